"""Any registered dataset as COCO JSON."""

import datetime
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from d2kit.data.catalog import DatasetCatalog, MetadataCatalog
from d2kit.structures import BoxMode
from d2kit.structures.masks import polygon_area
from d2kit.utils.file_io import atomic_write

__all__ = ["convert_to_coco_dict", "convert_to_coco_json"]

logger = logging.getLogger(__name__)

ROTATED = 5


def convert_to_coco_dict(dataset_name: str) -> dict[str, Any]:
    """Return a registered dataset in COCO's format.

    Args:
        dataset_name: a dataset in the standard format whose metadata has `thing_classes`.

    Returns:
        Dictionary with `info`, `images`, `categories`, `annotations`, `licenses`, ready for JSON.
        Boxes are XYWH, rotated ones stay XYWHA (five numbers).
        Category ids are those of the original data where the metadata map them.

    Raises:
        KeyError: unknown dataset.
        ValueError: an annotation has no box, or a segmentation that is none.
    """
    records = DatasetCatalog.get(dataset_name)
    metadata = MetadataCatalog.get(dataset_name)
    to_contiguous = metadata.get("thing_dataset_id_to_contiguous_id") or {}
    original = {index: category_id for category_id, index in to_contiguous.items()}
    categories = [
        {"id": original.get(index, index), "name": name}
        for index, name in enumerate(metadata.thing_classes)
    ]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, record in enumerate(records):
        image_id = record.get("image_id", number)
        images.append(
            {
                "id": image_id,
                "width": int(record["width"]),
                "height": int(record["height"]),
                "file_name": str(record["file_name"]),
            }
        )
        for annotation in record.get("annotations", ()):
            entry = _annotation_entry(annotation, f"dataset '{dataset_name}', image {image_id}")
            entry["id"] = len(annotations) + 1
            entry["image_id"] = image_id
            entry["category_id"] = original.get(entry["category_id"], entry["category_id"])
            annotations.append(entry)
    logger.info("Converted %d images, %d annotations", len(images), len(annotations))
    return {
        "info": {
            "date_created": datetime.datetime.now().isoformat(timespec="seconds"),
            "description": f"Dataset '{dataset_name}', converted by d2kit.",
        },
        "images": images,
        "categories": categories,
        "annotations": annotations,
        "licenses": [],
    }


def _annotation_entry(annotation: dict[str, Any], where: str) -> dict[str, Any]:
    """Return an annotation as COCO has it, without its ids."""
    if annotation.get("bbox") is None:
        raise ValueError(f"{where}: an annotation has no 'bbox'")
    given = np.asarray(annotation["bbox"], dtype=np.float64).reshape(-1).tolist()
    rotated = len(given) == ROTATED
    mode = BoxMode.XYWHA_ABS if rotated else annotation.get("bbox_mode", BoxMode.XYWH_ABS)
    kept = BoxMode.XYWHA_ABS if rotated else BoxMode.XYWH_ABS
    box = [round(float(x), 3) for x in BoxMode.convert(given, mode, kept)]
    area = box[2] * box[3]
    entry: dict[str, Any] = {
        "iscrowd": int(annotation.get("iscrowd", 0)),
        "category_id": int(annotation["category_id"]),
        "bbox": box,
    }
    if annotation.get("segmentation") is not None and len(annotation["segmentation"]):
        entry["segmentation"], area = _mask_entry(annotation["segmentation"], where)
    entry["area"] = float(area)
    if annotation.get("keypoints") is not None:
        points = np.asarray(annotation["keypoints"], dtype=np.float64).reshape(-1, 3)
        entry["num_keypoints"] = int((points[:, 2] > 0).sum())
        # Back from continuous coordinates to pixel indices, see `load_coco_json`.
        entry["keypoints"] = (points - [0.5, 0.5, 0.0]).round(3).reshape(-1).tolist()
    return entry


def _mask_entry(mask: Any, where: str) -> tuple[Any, float]:
    """Return a segmentation for JSON, and its area in pixels."""
    if isinstance(mask, np.ndarray) and mask.ndim == 2:
        from pycocotools import mask as mask_util

        mask = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    if isinstance(mask, dict):
        counts = mask["counts"]
        size = [int(side) for side in mask["size"]]
        if isinstance(counts, list):
            return {"size": size, "counts": counts}, float(sum(counts[1::2]))
        from pycocotools import mask as mask_util

        text = counts.decode("ascii") if isinstance(counts, bytes) else counts
        return {"size": size, "counts": text}, float(mask_util.area(mask))
    if isinstance(mask, (list, tuple)):
        polygons = [np.asarray(polygon, dtype=np.float64).reshape(-1) for polygon in mask]
        return [p.tolist() for p in polygons], sum(polygon_area(p[0::2], p[1::2]) for p in polygons)
    raise ValueError(
        f"{where}: a segmentation is a list of polygons, a run-length mask or an array (H, W), "
        f"got {type(mask).__name__}"
    )


def convert_to_coco_json(
    dataset_name: str, output_file: str | os.PathLike[str], allow_cached: bool = True
) -> None:
    """Write a registered dataset as a COCO JSON file.

    Args:
        dataset_name: see `convert_to_coco_dict`.
        output_file: appears only when it is complete; its folder is made.
        allow_cached: keep an existing file as it is. It is not compared with the dataset: delete it
            where the dataset has changed.

    Raises:
        KeyError: unknown dataset.
        OSError: the file cannot be written.
    """
    path = Path(output_file)
    if allow_cached and path.exists():
        logger.warning(
            "Using the existing COCO file %s; delete it if dataset '%s' has changed since",
            path,
            dataset_name,
        )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    content = convert_to_coco_dict(dataset_name)
    with atomic_write(path, "w") as file:
        json.dump(content, file)
    logger.info("Wrote dataset '%s' to %s", dataset_name, path)
