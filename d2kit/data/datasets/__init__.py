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
from d2kit.data.datasets.pascal_voc import load_voc_instances, register_pascal_voc

__all__ = [
    "convert_to_coco_dict",
    "convert_to_coco_json",
    "dataset_root",
    "load_coco_json",
    "load_sem_seg",
    "load_voc_instances",
    "register_coco_instances",
    "register_dataset",
    "register_pascal_voc",
]
