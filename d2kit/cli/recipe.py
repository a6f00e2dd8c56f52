"""Print the recipe that `d2kit train --data` would use, with its reasons; nothing is trained."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tabulate import tabulate

from d2kit.cli.train import add_data_arguments, plan
from d2kit.engine import user_errors

__all__ = ["main", "parser"]


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``d2kit recipe``."""
    found = argparse.ArgumentParser(prog="d2kit recipe", description=__doc__)
    add_data_arguments(found)
    return found


def main(argv: list[str] | None = None) -> None:
    """Run the verb."""
    args = vars(parser().parse_args(argv))
    output = args.pop("output")
    with user_errors(), tempfile.TemporaryDirectory() as folder:
        made = plan(output=Path(output or folder), **args)
        for line in made.data.report:
            print(line)
        print(tabulate(made.choices, ["key", "value", "reason"], maxcolwidths=[None, 28, 60]))
