"""Cuts a large image into overlapping tiles, and makes one result of theirs."""

from __future__ import annotations

import torch
from torch import Tensor

from d2kit.layers import batched_nms
from d2kit.structures import Boxes, Instances, ROIMasks

TOUCHING = 2.0  # pixels: a box this close to an inner edge of its tile may have been cut by it
COVERED = 0.7  # a cut box is dropped where another of its class covers this share of it


def tile_boxes(height: int, width: int, side: int, overlap: float) -> list[tuple[int, ...]]:
    """Return the tiles of an image as (x0, y0, x1, y1), row by row.

    Tiles are `side` x `side` pixels (less where the image is smaller); neighbours share at least
    `overlap` of a side; the last ones of a row and column end at the image's edge.

    Args:
        height: of the image, pixels.
        width: of the image, pixels.
        side: of a tile, pixels.
        overlap: in [0, 1).
    """
    rows, columns = (_starts(length, side, overlap) for length in (height, width))
    return [(x, y, min(x + side, width), min(y + side, height)) for y in rows for x in columns]


def _starts(length: int, side: int, overlap: float) -> list[int]:
    if length <= side:
        return [0]
    step = max(1, int(side * (1 - overlap)))
    count = -(-(length - side) // step) + 1
    return [min(i * step, length - side) for i in range(count)]


def merge_tiles(
    parts: list[Instances],
    tiles: list[tuple[int, ...]],
    size: tuple[int, int],
    *,
    nms_threshold: float,
    most: int,
) -> Instances:
    """Make one result for the image of the results of its tiles.

    Detections found twice where tiles overlap are suppressed by their IoU; one that a tile's inner
    edge has cut gives way to a whole one that covers it.

    Args:
        parts: per tile, with `pred_boxes` in pixels of the tile, `scores`, `pred_classes` and,
            with masks, `pred_masks` as `ROIMasks`.
        tiles: (x0, y0, x1, y1) of each.
        size: (height, width) of the image.
        nms_threshold: IoU in [0, 1] above which the better detection of a class stays alone.
        most: number of detections to keep.

    Returns:
        The detections of the image by falling score, masks (R, H, W) bool.
    """
    moved = [_move(part, tile) for part, tile in zip(parts, tiles, strict=True)]
    cut = torch.cat([_cut(part, tile, size) for part, tile in zip(moved, tiles, strict=True)])
    found = Instances.cat(moved)
    boxes, scores, classes = found.pred_boxes.tensor, found.scores, found.pred_classes
    keep = batched_nms(boxes, scores, classes, nms_threshold)
    keep = keep[~_covered(boxes[keep], classes[keep], cut[keep])][:most]
    found = found[keep]
    if found.has("pred_masks"):
        kept = ROIMasks(found.pred_masks, whole_pixels=parts[0].pred_masks.whole_pixels)
        found.pred_masks = kept.to_bitmasks(found.pred_boxes, *size).tensor
    result = Instances(size)
    for name, value in found.get_fields().items():
        result.set(name, value)
    return result


def _move(part: Instances, tile: tuple[int, ...]) -> Instances:
    """Return a tile's result in pixels of the image."""
    fields = dict(part.get_fields())
    offset = fields["scores"].new_tensor([*tile[:2], *tile[:2]])
    fields["pred_boxes"] = Boxes(fields["pred_boxes"].tensor + offset)
    if "pred_masks" in fields:
        fields["pred_masks"] = fields["pred_masks"].tensor
    if "pred_keypoints" in fields:
        fields["pred_keypoints"] = fields["pred_keypoints"].clone()
        fields["pred_keypoints"][..., :2] += offset[:2]
    return Instances((0, 0), **fields)


def _cut(part: Instances, tile: tuple[int, ...], size: tuple[int, int]) -> Tensor:
    """Return (R,) bool: the box touches an edge of the tile that is not one of the image."""
    boxes = part.pred_boxes.tensor
    edges = boxes.new_tensor(tile)
    image = boxes.new_tensor([0, 0, size[1], size[0]])
    found: Tensor = (((boxes - edges).abs() <= TOUCHING) & (edges != image)).any(1)
    return found


def _covered(boxes: Tensor, classes: Tensor, cut: Tensor) -> Tensor:
    """Return (R,) bool: the box was cut, and another of its class covers most of it."""
    top_left = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    bottom_right = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    shared = (bottom_right - top_left).clamp(min=0).prod(2)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    larger = area[None] > area[:, None]
    same = classes[:, None] == classes[None]
    return ((shared > COVERED * area[:, None]) & larger & same).any(1) & cut
