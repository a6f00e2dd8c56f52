"""Semantic segmentation as pairs of image and label files."""

import logging
import os
from typing import Any

__all__ = ["load_sem_seg"]


def load_sem_seg(
    gt_root: str, image_root: str, gt_ext: str = "png", image_ext: str = "jpg"
) -> list[dict[str, Any]]:
    """Pair the images of one folder tree with the label images of another.

    Args:
        gt_root: folder of label images, whose pixel values are class indices.
        image_root: folder of images.
        gt_ext: extension of the label images.
        image_ext: extension of the images.

    Returns:
        Records with `file_name` and `sem_seg_file_name`, sorted by name. Files whose relative path
        without extension occurs on one side only are left out, with a warning.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: no file is in both folders.
    """
    images = _files(image_root, image_ext)
    labels = _files(gt_root, gt_ext)
    both = sorted(images.keys() & labels.keys())
    if not both:
        raise ValueError(
            f"no '*.{image_ext}' of {image_root} has a '*.{gt_ext}' of the same name in {gt_root} "
            f"({len(images)} images, {len(labels)} label images)"
        )
    left_out = len(images) + len(labels) - 2 * len(both)
    logger = logging.getLogger(__name__)
    if left_out:
        logger.warning(
            "%s and %s: left out %d files without a partner", image_root, gt_root, left_out
        )
    logger.info("Loaded %d images with semantic labels from %s", len(both), image_root)
    return [{"file_name": images[key], "sem_seg_file_name": labels[key]} for key in both]


def _files(root: str, extension: str) -> dict[str, str]:
    """Return relative path without extension -> path, for the files below `root`."""
    if not os.path.isdir(root):
        raise FileNotFoundError(f"folder '{root}' does not exist")
    suffix = "." + extension.lstrip(".")
    found = {}
    for folder, _, names in os.walk(root, followlinks=True):
        for name in names:
            if name.endswith(suffix):
                path = os.path.join(folder, name)
                found[os.path.relpath(path, root).removesuffix(suffix)] = path
    return found
