"""Conversion between COCO JSON and Pascal VOC, YOLO, labelme, CVAT and mask PNGs.

Read, not written: exports of VIA and Label Studio, CSV, a folder per class.

In memory a dataset is always a COCO dictionary. Readers refuse what is damaged, by file and field;
writers tell what their format cannot hold. hotcoco has converters too, but its VOC and YOLO files
lose polygons and folders, and its CVAT files split objects of several parts.
"""

from d2kit.curate.conversion.common import (
    coco_files,
    read_coco_dataset,
    read_folders,
    split_of,
    write_coco_dataset,
)
from d2kit.curate.conversion.foreign import IMAGE_FOLDERS, SPLITS, image_files, read_text
from d2kit.curate.conversion.json_formats import (
    is_label_studio,
    is_via,
    read_label_studio,
    read_labelme,
    read_via,
    write_labelme,
)
from d2kit.curate.conversion.masks import read_masks, write_masks
from d2kit.curate.conversion.text_formats import is_table, read_csv, read_yolo, write_yolo
from d2kit.curate.conversion.xml_formats import (
    CVAT_MARK,
    read_cvat,
    read_voc,
    write_cvat,
    write_voc,
)

__all__ = [
    "CVAT_MARK",
    "IMAGE_FOLDERS",
    "READERS",
    "SPLITS",
    "WRITERS",
    "coco_files",
    "image_files",
    "is_label_studio",
    "is_table",
    "is_via",
    "read_text",
    "split_of",
]

READERS = {
    "voc": read_voc,
    "yolo": read_yolo,
    "labelme": read_labelme,
    "cvat": read_cvat,
    "masks": read_masks,
    "coco": read_coco_dataset,
    "via": read_via,
    "labelstudio": read_label_studio,
    "csv": read_csv,
    "folders": read_folders,
}
"""Format -> function (path, image folder or None, counter of what COCO cannot hold or None) that
returns a COCO dictionary."""

WRITERS = {
    "voc": write_voc,
    "yolo": write_yolo,
    "labelme": write_labelme,
    "cvat": write_cvat,
    "masks": write_masks,
    "coco": write_coco_dataset,
}
"""Format -> function (COCO dictionary, path) that returns what was lost, each with a count."""
