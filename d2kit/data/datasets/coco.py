"""Datasets in COCO's JSON format: loading and registering; writing is in `_coco_export`."""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import logging
import operator
import os
from collections import defaultdict
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from d2kit.data.catalog import DatasetCatalog, Metadata, MetadataCatalog
from d2kit.data.datasets.validate import (
    CocoTables,
    Problems,
    check_coco,
    path_problem,
    read_json,
    short,
)
from d2kit.structures import BoxMode
from d2kit.structures.masks import polygon_area
from d2kit.utils.env import paused_gc
from d2kit.utils.file_io import PathManager, atomic_write

__all__ = [
    "convert_to_coco_dict",
    "convert_to_coco_json",
    "load_coco_json",
    "load_sem_seg",
    "prefer_class_order",
    "register_coco_instances",
    "register_dataset",
]


def load_sem_seg(
    gt_root: str, image_root: str, gt_ext: str = "png", image_ext: str = "jpg"
) -> list[dict[str, Any]]:
    """Pair the images of one folder tree with the label images of another.

    Args:
        gt_root: folder of label images, whose pixel values are class indices.
        image_root: folder of images.
        gt_ext: extension of the label images.
        image_ext: extension of the images.

    Returns:
        Records with `file_name` and `sem_seg_file_name`, sorted by name. Files whose relative path
        without extension occurs on one side only are left out, with a warning.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: no file is in both folders.
    """
    images = _files(image_root, image_ext)
    labels = _files(gt_root, gt_ext)
    both = sorted(images.keys() & labels.keys())
    if not both:
        raise ValueError(
            f"no '*.{image_ext}' of {image_root} has a '*.{gt_ext}' of the same name in {gt_root} "
            f"({len(images)} images, {len(labels)} label images)"
        )
    left_out = len(images) + len(labels) - 2 * len(both)
    logger = logging.getLogger(__name__)
    if left_out:
        logger.warning(
            "%s and %s: left out %d files without a partner", image_root, gt_root, left_out
        )
    logger.info("Loaded %d images with semantic labels from %s", len(both), image_root)
    return [{"file_name": images[key], "sem_seg_file_name": labels[key]} for key in both]


def _files(root: str, extension: str) -> dict[str, str]:
    """Return relative path without extension -> path, for the files below `root`."""
    if not os.path.isdir(root):
        raise FileNotFoundError(f"folder '{root}' does not exist")
    suffix = "." + extension.lstrip(".")
    found = {}
    for folder, _, names in os.walk(root, followlinks=True):
        for name in names:
            if name.endswith(suffix):
                path = os.path.join(folder, name)
                found[os.path.relpath(path, root).removesuffix(suffix)] = path
    return found


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
        image_id = plain_id(record.get("image_id", number))
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
            "digest": _digest(images, annotations, categories),
        },
        "images": images,
        "categories": categories,
        "annotations": annotations,
        "licenses": [],
    }


def plain_id(value: Any) -> Any:
    """Return an id of numpy's or torch's integers as Python's, and any other as it is."""
    try:
        return operator.index(value)
    except TypeError:
        return value


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


def _mask_entry(mask: object, where: str) -> tuple[Any, float]:
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
        allow_cached: keep an existing file that has the dataset's present content (its digest is in
            ``info``), or that d2kit did not write; another one of d2kit's is written anew.

    Raises:
        KeyError: unknown dataset.
        OSError: the file cannot be written.
    """
    path = Path(output_file)
    if allow_cached and path.exists():
        info = _info_of(path)
        if info is None:
            logger.warning(
                "Using the existing COCO file %s, which d2kit did not write; delete it if dataset "
                "'%s' has changed since",
                path,
                dataset_name,
            )
            return
        content = convert_to_coco_dict(dataset_name)
        if info.get("digest") == content["info"]["digest"]:
            logger.info("Using the COCO file %s: dataset '%s' is as it was", path, dataset_name)
            return
        logger.warning(
            "Writing %s anew: dataset '%s' has changed since it was converted", path, dataset_name
        )
    else:
        content = convert_to_coco_dict(dataset_name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "w") as file:
        json.dump(content, file)
    logger.info("Wrote dataset '%s' to %s", dataset_name, path)


def _info_of(path: Path) -> dict[str, Any] | None:
    """Return "info" of a COCO file that a dataset was converted to; None for one of others."""
    try:
        info = json.loads(path.read_text(encoding="utf-8"))["info"]
        ours = "converted by d2kit" in info["description"] or "Detectron2" in info["description"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return info if ours else None


def _digest(*parts: object) -> str:
    """Return a digest of JSON content."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


Record = dict[str, Any]

KEPT_KEYS = ("iscrowd", "bbox", "keypoints", "category_id")


_strict = ContextVar("strict", default=True)


def set_strict_annotations(strict: bool) -> None:
    """Choose what `load_coco_json` does with defects where its caller does not say.

    Args:
        strict: the value of DATASETS.STRICT_ANNOTATIONS; the loaders of a config pass it on.
    """
    _strict.set(strict)


def load_coco_json(
    json_file: str | os.PathLike[str],
    image_root: str | os.PathLike[str],
    dataset_name: str | None = None,
    extra_annotation_keys: Sequence[str] | None = None,
    *,
    strict: bool | None = None,
) -> list[Record]:
    """Load a JSON file of COCO's instance format; polygons and run-length masks may be mixed.

    Args:
        json_file: the annotations.
        image_root: folder that the `file_name`s are relative to.
        dataset_name: sets `thing_classes` and `thing_dataset_id_to_contiguous_id` of this dataset's
            metadata, and maps category ids to 0, 1, ... in the order of the ids. None leaves the
            ids as they are.
        extra_annotation_keys: further keys of annotations to keep.
        strict: False logs and counts defects and leaves them out, instead of raising: polygons
            without three points, then annotations that have no polygon left or another defect. None
            is what DATASETS.STRICT_ANNOTATIONS said last, True by default.

    Returns:
        One record per image, by image id: `file_name`, `height`, `width`, `image_id` and
        `annotations` with `bbox` (XYWH_ABS; XYWHA_ABS where the file has five numbers: centre,
        size, degrees), `bbox_mode`, `category_id`, and where present
        `iscrowd`, `segmentation` (list of polygons, or compressed run-length mask) and `keypoints`
        (continuous: the pixel index plus 0.5).

    Raises:
        FileNotFoundError: there is no such file.
        DatasetError: not JSON, or defects, one line each with file, annotation and field.
    """
    shown = os.fspath(json_file)
    strict = _strict.get() if strict is None else strict
    with paused_gc():
        data = read_json(PathManager.get_local_path(shown), shown)
        problems, unusual = Problems(shown), Problems(shown)
        defects = problems if strict else Problems(shown)
        if not strict:
            _leave_out_polygons(data, shown)
        tables = check_coco(data, problems, defects, unusual)
        del data
        paths = image_paths(tables, os.fspath(image_root), problems)
        problems.raise_if_any()
        if not strict:
            defects.warn_if_any("annotations left out because of defects")
        unusual.warn_if_any("boxes that reach beyond their image")
        id_map = None if dataset_name is None else _name_classes(tables, dataset_name)
        keys = [*KEPT_KEYS, *(extra_annotation_keys or ())]
        records = make_records(tables, paths, id_map, keys)
    logger.info("Loaded %d images in COCO format from %s", len(records), shown)
    return records


def _leave_out_polygons(data: dict[str, Any], shown: str) -> None:
    """Take polygons without three points out of annotations, and annotations with no other."""
    given = data.get("annotations")
    annotations: list[Any] = given if isinstance(given, list) else []
    kept, polygons = [], 0
    for annotation in annotations:
        parts = annotation.get("segmentation") if isinstance(annotation, dict) else None
        if isinstance(parts, list) and parts:
            whole = [p for p in parts if not (isinstance(p, list) and (len(p) < 6 or len(p) % 2))]
            polygons += len(parts) - len(whole)
            if not whole:
                continue
            annotation["segmentation"] = whole
        kept.append(annotation)
    if polygons:
        logger.warning(
            "%s: left out %d polygons without three points, and %d annotations that have no other",
            shown,
            polygons,
            len(annotations) - len(kept),
        )
        data["annotations"] = kept


def image_paths(tables: CocoTables, root: str, problems: Problems) -> dict[int, str]:
    """Return the path of each image; one that leaves the image folder is a problem."""
    paths = {}
    for image_id, image in tables.images.items():
        name = image.get("file_name")
        if not isinstance(name, str) or not name:
            continue  # reported by the check
        paths[image_id] = os.path.join(root, name)
        what = path_problem(name, root)
        if what:
            problems.add(f"image {image_id}", "file_name", what)
    return paths


_CLASS_ORDERS: dict[str, tuple[Metadata, list[str]]] = {}
# with the metadata they were given for: a dataset registered anew under a name has others


def prefer_class_order(dataset_name: str, names: Sequence[str]) -> None:
    """Let a COCO dataset that is loaded later have its classes in another order, by name.

    Nothing happens where its names are others than these or not unique.

    Args:
        dataset_name: a registered dataset.
        names: of the model's classes, in its order.
    """
    order = [str(name) for name in names]
    _CLASS_ORDERS[dataset_name] = (MetadataCatalog.get(dataset_name), order)


def _name_classes(tables: CocoTables, dataset_name: str) -> dict[int, int]:
    """Set the class names of a dataset; return category id -> contiguous index."""
    ids = sorted(tables.categories)
    metadata = MetadataCatalog.get(dataset_name)
    # once named, a dataset keeps its order: records may be in use
    known, order = _CLASS_ORDERS.get(dataset_name, (None, []))
    wanted = metadata.get("thing_classes") or (order if known is metadata else [])
    names = [tables.categories[i]["name"] for i in ids]
    same = sorted(names) == sorted(map(str, wanted)) and len(set(names)) == len(names)
    if same and names != list(wanted):
        place = {name: index for index, name in enumerate(wanted)}
        ids = sorted(ids, key=lambda i: place[tables.categories[i]["name"]])
        logger.info(
            "Classes of '%s' are in another order (%s) and are mapped by name to %s",
            *(dataset_name, short(names), short(list(wanted))),
        )
    metadata.thing_classes = [tables.categories[i]["name"] for i in ids]
    if metadata.get("keypoint_names") is None:
        named = [c["keypoints"] for c in tables.categories.values() if c.get("keypoints")]
        if named and all(points == named[0] for points in named):
            metadata.keypoint_names = list(named[0])
    id_map = {category_id: index for index, category_id in enumerate(ids)}
    metadata.thing_dataset_id_to_contiguous_id = id_map
    if sorted(ids) != list(range(1, len(ids) + 1)) and "coco" not in dataset_name:
        logger.warning(
            "Category ids of '%s' are not 1..%d; they are mapped to 0..%d in their order.",
            dataset_name,
            len(ids),
            len(ids) - 1,
        )
    return id_map


def make_records(
    tables: CocoTables, paths: dict[int, str], id_map: dict[int, int] | None, keys: list[str]
) -> list[Record]:
    """Return the records of all images, by image id."""
    annotations_of: dict[int, list[Record]] = defaultdict(list)
    for annotation in tables.annotations:
        annotations_of[annotation["image_id"]].append(_convert(annotation, id_map, keys))
    return [
        {
            "file_name": paths[image_id],
            "height": tables.images[image_id]["height"],
            "width": tables.images[image_id]["width"],
            "image_id": image_id,
            "annotations": annotations_of.get(image_id, []),
        }
        for image_id in sorted(tables.images)
    ]


def _convert(annotation: Record, id_map: dict[int, int] | None, keys: list[str]) -> Record:
    """Return an annotation in the standard format."""
    out = {key: annotation[key] for key in keys if key in annotation}
    masks = annotation.get("segmentation")
    if masks:
        out["segmentation"] = _compressed(masks) if isinstance(masks, dict) else masks
    points = annotation.get("keypoints")
    if points is None:
        out.pop("keypoints", None)
    elif points:
        # COCO's are pixel indices; 0.5 leads to the centre of the pixel in continuous coordinates.
        shift = itertools.cycle((0.5, 0.5, 0))
        out["keypoints"] = [p + s for p, s in zip(points, shift, strict=False)]
    out["bbox_mode"] = BoxMode.XYWHA_ABS if len(out["bbox"]) == 5 else BoxMode.XYWH_ABS
    if id_map is not None:
        out["category_id"] = id_map[annotation["category_id"]]
    return out


def _compressed(mask: Record) -> Record:
    """Return a run-length mask whose counts are compressed; the mask was checked before."""
    if isinstance(mask["counts"], list):
        from pycocotools import mask as mask_util

        found: Record = mask_util.frPyObjects(mask, *mask["size"])
        return found
    return mask


@dataclass(frozen=True)
class CocoInstances:
    """Loads a registered COCO dataset; equal ones are the same definition."""

    name: str
    json_file: str
    image_root: str
    metadata: dict[str, Any] = field(hash=False)

    def __call__(self) -> list[Record]:
        return load_coco_json(self.json_file, self.image_root, self.name)


def register_coco_instances(
    name: str,
    metadata: dict[str, Any],
    json_file: str | os.PathLike[str],
    image_root: str | os.PathLike[str],
) -> None:
    """Register a dataset in COCO's instance or keypoint format; nothing is read yet.

    Args:
        name: by which configs name the dataset.
        metadata: further metadata, for example `thing_colors`; may be empty.
        json_file: the annotations.
        image_root: folder of the images.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: the name is taken by another dataset. The same call twice is no error.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"register_coco_instances expects a name, got {name!r}")
    if not isinstance(metadata, dict):
        raise TypeError(f"'{name}': metadata must be a dictionary, got {type(metadata).__name__}")
    paths = []
    for what, path in (("json_file", json_file), ("image_root", image_root)):
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"'{name}': {what} must be a path, got {type(path).__name__}")
        paths.append(os.fspath(path))
    definition = CocoInstances(name, paths[0], paths[1], dict(metadata))
    is_new = name not in DatasetCatalog or DatasetCatalog[name] != definition
    if is_new:
        DatasetCatalog.register(name, definition)
    try:
        MetadataCatalog.get(name).set(
            json_file=paths[0], image_root=paths[1], evaluator_type="coco", **metadata
        )
    except ValueError:
        if is_new:
            DatasetCatalog.remove(name)
        raise


def register_dataset(
    name: str, json: str | os.PathLike[str], images: str | os.PathLike[str]
) -> None:
    """Register a dataset of your own: a COCO JSON file and a folder of images.

    Args:
        name: by which configs name the dataset.
        json: the annotations, in COCO's instance format.
        images: folder of the images.

    Raises:
        ValueError: the name is taken by another dataset.
    """
    register_coco_instances(name, {}, json, images)
