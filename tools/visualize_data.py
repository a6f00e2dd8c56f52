#!/usr/bin/env python3
"""Draw what the model is fed: images and annotations after augmentation, or as they are on disk.

visualize_data.py --config-file configs/X.yaml --source dataloader --output-dir output/look
"""

from __future__ import annotations

import argparse
import itertools
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
)
from d2kit.engine import user_errors
from d2kit.visualization import Visualizer


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


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--source", choices=("dataloader", "annotation"), default="dataloader")
    parser.add_argument("--output-dir", type=Path, default=Path("output/visualize_data"))
    parser.add_argument("--count", type=int, default=20, help="number of pictures (default 20)")
    parser.add_argument("--scale", type=float, default=2.0, help="enlargement (default 2)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs")
    args = parser.parse_args()
    with user_errors():
        project.register_all()
        cfg = get_cfg()
        cfg.merge_from_file(args.config_file)
        cfg.merge_from_list(["DATALOADER.NUM_WORKERS", 0, *args.opts])
        source = from_loader if args.source == "dataloader" else from_dataset
        args.output_dir.mkdir(parents=True, exist_ok=True)
        pictures = itertools.islice(source(cfg, args.scale), args.count)
        for name, rgb in tqdm(pictures, total=args.count, desc="drawing"):
            cv2.imwrite(str(args.output_dir / f"{name}.jpg"), rgb[..., ::-1])
    print(f"pictures in {args.output_dir}")


if __name__ == "__main__":
    main()
