"""The public splits of COCO, registered when one of them is first named.

Their folder is that of the environment variable D2KIT_DATASETS, or DETECTRON2_DATASETS, or
`datasets` in the working folder; expected below it are `coco/annotations/*.json` and
`coco/{train,val,test}{2014,2017}/*.jpg`.
"""

import os

from d2kit.data.catalog import register_on_use
from d2kit.data.datasets.builtin_meta import _get_builtin_metadata
from d2kit.data.datasets.coco import register_coco_instances

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


def dataset_root() -> str:
    """Return the folder of the public datasets."""
    names = ("D2KIT_DATASETS", "DETECTRON2_DATASETS")
    return os.path.expanduser(next(filter(None, map(os.environ.get, names)), "datasets"))


def register_builtin(name: str) -> None:
    """Register the public dataset `name` below `dataset_root()`.

    Args:
        name: for example "coco_2017_val" or "keypoints_coco_2017_val".
    """
    base = os.path.join(dataset_root(), "coco")
    persons = name.startswith("keypoints_")
    split = name.removeprefix("keypoints_").removeprefix("coco_")
    if name in _TEST_LISTS:
        folder, file = "test2017", _TEST_LISTS[name]
    else:
        year, part = split.split("_", 1)
        stem = "person_keypoints" if persons else "instances"
        folder, file = _IMAGE_FOLDERS[split], f"{stem}_{part.removesuffix('_100')}{year}"
        file += "_100.json" if part.endswith("_100") else ".json"
    register_coco_instances(
        name,
        _get_builtin_metadata("coco_person" if persons else "coco"),
        os.path.join(base, "annotations", file),
        os.path.join(base, folder),
    )


register_on_use(
    [
        *(f"coco_{split}" for split in _IMAGE_FOLDERS),
        *(f"keypoints_coco_{split}" for split in _IMAGE_FOLDERS),
        *_TEST_LISTS,
    ],
    register_builtin,
)
