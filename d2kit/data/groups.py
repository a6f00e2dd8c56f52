"""Which images belong together: frames of a video, pictures of a patient."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import PurePosixPath
from typing import Any

from d2kit.data.datasets.validate import DatasetError, read_json

__all__ = ["group_images", "read_coco"]


def read_coco(path: str | PathLike[str]) -> dict[str, Any]:
    """Read a COCO JSON file without a look at its annotations.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: there is no such file.
        DatasetError: it is not JSON, or "images", "annotations" or "categories" is missing.
    """
    found = read_json(fspath(path), fspath(path))
    for key in ("images", "annotations", "categories"):
        if not isinstance(found.get(key), list):
            raise DatasetError(
                f"{path}: expected a list '{key}', got {type(found.get(key)).__name__}"
            )
    return found


def group_images(coco: Mapping[str, Any], key: str = "video") -> dict[str, list[int]]:
    """Sort the images of a COCO dictionary into groups.

    Args:
        coco: with "images" and, perhaps, "videos".
        key: ``video`` (the image's ``video_id``, by name where "videos" names it, else its
            ``video``, else its folder), ``folder`` (of ``file_name``), or any field of the images.

    Returns:
        Group -> image ids, in the order of the file.

    Raises:
        ValueError: if an image has no such field.
    """
    names = {v["id"]: str(v.get("name", v["id"])) for v in coco.get("videos", [])}
    groups: dict[str, list[int]] = {}
    for image in coco["images"]:
        groups.setdefault(_group_of(image, key, names), []).append(image["id"])
    return groups


def _group_of(image: Mapping[str, Any], key: str, names: Mapping[Any, str]) -> str:
    folder = str(PurePosixPath(image["file_name"]).parent)
    if key == "folder":
        return folder
    if key == "video":
        if "video_id" in image:
            return names.get(image["video_id"], str(image["video_id"]))
        return str(image.get("video", folder))
    if key not in image:
        raise ValueError(
            f"image {image['id']} ('{image['file_name']}') has no field '{key}' to group by; it "
            f"has {sorted(image)}; 'folder' groups by the folder of file_name"
        )
    return str(image[key])
