"""Segmentations in annotations: run-length codes, bit masks and polygons."""

from typing import Any

import numpy as np
from fvcore.transforms.transform import PadTransform, TransformList

from d2kit.data._image_io import MAX_IMAGE_PIXELS
from d2kit.data.datasets._rle import decode_counts

_LARGEST_COORDINATE = 1e6  # pixels; pycocotools reserves memory for every pixel of an outline


def decode_rle(rle: dict[str, Any]) -> np.ndarray:
    """Decode a run-length code of COCO, compressed or not, checking it wholly.

    pycocotools returns uninitialised memory where the counts do not fill the mask; here that is an
    error.

    Args:
        rle: {"size": [h, w], "counts": str, bytes or list of ints}; runs go down the columns.

    Returns:
        (H, W) uint8 of 0 and 1.

    Raises:
        ValueError: for a code that is malformed, or does not fit its size.
    """
    height, width = rle_size(rle)
    mask = np.zeros((width, height), dtype=np.uint8).T
    paint_rle(rle, mask)
    return mask


def rle_size(rle: dict[str, Any]) -> tuple[int, int]:
    """Return (h, w) of a run-length code.

    Raises:
        ValueError: where it has none, or none that an image may have.
    """
    size = rle.get("size")
    if "counts" not in rle or size is None or len(size) != 2:
        raise ValueError(f"an RLE must have 'size' [h, w] and 'counts', got keys {sorted(rle)}")
    height, width = int(size[0]), int(size[1])
    if min(height, width) < 0 or height * width > MAX_IMAGE_PIXELS:
        raise ValueError(f"RLE size {height}x{width} is not that of an image")
    return height, width


def paint_rle(rle: dict[str, Any], canvas: np.ndarray) -> None:
    """Decode a run-length code into an array of zeros, touching only the columns of the object.

    Args:
        rle: see `decode_rle`.
        canvas: (H, W) of the size of `rle`, uint8 or bool, all zero.

    Raises:
        ValueError: as `decode_rle`.
    """
    height, width = rle_size(rle)
    counts = rle["counts"]
    if isinstance(counts, (str, bytes)):
        try:
            counts = decode_counts(counts)
        except ValueError as error:
            raise ValueError(f"RLE counts are damaged: {error}") from error
    else:
        counts = np.asarray(counts, dtype=np.int64)
    if counts.ndim != 1 or (counts < 0).any() or counts.sum() != height * width:
        raise ValueError(
            f"RLE counts must be >= 0 and add up to {height}x{width} = {height * width}, got "
            f"{counts.sum()}"
        )
    ends = np.cumsum(counts)
    objects = np.flatnonzero(counts[1::2]) * 2 + 1  # every second run is of the object
    if len(objects) == 0:
        return
    first, last = ends[objects[0] - 1] // height, (ends[objects[-1]] - 1) // height + 1
    lengths = np.diff(ends.clip(first * height, last * height), prepend=first * height)
    values = (np.arange(len(lengths)) & 1).astype(canvas.dtype)
    canvas[:, first:last] = np.repeat(values, lengths).reshape(last - first, height).T


def name_of(annotation: dict[str, Any]) -> str:
    """Return how messages call an annotation: by its id where it has one."""
    return f"annotation {annotation['id']}" if "id" in annotation else "an annotation"


def transform_segmentation(
    annotation: dict[str, Any], transforms: Any, image_size: tuple[int, int]
) -> Any:
    """Transform the "segmentation" of an annotation.

    Args:
        annotation: with polygons (list of flat coordinate lists), an RLE dict, or a mask (H, W).
        transforms: `Transform`.
        image_size: (h, w) after the transforms.

    Returns:
        Polygons as list of float64 arrays (2P,), or a mask (h, w).

    Raises:
        ValueError: for a segmentation of another kind or size.
    """
    segmentation = annotation["segmentation"]
    if isinstance(segmentation, (list, tuple)):
        polygons = [_points(polygon, annotation) for polygon in segmentation]
        return [p.reshape(-1) for p in transforms.apply_polygons(polygons)]
    try:
        if isinstance(segmentation, dict):
            mask = decode_rle(segmentation)
        elif isinstance(segmentation, np.ndarray) and segmentation.ndim == 2:
            mask = segmentation
        else:
            raise ValueError(
                "expected polygons (list of lists), an RLE dict or a mask (H, W), got "
                f"{type(segmentation).__name__} {np.shape(segmentation)}"
            )
        mask = _transform_mask(transforms, mask)
        if tuple(mask.shape[:2]) != tuple(image_size):
            raise ValueError(f"mask is {mask.shape} where the image is {tuple(image_size)} (h, w)")
    except ValueError as error:
        raise ValueError(f"segmentation of {name_of(annotation)}: {error}") from error
    return mask


def _transform_mask(transform: Any, mask: np.ndarray) -> np.ndarray:
    """Transform the mask (H, W) of one object; no object lies in a border that is added.

    The border of a label map may have another value (`FixedSizeCrop` adds 255, "ignored").
    """
    if isinstance(transform, TransformList):
        for step in transform.transforms:
            mask = _transform_mask(step, mask)
        return mask
    if isinstance(transform, PadTransform):
        sides = ((transform.y0, transform.y1), (transform.x0, transform.x1))
        return np.pad(mask, sides)
    return transform.apply_segmentation(mask)


def _points(polygon: Any, annotation: dict[str, Any]) -> np.ndarray:
    """Return a polygon as new (P, 2) float64 array (fvcore's transforms write into it)."""
    try:
        points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
        if not (np.abs(points) < _LARGEST_COORDINATE).all():
            raise ValueError(f"coordinates must be finite and below {_LARGEST_COORDINATE:g}")
        return points
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"segmentation of {name_of(annotation)}: a polygon must be a flat list x0, y0, x1, y1, "
            f"... of numbers ({error})"
        ) from error


def paint_segmentation(annotation: dict[str, Any], canvas: np.ndarray) -> None:
    """Paint the "segmentation" of an annotation, of any kind, into an array of zeros.

    Polygons are rasterised by COCO's rule, as run-length code, and painted like one: 0.2 ms for an
    object of 200 pixels in an image of 800x1067, where decoding it in full takes 5.

    Args:
        annotation: with polygons, an RLE dict, or a mask (H, W).
        canvas: (H, W) bool, all False.

    Raises:
        ValueError: where the segmentation has another size than `canvas`.
    """
    segmentation = annotation["segmentation"]
    if isinstance(segmentation, (list, tuple)):
        if len(segmentation) == 0:
            return
        from pycocotools import mask as coco_mask

        polygons = [np.asarray(p, dtype=np.float64).reshape(-1) for p in segmentation]
        segmentation = coco_mask.merge(coco_mask.frPyObjects(polygons, *canvas.shape))
    found = rle_size(segmentation) if isinstance(segmentation, dict) else segmentation.shape
    if found != canvas.shape:
        raise ValueError(
            f"segmentation of {name_of(annotation)}: expected a mask of {canvas.shape} (h, w)"
            f", got {found}"
        )
    if isinstance(segmentation, dict):
        paint_rle(segmentation, canvas)
    else:
        np.not_equal(segmentation, 0, out=canvas)
