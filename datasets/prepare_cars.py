#!/usr/bin/env python3
"""Turn pictures of cars in folders (SPLIT/CLASS/PICTURE) into COCO JSON, or draw a small set.

prepare_cars.py ROOT             links ROOT, finds box and mask of each car by GrabCut
prepare_cars.py ROOT --frame     takes the full frame for the box (no GrabCut)
prepare_cars.py --synthetic      draws cars first: of each class 100 (--count), split 60 : 20 : 20

Splits: train, val (or valid, validation), test; classes: suv, sedan, minivan, convertible.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tabulate import tabulate
from tqdm import tqdm

from d2kit.engine import user_errors
from project import cars
from project.datasets_root import datasets_root


def main() -> None:
    """Prepare the dataset and print what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path, nargs="?", help="folder with train/, val/ and test/")
    parser.add_argument("--synthetic", action="store_true")
    parser.add_argument("--count", type=int, default=100, help="drawn cars of each class, >= 5")
    parser.add_argument("--frame", action="store_true", help="box = full frame")
    parser.add_argument("--output", type=Path, help="default: $D2KIT_DATASETS or datasets/data")
    parser.add_argument("--seed", type=int, default=0, help="of the synthetic set")
    args = parser.parse_args()
    if (args.root is None) != args.synthetic:
        parser.error("give either ROOT or --synthetic")
    folder = datasets_root(args.output) / "cars"
    images = folder / "images"
    with user_errors():
        if args.synthetic:
            cars.write_synthetic(images, args.seed, cars.split_counts(args.count))
        elif not args.root.is_dir():
            raise FileNotFoundError(f"{args.root}: no such folder")
        elif images.resolve() != args.root.resolve():
            folder.mkdir(parents=True, exist_ok=True)
            if images.exists():
                raise FileExistsError(f"{images} is there already; remove it to link {args.root}")
            images.symlink_to(args.root.resolve(), target_is_directory=True)
        with tqdm(desc="finding cars", unit="image") as bar:
            counts = cars.prepare(images, folder, grabcut=not args.frame, progress=bar.update)
    rows = [[split, *found.values()] for split, found in counts.items()]
    print(tabulate(rows, ["split", "images", "box by GrabCut", "box is the full frame"]))
    print(f"\n{cars.describe_set(counts, cars.read_sizes(folder))}\nwritten: {folder}")


if __name__ == "__main__":
    main()
