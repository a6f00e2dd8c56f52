#!/usr/bin/env python3
"""Make ADE20K's label images count from 0: ``prepare_ade20k_sem_seg.py``.

Reads ADEChallengeData2016/annotations/{training,validation} below the folder of the public
datasets, and writes annotations_detectron2/{training,validation}: 0 to 149, and 255 for no class.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from d2kit.data.datasets import dataset_root
from d2kit.data.datasets.coco_panoptic import write_ade20k_labels
from d2kit.engine import user_errors


def main() -> None:
    """Prepare both splits and print what was written."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    root = os.path.join(dataset_root(), "ADEChallengeData2016")
    with user_errors():
        for split in ("training", "validation"):
            output = os.path.join(root, "annotations_detectron2", split)
            count = write_ade20k_labels(os.path.join(root, "annotations", split), output)
            print(f"{output}: {count} label images")


if __name__ == "__main__":
    main()
