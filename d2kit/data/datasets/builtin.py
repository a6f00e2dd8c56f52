"""The public datasets, registered when one of them is first named.

Their folder is `dataset_root()`; datasets/README.md shows what is expected below it.
"""

import os
from typing import Any

from d2kit.data.catalog import DatasetCatalog, MetadataCatalog, register_on_use
from d2kit.data.datasets._ade20k import ade20k_classes
from d2kit.data.datasets._root import dataset_root
from d2kit.data.datasets._sem_seg import load_sem_seg
from d2kit.data.datasets.builtin_meta import _get_builtin_metadata
from d2kit.data.datasets.cityscapes import load_cityscapes_instances, load_cityscapes_semantic
from d2kit.data.datasets.coco import register_coco_instances
from d2kit.data.datasets.coco_panoptic import (
    register_coco_panoptic,
    register_separated,
    register_stuff_only,
)
from d2kit.data.datasets.lvis import get_lvis_instances_meta, register_lvis_instances
from d2kit.data.datasets.pascal_voc import register_pascal_voc

__all__ = ["dataset_root", "register_builtin"]

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
    try:
        metadata = get_lvis_instances_meta(name)
    except FileNotFoundError:  # then the classes become known when the dataset is loaded
        metadata = {}
    register_lvis_instances(name, metadata, _under("lvis", _LVIS_FILES[name]), _under("coco"))


def _register_voc(name: str) -> None:
    year, split = _VOC_SPLITS[name]
    register_pascal_voc(name, _under(f"VOC{year}"), split, year)


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
