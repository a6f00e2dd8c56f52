"""From the small mask of each box to the image: as full-size masks or as run lengths.

Bilinear interpolation is separable, so a mask in the image is ``Y @ mask @ X.T`` with one matrix of
interpolation weights per axis. Only the pixels of the box are computed.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2kit.layers.roi_align import axis_taps, roi_align, sample_counts
from d2kit.utils.devices import is_symbolic, largest

__all__ = [
    "bitmasks_to_rle",
    "crop_masks",
    "masks_to_rle",
    "paste_masks_in_image",
    "whole_pixel_boxes",
]

_CHUNK_ELEMENTS = 1 << 26  # float32 values at once on an accelerator: 256 MB


def paste_masks_in_image(
    masks: Tensor, boxes: object, image_shape: tuple[int, int], threshold: float = 0.5
) -> Tensor:
    """Resample the mask of each box to the pixels of the image, bilinearly.

    Outside the box, grown by one pixel, the result is 0. Mask values belong to the centres of the
    cells into which the mask divides its box.

    Args:
        masks: (R, M, M) float, probabilities in [0, 1].
        boxes: `Boxes` or (R, 4) XYXY, absolute pixels.
        image_shape: (height, width) in pixels.
        threshold: in [0, 1], values from it on are True; negative asks for soft masks.

    Returns:
        (R, height, width) bool; uint8 in [0, 255] where `threshold` is negative.

    Raises:
        ValueError: if shapes do not fit.
    """
    corners = _checked_boxes(masks, boxes)
    if is_symbolic():
        return _finish(_pasted(masks, corners, *image_shape), threshold)
    height, width = int(image_shape[0]), int(image_shape[1])
    dtype = torch.bool if threshold >= 0 else torch.uint8
    if masks.device.type == "cpu":
        # numpy's zeros are pages that the system clears when they are first touched
        kind = np.bool_ if threshold >= 0 else np.uint8
        canvas = torch.from_numpy(np.zeros((len(masks), height, width), dtype=kind))
        for index, (x0, y0, x1, y1), values in _regions(masks, corners, (height, width)):
            canvas[index, y0:y1, x0:x1] = _finish(values, threshold)
        return canvas
    canvas = torch.empty((len(masks), height, width), dtype=dtype, device=masks.device)
    step = max(1, _CHUNK_ELEMENTS // max(1, height * width))
    for start in range(0, len(masks), step):
        part = slice(start, start + step)
        canvas[part] = _finish(_pasted(masks[part], corners[part], height, width), threshold)
    return canvas


def _pasted(masks: Tensor, corners: Tensor, height: int, width: int) -> Tensor:
    """Return masks (R, M, M) in boxes (R, 4) at all pixels, (R, height, width) float32."""
    # both axes at once: half the kernels on an accelerator
    axes = _weights(corners[:, :2].T, corners[:, 2:].T, largest(height, width), masks.shape[1])
    x, y = axes[0, :, :width], axes[1, :, :height]
    with torch.autocast(masks.device.type, enabled=False):
        return y @ masks.float() @ x.transpose(1, 2)


def whole_pixel_boxes(boxes: Tensor, cells: int) -> Tensor:
    """Return boxes into which pasting puts a mask where torchvision's pasting puts it.

    Torchvision grows the mask by a cell of zeros on each side and the box with it, cuts the box's
    corners to whole pixels, and resizes the mask to the pixels from the first to the last.

    Args:
        boxes: (R, 4) XYXY, absolute pixels.
        cells: M, cells per side of the masks.

    Returns:
        (R, 4) float32: the part of those pixels that the M inner cells cover.
    """
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = (boxes[:, 2:] - boxes[:, :2]) / 2 * ((cells + 2) / cells)
    low, last = (centre - half).trunc(), (centre + half).trunc()
    sides = (last - low + 1).clamp(min=1)
    return torch.cat([low + sides / (cells + 2), low + sides * ((cells + 1) / (cells + 2))], dim=1)


def crop_masks(masks: Tensor, boxes: Tensor, mask_size: int) -> Tensor:
    """Resample the mask of each instance on a grid over its box, as RoIAlign with all samples does.

    Args:
        masks: (R, H, W) bool.
        boxes: (R, 4) XYXY, absolute pixels, on the device of `masks`.
        mask_size: M cells per side.

    Returns:
        (R, M, M) bool, True where at least half of a cell is covered.
    """
    boxes = boxes.detach().float()
    if masks.device.type != "cpu":
        image = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)[:, None]
        rois = torch.cat([image, boxes], dim=1)
        return roi_align(masks[:, None].float(), rois, mask_size, 1.0, 0, True)[:, 0] >= 0.5
    steps = (boxes[:, 2:] - boxes[:, :2]) / mask_size
    samples = sample_counts(steps, 0)
    matrices = []
    for axis, pixels in ((1, masks.shape[1]), (0, masks.shape[2])):
        taps = axis_taps(boxes[:, axis] - 0.5, steps[:, axis], mask_size, samples[:, axis], pixels)
        matrices.append(_tap_matrices(*taps[:2]))
    cropped = torch.empty((len(masks), mask_size, mask_size))
    for index, ((y0, y), (x0, x)) in enumerate(zip(*matrices, strict=True)):
        region = masks[index, y0 : y0 + y.shape[1], x0 : x0 + x.shape[1]].float()
        cropped[index] = y @ region @ x.T
    # sums of samples are exact where boxes lie on pixels: no rounding decides between the halves
    count = samples.prod(dim=1)[:, None, None]
    return (cropped >= 0.5 * count) & (count > 0)


def _tap_matrices(index: Tensor, weight: Tensor) -> list[tuple[int, Tensor]]:
    """Return, for each RoI, its first pixel on the axis and its weights as a (M, pixels) matrix."""
    first = index[:, :, 0].amin(dim=1)
    size = (index.flatten(1).amax(dim=1) - first + 1).tolist()
    place = (index - first[:, None, None]).clamp_(min=0)  # entries beyond the last tap weigh 0
    return [
        (start, torch.zeros(index.shape[1], size[i]).scatter_add_(1, place[i], weight[i]))
        for i, start in enumerate(first.tolist())
    ]


def _paste_masks_tensor_shape(
    masks: Tensor, boxes: object, image_shape: tuple[Tensor, Tensor], threshold: float = 0.5
) -> Tensor:
    """As `paste_masks_in_image`, with the image's height and width as tensors of one number."""
    return paste_masks_in_image(masks, boxes, image_shape, threshold)  # type: ignore[arg-type]


def masks_to_rle(
    masks: Tensor, boxes: object, image_shape: tuple[int, int], threshold: float = 0.5
) -> list[dict[str, Any]]:
    """Encode pasted masks as COCO run lengths without a full-size mask.

    Equal to ``pycocotools.mask.encode`` of each mask of `paste_masks_in_image`.

    Args:
        masks: (R, M, M) float, probabilities in [0, 1].
        boxes: `Boxes` or (R, 4) XYXY, absolute pixels.
        image_shape: (height, width) in pixels.
        threshold: in [0, 1], values from it on are in the mask.

    Returns:
        R dicts with ``"size"``: [height, width] and ``"counts"``: bytes, COCO's compressed form.

    Raises:
        ValueError: if shapes do not fit or the threshold is negative.
    """
    if threshold < 0:
        raise ValueError(f"masks_to_rle: expected a threshold in [0, 1], got {threshold}")
    corners = _checked_boxes(masks, boxes)
    height, width = int(image_shape[0]), int(image_shape[1])
    empty = np.array([height * width], dtype=np.int64)
    counts = [empty] * len(masks)
    regions = _regions(masks.cpu(), corners.cpu(), (height, width), transposed=True)
    for index, (x0, y0, _, _), values in regions:
        counts[index] = _run_lengths((values >= threshold).numpy(), x0, y0, height, width)
    strings = _compress(counts)
    return [{"size": [height, width], "counts": string} for string in strings]


def bitmasks_to_rle(masks: Tensor | np.ndarray) -> list[dict[str, Any]]:
    """Encode full-size masks as COCO run lengths.

    Equal to ``pycocotools.mask.encode`` of each mask. Only the rectangle around a mask's pixels is
    turned into columns, so that the time goes with the size of the objects.

    Args:
        masks: (R, H, W) of any number type; what is not 0 is in the mask.

    Returns:
        R dicts as those of `masks_to_rle`.
    """
    array = masks.detach().cpu().numpy() if isinstance(masks, Tensor) else np.asarray(masks)
    if len(array) == 0:
        return []
    if array.dtype != np.bool_:
        array = array != 0
    height, width = array.shape[1:]
    counts = []
    for mask in array:
        rows = np.flatnonzero(mask.any(axis=1))
        if len(rows) == 0:
            counts.append(np.array([height * width], dtype=np.int64))
            continue
        band = mask[rows[0] : rows[-1] + 1]
        columns = np.flatnonzero(band.any(axis=0))
        region = band[:, columns[0] : columns[-1] + 1].T
        counts.append(_run_lengths(region, columns[0], rows[0], height, width))
    return [{"size": [height, width], "counts": string} for string in _compress(counts)]


def _checked_boxes(masks: Tensor, boxes: Any) -> Tensor:
    """Return the boxes as (R, 4) float32; raise where shapes do not fit."""
    corners = boxes if isinstance(boxes, Tensor) else boxes.tensor
    if masks.dim() != 3 or corners.shape != (len(masks), 4):
        raise ValueError(
            "masks in boxes: expected masks (R, M, M) and boxes (R, 4), "
            f"got {tuple(masks.shape)} and {tuple(corners.shape)}"
        )
    return corners.float()


def _finish(values: Tensor, threshold: float) -> Tensor:
    return values >= threshold if threshold >= 0 else (values * 255).to(torch.uint8)


def _weights(low: Tensor, high: Tensor, size: int, cells: int) -> Tensor:
    """Return the weights of mask cells at pixels of an axis.

    Args:
        low: (..., R) where boxes begin.
        high: (..., R) where they end.
        size: S pixels on the axis.
        cells: M.

    Returns:
        (..., R, S, M): weights of cells at pixel centres; 0 more than a pixel outside the box.
    """
    pixel = torch.arange(size, device=low.device, dtype=torch.float32)
    start, end = low.floor()[..., None] - 1, high.ceil()[..., None] + 1
    weights = _hat(low[..., None], high[..., None], pixel, cells)
    return weights * ((pixel >= start) & (pixel < end))[..., None]


def _hat(low: Tensor, high: Tensor, pixel: Tensor, cells: int) -> Tensor:
    """Return bilinear weights of `cells` between `low` and `high` at pixel centres."""
    length = (high - low).clamp(min=1e-6)
    at = (pixel + 0.5 - low) / length * cells - 0.5
    cell = torch.arange(cells, device=low.device, dtype=torch.float32)
    return (1 - (at[..., None] - cell).abs_()).clamp_(min=0)


def _regions(
    masks: Tensor, corners: Tensor, image_shape: tuple[int, int], transposed: bool = False
) -> Iterator[tuple[int, tuple[int, int, int, int], Tensor]]:
    """Yield, for each mask that meets the image, its index, pixels and values.

    Args:
        masks: (R, M, M) on the CPU.
        corners: (R, 4) XYXY float32 on the CPU.
        image_shape: (height, width) in pixels.
        transposed: whether values come column by column, as run lengths need them.

    Yields:
        index; x0, y0, x1, y1 of the pixels of the box grown by one pixel, inside the image; the
        values, (y1 - y0, x1 - x0) float32, or (x1 - x0, y1 - y0) where transposed.
    """
    height, width = image_shape
    limit = torch.tensor([width, height], dtype=torch.float32)
    low = torch.minimum((corners[:, :2].floor() - 1).clamp(min=0), limit)
    high = torch.minimum((corners[:, 2:].ceil() + 1).clamp(min=0), limit)
    pixels = torch.cat([low, high], dim=1).long()
    masks = masks.float()
    for start in range(0, len(masks), _WEIGHED):
        part = slice(start, start + _WEIGHED)
        x_weights = _weights_of_spans(corners[part, ::2], pixels[part, ::2], masks.shape[2])
        y_weights = _weights_of_spans(corners[part, 1::2], pixels[part, 1::2], masks.shape[1])
        rows = zip(pixels[part].tolist(), x_weights, y_weights, masks[part], strict=True)
        for index, ((x0, y0, x1, y1), x, y, mask) in enumerate(rows, start):
            if x0 < x1 and y0 < y1:
                values = x @ mask.T @ y.T if transposed else y @ mask @ x.T
                yield index, (x0, y0, x1, y1), values


_WEIGHED = 100  # masks whose weights are held at a time


def _weights_of_spans(ends: Tensor, spans: Tensor, cells: int) -> tuple[Tensor, ...]:
    """Return the weights of mask cells at the pixels of each box on one axis.

    Args:
        ends: (R, 2) where boxes begin and end.
        spans: (R, 2) int64, the first pixel, and the one behind the last.
        cells: M.

    Returns:
        R tensors (pixels, M).
    """
    counts = (spans[:, 1] - spans[:, 0]).clamp(min=0)
    first = spans[:, 0] - counts.cumsum(0) + counts
    pixel = torch.arange(int(counts.sum())) + first.repeat_interleave(counts)
    low, high = ends.repeat_interleave(counts, dim=0).unbind(1)
    weights: tuple[Tensor, ...] = _hat(low, high, pixel.float(), cells).split(counts.tolist())
    return weights


def _run_lengths(
    columns: np.ndarray, x0: int, y0: int, image_height: int, image_width: int
) -> np.ndarray:
    """Return the lengths of the runs of a mask, column by column through the image.

    Args:
        columns: (w, h) bool, the pixels at (x0 + column, y0 + row); all others are 0.
        x0: the first column.
        y0: the first row.
        image_height: in pixels.
        image_width: in pixels.

    Returns:
        (L,) int64: lengths of runs of 0, 1, 0, ... that sum up to the number of pixels.
    """
    w, h = columns.shape
    # a 0 behind each column ends its runs there; one before the first begins them
    padded = np.zeros(1 + w * (h + 1), dtype=np.int8)
    padded[1:].reshape(w, h + 1)[:, :h] = columns
    change = np.flatnonzero(padded[1:] != padded[:-1])
    column, row = np.divmod(change, h + 1)
    at = (x0 + column) * image_height + y0 + row
    # where the region spans the whole height, a run may go on in the next column
    same = at[1:] == at[:-1]
    if same.any():
        at = at[~(np.append(same, False) | np.insert(same, 0, False))]
    total = image_height * image_width
    edges = np.concatenate([[0], at, [total]])
    lengths = np.diff(edges)
    return lengths[:-1] if len(lengths) > 1 and lengths[-1] == 0 else lengths


def _compress(runs: Sequence[np.ndarray]) -> list[bytes]:
    """Write run lengths in COCO's compressed form.

    From the fourth on, a number is the difference from the one two before. Each is written in
    groups of 5 bits, lowest first, as characters from "0" on; bit 5 says that another group
    follows, and the last group carries the sign.

    Args:
        runs: per mask, (L,) int64 lengths.

    Returns:
        One string per mask.
    """
    if not runs:
        return []
    numbers = np.concatenate([_differences(lengths) for lengths in runs])
    places = np.arange(len(numbers))  # of the numbers that are not yet written to their end
    sizes = np.zeros(len(numbers), dtype=np.int64)
    written = []
    while len(places):
        low = numbers & 31
        numbers = numbers >> 5
        more = numbers != -(low >> 4)
        written.append((places, (low + 32 * more + 48).astype(np.uint8)))
        sizes[places] += 1
        places, numbers = places[more], numbers[more]
    ends = np.cumsum(sizes)
    text = np.empty(ends[-1], dtype=np.uint8)
    for nth, (places, characters) in enumerate(written):
        text[ends[places] - sizes[places] + nth] = characters
    stops = ends[np.cumsum([len(lengths) for lengths in runs]) - 1].tolist()
    whole = text.tobytes()
    return [whole[start:end] for start, end in zip([0, *stops], stops, strict=False)]


def _differences(lengths: np.ndarray) -> np.ndarray:
    changed: np.ndarray = lengths.copy()
    changed[3:] -= lengths[1:-2]
    return changed


def pad_masks(masks: Tensor, padding: int) -> tuple[Tensor, float]:
    """Put a border of zeros around masks.

    Args:
        masks: (R, M, M).
        padding: cells on every side.

    Returns:
        (R, M + 2 * padding, M + 2 * padding), and by what the side has grown.
    """
    side = masks.shape[-1]
    padded = torch.nn.functional.pad(masks, (padding, padding, padding, padding))
    return padded, (side + 2 * padding) / side


def scale_boxes(boxes: Tensor, scale: float) -> Tensor:
    """Return boxes (R, 4) XYXY, made larger around their centres by a factor."""
    centers, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2 * scale
    return torch.cat([centers - half, centers + half], dim=1)


def paste_mask_in_image_old(
    mask: Tensor, box: Tensor, img_h: int, img_w: int, threshold: float
) -> Tensor:
    """Paste one mask; an older name of `paste_masks_in_image`.

    Args:
        mask: (M, M) in [0, 1].
        box: (4,) XYXY.
        img_h: pixels.
        img_w: pixels.
        threshold: in [0, 1]; below 0: values of 0 to 255 instead of a mask.

    Returns:
        (img_h, img_w) uint8.
    """
    boxes = box.reshape(1, 4).to(mask.dtype)
    return paste_masks_in_image(mask[None], boxes, (img_h, img_w), threshold)[0].to(torch.uint8)
