"""LVIS: reading its JSON files, and registering its splits.

Source: Gupta et al., "LVIS: A Dataset for Large Vocabulary Instance Segmentation", 2019 (arXiv
1908.03195); the fields are those that lvisdataset.org documents.
"""

from __future__ import annotations

import gzip
import json
import logging
import mmap
import os
import re
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from d2kit.data.catalog import (
    DatasetCatalog,
    MetadataCatalog,
    _get_coco_instances_meta,
    dataset_root,
)
from d2kit.data.datasets.coco import KEPT_KEYS, image_paths, make_records
from d2kit.data.datasets.validate import (
    CocoTables,
    DatasetError,
    Problems,
    check_coco,
    read_json,
    short,
)
from d2kit.utils.file_io import PathManager

__all__ = ["get_lvis_instances_meta", "load_lvis_json", "register_lvis_instances"]


FIELDS = ("id", "name", "frequency", "image_count")
_WINDOWS = (2**22, 2**26)
"""Bytes to parse the list within; that of v1 has about half a million."""

_FILES = {
    "v0.5": ("train", "val", "image_info_test"),
    "v1": ("train", "val", "image_info_test_dev", "image_info_test_challenge"),
}


def find_file(version: str, root: str) -> str | None:
    """Return the annotation file to take the categories of a version from; None: there is none."""
    paths = (os.path.join(root, "lvis", f"lvis_{version}_{s}.json") for s in _FILES[version])
    return next((path for path in paths if os.path.isfile(path)), None)


@cache
def shipped_categories(version: str) -> tuple[dict[str, Any], ...]:
    """Return the categories of a version by id, as they come with d2kit.

    Args:
        version: "v0.5" (without counts of images) or "v1".
    """
    packed = (Path(__file__).parent / "lvis_categories.json.gz").read_bytes()
    facts = json.loads(gzip.decompress(packed))
    counts = facts["v1_image_count"] if version == "v1" else {}
    return tuple(
        {**c, **({"image_count": counts[str(c["id"])]} if counts else {})} for c in facts[version]
    )


def categories_of(version: str, root: str) -> tuple[dict[str, Any], ...]:
    """Return the categories of a version by id, of an annotation file or those that are shipped.

    Args:
        version: "v0.5" or "v1".
        root: folder of the public datasets.

    Raises:
        DatasetError: an annotation file has no list of categories.
    """
    path = find_file(version, root)
    return shipped_categories(version) if path is None else read_categories(path)


@lru_cache(maxsize=4)
def read_categories(path: str) -> tuple[dict[str, Any], ...]:
    """Return the categories of an annotation file, by id; the rest of the file is not parsed.

    Args:
        path: local file.

    Raises:
        DatasetError: it has no such list, or one without `FIELDS`.
    """
    categories = _scan(path)
    for entry in categories:
        missing = [f for f in FIELDS if not isinstance(entry, dict) or f not in entry]
        if missing:
            raise DatasetError(f"{path}: categories: no {', '.join(missing)} in {short(entry)}")
        if type(entry["id"]) is not int:
            raise DatasetError(
                f"{path}: categories: id: expected an integer, got {short(entry['id'])}"
            )
    return tuple(sorted(categories, key=lambda entry: entry["id"]))


def _scan(path: str) -> list[Any]:
    """Find the list in a file of up to some gigabytes, and parse it alone."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                match = re.search(rb'"categories"\s*:\s*(?=\[)', content)
                start = match.end() if match else len(content)
                for window in _WINDOWS:
                    text = content[start : start + window].decode("utf-8", "ignore")
                    try:
                        found: list[Any] = json.JSONDecoder().raw_decode(text)[0]
                        return found
                    except ValueError:
                        continue
    raise DatasetError(f"{path}: categories: no list of categories that can be read")


def image_counts(categories: Sequence[dict[str, Any]]) -> list[dict[str, int]]:
    """Return ``{"id", "image_count"}`` of each category."""
    return [{"id": c["id"], "image_count": c["image_count"]} for c in categories]


logger = logging.getLogger(__name__)

Record = dict[str, Any]

_IMAGE_KEYS = ("not_exhaustive_category_ids", "neg_category_ids")


def load_lvis_json(
    json_file: str,
    image_root: str,
    dataset_name: str | None = None,
    extra_annotation_keys: Sequence[str] | None = None,
) -> list[Record]:
    """Load a JSON file of LVIS.

    Args:
        json_file: the annotations.
        image_root: folder of COCO: an image is ``<split>/<name>`` below it, the end of its
            `coco_url`; `file_name` where it has none.
        dataset_name: sets `thing_classes`, `thing_dataset_id_to_contiguous_id` and
            `class_image_count` of this dataset's metadata, and maps category ids to 0, 1, ... in
            the order of the ids (a name with "cocofied": to COCO's 80). None leaves the ids.
        extra_annotation_keys: further keys of annotations to keep.

    Returns:
        One record per image, as of `load_coco_json`, with `neg_category_ids` and
        `not_exhaustive_category_ids` (of the dataset).

    Raises:
        FileNotFoundError: there is no such file.
        DatasetError: not JSON, or defects, one line each with file, annotation and field.
    """
    data = read_json(PathManager.get_local_path(json_file), json_file)
    problems, unusual = Problems(json_file), Problems(json_file)
    for image in data["images"] if isinstance(data.get("images"), list) else ():
        if isinstance(image, dict) and isinstance(image.get("coco_url"), str):
            image["file_name"] = os.path.join(*image["coco_url"].split("/")[-2:])
    tables = check_coco(data, problems, problems, unusual)
    del data
    for image_id, image in tables.images.items():
        for key in _IMAGE_KEYS:
            ids = image.get(key, [])
            if not isinstance(ids, list) or any(type(i) is not int for i in ids):
                what = f"expected a list of category ids, got {short(ids)}"
                problems.add(f"image {image_id}", key, what)
    paths = image_paths(tables, image_root, problems)
    problems.raise_if_any()
    unusual.warn_if_any("boxes that reach beyond their image")
    id_map = None if dataset_name is None else _name_classes(tables, dataset_name)
    records = make_records(tables, paths, id_map, [*KEPT_KEYS, *(extra_annotation_keys or ())])
    for record in records:
        image = tables.images[record["image_id"]]
        record.update({key: image.get(key, []) for key in _IMAGE_KEYS})
    logger.info("Loaded %d images in LVIS's format from %s", len(records), json_file)
    return records


def _name_classes(tables: CocoTables, dataset_name: str) -> dict[int, int]:
    """Set what the metadata do not have yet; return category id -> contiguous index."""
    if "cocofied" in dataset_name:
        facts = _get_coco_instances_meta()
    else:
        facts = _meta_of([tables.categories[i] for i in sorted(tables.categories)])
    metadata = MetadataCatalog.get(dataset_name)
    facts = {k: v for k, v in facts.items() if k == "thing_classes" or metadata.get(k) is None}
    metadata.set(**facts)
    found: dict[int, int] = metadata.thing_dataset_id_to_contiguous_id
    return found


def _meta_of(categories: Sequence[Record]) -> dict[str, Any]:
    """Return the metadata of categories, given by id."""
    counts = all("image_count" in category for category in categories)
    return {
        "thing_classes": [(c.get("synonyms") or [c["name"]])[0] for c in categories],
        "thing_dataset_id_to_contiguous_id": {c["id"]: i for i, c in enumerate(categories)},
        **({"class_image_count": image_counts(categories)} if counts else {}),
    }


def get_lvis_instances_meta(dataset_name: str) -> dict[str, Any]:
    """Return the metadata of a split of LVIS.

    The names are those of an annotation file of that version in ``lvis/`` below the folder of the
    public datasets (`dataset_root`), of which no other part is parsed; without one, those that come
    with d2kit.

    Args:
        dataset_name: contains "v1" or "v0.5"; with "cocofied" the classes are COCO's 80, for which
            no file is needed.

    Returns:
        `thing_classes`, `thing_dataset_id_to_contiguous_id` and, but for "cocofied",
        `class_image_count`.

    Raises:
        ValueError: another version.
    """
    if "cocofied" in dataset_name:
        return _get_coco_instances_meta()
    version = next((v for v in ("v0.5", "v1") if v in dataset_name), None)
    if version is None:
        raise ValueError(
            f"'{dataset_name}' is no dataset of LVIS v0.5 or v1; load_lvis_json takes the classes "
            "of others from their file"
        )
    return _meta_of(categories_of(version, dataset_root()))


def register_lvis_instances(
    name: str, metadata: dict[str, Any], json_file: str, image_root: str
) -> None:
    """Register a dataset in LVIS's format; nothing is read yet.

    Args:
        name: by which configs name the dataset.
        metadata: further metadata; may be empty.
        json_file: the annotations.
        image_root: folder of COCO's images.
    """
    DatasetCatalog.register(name, lambda: load_lvis_json(json_file, image_root, name))
    MetadataCatalog.get(name).set(
        json_file=json_file, image_root=image_root, evaluator_type="lvis", **metadata
    )
