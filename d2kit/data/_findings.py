"""Lines about a dataset, kept apart by file, place and field."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from d2kit.data.datasets._validate import Problems

__all__ = ["Finding", "Findings", "reaches_far", "roots_of_classes", "true_area"]


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
    used = {a.get("category_id") for a in annotations if isinstance(a, Mapping)}
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
        return float(annotation["bbox"][2] * annotation["bbox"][3])
    from pycocotools import mask as mask_util

    if isinstance(masks, dict):
        counts = masks["counts"]
        rle = mask_util.frPyObjects(masks, *masks["size"]) if isinstance(counts, list) else masks
    else:
        rle = mask_util.merge(mask_util.frPyObjects(masks, height, width))
    return float(mask_util.area(rle))
