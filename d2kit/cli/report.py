"""``d2kit report``: the page of a run, or two runs compared."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["main", "parser"]


def parser() -> argparse.ArgumentParser:
    """Return the parser of the verb."""
    found = argparse.ArgumentParser(
        prog="d2kit report",
        description="Write the results page of a run (report.html and README.md in its folder), or "
        "compare two runs on the same test images by paired bootstrap.",
    )
    found.add_argument("run", type=Path, help="OUTPUT_DIR of a training, or folder of an export")
    found.add_argument("other", type=Path, nargs="?", help="of another, to be compared with it")
    found.add_argument("--output", type=Path, metavar="FILE.html", help="where the page goes")
    found.add_argument("--samples", type=int, default=1000, help="of the paired bootstrap")
    return found


def results_of(folder: Path) -> Path:
    """Return the folder with the results: of an export, what its evaluation wrote.

    Raises:
        FileNotFoundError: the export was not evaluated.
    """
    from d2kit.export.backends import EVALUATION, is_exported

    if not is_exported(folder):
        return folder
    if not (folder / EVALUATION).is_dir():
        raise FileNotFoundError(
            f"{folder} is an exported model without results: evaluate it first, d2kit train "
            f"--eval-only --config-file {folder}"
        )
    return folder / EVALUATION


def main(argv: list[str] | None = None) -> None:
    """Write the page or print the comparison."""
    args = parser().parse_args(argv)
    from d2kit.engine import user_errors
    from d2kit.evaluation.report import compare_runs, write_page, write_report

    with user_errors():
        run = results_of(args.run)
        if args.other is None:
            print(write_report(run, args.output))
            return
        found = compare_runs(run, results_of(args.other), samples=args.samples)
        print(found.text())
        if args.output:
            write_page(args.output, found.page())
            print(args.output)
