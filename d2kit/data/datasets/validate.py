"""Checks of COCO JSON: every defect becomes one line with file, annotation and field."""

import logging
import os
from dataclasses import dataclass, field
from math import hypot, isfinite
from typing import Any

from d2kit.structures.masks import rle_problem
from d2kit.utils.file_io import load_json

__all__ = [
    "MAX_LISTED",
    "CocoTables",
    "DatasetError",
    "Problems",
    "check_coco",
    "path_problem",
    "read_json",
]

MAX_LISTED = 20
"""How many lines of a kind a message lists before it only counts."""

Number = (int, float)


class DatasetError(ValueError):
    """A dataset cannot be used as it is.

    Args:
        title: the whole message where there are no lines, else what comes before them.
        problems: one line each.
        total: number of problems where not all are listed.
    """

    def __init__(self, title: str, problems: list[str] | None = None, total: int = 0) -> None:
        self.problems = list(problems or [])
        self.total = max(total, len(self.problems))
        lines = [title, *self.problems] if title else list(self.problems)
        if self.total > len(self.problems):
            lines.append(f"... and {self.total - len(self.problems)} more")
        super().__init__("\n".join(lines))


@dataclass
class Problems:
    """Collects lines about one file.

    Args:
        file: its path.
    """

    file: str
    lines: list[str] = field(default_factory=list)
    total: int = 0

    def add(self, where: str, key: str, what: str) -> None:
        """Note that field `key` of `where` is wrong."""
        self.total += 1
        if len(self.lines) < MAX_LISTED:
            self.lines.append(f"{self.file}: {where}: {key}: {what}")

    def raise_if_any(self) -> None:
        """Raise a `DatasetError` with the lines, if there are any."""
        if self.total:
            title = "" if self.total == 1 else f"{self.file}: {self.total} problems"
            raise DatasetError(title, self.lines, self.total)

    def warn_if_any(self, what: str) -> None:
        """Log the lines as one warning."""
        if self.total:
            more = f"\n... and {self.total - len(self.lines)} more" * (self.total > len(self.lines))
            text = "\n".join(self.lines) + more
            logging.getLogger(__name__).warning("%s: %s: %d\n%s", self.file, what, self.total, text)


@dataclass
class CocoTables:
    """What a COCO JSON file holds, checked.

    Args:
        images: image id -> entry of "images", with sizes as integers.
        categories: category id -> entry of "categories".
        annotations: the usable annotations in the order of the file.
    """

    images: dict[int, dict[str, Any]]
    categories: dict[int, dict[str, Any]]
    annotations: list[dict[str, Any]]


def short(value: object) -> str:
    """Show a value within 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def path_problem(name: object, root: str) -> str | None:
    """Say why `name` is no file below the folder `root`; links within it are the owner's business.

    Args:
        name: from a file of others.
        root: folder or URL.
    """
    if not isinstance(name, str) or not name:
        return f"expected a name, got {short(name)}"
    if "://" in name or "\0" in name:
        return f"expected a file, got '{name!r:.60}'"
    if not os.path.isabs(name) and ".." not in name.split(os.sep):
        return None
    folder = os.path.abspath(root) if "://" not in root else root
    if os.path.abspath(os.path.join(root, name)).startswith(folder.rstrip(os.sep) + os.sep):
        return None
    return (
        f"'{name:.200}' is outside of the image folder '{folder}'; register the dataset with an "
        "image folder that holds all its images"
    )


def read_json(path: str, shown: str) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
        path: local path.
        shown: path for messages.

    Raises:
        FileNotFoundError: there is no such file.
        DatasetError: not JSON; the message has line and column.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"{shown}: annotation file does not exist")
    try:
        data = load_json(path, shown)
    except ValueError as error:
        raise DatasetError(str(error)) from error
    if not isinstance(data, dict):
        raise DatasetError(
            f"{shown}: expected an object with 'images', 'annotations' and 'categories', got "
            f"{type(data).__name__}"
        )
    return data


def check_coco(
    data: dict[str, Any], problems: Problems, defects: Problems, unusual: Problems
) -> CocoTables:
    """Check the content of a COCO JSON file.

    Args:
        data: the parsed file.
        problems: receives what is wrong with images and categories.
        defects: receives what is wrong with annotations; may be the same object.
        unusual: receives what can be used, but should be looked at.

    Returns:
        The parts that can be used.
    """
    for key in ("images", "annotations", "categories"):
        # The published lists of test images have no annotations.
        needed = key == "images" or (key == "categories" and data.get("annotations"))
        if not isinstance(data.get(key, None if needed else []), list):
            problems.add("top level", key, f"expected a list, got {short(data.get(key))}")
            data = {**data, key: []}
    images = _by_id(data["images"], "image", image_problems, problems)
    categories = _by_id(data.get("categories", []), "category", _category_problems, problems)
    annotations = data.get("annotations", [])
    check = _AnnotationCheck(images, categories, defects, unusual, annotations)
    return CocoTables(images, categories, [a for a in annotations if check.passes(a)])


def _by_id(entries: list[Any], kind: str, check: Any, problems: Problems) -> dict[int, Any]:
    """Return the sound entries by their id."""
    table: dict[int, Any] = {}
    for i, entry in enumerate(entries):
        where = f"{kind} {entry.get('id', f'number {i}') if isinstance(entry, dict) else i}"
        if not isinstance(entry, dict):
            problems.add(where, "entry", f"expected an object, got {short(entry)}")
            continue
        found = _id_problem(entry, table) or (
            f"expected an integer >= 0, got {entry['id']}; COCO's evaluation has no other"
            if entry["id"] < 0
            else None
        )
        if found:
            problems.add(where, "id", found)
            continue
        table[entry["id"]] = entry  # even where a field is wrong: it is reported once, here
        for key, what in check(entry):
            problems.add(where, key, what)
    return table


def _id_problem(entry: dict[str, Any], seen: Any) -> str | None:
    """Say what is wrong with the id of an entry."""
    if "id" not in entry:
        return "missing"
    if type(entry["id"]) is not int or not -(2**63) <= entry["id"] < 2**63:
        return f"expected an integer, got {short(entry['id'])}"
    return "used twice" if entry["id"] in seen else None


def image_problems(image: dict[str, Any]) -> Any:
    """Yield (field, what) of an entry of "images"; whole sizes become integers."""
    if not isinstance(image.get("file_name"), str) or not image["file_name"]:
        yield "file_name", _expected("a name", image, "file_name")
    for key in ("height", "width"):
        size = image.get(key)
        if type(size) is float and size.is_integer():
            image[key] = size = int(size)
        if type(size) is not int or not 0 < size < 2**31:
            yield key, _expected("an integer > 0 (pixels)", image, key)


def _category_problems(category: dict[str, Any]) -> Any:
    if not isinstance(category.get("name"), str):
        yield "name", _expected("text", category, "name")
    points = category.get("keypoints")
    if points and not (isinstance(points, list) and all(isinstance(p, str) for p in points)):
        yield "keypoints", _expected("a list of names", category, "keypoints")


def _expected(what: str, entry: dict[str, Any], key: str) -> str:
    return f"expected {what}, got {short(entry[key]) if key in entry else 'nothing: it is missing'}"


def is_number(value: object) -> bool:
    """Whether `value` is a finite number; text and booleans are not."""
    if not isinstance(value, Number) or isinstance(value, bool):
        return False
    # An integer beyond the range of floats has no place in any tensor.
    return abs(value) < 1e300 if isinstance(value, int) else isfinite(value)


def all_numbers(values: object) -> bool:
    """Whether `values` are a list of finite numbers. One sum decides in the usual case."""
    if not isinstance(values, list):
        return False
    try:
        if isfinite(sum(values)):
            return True
    except (TypeError, OverflowError):
        return False
    return all(map(is_number, values))


class _AnnotationCheck:
    """Checks annotations against the images and categories of their file."""

    def __init__(
        self,
        images: dict[int, dict[str, Any]],
        categories: dict[int, dict[str, Any]],
        problems: Problems,
        unusual: Problems,
        annotations: list[Any],
    ) -> None:
        self.images = images
        self.categories = categories
        self.problems = problems
        self.unusual = unusual
        self.seen: set[int] = set()
        # A known fault of the minival splits of COCO 2014, harmless for training.
        self.may_repeat = "minival" in os.path.basename(problems.file)
        self.has_masks = any(isinstance(a, dict) and a.get("segmentation") for a in annotations)
        self.count = 0

    def passes(self, annotation: object) -> bool:
        """Whether the annotation can be used; what is wrong goes to the problems."""
        self.count += 1
        if not isinstance(annotation, dict):
            where = f"annotation number {self.count - 1}"
            self.problems.add(where, "entry", f"expected an object, got {short(annotation)}")
            return False
        before = self.problems.total
        for key, what in self._found(annotation):
            where = f"annotation {annotation.get('id', f'number {self.count - 1}')}"
            self.problems.add(where, key, what)
        return self.problems.total == before

    def _found(self, a: dict[str, Any]) -> list[tuple[str, str]]:
        """Return (field, what) for each defect."""
        image = self._known(self.images, a.get("image_id"))
        category = self._known(self.categories, a.get("category_id"))
        crowd = a.get("iscrowd", 0)
        checks = (
            ("id", _id_problem(a, () if self.may_repeat else self.seen)),
            ("image_id", None if image else self._unknown(a, "image_id", "images")),
            ("category_id", None if category else self._unknown(a, "category_id", "categories")),
            ("iscrowd", None if crowd in (0, 1) else f"expected 0 or 1, got {short(crowd)}"),
            ("ignore", "only 0 is supported; delete the annotation" if a.get("ignore") else None),
            ("area", None if is_number(a.get("area", 0)) else _expected("a number", a, "area")),
            ("bbox", self._box(a, image)),
            ("segmentation", self._segmentation(a.get("segmentation"), crowd, image)),
            ("keypoints", self._keypoints(a, category)),
        )
        if type(a.get("id")) is int:
            self.seen.add(a["id"])
        return [(key, what) for key, what in checks if what]

    @staticmethod
    def _known(table: dict[int, dict[str, Any]], key: object) -> dict[str, Any] | None:
        return table.get(key) if type(key) is int else None

    def _unknown(self, a: dict[str, Any], key: str, table: str) -> str:
        if type(a.get(key)) is int:
            return f"{a[key]} is not among the '{table}' of the file"
        return _expected("an integer", a, key)

    def _box(self, a: dict[str, Any], image: dict[str, Any] | None) -> str | None:
        box = a.get("bbox")
        if all_numbers(box) and len(box) == 5:  # type: ignore[arg-type]
            return self._rotated_box(box, image)  # type: ignore[arg-type]
        if not all_numbers(box) or len(box) != 4:  # type: ignore[arg-type]
            return _expected("4 finite numbers [x, y, width, height]", a, "bbox")
        x, y, w, h = box  # type: ignore[misc]
        if w < 0 or h < 0:
            return f"expected [x, y, width, height] with a size >= 0 (is it x, y, x, y?), got {box}"
        width, height = self._size(image)
        if w > 0 and h > 0 and width and not (x < width and y < height and x + w > 0 and y + h > 0):
            return f"lies outside of its image of {width} x {height} pixels: {box}"
        if width and (min(x, y) < -1 or x + w > width + 1 or y + h > height + 1):
            where = f"annotation {a.get('id')}"
            self.unusual.add(where, "bbox", f"{box} in an image of {width} x {height} pixels")
        return None

    def _rotated_box(self, box: list[float], image: dict[str, Any] | None) -> str | None:
        x, y, w, h, _ = box
        if w < 0 or h < 0:
            return f"expected [center x, center y, width, height, angle], size >= 0, got {box}"
        width, height = self._size(image)
        reach = hypot(w, h) / 2  # whatever the angle
        seen = -reach <= x <= width + reach and -reach <= y <= height + reach
        if w > 0 and h > 0 and width and not seen:
            return f"lies outside of its image of {width} x {height} pixels: {box}"
        return None

    @staticmethod
    def _size(image: dict[str, Any] | None) -> tuple[int, int]:
        """Return (width, height), or zeros where they are not known."""
        size = (image or {}).get("width"), (image or {}).get("height")
        if type(size[0]) is int and type(size[1]) is int:
            return size[0], size[1]
        return 0, 0

    def _segmentation(
        self, masks: object, crowd: object, image: dict[str, Any] | None
    ) -> str | None:
        if isinstance(masks, dict):
            width, height = self._size(image)
            return rle_problem(masks, height, width)
        if crowd == 1 and (masks or self.has_masks):
            return f"a crowd (iscrowd 1) needs a run-length mask, got {short(masks)}"
        if not masks and masks in (None, []):
            return None  # boxes without masks
        if not isinstance(masks, list):
            return f"expected a list of polygons or a run-length mask, got {short(masks)}"
        if not any(isinstance(polygon, list) for polygon in masks):
            return f"expected a list of polygons [[x, y, ...], ...], got a flat list {short(masks)}"
        for polygon in masks:
            if not all_numbers(polygon) or len(polygon) < 6 or len(polygon) % 2:
                return (
                    "expected polygons of an even number, at least 6, of finite coordinates, got "
                    f"{short(polygon)}"
                )
        return None

    @staticmethod
    def _keypoints(a: dict[str, Any], category: dict[str, Any] | None) -> str | None:
        points = a.get("keypoints")
        if points is None:
            return None
        names = (category or {}).get("keypoints")
        wanted = 3 * len(names) if isinstance(names, list) and names else None
        if not all_numbers(points) or len(points) % 3 or wanted not in (None, len(points)):
            count = f"{wanted} " if wanted else ""
            return _expected(f"{count}finite numbers x, y, visibility, ...", a, "keypoints")
        return None
