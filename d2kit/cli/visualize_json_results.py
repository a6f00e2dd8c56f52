"""Draw results of COCO's format beside the ground truth: predictions left, annotations right.

d2kit visualize-results --input output/run/inference/coco_instances_results.json \
                        --output output/look [--conf-threshold 0.5] \
                        (--dataset coco_2017_val | --config-file output/run/config.yaml)
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from d2kit.cli.visualize_data import tell_bad, write_pictures
from d2kit.config import get_cfg
from d2kit.data import DatasetCatalog, MetadataCatalog, register_datasets
from d2kit.data.detection_utils import read_image
from d2kit.engine import user_errors
from d2kit.evaluation.coco_evaluation import instances_from_coco_json
from d2kit.evaluation.coco_results import read_coco_results
from d2kit.evaluation.evaluator import stale_results
from d2kit.visualization import Visualizer


def read_results(path: Path, threshold: float) -> dict[Any, list[dict[str, Any]]]:
    """Return the results of each image whose score is at least `threshold`."""
    found: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for result in read_coco_results(path):
        if result.get("score", 1.0) >= threshold:
            found[result["image_id"]].append(result)
    return found


def pictures(
    dataset: str, found: dict[Any, list[dict[str, Any]]], scale: float, bad: list[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, RGB picture) of each image: predictions, and what is true.

    What cannot be read is appended to `bad`, one line each.
    """
    records = DatasetCatalog.get(dataset)
    metadata = MetadataCatalog.get(dataset)
    unknown = set(found) - {record["image_id"] for record in records}
    if unknown:
        raise ValueError(
            f"image {min(unknown, key=str)!r} of the results is not in dataset '{dataset}'"
        )
    for record in records:
        try:
            image = read_image(record["file_name"], "RGB")
        except (ValueError, OSError) as error:
            bad.append(str(error))
            continue
        results = found.get(record["image_id"], [])
        instances = instances_from_coco_json(
            results, image.shape[:2], metadata.get("thing_dataset_id_to_contiguous_id")
        )
        predicted = Visualizer(image, metadata, scale=scale).draw_instance_predictions(instances)
        true = Visualizer(image, metadata, scale=scale).draw_dataset_dict(record)
        both = np.concatenate([predicted.get_image(), true.get_image()], axis=1)
        yield f"{record['image_id']}_{Path(record['file_name']).stem}", both


def main(argv: list[str] | None = None, register: Callable[[], None] | None = None) -> None:
    """Write the pictures.

    Args:
        argv: the command line; None: that of the process.
        register: makes datasets known by name, e.g. those of a checkout.
    """
    parser = argparse.ArgumentParser(
        prog="d2kit visualize-results",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--input", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--dataset", help="default: the config's test set, else coco_2017_val")
    parser.add_argument("--config-file", help="registers datasets of your own, e.g. of the run")
    parser.add_argument("--output", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--conf-threshold", type=float, default=0.5, help="default 0.5")
    parser.add_argument("--count", type=int, help="number of pictures; default all")
    parser.add_argument("--scale", type=float, default=1.0, help="enlargement (default 1)")
    args = parser.parse_args(argv)
    with user_errors():
        if register is not None:
            register()
        dataset = args.dataset or "coco_2017_val"
        if args.config_file:
            cfg = get_cfg()
            cfg.merge_from_file(args.config_file)
            register_datasets(cfg.DATASETS.REGISTER_COCO)
            dataset = args.dataset or cfg.DATASETS.TEST[0]
        found = read_results(args.input, args.conf_threshold)
        truth = MetadataCatalog.get(dataset).get("json_file")
        stale = stale_results(args.input, truth) if truth else ""
        if stale:
            print(f"warning: {stale}", file=sys.stderr)
        bad: list[str] = []
        drawn = itertools.islice(pictures(dataset, found, args.scale, bad), args.count)
        write_pictures(args.output, tqdm(drawn, desc="drawing", unit="image"))
        print(f"pictures in {args.output}")
        tell_bad(bad)
