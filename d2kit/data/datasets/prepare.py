"""Label images that training needs, made from what the public datasets come with."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from d2kit.data.datasets.validate import DatasetError, Problems, path_problem, read_json
from d2kit.data.detection_utils import read_image, read_label_map
from d2kit.utils.file_io import atomic_write

__all__ = ["write_ade20k_labels", "write_stuff_labels"]

IGNORE_LABEL = 255


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
