"""Dataset formats, and the public datasets (registered on use)."""

from d2kit.data.datasets.builtin import dataset_root
from d2kit.data.datasets.coco import (
    convert_to_coco_dict,
    convert_to_coco_json,
    load_coco_json,
    load_sem_seg,
    register_coco_instances,
    register_dataset,
)

__all__ = [
    "convert_to_coco_dict",
    "convert_to_coco_json",
    "dataset_root",
    "load_coco_json",
    "load_sem_seg",
    "register_coco_instances",
    "register_dataset",
]
