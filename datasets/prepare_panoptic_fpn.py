#!/usr/bin/env python3
"""Make the label images of COCO's stuff from the panoptic annotations.

``prepare_panoptic_fpn.py [SPLIT ...]`` reads coco/annotations/panoptic_SPLIT.json and
coco/panoptic_SPLIT/*.png below the folder of the public datasets, and writes
coco/panoptic_stuff_SPLIT/*.png: 0 is all things together, 1 to 53 are stuff, 255 is neither.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from d2kit.data.catalog import _get_builtin_metadata
from d2kit.data.datasets import dataset_root
from d2kit.data.datasets.coco_panoptic import write_stuff_labels
from d2kit.engine import user_errors


def main() -> None:
    """Prepare the splits and print what was written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("splits", nargs="*", default=["val2017", "train2017"], metavar="SPLIT")
    args = parser.parse_args()
    metadata = _get_builtin_metadata("coco_panoptic_separated")
    coco = os.path.join(dataset_root(), "coco")
    with user_errors():
        for split in args.splits:
            output = os.path.join(coco, f"panoptic_stuff_{split}")
            count = write_stuff_labels(
                os.path.join(coco, "annotations", f"panoptic_{split}.json"),
                os.path.join(coco, f"panoptic_{split}"),
                output,
                metadata["stuff_dataset_id_to_contiguous_id"],
                list(metadata["thing_dataset_id_to_contiguous_id"]),
            )
            print(f"{output}: {count} label images")


if __name__ == "__main__":
    main()
