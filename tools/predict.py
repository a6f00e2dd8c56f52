#!/usr/bin/env python3
r"""Run a model on images or folders: overlay pictures and COCO JSON.

predict.py --config-file output/run/config.yaml --input a.jpg folder/ --output output/predictions \
           [--confidence-threshold 0.5] [--tile 800] MODEL.WEIGHTS output/run/model_final.pth
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import cv2
from tabulate import tabulate
from tqdm import tqdm

import project
from d2kit.config import get_cfg
from d2kit.data.detection_utils import read_image
from d2kit.engine import user_errors
from d2kit.evaluation.coco_evaluation import instances_to_coco_json
from d2kit.predict.predictor import Predictor, find_images
from d2kit.utils.file_io import atomic_write
from d2kit.visualization import Visualizer

KEY = re.compile(r"[A-Z0-9_]+(\.[A-Z0-9_]+)+")


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--input", nargs="+", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("output/predictions"))
    parser.add_argument("--confidence-threshold", type=float, default=0.5)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--tile", type=int, help="side in pixels of tiles, for large images")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs")
    args = parser.parse_args()
    # argparse takes all words behind --input for images, also the KEY VALUE pairs
    is_key = [bool(KEY.fullmatch(str(path))) and not path.exists() for path in args.input]
    first = is_key.index(True) if True in is_key else len(is_key)
    args.opts = [*map(str, args.input[first:]), *args.opts]
    args.input = args.input[:first]
    return args


def annotation(found: dict[str, Any], annotation_id: int) -> dict[str, Any]:
    """Complete a result of COCO's result format to an annotation; category ids count from 1."""
    from pycocotools import mask as mask_util

    area = found["bbox"][2] * found["bbox"][3]
    if "segmentation" in found:
        area = int(mask_util.area(found["segmentation"]))
    ids = {"id": annotation_id, "category_id": found["category_id"] + 1}
    return {**found, **ids, "area": area, "iscrowd": 0}


def main(args: argparse.Namespace) -> None:
    """Predict every image; write ``overlays/*.jpg`` and ``predictions.json``."""
    project.register_all()
    cfg = get_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(
        ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", args.confidence_threshold, *args.opts]
    )
    files = find_images(args.input)
    predictor = Predictor(cfg, batch_size=args.batch_size, tile=args.tile)
    names = predictor.class_names
    overlays = args.output / "overlays"
    overlays.mkdir(parents=True, exist_ok=True)
    images, annotations, rows = [], [], []
    stream = tqdm(predictor.stream(files), desc="predicting", unit="image", total=len(files))
    for image_id, (file, instances) in enumerate(stream, start=1):
        rgb = read_image(str(file), "RGB")
        picture = Visualizer(rgb, predictor.metadata).draw_instance_predictions(instances)
        picture.save(str(overlays / f"{image_id:05d}_{file.stem}.jpg"))
        size = {"height": rgb.shape[0], "width": rgb.shape[1]}
        images.append({"id": image_id, "file_name": str(file), **size})
        found = instances_to_coco_json(instances, image_id)
        annotations += [annotation(a, len(annotations) + i) for i, a in enumerate(found, start=1)]
        counts = [names[a["category_id"]] for a in found]
        summary = ", ".join(f"{counts.count(n)} {n}" for n in dict.fromkeys(counts))
        rows.append([file.name, summary or "nothing", max((a["score"] for a in found), default=0)])
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
    result = {"images": images, "categories": categories, "annotations": annotations}
    with atomic_write(args.output / "predictions.json", "w") as f:
        json.dump(result, f)
    print(tabulate(rows[:40], ["image", "found", "best score"], floatfmt=".3f"))
    if len(rows) > 40:
        print(f"... and {len(rows) - 40} more images")
    print(f"\noverlays: {overlays}\nCOCO JSON: {args.output / 'predictions.json'}")


if __name__ == "__main__":
    cv2.setNumThreads(0)
    with user_errors():
        main(parse())
