#!/usr/bin/env python3
"""Turn the Penn-Fudan pedestrian database into COCO JSON: ``prepare_pennfudan.py [--zip FILE]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from d2kit.engine import user_errors
from project import pennfudan
from project.datasets_root import datasets_root


def main() -> None:
    """Prepare the dataset and print what was written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--zip", type=Path, help="PennFudanPed.zip; downloaded where not given")
    parser.add_argument("--output", type=Path, help="default: $D2KIT_DATASETS or datasets/data")
    parser.add_argument("--seed", type=int, default=1, help="seed of the random split (default 1)")
    args = parser.parse_args()
    root = datasets_root(args.output) / "pennfudan"
    with user_errors():
        archive = args.zip or pennfudan.download(root)
        counts = pennfudan.prepare(archive, root, args.seed)
    for file_name, count in counts.items():
        print(f"{root / file_name}: {count} images")


if __name__ == "__main__":
    main()
