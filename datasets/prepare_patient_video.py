#!/usr/bin/env python3
"""Generate the synthetic ward: frames, MP4 videos, COCO JSON and per-frame ground truth."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from project import patient_video
from project.datasets_root import datasets_root


def main() -> None:
    """Generate the dataset, unless it is already there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="default: $D2KIT_DATASETS or datasets/data")
    for field in dataclasses.fields(patient_video.WardSpec):
        flag = "--" + field.name.replace("_", "-")
        kind = type(field.default)
        parser.add_argument(flag, type=kind, default=field.default, help=f"default {field.default}")
    args = vars(parser.parse_args())
    root = datasets_root(args.pop("output")) / "patient_video"
    made = patient_video.generate(root, patient_video.WardSpec(**args))
    print(f"{'generated' if made else 'already there'}: {root}")


if __name__ == "__main__":
    main()
