"""Instance masks as bitmaps, as polygons, and as small grids over boxes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2kit.layers.mask_ops import crop_masks, paste_masks_in_image, whole_pixel_boxes
from d2kit.structures.boxes import Boxes

__all__ = [
    "BitMasks",
    "PolygonMasks",
    "ROIMasks",
    "polygon_area",
    "polygons_to_bitmask",
    "rasterize_polygons_within_box",
]


_FIRST_CODE, _LAST_CODE = 48, 111
"""Range of the characters of compressed runs."""

MAX_DIGITS = 7
"""Characters of one number: 35 bits are more than any image has pixels."""


def decode_counts(text: str | bytes) -> np.ndarray:
    """Decode compressed run lengths.

    Args:
        text: the "counts" of a compressed mask.

    Returns:
        (n,) int64 run lengths.

    Raises:
        ValueError: not of that form.
    """
    raw = text.encode("ascii") if isinstance(text, str) else text
    codes = np.frombuffer(raw, dtype=np.uint8).astype(np.int64)
    if len(codes) == 0:
        return codes
    if codes.min() < _FIRST_CODE or codes.max() > _LAST_CODE:
        raise ValueError("a character outside of the code")
    codes -= _FIRST_CODE
    last = (codes & 0x20) == 0
    if not last[-1]:
        raise ValueError("it ends within a number")
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    digits = ends - starts + 1
    if digits.max() > MAX_DIGITS:
        raise ValueError("a number is too long")
    place = np.arange(len(codes)) - np.repeat(starts, digits)
    values = np.add.reduceat((codes & 0x1F) << (5 * place), starts)
    negative = (codes[ends] & 0x10) != 0
    values[negative] -= 1 << (5 * digits[negative])
    # Differences to the run two before, from the fourth run on: two interleaved running sums.
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def rle_problem(mask: dict[str, Any], height: int, width: int) -> str | None:
    """Say what is wrong with a run-length mask.

    Args:
        mask: {"size": [height, width], "counts": list of integers, or text}.
        height: of the image in pixels; 0 where it is not known.
        width: of the image in pixels.

    Returns:
        None where nothing is.
    """
    size, counts = mask.get("size"), mask.get("counts")
    if not (isinstance(size, list) and len(size) == 2 and all(type(s) is int for s in size)):
        return f"a run-length mask needs 'size': [height, width], got {size!r}"
    if height and size != [height, width]:
        return f"run-length mask of size {size} in an image of size {[height, width]}"
    if isinstance(counts, (str, bytes)):
        try:
            runs = decode_counts(counts)
        except ValueError as error:
            return f"run-length mask with damaged 'counts': {error}"
    elif isinstance(counts, list) and all(type(c) is int for c in counts):
        if any(not 0 <= c < 2**31 for c in counts):
            return "run-length mask with a run that is negative or longer than any image"
        runs = np.array(counts, dtype=np.int64)
    else:
        return "a run-length mask needs 'counts': text, or a list of integers"
    if len(runs) and runs.min() < 0:
        return "run-length mask with a negative run"
    if runs.sum() != size[0] * size[1]:
        return f"run-length mask with {runs.sum()} pixels instead of {size[0]} x {size[1]}"
    return None


def polygon_area(x: np.ndarray, y: np.ndarray) -> float:
    """Return the area of the polygon with corners (x[i], y[i]), in square pixels."""
    next_x, next_y = np.roll(x, -1), np.roll(y, -1)
    return abs(float(np.sum(x * next_y - next_x * y))) / 2


def polygons_to_bitmask(polygons: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """Rasterise the union of polygons by COCO's rule.

    Args:
        polygons: each (2n,) as x0, y0, x1, y1, ... in absolute pixels.
        height: of the mask in pixels.
        width: of the mask in pixels.

    Returns:
        (height, width) bool.
    """
    if len(polygons) == 0:
        return np.zeros((height, width), dtype=bool)
    from pycocotools import mask

    rle = mask.merge(mask.frPyObjects([np.asarray(p) for p in polygons], height, width))
    found: np.ndarray = mask.decode(rle).astype(bool)
    return found


def rasterize_polygons_within_box(
    polygons: Sequence[np.ndarray], box: np.ndarray, mask_size: int
) -> Tensor:
    """Rasterise polygons on a grid over a box.

    Args:
        polygons: each (2n,) as x0, y0, x1, y1, ... in absolute pixels.
        box: (4,) XYXY, absolute pixels.
        mask_size: M cells per side.

    Returns:
        (M, M) bool.
    """
    origin = np.asarray(box[:2])
    # below a tenth of a pixel a side counts as one: nothing is divided by 0
    cells = mask_size / np.maximum(box[2:] - box[:2], np.asarray(0.1, dtype=box.dtype))
    moved = [
        ((np.asarray(p).reshape(-1, 2) - origin) * cells.astype(box.dtype)).ravel()
        for p in polygons
    ]
    return torch.from_numpy(polygons_to_bitmask(moved, mask_size, mask_size))


class BitMasks:
    """Masks of R instances as bitmaps of the size of the image.

    Args:
        tensor: (R, H, W), becomes bool.

    Raises:
        ValueError: if there are not three axes.
    """

    def __init__(self, tensor: Tensor | np.ndarray) -> None:
        tensor = torch.as_tensor(tensor).to(torch.bool)
        if tensor.dim() != 3:
            raise ValueError(f"BitMasks: expected shape (R, H, W), got {tuple(tensor.shape)}")
        self.tensor = tensor
        self.image_size = (int(tensor.shape[1]), int(tensor.shape[2]))

    def to(self, *args: Any, **kwargs: Any) -> BitMasks:
        """Return the masks after `Tensor.to(*args, **kwargs)`."""
        return BitMasks(self.tensor.to(*args, **kwargs))

    @property
    def device(self) -> torch.device:
        """The device of the masks."""
        return self.tensor.device

    def __getitem__(self, item: int | slice | list[int] | Tensor) -> BitMasks:
        """Select masks by an integer (gives one), a slice, a bool mask or indices."""
        if isinstance(item, int):
            return BitMasks(self.tensor[item].unsqueeze(0))
        chosen = self.tensor[item]
        if chosen.dim() != 3:
            raise ValueError(
                f"BitMasks: index {item!r} gives shape {tuple(chosen.shape)}, not (R, H, W)"
            )
        return BitMasks(chosen)

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.tensor

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def __repr__(self) -> str:
        return f"BitMasks(num_instances={len(self)}, image_size={self.image_size})"

    def nonempty(self) -> Tensor:
        """Tell which masks have at least one pixel, (R,) bool."""
        if self.tensor.numel() == 0:
            return torch.zeros(len(self.tensor), dtype=torch.bool, device=self.tensor.device)
        # torch's `any` over bool takes 12.5 ms for 20 masks of 800x1067, this 0.3
        return self.tensor.flatten(1).view(torch.uint8).amax(dim=1).bool()

    @staticmethod
    def from_polygon_masks(
        polygon_masks: PolygonMasks | list[list[np.ndarray]], height: int, width: int
    ) -> BitMasks:
        """Rasterise polygons.

        Args:
            polygon_masks: the polygons of R instances.
            height: of the image in pixels.
            width: of the image in pixels.
        """
        instances = getattr(polygon_masks, "polygons", polygon_masks)
        masks = [polygons_to_bitmask(polygons, height, width) for polygons in instances]
        if not masks:
            return BitMasks(torch.zeros((0, height, width), dtype=torch.bool))
        return BitMasks(torch.from_numpy(np.stack(masks)))

    @staticmethod
    def from_roi_masks(roi_masks: ROIMasks, height: int, width: int, boxes: object) -> BitMasks:
        """Paste masks over boxes into images, with a threshold of 0.5.

        Args:
            roi_masks: masks of R instances.
            height: of the image in pixels.
            width: of the image in pixels.
            boxes: `Boxes` or (R, 4) XYXY, absolute pixels.
        """
        return roi_masks.to_bitmasks(boxes, height, width)

    def crop_and_resize(self, boxes: Tensor, mask_size: int) -> Tensor:
        """Resample each mask on a grid over its box, as RoIAlign does.

        Args:
            boxes: (R, 4) XYXY, absolute pixels.
            mask_size: M cells per side.

        Returns:
            (R, M, M) bool, True where at least half of a cell is covered.

        Raises:
            ValueError: if there are not as many boxes as masks.
        """
        if len(boxes) != len(self):
            raise ValueError(f"BitMasks: expected {len(self)} boxes, got {len(boxes)}")
        return crop_masks(self.tensor, boxes.to(self.device), mask_size)

    def get_bounding_boxes(self) -> Boxes:
        """Return the smallest boxes that cover the masks; 0, 0, 0, 0 for an empty mask."""
        sides = []
        for axis in (1, 2):  # over rows: columns in use, and the other way round
            used = self.tensor.view(torch.uint8).amax(dim=axis)
            first = used.argmax(dim=1)
            last = used.shape[1] - used.flip(1).argmax(dim=1)
            sides.append((first, torch.where(used.amax(dim=1) > 0, last, 0)))
        (x0, x1), (y0, y1) = sides
        return Boxes(torch.stack([x0, y0, x1, y1], dim=1).float())

    @staticmethod
    def cat(bitmasks_list: Sequence[BitMasks]) -> BitMasks:
        """Concatenate at least one `BitMasks` of the same image size.

        Raises:
            ValueError: if the list is empty.
        """
        if not bitmasks_list:
            raise ValueError("BitMasks.cat: expected at least one element, got an empty list")
        return BitMasks(torch.cat([masks.tensor for masks in bitmasks_list], dim=0))


class PolygonMasks:
    """Masks of R instances as polygons, always on the CPU.

    Args:
        polygons: per instance a list of polygons, each (2n,) with n >= 3 as x0, y0, x1, y1, ... in
            absolute pixels; become float64.

    Raises:
        ValueError: if it is not a list of lists, or a polygon has another length.
    """

    def __init__(self, polygons: list[list[Tensor | np.ndarray]]) -> None:
        if not isinstance(polygons, list):
            raise ValueError(
                f"PolygonMasks: expected a list of lists of polygons, got {type(polygons).__name__}"
            )
        self.polygons: list[list[np.ndarray]] = [
            _checked_polygons(of_instance, index) for index, of_instance in enumerate(polygons)
        ]

    def to(self, *args: object, **kwargs: object) -> PolygonMasks:
        """Return the masks themselves: polygons stay on the CPU."""
        return self

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def get_bounding_boxes(self) -> Boxes:
        """Return the smallest boxes that cover the polygons; inf, inf, 0, 0 for no polygon."""
        boxes = torch.tensor([[np.inf, np.inf, 0, 0]], dtype=torch.float32).repeat(len(self), 1)
        for box, polygons in zip(boxes, self.polygons, strict=True):
            if polygons:
                points = torch.from_numpy(np.concatenate(polygons).reshape(-1, 2)).float()
                box[:2], box[2:] = points.amin(dim=0), points.amax(dim=0).clamp(min=0)
        return Boxes(boxes)

    def nonempty(self) -> Tensor:
        """Tell which instances have at least one polygon, (R,) bool."""
        return torch.tensor([len(p) > 0 for p in self.polygons], dtype=torch.bool)

    def __getitem__(self, item: int | slice | list[int] | Tensor) -> PolygonMasks:
        """Select instances by an integer (gives one), a slice, a bool mask or indices."""
        if isinstance(item, int):
            return self._of([self.polygons[item]])
        if isinstance(item, slice):
            return self._of(self.polygons[item])
        index = torch.as_tensor(item)
        if index.dim() != 1 or index.is_floating_point():
            if index.numel() == 0:
                return self._of([])
            raise ValueError(f"PolygonMasks: expected a 1-D mask or indices, got {item!r}")
        if index.dtype == torch.bool:
            if len(index) != len(self):
                raise IndexError(
                    f"PolygonMasks: mask of length {len(index)} for {len(self)} instances"
                )
            index = index.nonzero().flatten()
        return self._of([self.polygons[i] for i in index.tolist()])

    @classmethod
    def _of(cls, polygons: list[list[np.ndarray]]) -> PolygonMasks:
        """Wrap polygons that were checked before."""
        made = cls([])
        made.polygons = polygons
        return made

    def __iter__(self) -> Iterator[list[np.ndarray]]:
        return iter(self.polygons)

    def __repr__(self) -> str:
        return f"PolygonMasks(num_instances={len(self)})"

    def __len__(self) -> int:
        return len(self.polygons)

    def crop_and_resize(self, boxes: Tensor, mask_size: int) -> Tensor:
        """Rasterise each instance on a grid over its box.

        Args:
            boxes: (R, 4) XYXY, absolute pixels.
            mask_size: M cells per side.

        Returns:
            (R, M, M) bool on the device of `boxes`.

        Raises:
            ValueError: if there are not as many boxes as instances.
        """
        if len(boxes) != len(self):
            raise ValueError(f"PolygonMasks: expected {len(self)} boxes, got {len(boxes)}")
        masks = [
            rasterize_polygons_within_box(polygons, box, mask_size)
            for polygons, box in zip(self.polygons, boxes.detach().cpu().numpy(), strict=True)
        ]
        if not masks:
            return torch.zeros((0, mask_size, mask_size), dtype=torch.bool, device=boxes.device)
        return torch.stack(masks).to(boxes.device)

    def area(self) -> Tensor:
        """Return the sums of the areas of the polygons in square pixels, (R,) float64."""
        areas = [sum(polygon_area(p[0::2], p[1::2]) for p in of) for of in self.polygons]
        return torch.tensor(areas, dtype=torch.float64)

    @staticmethod
    def cat(polymasks_list: Sequence[PolygonMasks]) -> PolygonMasks:
        """Concatenate at least one `PolygonMasks`.

        Raises:
            ValueError: if the list is empty.
        """
        if not polymasks_list:
            raise ValueError("PolygonMasks.cat: expected at least one element, got an empty list")
        return PolygonMasks._of([polygons for masks in polymasks_list for polygons in masks])


def _checked_polygons(polygons: object, index: int) -> list[np.ndarray]:
    """Return the polygons of one instance as float64 arrays."""
    if not isinstance(polygons, list):
        raise ValueError(
            "PolygonMasks: expected a list of polygons per instance, "
            f"got {type(polygons).__name__} for instance {index}"
        )
    arrays = []
    for polygon in polygons:
        array = polygon.cpu().numpy() if isinstance(polygon, Tensor) else np.asarray(polygon)
        if array.ndim != 1 or len(array) % 2 or len(array) < 6:
            raise ValueError(
                "PolygonMasks: expected a polygon x0, y0, x1, y1, ... of at least 3 points, "
                f"got shape {array.shape} for instance {index}"
            )
        arrays.append(array.astype(np.float64))
    return arrays


class ROIMasks:
    """Masks of R instances as grids over their boxes.

    Args:
        tensor: (R, M, M), probabilities in [0, 1] or bool.
        whole_pixels: whether pasting cuts the boxes to whole pixels, as torchvision does.

    Raises:
        ValueError: if there are not three axes.
    """

    def __init__(self, tensor: Tensor, *, whole_pixels: bool = False) -> None:
        if tensor.dim() != 3:
            raise ValueError(f"ROIMasks: expected shape (R, M, M), got {tuple(tensor.shape)}")
        self.tensor = tensor
        self.whole_pixels = whole_pixels

    def to(self, device: torch.device | str) -> ROIMasks:
        """Return the masks on `device`."""
        return ROIMasks(self.tensor.to(device), whole_pixels=self.whole_pixels)

    @property
    def device(self) -> torch.device:
        """The device of the masks."""
        return self.tensor.device

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def __getitem__(self, item: int | slice | list[int] | Tensor) -> ROIMasks:
        """Select masks by a slice, a bool mask or indices.

        Raises:
            ValueError: if the result has not three axes.
        """
        chosen = self.tensor[item]
        if chosen.dim() != 3:
            raise ValueError(
                f"ROIMasks: index {item!r} gives shape {tuple(chosen.shape)}, not (R, M, M)"
            )
        return ROIMasks(chosen, whole_pixels=self.whole_pixels)

    def __repr__(self) -> str:
        return f"ROIMasks(num_instances={len(self)})"

    def to_bitmasks(
        self, boxes: object, height: int, width: int, threshold: float = 0.5
    ) -> BitMasks:
        """Paste the masks into images.

        Args:
            boxes: `Boxes` or (R, 4) XYXY, absolute pixels.
            height: of the image in pixels.
            width: of the image in pixels.
            threshold: in [0, 1], values from it on are True.
        """
        places = self.places(boxes)
        return BitMasks(paste_masks_in_image(self.tensor, places, (height, width), threshold))

    def places(self, boxes: Any) -> Tensor:
        """Return where on the image the masks lie, (R, 4) XYXY, given their boxes (R, 4)."""
        corners = boxes if isinstance(boxes, Tensor) else boxes.tensor
        return whole_pixel_boxes(corners, self.tensor.shape[-1]) if self.whole_pixels else corners
