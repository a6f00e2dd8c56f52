"""COCO's panoptic format: loading and registering it, and label images made from it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from d2kit.data.catalog import DatasetCatalog, MetadataCatalog
from d2kit.data.datasets.coco import load_coco_json, load_sem_seg
from d2kit.data.datasets.validate import DatasetError, Problems, path_problem, read_json, short
from d2kit.data.detection_utils import read_image, read_label_map
from d2kit.utils.file_io import PathManager, atomic_write

__all__ = [
    "load_coco_panoptic_json",
    "merge_to_panoptic",
    "register_coco_panoptic",
    "register_coco_panoptic_separated",
    "write_ade20k_labels",
    "write_stuff_labels",
]


logger = logging.getLogger(__name__)

Record = dict[str, Any]

IGNORE_LABEL = 255


def load_coco_panoptic_json(
    json_file: str, image_dir: str, gt_dir: str, meta: dict[str, Any]
) -> list[Record]:
    """Load a JSON file of COCO's panoptic format.

    Args:
        json_file: the annotations.
        image_dir: folder of the images, ``<name>.jpg``.
        gt_dir: folder of the segment images, ``<name>.png``, whose colours are segment ids.
        meta: `thing_dataset_id_to_contiguous_id` and `stuff_dataset_id_to_contiguous_id`.

    Returns:
        One record per image: `file_name`, `image_id`, `pan_seg_file_name` and `segments_info` with
        `id`, contiguous `category_id`, `isthing`, and what else the file says.

    Raises:
        FileNotFoundError: there is no such file.
        DatasetError: not JSON, or defects, one line each with file, image and field.
    """
    data = read_json(PathManager.get_local_path(json_file), json_file)
    problems = Problems(json_file)
    annotations = data.get("annotations")
    if not isinstance(annotations, list):
        problems.add("top level", "annotations", f"expected a list, got {short(annotations)}")
    problems.raise_if_any()
    records = []
    seen: set[int] = set()
    for number, entry in enumerate(annotations or ()):
        if not isinstance(entry, dict):
            problems.add(f"annotation number {number}", "entry", f"got {short(entry)}")
            continue
        where = f"image {entry.get('image_id', f'number {number}')}"
        for key, what in _entry_problems(entry, gt_dir, seen):
            problems.add(where, key, what)
        name = os.path.splitext(str(entry.get("file_name")))[0]
        records.append(
            {
                "file_name": os.path.join(image_dir, f"{name}.jpg"),
                "image_id": entry.get("image_id"),
                "pan_seg_file_name": os.path.join(gt_dir, str(entry.get("file_name"))),
                "segments_info": _segments(entry.get("segments_info"), where, meta, problems),
            }
        )
    problems.raise_if_any()
    logger.info("Loaded %d images in COCO's panoptic format from %s", len(records), json_file)
    return records


def _entry_problems(entry: Record, gt_dir: str, seen: set[int]) -> list[tuple[str, str]]:
    """Return (field, what) for each defect of an image's entry."""
    found = []
    image_id = entry.get("image_id")
    if type(image_id) is not int:
        found.append(("image_id", f"expected an integer, got {short(image_id)}"))
    elif image_id in seen:
        found.append(("image_id", "used twice"))
    else:
        seen.add(image_id)
    what = path_problem(entry.get("file_name"), gt_dir)
    return [*found, ("file_name", what)] if what else found


def _segments(
    segments: object, where: str, meta: dict[str, Any], problems: Problems
) -> list[Record]:
    """Return the segments of an image with contiguous categories."""
    if not isinstance(segments, list):
        problems.add(where, "segments_info", f"expected a list, got {short(segments)}")
        return []
    things = meta["thing_dataset_id_to_contiguous_id"]
    stuff = meta["stuff_dataset_id_to_contiguous_id"]
    found = []
    for segment in segments:
        category = segment.get("category_id") if isinstance(segment, dict) else None
        if category is None or type(segment.get("id")) is not int:
            problems.add(where, "segments_info", f"expected id and category, got {short(segment)}")
        elif category in things:
            found.append({**segment, "category_id": things[category], "isthing": True})
        elif category in stuff:
            found.append({**segment, "category_id": stuff[category], "isthing": False})
        else:
            what = f"segment {segment['id']}: {short(category)} is no category of the metadata"
            problems.add(where, "category_id", what)
    return found


def merge_to_panoptic(detection_dicts: list[Record], sem_seg_dicts: list[Record]) -> list[Record]:
    """Join records of instances with those of label images.

    Args:
        detection_dicts: as of `load_coco_json`.
        sem_seg_dicts: as of `load_sem_seg`; each image of the first must be among them.

    Returns:
        The records of the first with `sem_seg_file_name`.

    Raises:
        ValueError: an image has no label image.
    """
    labels = {record["file_name"]: record for record in sem_seg_dicts}
    missing = [r["file_name"] for r in detection_dicts if r["file_name"] not in labels]
    if missing:
        raise ValueError(
            f"{missing[0]} has no label image ({len(missing)} of {len(detection_dicts)} images); "
            "datasets/prepare_panoptic_fpn.py makes them"
        )
    return [{**labels[record["file_name"]], **record} for record in detection_dicts]


def register_coco_panoptic(
    name: str,
    metadata: dict[str, Any],
    image_root: str,
    panoptic_root: str,
    panoptic_json: str,
    instances_json: str | None = None,
) -> None:
    """Register a dataset in COCO's panoptic format; nothing is read yet.

    Args:
        name: by which configs name the dataset.
        metadata: maps from category ids to contiguous ones, names, colours.
        image_root: folder of the images.
        panoptic_root: folder of the segment images.
        panoptic_json: the annotations.
        instances_json: the same images' instances, for evaluation of boxes and masks.
    """
    DatasetCatalog.register(
        name, lambda: load_coco_panoptic_json(panoptic_json, image_root, panoptic_root, metadata)
    )
    MetadataCatalog.get(name).set(
        panoptic_root=panoptic_root,
        image_root=image_root,
        panoptic_json=panoptic_json,
        json_file=instances_json,
        evaluator_type="coco_panoptic_seg",
        ignore_label=IGNORE_LABEL,
        label_divisor=1000,
        **metadata,
    )


def register_coco_panoptic_separated(
    name: str,
    metadata: dict[str, Any],
    image_root: str,
    panoptic_root: str,
    panoptic_json: str,
    sem_seg_root: str,
    instances_json: str,
) -> None:
    """Register ``<name>_separated`` (instances and label images) and ``<name>_stuffonly``.

    Args:
        name: of the panoptic dataset.
        metadata: maps from category ids to contiguous ones, names, colours.
        image_root: folder of the images.
        panoptic_root: folder of the segment images, for evaluation.
        panoptic_json: the panoptic annotations, for evaluation.
        sem_seg_root: folder of the label images (see datasets/prepare_panoptic_fpn.py): 0 is all
            things together.
        instances_json: annotations of the instances.
    """
    register_separated(
        f"{name}_separated",
        metadata,
        image_root,
        panoptic_root,
        panoptic_json,
        sem_seg_root,
        instances_json,
    )
    register_stuff_only(f"{name}_stuffonly", metadata, image_root, sem_seg_root)


def register_separated(
    name: str,
    metadata: dict[str, Any],
    image_root: str,
    panoptic_root: str,
    panoptic_json: str,
    sem_seg_root: str,
    instances_json: str,
) -> None:
    """Register the first of the two datasets of `register_coco_panoptic_separated`."""
    DatasetCatalog.register(
        name,
        lambda: merge_to_panoptic(
            load_coco_json(instances_json, image_root, name),
            load_sem_seg(sem_seg_root, image_root),
        ),
    )
    MetadataCatalog.get(name).set(
        panoptic_root=panoptic_root,
        image_root=image_root,
        panoptic_json=panoptic_json,
        sem_seg_root=sem_seg_root,
        json_file=instances_json,
        evaluator_type="coco_panoptic_seg",
        ignore_label=IGNORE_LABEL,
        **metadata,
    )


def register_stuff_only(
    name: str, metadata: dict[str, Any], image_root: str, sem_seg_root: str
) -> None:
    """Register the second of the two datasets of `register_coco_panoptic_separated`."""
    DatasetCatalog.register(name, lambda: load_sem_seg(sem_seg_root, image_root))
    MetadataCatalog.get(name).set(
        sem_seg_root=sem_seg_root,
        image_root=image_root,
        evaluator_type="sem_seg",
        ignore_label=IGNORE_LABEL,
        **metadata,
    )


def write_stuff_labels(
    panoptic_json: str,
    panoptic_root: str,
    sem_seg_root: str,
    stuff_ids: Mapping[int, int],
    thing_ids: Sequence[int],
) -> int:
    """Write a label image for each segment image of COCO's panoptic format.

    Args:
        panoptic_json: the annotations.
        panoptic_root: folder of the segment images.
        sem_seg_root: where the label images go, under the same names; it is made.
        stuff_ids: category id -> label; `stuff_dataset_id_to_contiguous_id` of the separated data.
        thing_ids: category ids that all become label 0. Pixels of no segment become 255.

    Returns:
        How many were written.

    Raises:
        FileNotFoundError: a file does not exist.
        DatasetError: a damaged annotation; an unknown category; a segment without an annotation.
    """
    labels = {**stuff_ids, **dict.fromkeys(thing_ids, 0)}
    data = read_json(panoptic_json, panoptic_json)
    problems = Problems(panoptic_json)
    jobs = []
    for entry in data.get("annotations") or ():
        what = path_problem(entry.get("file_name"), panoptic_root)
        if what:
            problems.add(f"image {entry.get('image_id')}", "file_name", what)
            continue
        segments = {s["id"]: s["category_id"] for s in entry["segments_info"]}
        unknown = set(segments.values()) - set(labels)
        if unknown:
            what = f"{min(unknown)} is no category of the metadata"
            problems.add(f"image {entry.get('image_id')}", "category_id", what)
        jobs.append((entry["file_name"], segments))
    problems.raise_if_any()

    def convert(job: tuple[str, dict[int, int]]) -> None:
        name, segments = job
        path = os.path.join(panoptic_root, name)
        rgb = read_image(path, "RGB").astype(np.int32)
        ids = rgb[..., 0] + 256 * rgb[..., 1] + 256**2 * rgb[..., 2]
        known = np.array([0, *sorted(segments)])
        place = np.searchsorted(known, ids).clip(max=len(known) - 1)
        if not (known[place] == ids).all():
            wrong = int(ids[known[place] != ids][0])
            raise DatasetError(f"{path}: segment {wrong} is not in {panoptic_json}")
        table = [IGNORE_LABEL, *(labels[segments[s]] for s in sorted(segments))]
        _write(os.path.join(sem_seg_root, name), np.array(table, dtype=np.uint8)[place])

    return _run(convert, jobs)


def write_ade20k_labels(annotations: str, output: str) -> int:
    """Write ADE20K's label images so that 0 is the first class and 255 is no class.

    Args:
        annotations: folder of the published label images: 0 is no class, 1 to 150 are classes.
        output: where the new ones go, under the same names; it is made.

    Returns:
        How many were written.

    Raises:
        FileNotFoundError: there is no label image.
        DatasetError: a label above 150.
    """
    files = sorted(Path(annotations).glob("*.png"))
    if not files:
        raise FileNotFoundError(f"no *.png in '{annotations}'; see datasets/README.md")

    def convert(file: Path) -> None:
        labels = read_label_map(file)
        if labels.max(initial=0) > 150:
            raise DatasetError(f"{file}: label {labels.max()}, expected 0 to 150")
        _write(os.path.join(output, file.name), (labels.astype(np.int32) - 1).astype(np.uint8))

    return _run(convert, files)


def _run(convert: Callable[[Any], None], jobs: Sequence[Any]) -> int:
    """Convert several images at a time, with a progress bar."""
    from tqdm import tqdm

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return len(list(tqdm(pool.map(convert, jobs), total=len(jobs), unit="image", disable=None)))


def _write(path: str, labels: np.ndarray) -> None:
    from PIL import Image

    os.makedirs(os.path.dirname(path), exist_ok=True)
    with atomic_write(path) as file:
        Image.fromarray(labels).save(file, format="PNG")
