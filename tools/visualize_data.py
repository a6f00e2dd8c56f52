#!/usr/bin/env python3
"""Draw what the model is fed: images and annotations after augmentation, or as they are on disk.

visualize_data.py --config-file configs/X.yaml --source dataloader --output-dir output/look
visualize_data.py --json train.json --images photos --html look.html    (no config needed)

--html writes one page with thumbnails and class counts, complete in itself.
"""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

import project
from d2kit.config import CfgNode, get_cfg
from d2kit.data import (
    DatasetCatalog,
    MetadataCatalog,
    build_detection_train_loader,
    detection_utils,
    register_dataset,
    register_datasets,
)
from d2kit.engine import user_errors
from d2kit.utils.file_io import atomic_write
from d2kit.visualization import Visualizer
from d2kit.visualization.page import make_page


def from_loader(cfg: CfgNode, scale: float) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, RGB picture) of the training stream, as the model sees it."""
    metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
    position = itertools.count()
    for batch in build_detection_train_loader(cfg):
        for sample in batch:
            image = sample["image"].permute(1, 2, 0).numpy()
            image = detection_utils.convert_image_to_rgb(image, cfg.INPUT.FORMAT)
            instances = sample["instances"]
            fields = instances.get_fields()
            classes = [metadata.thing_classes[i] for i in instances.gt_classes]
            picture = Visualizer(image, metadata, scale=scale).overlay_instances(
                boxes=instances.gt_boxes,
                labels=classes,
                masks=fields.get("gt_masks"),
                keypoints=fields.get("gt_keypoints"),
            )
            yield f"{next(position):05d}_{Path(sample['file_name']).stem}", picture.get_image()


def from_dataset(cfg: CfgNode, scale: float) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, RGB picture) of the training sets as they lie on disk."""
    for name in cfg.DATASETS.TRAIN:
        metadata = MetadataCatalog.get(name)
        for record in DatasetCatalog.get(name):
            image = detection_utils.read_image(record["file_name"], "RGB")
            picture = Visualizer(image, metadata, scale=scale).draw_dataset_dict(record)
            yield f"{name}_{record['image_id']}", picture.get_image()


def read_config(args: argparse.Namespace) -> CfgNode:
    """Return the config, or one whose training set is the file of ``--json``."""
    cfg = get_cfg()
    cfg.merge_from_list(["DATALOADER.NUM_WORKERS", 0])
    if args.json:
        name = str(args.json)
        register_dataset(name, args.json, args.images)
        cfg.merge_from_list(["DATASETS.TRAIN", (name,)])
        args.source = "annotation"
    else:
        project.register_all()
        cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    register_datasets(cfg.DATASETS.REGISTER_COCO)
    return cfg


def count_classes(cfg: CfgNode) -> list[tuple[str, int, int]]:
    """Return (class, instances, images with it) of the training sets, crowds left out."""
    instances: Counter[str] = Counter()
    images: Counter[str] = Counter()
    for name in cfg.DATASETS.TRAIN:
        records = DatasetCatalog.get(name)
        names = MetadataCatalog.get(name).thing_classes
        instances.update(dict.fromkeys(names, 0))
        for record in records:
            found = [
                names[a["category_id"]] for a in record["annotations"] if not a.get("iscrowd", 0)
            ]
            instances.update(found)
            images.update(set(found))
    return [(name, count, images[name]) for name, count in instances.most_common()]


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file")
    parser.add_argument("--json", type=Path, help="COCO annotations, instead of a config")
    parser.add_argument("--images", type=Path, help="image folder of --json")
    parser.add_argument("--html", type=Path, help="write one page instead of pictures")
    parser.add_argument("--source", choices=("dataloader", "annotation"), default="dataloader")
    parser.add_argument("--output-dir", type=Path, default=Path("output/visualize_data"))
    parser.add_argument("--count", type=int, default=20, help="number of pictures (default 20)")
    parser.add_argument("--scale", type=float, default=2.0, help="enlargement (default 2)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs")
    args = parser.parse_args()
    if (args.config_file is None) == (args.json is None) or (args.json and not args.images):
        parser.error("give either --config-file, or --json and --images")
    with user_errors():
        cfg = read_config(args)
        source = from_loader if args.source == "dataloader" else from_dataset
        if args.html:
            pictures = itertools.islice(source(cfg, args.scale), args.count)
            counts = count_classes(cfg)
            page = make_page(tqdm(pictures, total=args.count, desc="drawing"), counts)
            with atomic_write(args.html, "w") as file:
                file.write(page)
            print(f"page in {args.html}")
            return
        args.output_dir.mkdir(parents=True, exist_ok=True)
        pictures = itertools.islice(source(cfg, args.scale), args.count)
        for name, rgb in tqdm(pictures, total=args.count, desc="drawing"):
            cv2.imwrite(str(args.output_dir / f"{name}.jpg"), rgb[..., ::-1])
    print(f"pictures in {args.output_dir}")


if __name__ == "__main__":
    main()
