"""The public datasets, registered when one of them is first named.

Their folder is `dataset_root()`; datasets/README.md shows what is expected below it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from d2kit.data.catalog import (
    DatasetCatalog,
    MetadataCatalog,
    _get_builtin_metadata,
    dataset_root,
    register_on_use,
)
from d2kit.data.datasets.cityscapes import load_cityscapes_instances, load_cityscapes_semantic
from d2kit.data.datasets.coco import CocoInstances, load_sem_seg, register_coco_instances
from d2kit.data.datasets.coco_panoptic import (
    register_coco_panoptic,
    register_separated,
    register_stuff_only,
)
from d2kit.data.datasets.lvis import get_lvis_instances_meta, register_lvis_instances
from d2kit.data.datasets.pascal_voc import register_pascal_voc
from d2kit.data.datasets.validate import DatasetError

__all__ = ["dataset_root", "register_builtin"]


KEY = "DATASETS.REGISTER_COCO"


def register_datasets(entries: Sequence[Sequence[str]]) -> None:
    """Register datasets in COCO format; nothing is read yet, and the same twice is no error.

    Args:
        entries: (name, annotation file, image folder) each, as in DATASETS.REGISTER_COCO. A
            relative path counts from the current folder or, if there is no such file, from the
            folder that D2KIT_DATASETS names.

    Raises:
        ValueError: an entry is of another form, holds a URL, or a name is taken by other files.
    """
    for entry in entries:
        name, json_file, image_root = _checked(entry)
        paths = _place(json_file), _place(image_root)
        if name not in DatasetCatalog:
            register_coco_instances(name, {}, *paths)
            continue
        known = DatasetCatalog[name]
        if not _is_of(known, *paths):
            now = "otherwise"
            if isinstance(known, CocoInstances):
                now = f"with '{known.json_file}' and '{known.image_root}'"
            raise ValueError(
                f"{KEY}: dataset '{name}' is already registered {now}, not with '{paths[0]}' and "
                f"'{paths[1]}'; choose another name"
            )


def _checked(entry: object) -> tuple[str, str, str]:
    """Return an entry, or raise a ValueError that shows the form."""
    form = "[name, annotations.json, folder of images]"
    if not isinstance(entry, (list, tuple)) or len(entry) != 3:
        raise ValueError(f"{KEY}: expected a list of {form}, got the entry {entry!r}")
    if not all(isinstance(part, str) and part for part in entry):
        raise ValueError(f"{KEY}: expected three texts {form}, got {entry!r}")
    for path in entry[1:]:
        if "://" in path:
            raise ValueError(f"{KEY}: '{path}' is no local path; download it, and give its path")
    return entry[0], entry[1], entry[2]


def _place(path: str) -> str:
    """Return where a path of a config leads."""
    path = os.path.expanduser(path)
    below = os.path.join(dataset_root(), path)  # an absolute path stays itself
    return below if not os.path.exists(path) and os.path.exists(below) else path


def _is_of(known: object, json_file: str, image_root: str) -> bool:
    if not isinstance(known, CocoInstances):
        return False
    pairs = ((known.json_file, json_file), (known.image_root, image_root))
    return all(os.path.realpath(a) == os.path.realpath(b) for a, b in pairs)


def ade20k_classes(root: str) -> list[str]:
    """Return the class names in the order of their indices.

    Args:
        root: folder "ADEChallengeData2016" with ``objectInfo150.txt``: a head line, then per class
            columns between tabs; the first is the number from 1, the last the synonyms.

    Returns:
        The first synonym of each class; all of them where another class has the same first.

    Raises:
        FileNotFoundError: there is no such file.
        DatasetError: it has another form.
    """
    path = os.path.join(root, "objectInfo150.txt")
    names = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(filter(None, map(str.strip, list(file)[1:])), start=1):
            cells = [cell.strip() for cell in line.split("\t")]
            if len(cells) < 2 or cells[0] != str(number) or not cells[-1]:
                raise DatasetError(
                    f"{path}: line {number + 1}: expected class {number}, ..., its names between "
                    f"tabs, got {line[:60]!r}"
                )
            names.append(cells[-1])
    first = [name.split(",")[0].strip() for name in names]
    return [
        short if first.count(short) == 1 else name for short, name in zip(first, names, strict=True)
    ]


_IMAGE_FOLDERS = {
    "2014_train": "train2014",
    "2014_val": "val2014",
    "2014_minival": "val2014",
    "2014_valminusminival": "val2014",
    "2017_train": "train2017",
    "2017_val": "val2017",
    "2017_val_100": "val2017",
}

_TEST_LISTS = {
    "coco_2017_test": "image_info_test2017.json",
    "coco_2017_test-dev": "image_info_test-dev2017.json",
}

_PANOPTIC_SPLITS = ("2017_train", "2017_val", "2017_val_100")

_LVIS_FILES = {
    **{f"lvis_v1_{split}": f"lvis_v1_{split}.json" for split in ("train", "val")},
    "lvis_v1_test_dev": "lvis_v1_image_info_test_dev.json",
    "lvis_v1_test_challenge": "lvis_v1_image_info_test_challenge.json",
    **{f"lvis_v0.5_{s}": f"lvis_v0.5_{s}.json" for s in ("train", "val", "val_rand_100")},
    "lvis_v0.5_test": "lvis_v0.5_image_info_test.json",
    **{
        f"lvis_{version}_{split}_cocofied": f"lvis_{version}_{split}_cocofied.json"
        for version in ("v0.5", "v1")
        for split in ("train", "val")
    },
}

_VOC_SPLITS = {
    f"voc_{year}_{split}": (year, split)
    for year, splits in {
        2007: ("trainval", "train", "val", "test"),
        2012: ("trainval", "train", "val"),
    }.items()
    for split in splits
}

_CITYSCAPES = {
    f"cityscapes_fine_{task}_{split}": (task, split)
    for task in ("instance_seg", "sem_seg")
    for split in ("train", "val", "test")
}

_ADE20K = {"ade20k_sem_seg_train": "training", "ade20k_sem_seg_val": "validation"}


def _under(*parts: str) -> str:
    return os.path.join(dataset_root(), *parts)


def _coco_files(split: str, stem: str) -> tuple[str, str]:
    """Return annotation file and image folder of a split such as "2017_val_100"."""
    year, part = split.split("_", 1)
    hundred = "_100" if part.endswith("_100") else ""
    file = f"{stem}_{part.removesuffix('_100')}{year}{hundred}.json"
    return _under("coco", "annotations", file), _under("coco", _IMAGE_FOLDERS[split])


def _register_coco(name: str) -> None:
    persons = name.startswith("keypoints_")
    if name in _TEST_LISTS:
        files = _under("coco", "annotations", _TEST_LISTS[name]), _under("coco", "test2017")
    else:
        split = name.removeprefix("keypoints_").removeprefix("coco_")
        files = _coco_files(split, "person_keypoints" if persons else "instances")
    metadata = _get_builtin_metadata("coco_person" if persons else "coco")
    register_coco_instances(name, metadata, *files)


def _register_coco_panoptic(name: str) -> None:
    split, _, kind = name.removeprefix("coco_").partition("_panoptic")
    panoptic_json, image_root = _coco_files(split, "panoptic")
    panoptic_root = _under("coco", os.path.basename(panoptic_json).removesuffix(".json"))
    labels = panoptic_root.replace("panoptic_", "panoptic_stuff_")
    instances_json, _ = _coco_files(split, "instances")
    if not kind:
        metadata = _get_builtin_metadata("coco_panoptic_standard")
        register_coco_panoptic(
            name, metadata, image_root, panoptic_root, panoptic_json, instances_json
        )
        return
    metadata = _get_builtin_metadata("coco_panoptic_separated")
    if kind == "_stuffonly":
        register_stuff_only(name, metadata, image_root, labels)
    else:
        register_separated(
            name, metadata, image_root, panoptic_root, panoptic_json, labels, instances_json
        )


def _register_lvis(name: str) -> None:
    metadata = get_lvis_instances_meta(name)
    register_lvis_instances(name, metadata, _under("lvis", _LVIS_FILES[name]), _under("coco"))


def _register_voc(name: str) -> None:
    year, split = _VOC_SPLITS[name]
    register_pascal_voc(name, _under(f"VOC{year}"), split, year)
    MetadataCatalog.get(name).evaluator_type = "pascal_voc"


def _register_cityscapes(name: str) -> None:
    task, split = _CITYSCAPES[name]
    folders = _under("cityscapes", "leftImg8bit", split), _under("cityscapes", "gtFine", split)
    facts: dict[str, Any] = {"image_dir": folders[0], "gt_dir": folders[1]}
    if task == "instance_seg":
        DatasetCatalog.register(name, lambda: load_cityscapes_instances(*folders))
        facts["evaluator_type"] = "cityscapes_instance"
    else:
        DatasetCatalog.register(name, lambda: load_cityscapes_semantic(*folders))
        facts |= {"evaluator_type": "cityscapes_sem_seg", "ignore_label": 255}
    MetadataCatalog.get(name).set(**facts, **_get_builtin_metadata("cityscapes"))


def _register_ade20k(name: str) -> None:
    root, split = _under("ADEChallengeData2016"), _ADE20K[name]
    folders = (
        os.path.join(root, "annotations_detectron2", split),
        os.path.join(root, "images", split),
    )
    try:
        classes = {"stuff_classes": ade20k_classes(root)}
    except FileNotFoundError:
        classes = {}  # they come with the dataset, which is not there
    DatasetCatalog.register(name, lambda: load_sem_seg(*folders))
    MetadataCatalog.get(name).set(
        sem_seg_root=folders[0],
        image_root=folders[1],
        evaluator_type="sem_seg",
        ignore_label=255,
        **classes,
    )


_FAMILIES = (
    (
        _register_coco,
        [
            *(f"coco_{split}" for split in _IMAGE_FOLDERS),
            *(f"keypoints_coco_{split}" for split in _IMAGE_FOLDERS),
            *_TEST_LISTS,
        ],
    ),
    (
        _register_coco_panoptic,
        [
            f"coco_{split}_panoptic{kind}"
            for split in _PANOPTIC_SPLITS
            for kind in ("", "_separated", "_stuffonly")
        ],
    ),
    (_register_lvis, [*_LVIS_FILES]),
    (_register_voc, [*_VOC_SPLITS]),
    (_register_cityscapes, [*_CITYSCAPES]),
    (_register_ade20k, [*_ADE20K]),
)


def register_builtin(name: str) -> None:
    """Register the public dataset `name` below `dataset_root()`.

    Args:
        name: for example "coco_2017_val" or "keypoints_coco_2017_val".

    Raises:
        KeyError: there is no public dataset of that name.
    """
    register = next((function for function, names in _FAMILIES if name in names), None)
    if register is None:
        raise KeyError(f"'{name}' is no public dataset that d2kit knows")
    register(name)


register_on_use([name for _, names in _FAMILIES for name in names], register_builtin)
