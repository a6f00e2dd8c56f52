"""Lines about a dataset, kept apart by file, place and field."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from d2kit.data.datasets.validate import Problems, all_numbers, is_number, path_problem
from d2kit.data.detection_utils import open_image, read_image, read_image_bytes


class Finding(NamedTuple):
    """One thing about a dataset.

    Args:
        file: path of the annotations.
        where: "annotation 12", "image 3", "category 1" or "top level".
        field: which field.
        what: what was expected and found, or what was done.
        level: "error" or "note".
    """

    file: str
    where: str
    field: str
    what: str
    level: str = "error"

    def __str__(self) -> str:
        """Return the line."""
        return f"{self.file}: {self.where}: {self.field}: {self.what}"


class Findings(Problems):
    """Collects `Finding`s from checks that report to a `Problems`.

    Args:
        file: path of the annotations.
    """

    def __init__(self, file: str) -> None:
        super().__init__(file)
        self.found: list[Finding] = []

    def add(self, where: str, key: str, what: str) -> None:
        """Note that field `key` of `where` is wrong."""
        self.total += 1
        self.found.append(Finding(self.file, where, key, what))

    def note(self, where: str, key: str, what: str) -> None:
        """Note something that can be intended."""
        self.found.append(Finding(self.file, where, key, what, "note"))


def reaches_far(polygon: Sequence[float], width: int, height: int) -> bool:
    """Whether a point lies more than an image size beyond the image.

    Such a polygon is no rounding, and its outline may be too long to be drawn.

    Args:
        polygon: x, y, x, y, ...
        width: of the image in pixels.
        height: of the image in pixels.
    """
    return any(
        min(values) < -side or max(values) > 2 * side
        for values, side in ((polygon[::2], width), (polygon[1::2], height))
    )


def roots_of_classes(
    categories: Iterable[Mapping[str, Any]], annotations: Iterable[Any]
) -> set[int]:
    """Return the ids of categories that are only the `supercategory` of others.

    Roboflow writes such a one, of id 0, which no object belongs to; a model would get a class that
    never occurs.
    """
    ids = (a.get("category_id") for a in annotations if isinstance(a, Mapping))
    used = {i for i in ids if isinstance(i, int)}
    table = [c for c in categories if isinstance(c.get("name"), str)]
    return {
        c["id"]
        for c in table
        if c["id"] not in used
        and c.get("supercategory") in (None, "", "none")
        and any(o.get("supercategory") == c["name"] for o in table)
    }


def true_area(annotation: Mapping[str, Any], height: int, width: int) -> float:
    """Compute the area of an annotation whose box and masks were checked.

    Args:
        annotation: with `bbox` [x, y, width, height] and perhaps `segmentation`.
        height: of the image in pixels; used for masks only.
        width: of the image in pixels.

    Returns:
        Pixels of the mask, or of the box where there is none.
    """
    masks = annotation.get("segmentation")
    if not masks:
        return float(annotation["bbox"][2] * annotation["bbox"][3])  # of rotated ones, too
    from pycocotools import mask as mask_util

    if isinstance(masks, dict):
        counts = masks["counts"]
        rle = mask_util.frPyObjects(masks, *masks["size"]) if isinstance(counts, list) else masks
    else:
        rle = mask_util.merge(mask_util.frPyObjects(masks, height, width))
    return float(mask_util.area(rle))


def bounds_of_polygons(masks: object) -> list[float] | None:
    """Return the box [x, y, width, height] around polygons; None for other masks."""
    if not isinstance(masks, list):
        return None
    points = [p for p in masks if all_numbers(p) and len(p) >= 6 and len(p) % 2 == 0]
    xs, ys = [x for p in points for x in p[::2]], [y for p in points for y in p[1::2]]
    if not xs or not ys:
        return None
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def _near_corners(corners: Sequence[float], bounds: Sequence[float]) -> bool:
    """Whether x0, y0, x1, y1 are those of a box [x, y, width, height], within 3 pixels."""
    u, v, s, t = bounds
    return all(abs(p - q) <= 3 for p, q in zip(corners, (u, v, u + s, v + t), strict=True))


def mask_disagrees(annotation: Mapping[str, Any], image: Mapping[str, Any]) -> str | None:
    """Say how a box and its polygons contradict each other; None where they fit.

    Args:
        annotation: with `bbox` [x, y, width, height] and `segmentation`.
        image: its entry; polygons beyond the border are compared as far as they are inside.
    """
    bounds = bounds_of_polygons(annotation.get("segmentation"))
    if bounds is None:
        return None
    x, y, w, h = annotation["bbox"]
    u, v, s, t = bounds
    across = min(x + w, u + s) - max(x, u)
    down = min(y + h, v + t) - max(y, v)
    common = max(across, 0) * max(down, 0)
    if _near_corners((x, y, x + w, y + h), bounds):
        return None
    # corners, from the centre, axes exchanged: an object near the origin overlaps all the same
    readings = [(x, y, w, h), (x - w / 2, y - h / 2, x + w / 2, y + h / 2), (y, x, y + h, x + w)]
    misread = any(_near_corners(corners, bounds) for corners in readings)
    if not misread and common >= 0.5 * (w * h + s * t - common):
        return None
    shown = [round(n, 1) for n in bounds]
    return f"{[x, y, w, h]}, but its mask lies in {shown} (x, y, width, height)"


def box_by_area(a: Mapping[str, Any], width: int, height: int) -> list[float]:
    """Return the box without a mask as its area says it is meant: sizes, corners or shares."""
    x, y, w, h = a["bbox"]
    readings = {
        "sizes": [x, y, w, h],
        "corners": [x, y, w - x, h - y],
        "shares": [x * width, y * height, w * width, h * height],
    }
    area: Any = a.get("area")
    for box in readings.values() if is_number(area) and area else ():
        fits = abs(box[2] * box[3] - area) <= 0.02 * abs(area)
        if min(box[2:]) > 0 and fits:
            return box
    return readings["sizes"]


def mask_is_right(a: Mapping[str, Any], bounds: list[float], width: int, height: int) -> bool:
    """Whether a mask that contradicts its box is borne out by a reading of the box or by the area.

    Args:
        a: the annotation.
        bounds: of the mask, [x, y, width, height].
        width: of the image in pixels.
        height: of the image in pixels.
    """
    x, y, w, h = a["bbox"]
    u, v, s, t = bounds
    wanted = (u, v, u + s, v + t)
    readings = (
        (x, y, w, h),
        (x - w / 2, y - h / 2, x + w / 2, y + h / 2),
        (x * width, y * height, (x + w) * width, (y + h) * height),
        # row before column, as boxes of TensorFlow have it
        *[(y, x, y + h, x + w)] * is_inside(bounds, width, height),
    )
    if any(all(abs(p - q) <= 3 for p, q in zip(r, wanted, strict=True)) for r in readings):
        return True
    if min(w, h) <= 0:
        return True  # no box at all
    area: Any = a.get("area")
    if not is_number(area) or area <= 0:
        return False
    try:
        truth = true_area(a, height, width)
    except (TypeError, ValueError, IndexError):
        return False
    fits = [abs(found - area) <= 0.1 * area + s + t for found in (truth, w * h)]
    beyond = not is_inside(a["bbox"], width, height) and is_inside(bounds, width, height)
    return fits[0] and (beyond or not fits[1])


def is_inside(box: Sequence[float], width: int, height: int) -> bool:
    """Whether a box [x, y, width, height] lies inside its image, within a pixel."""
    x, y, w, h = box
    return x >= -1 and y >= -1 and x + w <= width + 1 and y + h <= height + 1


SHARES = "all boxes of the file lie within 1 x 1 pixel: shares of the image size? COCO has pixels"


def within_one(annotations: Sequence[Mapping[str, Any]]) -> bool:
    """Whether no box of checked annotations reaches beyond 1 x 1 pixel."""
    boxes = [a["bbox"] for a in annotations if len(a["bbox"]) == 4]
    return bool(boxes) and max(max(map(abs, box)) for box in boxes) <= 1


def keypoints_apart(annotation: Mapping[str, Any]) -> str | None:
    """Say that most visible keypoints lie away from their box; None where they fit, or are none.

    Args:
        annotation: checked; `keypoints` x, y, visibility, ... The box counts with half its size
            more on each side: parts that are hidden are guessed.
    """
    points = annotation.get("keypoints") or []
    box = annotation["bbox"]
    if len(box) != 4:
        return None
    x, y, w, h = box
    seen = [(p, q) for p, q, v in zip(points[::3], points[1::3], points[2::3], strict=False) if v]
    far = [
        (p, q)
        for p, q in seen
        if not (x - w / 2 - 3 <= p <= x + 1.5 * w + 3 and y - h / 2 - 3 <= q <= y + 1.5 * h + 3)
    ]
    if 2 * len(far) <= len(seen):
        return None
    return f"{len(far)} of {len(seen)} lie away from the box {box}, for example {far[0]}"


class ImageFile(NamedTuple):
    """What an image file holds.

    Args:
        path: of the file.
        width: in pixels, upright; 0 where it cannot be read.
        height: in pixels.
        problem: why it cannot be read; empty where it can.
        note: what is unusual about it.
    """

    path: str
    width: int = 0
    height: int = 0
    problem: str = ""
    note: str = ""


def survey_images(
    images: Iterable[Mapping[str, Any]],
    folder: str | os.PathLike[str],
    progress: Callable[[], Any] | None = None,
) -> dict[str, ImageFile]:
    """Decode the images of a dataset.

    Args:
        images: entries with `file_name`; those outside of the folder are not touched.
        folder: that the names are relative to.
        progress: called after each image.

    Returns:
        `file_name` -> what its file holds.
    """
    root = os.fspath(folder)
    names = [i.get("file_name") for i in images if isinstance(i, Mapping)]
    unique = {name for name in names if isinstance(name, str)}
    safe = [name for name in unique if path_problem(name, root) is None]

    def look(name: str) -> ImageFile:
        found = _look(os.path.join(root, name))
        if progress:
            progress()
        return found

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(safe, pool.map(look, safe), strict=True))


def _look(path: str) -> ImageFile:
    if not os.path.isfile(path):
        return ImageFile(path, problem=f"{path}: image file does not exist")
    try:
        header = open_image(read_image_bytes(path), path)
        height, width = read_image(path, "RGB").shape[:2]
    except (ValueError, OSError) as error:  # both name the path
        text = str(error)
        return ImageFile(path, problem=text if path in text else f"{path}: {text}")
    return ImageFile(path, width, height, note=_unusual(header, (width, height)))


def _unusual(header: Any, size: tuple[int, int]) -> str:
    """Say what reading changes."""
    parts = []
    if getattr(header, "n_frames", 1) > 1:
        parts.append(f"animation of {header.n_frames} frames, the first is used")
    if header.size != size:
        parts.append("turned upright by its EXIF orientation")
    if header.mode not in ("RGB", "L", "P", "1"):
        parts.append(f"mode {header.mode} is converted to 8-bit RGB")
    return "; ".join(parts)
