"""Command line: ``python -m d2kit.as_detectron2 script.py ARGS`` and ``--scan PATH``."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path


def main(arguments: list[str]) -> int:
    """Run a script with detectron2 served by d2kit, or scan code; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m d2kit.as_detectron2",
        description="Run a script written for Detectron2 on d2kit, or see what of it is supported.",
    )
    parser.add_argument("--scan", metavar="PATH", type=Path, nargs="+", help="files or folders")
    parser.add_argument("--json", action="store_true", help="print the scan's findings as JSON")
    parser.add_argument("-m", dest="module", action="store_true", help="SCRIPT is a module's name")
    parser.add_argument("script", nargs="?", help="the script; what follows it is passed on to it")
    parser.add_argument("args", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    if options.scan:
        from d2kit.as_detectron2.scan import as_json, report, scan

        missing_paths = [path for path in options.scan if not path.exists()]
        if missing_paths:
            parser.error(f"{missing_paths[0]}: no such file or folder")
        found = scan(options.scan)
        print(as_json(found) if options.json else report(found))
        return int(any(not use.supported for use in found))
    if options.script is None:
        parser.error("give a script, or --scan PATH")
    sys.argv = [options.script, *options.args]
    if options.module:
        sys.path.insert(0, "")
        runpy.run_module(options.script, run_name="__main__", alter_sys=True)
    else:
        if not Path(options.script).is_file():
            parser.error(f"{options.script}: no such file")
        sys.path.insert(0, str(Path(options.script).resolve().parent))
        runpy.run_path(options.script, run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
