"""Names of datasets: how to load them (`DatasetCatalog`), what is known of them (`Metadata`)."""

from __future__ import annotations

import colorsys
import logging
import os
from collections import UserDict
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np

from d2kit.utils.names import AssertedTypeError, AssertedValueError, nearest_names

__all__ = [
    "CITYSCAPES_CATEGORIES",
    "COCO_CATEGORIES",
    "COCO_PERSON_KEYPOINT_FLIP_MAP",
    "COCO_PERSON_KEYPOINT_NAMES",
    "KEYPOINT_CONNECTION_RULES",
    "DatasetCatalog",
    "Metadata",
    "MetadataCatalog",
]


def dataset_root() -> str:
    """Return the folder of the public datasets.

    That is the environment variable D2KIT_DATASETS, or DETECTRON2_DATASETS, or `datasets` in the
    working folder.
    """
    names = ("D2KIT_DATASETS", "DETECTRON2_DATASETS")
    return os.path.expanduser(next(filter(None, map(os.environ.get, names)), "datasets"))


T = TypeVar("T")

logger = logging.getLogger(__name__)

GIVES_WAY = ("lvis_v1_train_cocofied", "lvis_v1_val_cocofied")
"""Public datasets that Detectron2 does not register: somebody's own of that name replaces them."""

_PENDING: dict[str, Callable[[str], None]] = {}
"""Datasets that are known but registered only when first named (see `register_on_use`)."""


def register_on_use(names: Iterable[str], register: Callable[[str], None]) -> None:
    """Make `names` known; `register(name)` runs when one of them is first asked for.

    Args:
        names: dataset names.
        register: registers the dataset of that name in both catalogs.
    """
    _PENDING.update(dict.fromkeys(names, register))


def _settle(name: object) -> None:
    """Register the pending dataset `name`, if it is one."""
    register = _PENDING.pop(name, None) if isinstance(name, str) else None
    if register is not None:
        register(str(name))


class _DatasetCatalog(UserDict[str, Callable[[], Any]]):
    """Maps the name of a dataset to a function that returns its records.

    The function takes no argument and returns a list of dictionaries in the standard format
    (`file_name`, `height`, `width`, `image_id`, `annotations`), or a `torch.utils.data.Dataset`.
    """

    def register(self, name: str, func: Callable[[], Any]) -> None:
        """Register `func` under `name`.

        Args:
            name: a new name.
            func: called without arguments by `get`; the same records in the same order every time.

        Raises:
            TypeError: `func` is not callable.
            ValueError: the name is taken.
        """
        if not callable(func):
            raise AssertedTypeError(
                f"DatasetCatalog.register('{name}', ...) expects a function without arguments, "
                f"got {type(func).__name__}"
            )
        if name in GIVES_WAY and _PENDING.pop(name, None) is not None:
            logger.info("Dataset '%s' is now the one that was just registered", name)
        if name in self:
            raise AssertedValueError(
                f"dataset '{name}' is already registered; choose another name or call "
                f"DatasetCatalog.remove('{name}') first"
            )
        self.data[name] = func

    def get(self, name: str) -> list[dict[str, Any]]:  # type: ignore[override]
        """Load the dataset `name`.

        Returns:
            What the registered function returns.

        Raises:
            KeyError: there is no such dataset; the message lists the nearest names.
        """
        found: list[dict[str, Any]] = self[name]()
        return found

    def list(self) -> list[str]:
        """Return the names of all datasets; none is registered by that."""
        return [*self.data, *_PENDING]

    def remove(self, name: str) -> None:
        """Forget the dataset `name`; its metadata stays."""
        self.pop(name)

    def clear(self) -> None:
        """Forget all datasets, the built-in ones included."""
        _PENDING.clear()
        self.data.clear()

    def __contains__(self, key: object) -> bool:
        _settle(key)
        return key in self.data

    def __getitem__(self, key: str) -> Callable[[], Any]:
        _settle(key)
        if key in self.data:
            return self.data[key]
        known = [*self.data, *_PENDING]
        near = nearest_names(str(key), known)
        if near:
            hint = f"nearest: {', '.join(near)}"
        else:
            hint = f"registered: {', '.join(sorted(self.data)) or 'none'}"
        raise KeyError(
            f"dataset '{key}' is not registered ({hint}). Register it before use: for COCO JSON in "
            f"the config, DATASETS.REGISTER_COCO: [[{key}, annotations.json, image/folder]], or in "
            f"Python, d2kit.register_dataset('{key}', 'annotations.json', 'image/folder'), "
            f"or DatasetCatalog.register('{key}', function)"
        )

    def __delitem__(self, key: str) -> None:
        self[key]  # the error for an unknown name
        del self.data[key]

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)


class Metadata(SimpleNamespace):
    """Facts of one dataset as attributes: `thing_classes`, `json_file`, `evaluator_type`, ...

    An attribute is set once; setting it again to an equal value does nothing, and to another value
    is an error, so that two parts of a program cannot disagree about a dataset.
    """

    name: str = "N/A"

    def __getattr__(self, key: str) -> Any:
        if key.startswith("__"):
            raise AttributeError(key)
        present = [k for k in self.__dict__ if k != "name"]
        near = nearest_names(key, present)
        hint = f"nearest: {', '.join(near)}" if near else f"it has: {', '.join(present) or 'none'}"
        raise AttributeError(
            f"metadata of dataset '{self.name}' has no attribute '{key}' ({hint}). Some attributes "
            f"exist only after the dataset was loaded by DatasetCatalog.get('{self.name}'); set "
            f"others by MetadataCatalog.get('{self.name}').set({key}=...)"
        )

    def __setattr__(self, key: str, value: object) -> None:
        if key in self.__dict__ and not _equal(self.__dict__[key], value):
            raise AssertedValueError(
                f"metadata '{key}' of dataset '{self.name}' is already "
                f"{_short(self.__dict__[key])} and cannot become {_short(value)}; use "
                f"another dataset name, or MetadataCatalog.remove('{self.name}') first"
            )
        super().__setattr__(key, value)

    def as_dict(self) -> dict[str, Any]:
        """Return a copy of all attributes; changing it does not change the metadata."""
        return dict(self.__dict__)

    def set(self, **kwargs: object) -> Metadata:
        """Set several attributes; returns the metadata itself."""
        for key, value in kwargs.items():
            setattr(self, key, value)
        return self

    def get(self, key: str, default: T | None = None) -> Any | T | None:
        """Return attribute `key`, or `default` where it is not set."""
        return self.__dict__.get(key, default)


def _equal(a: Any, b: Any) -> bool:
    """Compare values that may hold arrays."""
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.array_equal(a, b)
    return bool(a == b)


def _short(value: object) -> str:
    """Show a value within 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class _MetadataCatalog(UserDict[str, Metadata]):
    """Maps the name of a dataset to its `Metadata`, which exists once per name."""

    def get(self, name: str) -> Metadata:  # type: ignore[override]
        """Return the metadata of `name`; an empty one is made for a new name.

        Args:
            name: name of a dataset, registered or not.

        Raises:
            ValueError: the name is empty.
        """
        if not name:
            raise AssertedValueError("MetadataCatalog.get expects the name of a dataset, got ''")
        _settle(name)
        if name not in self.data:
            self.data[name] = Metadata(name=name)
        return self.data[name]

    def list(self) -> list[str]:
        """Return the names that have metadata; those of public datasets are made when asked for."""
        return [*self.data, *(name for name in _PENDING if name not in self.data)]

    def remove(self, name: str) -> None:
        """Forget the metadata of `name`; the dataset stays."""
        self.pop(name)

    def __contains__(self, key: object) -> bool:
        _settle(key)
        return key in self.data

    def __getitem__(self, key: str) -> Metadata:
        _settle(key)
        return super().__getitem__(key)

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)


DatasetCatalog = _DatasetCatalog()
MetadataCatalog = _MetadataCatalog()


_COCO_THINGS = """
1 person|2 bicycle|3 car|4 motorcycle|5 airplane|6 bus|7 train|8 truck|9 boat|10 traffic light
11 fire hydrant|13 stop sign|14 parking meter|15 bench|16 bird|17 cat|18 dog|19 horse|20 sheep
21 cow|22 elephant|23 bear|24 zebra|25 giraffe|27 backpack|28 umbrella|31 handbag|32 tie
33 suitcase|34 frisbee|35 skis|36 snowboard|37 sports ball|38 kite|39 baseball bat
40 baseball glove|41 skateboard|42 surfboard|43 tennis racket|44 bottle|46 wine glass|47 cup
48 fork|49 knife|50 spoon|51 bowl|52 banana|53 apple|54 sandwich|55 orange|56 broccoli|57 carrot
58 hot dog|59 pizza|60 donut|61 cake|62 chair|63 couch|64 potted plant|65 bed|67 dining table
70 toilet|72 tv|73 laptop|74 mouse|75 remote|76 keyboard|77 cell phone|78 microwave|79 oven
80 toaster|81 sink|82 refrigerator|84 book|85 clock|86 vase|87 scissors|88 teddy bear
89 hair drier|90 toothbrush
"""

_COCO_STUFF = """
92 banner|93 blanket|95 bridge|100 cardboard|107 counter|109 curtain|112 door-stuff
118 floor-wood|119 flower|122 fruit|125 gravel|128 house|130 light|133 mirror-stuff|138 net
141 pillow|144 platform|145 playingfield|147 railroad|148 river|149 road|151 roof|154 sand
155 sea|156 shelf|159 snow|161 stairs|166 tent|168 towel|171 wall-brick|175 wall-stone
176 wall-tile|177 wall-wood|178 water-other|180 window-blind|181 window-other|184 tree-merged
185 fence-merged|186 ceiling-merged|187 sky-other-merged|188 cabinet-merged|189 table-merged
190 floor-other-merged|191 pavement-merged|192 mountain-merged|193 grass-merged|194 dirt-merged
195 paper-merged|196 food-other-merged|197 building-other-merged|198 rock-merged
199 wall-other-merged|200 rug-merged
"""

_CITYSCAPES_STUFF = """
7 road|8 sidewalk|11 building|12 wall|13 fence|17 pole|19 traffic light|20 traffic sign
21 vegetation|22 terrain|23 sky
"""

_CITYSCAPES_THINGS = """
24 person|25 rider|26 car|27 truck|28 bus|31 train|32 motorcycle|33 bicycle
"""


def _colour(number: int) -> list[int]:
    """Return the RGB colour of a number in [0, 255]; successive ones differ in hue and lightness.

    Args:
        number: 0, 1, ... The hue advances by the golden ratio, which keeps all hues far apart.
    """
    hue = number * 0.6180339887498949 % 1.0
    lightness = (0.5, 0.38, 0.65)[number % 3]
    return [
        round(255 * c) for c in colorsys.hls_to_rgb(hue, lightness, (0.9, 0.7)[number // 3 % 2])
    ]


def _categories(*groups: tuple[str, int]) -> list[dict[str, Any]]:
    """Return the entries of tables of "id name", each with its `isthing`."""
    entries: list[dict[str, Any]] = []
    for table, isthing in groups:
        for item in table.strip().replace("\n", "|").split("|"):
            number, name = item.split(" ", 1)
            colour = _colour(len(entries))
            entries.append({"color": colour, "isthing": isthing, "id": int(number), "name": name})
    return entries


COCO_CATEGORIES = _categories((_COCO_THINGS, 1), (_COCO_STUFF, 0))
"""The 80 thing and 53 stuff categories of COCO's panoptic task."""

CITYSCAPES_CATEGORIES = [
    {**category, "trainId": train_id}
    for train_id, category in enumerate(
        _categories((_CITYSCAPES_STUFF, 0), (_CITYSCAPES_THINGS, 1))
    )
]
"""The 19 evaluated categories of Cityscapes."""

COCO_PERSON_KEYPOINT_NAMES = (
    "nose",
    *(f"{side}_{part}" for part in ("eye", "ear", "shoulder") for side in ("left", "right")),
    *(f"{side}_{part}" for part in ("elbow", "wrist", "hip") for side in ("left", "right")),
    *(f"{side}_{part}" for part in ("knee", "ankle") for side in ("left", "right")),
)
"""The 17 keypoints of a person."""

COCO_PERSON_KEYPOINT_FLIP_MAP = tuple(
    (name, name.replace("left", "right"))
    for name in COCO_PERSON_KEYPOINT_NAMES
    if name.startswith("left")
)
"""Pairs of keypoints that a horizontal flip exchanges."""

_CONNECTIONS = [
    ("left_ear", "left_eye"),
    ("right_ear", "right_eye"),
    ("left_eye", "nose"),
    ("nose", "right_eye"),
    ("left_shoulder", "right_shoulder"),
    ("left_shoulder", "left_elbow"),
    ("right_shoulder", "right_elbow"),
    ("left_elbow", "left_wrist"),
    ("right_elbow", "right_wrist"),
    ("left_hip", "right_hip"),
    ("left_hip", "left_knee"),
    ("right_hip", "right_knee"),
    ("left_knee", "left_ankle"),
    ("right_knee", "right_ankle"),
]

KEYPOINT_CONNECTION_RULES = [
    (*pair, tuple(_colour(number))) for number, pair in enumerate(_CONNECTIONS)
]
"""Lines of a drawn skeleton: (keypoint, keypoint, RGB colour)."""


def _get_coco_instances_meta() -> dict[str, Any]:
    """Return the metadata of COCO's 80 thing categories."""
    things = [category for category in COCO_CATEGORIES if category["isthing"]]
    return {
        "thing_dataset_id_to_contiguous_id": {c["id"]: i for i, c in enumerate(things)},
        "thing_classes": [c["name"] for c in things],
        "thing_colors": [c["color"] for c in things],
    }


def _get_coco_person_meta() -> dict[str, Any]:
    """Return the metadata of COCO's person keypoints."""
    return {
        "thing_classes": ["person"],
        "keypoint_names": COCO_PERSON_KEYPOINT_NAMES,
        "keypoint_flip_map": COCO_PERSON_KEYPOINT_FLIP_MAP,
        "keypoint_connection_rules": KEYPOINT_CONNECTION_RULES,
    }


def _get_coco_panoptic_separated_meta() -> dict[str, Any]:
    """Return the metadata of COCO's panoptic task with instances and label images apart.

    In the label images 0 is all things together, and the stuff classes are 1 to 53.
    """
    stuff = [category for category in COCO_CATEGORIES if not category["isthing"]]
    return {
        "stuff_dataset_id_to_contiguous_id": {0: 0, **{c["id"]: i for i, c in enumerate(stuff, 1)}},
        "stuff_classes": ["things", *(c["name"] for c in stuff)],
        "stuff_colors": [_colour(len(COCO_CATEGORIES)), *(c["color"] for c in stuff)],
        **_get_coco_instances_meta(),
    }


def _get_coco_panoptic_standard_meta() -> dict[str, Any]:
    """Return the metadata of COCO's panoptic task: 133 classes, numbered through."""
    names = [category["name"] for category in COCO_CATEGORIES]
    colors = [category["color"] for category in COCO_CATEGORIES]
    ids: tuple[dict[int, int], dict[int, int]] = {}, {}
    for index, category in enumerate(COCO_CATEGORIES):
        ids[category["isthing"]][category["id"]] = index
    return {
        "thing_classes": names,
        "thing_colors": colors,
        "stuff_classes": names,
        "stuff_colors": colors,
        "thing_dataset_id_to_contiguous_id": ids[1],
        "stuff_dataset_id_to_contiguous_id": ids[0],
    }


def _get_cityscapes_meta() -> dict[str, Any]:
    """Return the metadata of Cityscapes: 8 classes of things, 19 classes in all."""
    things = [category for category in CITYSCAPES_CATEGORIES if category["isthing"]]
    return {
        "thing_classes": [c["name"] for c in things],
        "thing_colors": [c["color"] for c in things],
        "stuff_classes": [c["name"] for c in CITYSCAPES_CATEGORIES],
        "stuff_colors": [c["color"] for c in CITYSCAPES_CATEGORIES],
    }


def _get_builtin_metadata(dataset_name: str) -> dict[str, Any]:
    """Return the metadata of a public dataset.

    Args:
        dataset_name: "coco", "coco_person", "coco_panoptic_separated", "coco_panoptic_standard" or
            "cityscapes".

    Raises:
        KeyError: there are no facts of that name.
    """
    makers = {
        "coco": _get_coco_instances_meta,
        "coco_person": _get_coco_person_meta,
        "coco_panoptic_separated": _get_coco_panoptic_separated_meta,
        "coco_panoptic_standard": _get_coco_panoptic_standard_meta,
        "cityscapes": _get_cityscapes_meta,
    }
    if dataset_name not in makers:
        near = nearest_names(dataset_name, makers) or list(makers)
        raise KeyError(f"no built-in metadata '{dataset_name}'; nearest: {', '.join(near)}")
    return makers[dataset_name]()
