"""From a mask to an annotation of a COCO JSON file."""

from __future__ import annotations

import numpy as np


def mask_annotation(mask: np.ndarray, category_id: int) -> dict:
    """Return box, area and RLE of one instance.

    Args:
        mask: (H, W) bool with at least one pixel.
        category_id: id in the file's "categories".

    Returns:
        An entry of "annotations" without "id" and "image_id".
    """
    from pycocotools import mask as mask_util

    rle = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = [xs[0], ys[0], xs[-1] + 1 - xs[0], ys[-1] + 1 - ys[0]]
    return {
        "category_id": category_id,
        "bbox": [float(b) for b in box],
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")},
    }
