"""From annotation dicts to `Instances`: transforming, converting, filtering."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from fvcore.transforms.transform import PadTransform

from d2kit.data.transforms import HFlipTransform, Transform, TransformList
from d2kit.structures import (
    BitMasks,
    Boxes,
    BoxMode,
    Instances,
    Keypoints,
    PolygonMasks,
    RotatedBoxes,
)
from d2kit.structures.masks import decode_counts
from d2kit.utils.file_io import MAX_IMAGE_PIXELS

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
    mask: np.ndarray = np.zeros((width, height), dtype=np.uint8).T
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
    found: np.ndarray = transform.apply_segmentation(mask)
    return found


def _points(polygon: object, annotation: dict[str, Any]) -> np.ndarray:
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


Annotation = dict[str, Any]

# Bit masks of one image, at one byte per pixel. More would end the process on most machines
# without a word; polygons have no such limit.
MAX_MASK_BYTES = 2**33


def get_bbox(annotation: Annotation) -> np.ndarray:
    """Return the "bbox" of an annotation.

    Args:
        annotation: with "bbox" and "bbox_mode".

    Returns:
        (4,) float64, XYXY, absolute pixels.
    """
    found: np.ndarray = _boxes_xyxy([annotation])[0]
    return found


def _boxes_xyxy(annotations: Sequence[Annotation]) -> np.ndarray:
    """Return the boxes of `annotations` as (R, 4) float64, XYXY."""
    boxes = np.zeros((len(annotations), 4))
    by_mode: dict[Any, list[int]] = {}
    for i, annotation in enumerate(annotations):
        if "bbox" not in annotation or "bbox_mode" not in annotation:
            raise ValueError(
                f"{name_of(annotation)} must have 'bbox' and 'bbox_mode', got {sorted(annotation)}"
            )
        by_mode.setdefault(BoxMode(annotation["bbox_mode"]), []).append(i)
    for mode, members in by_mode.items():
        try:
            rows = np.array([annotations[i]["bbox"] for i in members], dtype=np.float64)
        except (ValueError, TypeError) as error:
            names = ", ".join(name_of(annotations[i]) for i in members[:3])
            raise ValueError(f"'bbox' of {names}, ...: not lists of 4 numbers ({error})") from error
        boxes[members] = BoxMode.convert(rows, mode, BoxMode.XYXY_ABS)
    return boxes


def _one_transform(transforms: object) -> Any:
    """Return one transform for one or a sequence of them."""
    return TransformList(list(transforms)) if isinstance(transforms, (tuple, list)) else transforms


def transform_annotations(
    annotations: Sequence[Annotation],
    transforms: Transform | Sequence[Transform],
    image_size: tuple[int, int],
    *,
    keypoint_hflip_indices: np.ndarray | Sequence[int] | None = None,
) -> None:
    """Transform the annotations of one image in place, all boxes at once.

    See `transform_instance_annotations`, which does the same for one of them.
    """
    if len(annotations) == 0:
        return
    transform = _one_transform(transforms)
    height, width = image_size
    boxes = np.asarray(transform.apply_box(_boxes_xyxy(annotations)), dtype=np.float64)
    boxes = boxes.clip(0, (width, height, width, height))
    for annotation, box in zip(annotations, boxes, strict=True):
        annotation["bbox"] = box
        annotation["bbox_mode"] = BoxMode.XYXY_ABS
        if "segmentation" in annotation:
            annotation["segmentation"] = transform_segmentation(annotation, transform, image_size)
        if "keypoints" in annotation:
            annotation["keypoints"] = transform_keypoint_annotations(
                annotation["keypoints"], transform, image_size, keypoint_hflip_indices
            )


def transform_rotated_annotations(
    annotations: Sequence[Annotation], transforms: Transform | Sequence[Transform]
) -> None:
    """Transform the boxes of one image's annotations in place, as rotated boxes, all at once.

    Args:
        annotations: with "bbox" and "bbox_mode"; upright boxes become rotated ones of angle 0.
            What else has coordinates (segmentation, keypoints) is removed.
        transforms: one or several, to be applied in order.

    Raises:
        ValueError: for a malformed box, or a transform that has no rule for rotated boxes.
    """
    transform = _one_transform(transforms)
    for step in getattr(transform, "transforms", [transform]):
        if not hasattr(step, "apply_rotated_box"):
            raise ValueError(
                f"{type(step).__name__} cannot transform rotated boxes; leave it out, or teach it: "
                f"{type(step).__name__}.register_type('rotated_box', function)"
            )
    if len(annotations) == 0:
        return
    rows = np.zeros((len(annotations), 5))
    for row, annotation in zip(rows, annotations, strict=True):
        if annotation.get("bbox_mode") == BoxMode.XYWHA_ABS and len(annotation["bbox"]) == 5:
            row[:] = annotation["bbox"]
        else:
            x0, y0, x1, y1 = _boxes_xyxy([annotation])[0]
            row[:4] = (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0
    for annotation, box in zip(annotations, transform.apply_rotated_box(rows), strict=True):
        annotation["bbox"] = box
        annotation["bbox_mode"] = BoxMode.XYWHA_ABS
        annotation.pop("segmentation", None)
        annotation.pop("keypoints", None)


def transform_instance_annotations(
    annotation: Annotation,
    transforms: Transform | Sequence[Transform],
    image_size: tuple[int, int],
    *,
    keypoint_hflip_indices: np.ndarray | Sequence[int] | None = None,
) -> Annotation:
    """Transform box, segmentation and keypoints of one annotation.

    Args:
        annotation: in the standard format; changed in place.
        transforms: one or several, to be applied in order.
        image_size: (h, w) of the image after the transforms; boxes are clipped to it.
        keypoint_hflip_indices: see `create_keypoint_hflip_indices`; needed for keypoints that
            are flipped.

    Returns:
        The same dict. Its "bbox" is (4,) float64, XYXY; polygons are float64 arrays; an RLE has
        become a mask (h, w); "keypoints" is (P, 3).

    Raises:
        ValueError: for a malformed box, segmentation or keypoint list.
    """
    transform_annotations(
        [annotation], transforms, image_size, keypoint_hflip_indices=keypoint_hflip_indices
    )
    return annotation


def transform_keypoint_annotations(
    keypoints: Sequence[float] | np.ndarray,
    transforms: Transform | Sequence[Transform],
    image_size: tuple[int, int],
    keypoint_hflip_indices: np.ndarray | Sequence[int] | None = None,
) -> np.ndarray:
    """Transform the keypoints of one object.

    Args:
        keypoints: 3P numbers: x, y (absolute pixels) and visibility (0, 1 or 2) of each.
        transforms: one or several, to be applied in order.
        image_size: (h, w) after the transforms; points outside become invisible.
        keypoint_hflip_indices: for each keypoint the one whose place it takes in a mirrored image.

    Returns:
        (P, 3) float64; x = y = 0 where the visibility is 0.

    Raises:
        ValueError: if the image is flipped and the indices are missing or of another number.
    """
    transform = _one_transform(transforms)
    given = np.asarray(keypoints, dtype=np.float64).reshape(-1, 3)
    x, y = np.asarray(transform.apply_coords(given[:, :2].copy())).T
    height, width = image_size
    seen = (x >= 0) & (x <= width) & (y >= 0) & (y <= height) & (given[:, 2] != 0)
    moved = np.where(seen[:, None], np.stack([x, y, given[:, 2]], axis=1), 0.0)
    if not _mirrors(transform):
        return moved
    if keypoint_hflip_indices is None:
        raise ValueError(
            "keypoints cannot be flipped without keypoint_hflip_indices; build them with "
            "create_keypoint_hflip_indices, or turn the flip off (INPUT.RANDOM_FLIP none)"
        )
    if len(keypoint_hflip_indices) != len(moved):
        raise ValueError(
            f"the annotation has {len(moved)} keypoints, its dataset's metadata "
            f"{len(keypoint_hflip_indices)} (keypoint_names)"
        )
    return moved[list(keypoint_hflip_indices)]


def _mirrors(transform: Transform) -> bool:
    """Tell whether left and right change places."""
    mirrored = False
    for step in getattr(transform, "transforms", [transform]):
        mirrored ^= isinstance(step, HFlipTransform)
    return mirrored


def annotations_to_instances(
    annos: Sequence[Annotation], image_size: tuple[int, int], mask_format: str = "polygon"
) -> Instances:
    """Convert the annotations of one image to ground truth for training.

    Args:
        annos: annotations, transformed already. Polygons, RLE dicts and masks may be mixed.
        image_size: (h, w), pixels.
        mask_format: "polygon" keeps polygons as they are, but an image with any annotation that
            is not polygons gets bit masks for all of its objects; "bitmask" always gives them.

    Returns:
        `gt_boxes` (`Boxes`, clipped by nobody), `gt_classes` (R,) int64, and, where the
        annotations have them, `gt_masks` (`PolygonMasks` or `BitMasks`) and `gt_keypoints`.

    Raises:
        ValueError: for another `mask_format`, or annotations that disagree in what they have.
    """
    if mask_format not in ("polygon", "bitmask"):
        raise ValueError(f"mask_format must be 'polygon' or 'bitmask', got {mask_format!r}")
    target = Instances(image_size)
    target.gt_boxes = Boxes(torch.from_numpy(_boxes_xyxy(annos)).to(torch.float32))
    target.gt_classes = _classes(annos)
    if _all_have("segmentation", annos):
        target.gt_masks = _masks(annos, image_size, mask_format)
    if _all_have("keypoints", annos):
        target.gt_keypoints = _keypoints(annos)
    return target


def annotations_to_instances_rotated(
    annos: Sequence[Annotation], image_size: tuple[int, int]
) -> Instances:
    """Convert annotations with rotated boxes to ground truth for training.

    Args:
        annos: annotations whose "bbox" is XYWHA: centre, size (absolute pixels), degrees
            counter-clockwise.
        image_size: (h, w), pixels; boxes that are nearly upright are clipped to it.

    Returns:
        `gt_boxes` (`RotatedBoxes`) and `gt_classes` (R,) int64.
    """
    for annotation in annos:
        if len(annotation["bbox"]) != 5:
            raise ValueError(
                f"{name_of(annotation)}: a rotated box has 5 numbers, got {annotation['bbox']}"
            )
    rows = np.array([annotation["bbox"] for annotation in annos], dtype=np.float32)
    boxes = RotatedBoxes(torch.from_numpy(rows.reshape(-1, 5)))
    boxes.clip(image_size)
    target = Instances(image_size)
    target.gt_boxes = boxes
    target.gt_classes = _classes(annos)
    return target


def _classes(annos: Sequence[Annotation]) -> torch.Tensor:
    return torch.tensor([int(annotation["category_id"]) for annotation in annos], dtype=torch.int64)


def _all_have(field: str, annos: Sequence[Annotation]) -> bool:
    """Tell whether all annotations have `field`, or none; otherwise raise ValueError."""
    having = [field in annotation for annotation in annos]
    if any(having) and not all(having):
        lacking = name_of(annos[having.index(False)])
        raise ValueError(
            f"{having.count(False)} of {len(annos)} annotations of one image have no {field!r} "
            f"({lacking}); give it to all of them, or turn the head that needs it off"
        )
    return any(having)


def _masks(
    annos: Sequence[Annotation], image_size: tuple[int, int], mask_format: str
) -> PolygonMasks | BitMasks:
    if mask_format == "polygon" and all(
        isinstance(annotation["segmentation"], (list, tuple)) for annotation in annos
    ):
        return PolygonMasks([annotation["segmentation"] for annotation in annos])
    needed = len(annos) * image_size[0] * image_size[1]
    if needed > MAX_MASK_BYTES:
        raise ValueError(
            f"{len(annos)} bit masks of {image_size[0]}x{image_size[1]} pixels need {needed} bytes,"
            f" the limit is {MAX_MASK_BYTES}; use polygons, smaller images or crops"
        )
    bits = np.zeros((len(annos), *image_size), dtype=bool)
    for row, annotation in zip(bits, annos, strict=True):
        paint_segmentation(annotation, row)
    return BitMasks(torch.from_numpy(bits))


def _keypoints(annos: Sequence[Annotation]) -> Keypoints:
    rows = [np.asarray(a["keypoints"], dtype=np.float32).reshape(-1, 3) for a in annos]
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f"objects of one image have {[len(row) for row in rows]} keypoints")
    return Keypoints(np.stack(rows))


def filter_empty_instances(
    instances: Instances,
    by_box: bool = True,
    by_mask: bool = True,
    box_threshold: float = 1e-5,
    return_mask: bool = False,
) -> Any:
    """Drop instances whose box or mask is empty, e.g. because they were cropped away.

    Args:
        instances: with `gt_boxes` and perhaps `gt_masks`.
        by_box: drop those with a box whose width or height is at most `box_threshold`.
        by_mask: drop those with an empty mask.
        box_threshold: pixels.
        return_mask: also return which were kept.

    Returns:
        The instances that are left; with `return_mask` also an (R,) bool tensor.

    Raises:
        ValueError: if neither criterion is chosen.
    """
    if not by_box and not by_mask:
        raise ValueError("filter_empty_instances: by_box and by_mask are both False")
    keep = torch.ones(len(instances), dtype=torch.bool)
    if by_box:
        keep &= instances.gt_boxes.nonempty(threshold=box_threshold)
    if by_mask and instances.has("gt_masks"):
        keep &= instances.gt_masks.nonempty()
    left = instances if bool(keep.all()) else instances[keep]
    return (left, keep) if return_mask else left
