"""Datasets in COCO's JSON format: loading and registering; writing is in `_coco_export`."""

import contextlib
import gc
import itertools
import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from d2kit.data.catalog import DatasetCatalog, MetadataCatalog
from d2kit.data.datasets._coco_export import convert_to_coco_dict, convert_to_coco_json
from d2kit.data.datasets._sem_seg import load_sem_seg
from d2kit.data.datasets._validate import (
    CocoTables,
    Problems,
    check_coco,
    path_problem,
    read_json,
)
from d2kit.structures import BoxMode
from d2kit.utils.file_io import PathManager

__all__ = [
    "convert_to_coco_dict",
    "convert_to_coco_json",
    "load_coco_json",
    "load_sem_seg",
    "register_coco_instances",
    "register_dataset",
]

logger = logging.getLogger(__name__)

Record = dict[str, Any]

KEPT_KEYS = ("iscrowd", "bbox", "keypoints", "category_id")


def load_coco_json(
    json_file: str | os.PathLike[str],
    image_root: str | os.PathLike[str],
    dataset_name: str | None = None,
    extra_annotation_keys: Sequence[str] | None = None,
    *,
    strict: bool = True,
) -> list[Record]:
    """Load a JSON file of COCO's instance format; polygons and run-length masks may be mixed.

    Args:
        json_file: the annotations.
        image_root: folder that the `file_name`s are relative to.
        dataset_name: sets `thing_classes` and `thing_dataset_id_to_contiguous_id` of this dataset's
            metadata, and maps category ids to 0, 1, ... in the order of the ids. None leaves the
            ids as they are.
        extra_annotation_keys: further keys of annotations to keep.
        strict: False logs defective annotations and leaves them out, instead of raising.

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
    with _no_collection():
        data = read_json(PathManager.get_local_path(shown), shown)
        problems, unusual = Problems(shown), Problems(shown)
        defects = problems if strict else Problems(shown)
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


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Pause the garbage collector, which would walk millions of new objects again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


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


def _name_classes(tables: CocoTables, dataset_name: str) -> dict[int, int]:
    """Set the class names of a dataset; return category id -> contiguous index."""
    ids = sorted(tables.categories)
    metadata = MetadataCatalog.get(dataset_name)
    metadata.thing_classes = [tables.categories[i]["name"] for i in ids]
    id_map = {category_id: index for index, category_id in enumerate(ids)}
    metadata.thing_dataset_id_to_contiguous_id = id_map
    if ids != list(range(1, len(ids) + 1)) and "coco" not in dataset_name:
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
    if points:
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

        return mask_util.frPyObjects(mask, *mask["size"])
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
