"""Dataset formats, and the public datasets (registered on use)."""

from d2kit.data.datasets.builtin import dataset_root
from d2kit.data.datasets.cityscapes import load_cityscapes_instances, load_cityscapes_semantic
from d2kit.data.datasets.coco import (
    convert_to_coco_dict,
    convert_to_coco_json,
    load_coco_json,
    load_sem_seg,
    register_coco_instances,
    register_dataset,
)
from d2kit.data.datasets.coco_panoptic import (
    load_coco_panoptic_json,
    register_coco_panoptic,
    register_coco_panoptic_separated,
)
from d2kit.data.datasets.lvis import (
    get_lvis_instances_meta,
    load_lvis_json,
    register_lvis_instances,
)
from d2kit.data.datasets.pascal_voc import load_voc_instances, register_pascal_voc

__all__ = [
    "convert_to_coco_dict",
    "convert_to_coco_json",
    "dataset_root",
    "get_lvis_instances_meta",
    "load_cityscapes_instances",
    "load_cityscapes_semantic",
    "load_coco_json",
    "load_coco_panoptic_json",
    "load_lvis_json",
    "load_sem_seg",
    "load_voc_instances",
    "register_coco_instances",
    "register_coco_panoptic",
    "register_coco_panoptic_separated",
    "register_dataset",
    "register_lvis_instances",
    "register_pascal_voc",
]
