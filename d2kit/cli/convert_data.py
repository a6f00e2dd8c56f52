"""Convert annotations between COCO JSON, Pascal VOC, YOLO, labelme, CVAT and mask PNGs.

d2kit convert --from labelme --to coco INPUT OUTPUT [--images FOLDER]

INPUT and OUTPUT are a file for coco (.json) and cvat (.xml), else a folder; exports of VIA and
Label Studio, CSV and a folder per class are read only. Images stay where they are: their names are
relative to --images. What the target cannot hold is counted; docs/own_data.md has the layouts.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from d2kit.curate.conversion import READERS, WRITERS
from d2kit.engine import user_errors


def main(argv: list[str] | None = None) -> None:
    """Read, write, and tell what was lost."""
    parser = argparse.ArgumentParser(
        prog="d2kit convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--from", dest="source", choices=READERS, required=True)
    parser.add_argument("--to", dest="target", choices=WRITERS, required=True)
    parser.add_argument("--images", type=Path, help="image folder: names are relative to it")
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args(argv)
    with user_errors():
        if not args.input.exists():
            raise FileNotFoundError(f"'{args.input}' does not exist")
        if args.target != "coco" and args.output.is_file() and args.output.suffix != ".xml":
            raise ValueError(f"'{args.output}' is a file; {args.target} needs a folder")
        if args.target == "coco" and args.output.is_dir():
            raise ValueError(f"'{args.output}' is a folder; coco needs a .json file")
        same = args.output.exists() and args.output.resolve() == args.input.resolve()
        if same and args.source in ("coco", "cvat"):
            raise ValueError(f"'{args.output}' is the input itself; give another output")
        if args.images and not args.images.is_dir():
            raise FileNotFoundError(f"--images {args.images}: no such folder")
        lost: Counter[str] = Counter()
        coco = READERS[args.source](args.input, args.images, lost)
        lost += WRITERS[args.target](coco, args.output)
        counts = [f"{len(coco[k])} {k}" for k in ("images", "annotations", "categories")]
        print(f"{args.output}: {', '.join(counts)}")
        for what, count in sorted(lost.items()):
            print(f"not kept: {count} {what}")
