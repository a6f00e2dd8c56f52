"""Anchors: the reference boxes of dense detectors.

Source: Ren et al., Faster R-CNN (2015), section 3.1.1; Ma et al., Arbitrary-Oriented Scene Text
Detection via Rotation Proposals (2018), section III-B, for rotated anchors.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2kit.config import CfgNode, configurable
from d2kit.layers import ShapeSpec, move_device_like
from d2kit.structures import Boxes, RotatedBoxes
from d2kit.utils.devices import is_symbolic
from d2kit.utils.registry import Registry

__all__ = [
    "ANCHOR_GENERATOR_REGISTRY",
    "BufferList",
    "DefaultAnchorGenerator",
    "RotatedAnchorGenerator",
    "WholePixelAnchorGenerator",
    "build_anchor_generator",
    "move_device_like",
]

ANCHOR_GENERATOR_REGISTRY = Registry("ANCHOR_GENERATOR")
ANCHOR_GENERATOR_REGISTRY.__doc__ = """Classes `(cfg, input_shape: list[ShapeSpec]) -> Module`."""

_GRIDS_KEPT = 4  # per level; a p2 grid of 200x304 with 3 anchors takes 3 MB


class BufferList(nn.Module):
    """A list of tensors that move with the module but are not saved with it.

    Args:
        buffers: the tensors.
    """

    def __init__(self, buffers: Iterable[Tensor]) -> None:
        super().__init__()
        self._length = 0
        for tensor in buffers:
            self.register_buffer(str(self._length), tensor, persistent=False)
            self._length += 1

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Tensor:
        place = range(self._length)[index]  # negative ones count from the end
        tensor: Tensor = getattr(self, str(place))
        return tensor

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(self._length))


def _per_level(name: str, values: Sequence[Any], num_levels: int) -> list[tuple[float, ...]]:
    """Give every level its values: one list may serve all levels, or be flat.

    Raises:
        ValueError: no value, or neither one list nor one for each level.
    """
    if len(values) == 0:
        raise ValueError(f"anchor generator: {name} is empty.")
    rows = list(values) if isinstance(values[0], Sequence) else [values]
    if len(rows) == 1:
        rows *= num_levels
    if len(rows) != num_levels:
        raise ValueError(
            f"anchor generator: {name} must be one list or one for each of the {num_levels} "
            f"feature maps, got {len(rows)} lists."
        )
    return [tuple(float(v) for v in row) for row in rows]


def _sizes(features: Sequence[Tensor]) -> list[Sequence[int]]:
    return [feature.shape[-2:] for feature in features]


class _GridAnchors(nn.Module):
    """Cell anchors repeated at every cell of every feature map."""

    box_dim: int

    def __init__(
        self, cell_anchors: Iterable[Tensor], strides: Sequence[int], offset: float
    ) -> None:
        super().__init__()
        if not 0.0 <= offset < 1.0:
            raise ValueError(
                f"anchor generator: offset (MODEL.ANCHOR_GENERATOR.OFFSET) must be in [0, 1), "
                f"got {offset}."
            )
        self.strides = list(strides)
        self.num_features = len(self.strides)
        self.offset = offset
        self.cell_anchors = BufferList(cell_anchors)
        # (level, H, W, steps) -> (cell anchors they were made from, anchors). `module.to` replaces
        # the cell anchors, so the identity of that tensor says whether an entry is still good.
        self._grids: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def _cells(self, *rows: Sequence[Sequence[float]]) -> BufferList:
        """Make the cell anchors of rows, one per level, of sizes, aspect ratios (and angles)."""
        make: Any = type(self).generate_cell_anchors  # type: ignore[attr-defined]
        return BufferList(map(make, *rows))

    @property
    def num_anchors(self) -> list[int]:
        """Number of anchors at each cell, for each feature map."""
        return [len(cell) for cell in self.cell_anchors]

    @property
    def num_cell_anchors(self) -> list[int]:
        """Number of anchors at each cell, for each feature map."""
        return self.num_anchors

    def _grid_anchors(self, grid_sizes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return the anchors of each feature map (H * W * A, box_dim); user classes override it.

        Args:
            grid_sizes: height and width of each map.
        """
        if len(grid_sizes) != self.num_features:
            raise ValueError(
                f"anchor generator: made for {self.num_features} feature maps (strides "
                f"{self.strides}), got {len(grid_sizes)}."
            )
        sizes: list[Any] = list(grid_sizes)
        if is_symbolic():
            return [
                self._make_grid(i, h, w, *step)
                for i, ((h, w), step) in enumerate(zip(sizes, self._steps(sizes), strict=True))
            ]
        sizes = [(int(h), int(w)) for h, w in sizes]
        return [
            self._cached_grid(i, h, w, *step)
            for i, ((h, w), step) in enumerate(zip(sizes, self._steps(sizes), strict=True))
        ]

    def _steps(self, sizes: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
        """Distances of the cells of each map, downwards and to the right, in input pixels."""
        del sizes
        return [(stride, stride) for stride in self.strides]

    def _cached_grid(self, level: int, height: int, width: int, down: int, right: int) -> Tensor:
        key = (level, height, width, down, right)
        cell = self.cell_anchors[level]
        source, anchors = self._grids.pop(key, (None, None))
        if anchors is None or source is not cell:
            # Made outside inference mode, so that a later training step may use it.
            with torch.inference_mode(False), torch.no_grad():
                anchors = self._make_grid(*key)
        self._grids[key] = (cell, anchors)
        of_level = [k for k in self._grids if k[0] == level]
        if len(of_level) > _GRIDS_KEPT:
            del self._grids[of_level[0]]  # the least recently used: a hit moves to the end
        return anchors

    def _make_grid(self, level: int, height: int, width: int, down: int, right: int) -> Tensor:
        """Shift the cell anchors to every cell: (H, W, A, box_dim), flattened."""
        cell = self.cell_anchors[level]
        x, y = (
            (torch.arange(count, dtype=torch.float32, device=cell.device) + self.offset) * step
            for count, step in ((width, right), (height, down))
        )
        if is_symbolic():  # exporters know no change of a part
            ys, xs = torch.meshgrid(y, x, indexing="ij")
            still = [torch.zeros_like(xs)] * 3
            move = [xs, ys, xs, ys] if self.box_dim == 4 else [xs, ys, *still]
            shift = torch.stack(move, dim=2).view(-1, 1, self.box_dim)
            return (cell.float() + shift).view(-1, self.box_dim).to(cell.dtype)
        anchors = cell.float().repeat(height * width, 1).view(height, width, -1, self.box_dim)
        for first in range(0, 4 if self.box_dim == 4 else 2, 2):  # XYXY: both corners move
            anchors[..., first] += x[None, :, None]
            anchors[..., first + 1] += y[:, None, None]
        return anchors.view(-1, self.box_dim).to(cell.dtype)


@ANCHOR_GENERATOR_REGISTRY.register()
class DefaultAnchorGenerator(_GridAnchors):
    """Upright anchors of every size and aspect ratio at every cell.

    Args:
        sizes: for each feature map the side lengths (square roots of the areas) in input pixels;
            one list, also a flat one, serves all maps.
        aspect_ratios: for each feature map the ratios height / width, likewise.
        strides: stride of each feature map, in input pixels.
        offset: centre of the first cell, as a fraction of the stride, in [0, 1).

    Raises:
        ValueError: lists of other lengths, or an offset outside [0, 1).
    """

    box_dim = 4

    @configurable
    def __init__(
        self,
        *,
        sizes: Sequence[Sequence[float]] | Sequence[float],
        aspect_ratios: Sequence[Sequence[float]] | Sequence[float],
        strides: Sequence[int],
        offset: float = 0.5,
    ) -> None:
        size_rows = _per_level("sizes", sizes, len(strides))
        ratio_rows = _per_level("aspect_ratios", aspect_ratios, len(strides))
        super().__init__(self._calculate_anchors(size_rows, ratio_rows), strides, offset)

    def _calculate_anchors(
        self, sizes: Sequence[Sequence[float]], aspect_ratios: Sequence[Sequence[float]]
    ) -> BufferList:
        """Make the cell anchors of all levels, one row each; user classes override it."""
        return self._cells(sizes, aspect_ratios)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict[str, Any]:
        """Constructor arguments from `cfg.MODEL.ANCHOR_GENERATOR` and the features' strides."""
        return {
            "sizes": cfg.MODEL.ANCHOR_GENERATOR.SIZES,
            "aspect_ratios": cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS,
            "strides": [shape.stride for shape in input_shape],
            "offset": cfg.MODEL.ANCHOR_GENERATOR.OFFSET,
        }

    @staticmethod
    def generate_cell_anchors(
        sizes: Sequence[float] = (32, 64, 128, 256, 512),
        aspect_ratios: Sequence[float] = (0.5, 1, 2),
    ) -> Tensor:
        """Make the anchors of one cell, centred at (0, 0).

        Args:
            sizes: square roots of the areas, in pixels.
            aspect_ratios: heights over widths.

        Returns:
            Float32 (len(sizes) * len(aspect_ratios), 4), XYXY, sizes varying slowest.
        """
        rows = []
        for size in sizes:
            for ratio in aspect_ratios:
                width, height = size / math.sqrt(ratio), size * math.sqrt(ratio)
                rows.append([-width / 2, -height / 2, width / 2, height / 2])
        return torch.tensor(rows)

    def forward(self, features: Sequence[Tensor]) -> list[Boxes]:
        """Return the anchors of each feature map.

        Args:
            features: one tensor (N, C, H, W) for each stride; only H and W matter.

        Returns:
            For each map H * W * A boxes, rows slowest, anchors of a cell fastest. The tensors are
            kept for the next call with these sizes: do not change them in place.

        Raises:
            ValueError: another number of feature maps than strides.
        """
        return [Boxes(anchors) for anchors in self._grid_anchors(_sizes(features))]


@ANCHOR_GENERATOR_REGISTRY.register()
class WholePixelAnchorGenerator(DefaultAnchorGenerator):
    """Anchors of whole pixels, as torchvision's detectors have them.

    Corners of the cell anchors are rounded (halves to even), and the cells of a map lie at the
    whole part of (padded image size / map size), which is not the stride where that size is no
    multiple of it: 61 instead of 64 at `p6` of 800 pixels.

    Args:
        sizes: as of `DefaultAnchorGenerator`, as the others.
        aspect_ratios: see there.
        strides: see there; the first must divide the padded image.
        offset: see there.
    """

    @staticmethod
    def generate_cell_anchors(
        sizes: Sequence[float] = (32, 64, 128, 256, 512),
        aspect_ratios: Sequence[float] = (0.5, 1, 2),
    ) -> Tensor:
        """See `DefaultAnchorGenerator.generate_cell_anchors`; rounded."""
        found: Tensor = DefaultAnchorGenerator.generate_cell_anchors(sizes, aspect_ratios).round()
        return found

    def _steps(self, sizes: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
        image = [side * self.strides[0] for side in sizes[0]]
        return [(image[0] // h, image[1] // w) for h, w in sizes]


@ANCHOR_GENERATOR_REGISTRY.register()
class RotatedAnchorGenerator(_GridAnchors):
    """Anchors of every size, aspect ratio and angle at every cell.

    Args:
        sizes: for each feature map the square roots of the areas, in input pixels; one list, also
            a flat one, serves all maps.
        aspect_ratios: for each feature map the ratios height / width, likewise.
        strides: stride of each feature map, in input pixels.
        angles: for each feature map the angles in degrees, counter-clockwise, likewise.
        offset: centre of the first cell, as a fraction of the stride, in [0, 1).

    Raises:
        ValueError: lists of other lengths, or an offset outside [0, 1).
    """

    box_dim = 5

    @configurable
    def __init__(
        self,
        *,
        sizes: Sequence[Sequence[float]] | Sequence[float],
        aspect_ratios: Sequence[Sequence[float]] | Sequence[float],
        strides: Sequence[int],
        angles: Sequence[Sequence[float]] | Sequence[float],
        offset: float = 0.5,
    ) -> None:
        size_rows = _per_level("sizes", sizes, len(strides))
        ratio_rows = _per_level("aspect_ratios", aspect_ratios, len(strides))
        angle_rows = _per_level("angles", angles, len(strides))
        cells = self._calculate_anchors(size_rows, ratio_rows, angle_rows)
        super().__init__(cells, strides, offset)

    def _calculate_anchors(
        self,
        sizes: Sequence[Sequence[float]],
        aspect_ratios: Sequence[Sequence[float]],
        angles: Sequence[Sequence[float]],
    ) -> BufferList:
        """Make the cell anchors of all levels, one row each; user classes override it."""
        return self._cells(sizes, aspect_ratios, angles)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict[str, Any]:
        """Constructor arguments from `cfg.MODEL.ANCHOR_GENERATOR` and the features' strides."""
        return {
            **DefaultAnchorGenerator.from_config(cfg, input_shape),
            "angles": cfg.MODEL.ANCHOR_GENERATOR.ANGLES,
        }

    @staticmethod
    def generate_cell_anchors(
        sizes: Sequence[float] = (32, 64, 128, 256, 512),
        aspect_ratios: Sequence[float] = (0.5, 1, 2),
        angles: Sequence[float] = (-90, -60, -30, 0, 30, 60, 90),
    ) -> Tensor:
        """Make the anchors of one cell, centred at (0, 0).

        Args:
            sizes: square roots of the areas, in pixels.
            aspect_ratios: heights over widths.
            angles: degrees, counter-clockwise.

        Returns:
            Float32 (sizes * ratios * angles, 5), XYWHA, sizes slowest, angles fastest.
        """
        rows: list[list[float]] = []
        for size in sizes:
            for ratio in aspect_ratios:
                width, height = size / math.sqrt(ratio), size * math.sqrt(ratio)
                rows.extend([0.0, 0.0, width, height, float(angle)] for angle in angles)
        return torch.tensor(rows)

    def forward(self, features: Sequence[Tensor]) -> list[RotatedBoxes]:
        """Return the anchors of each feature map.

        Args:
            features: one tensor (N, C, H, W) for each stride; only H and W matter.

        Returns:
            For each map H * W * A rotated boxes, rows slowest, anchors of a cell fastest. The
            tensors are kept for the next call with these sizes: do not change them in place.

        Raises:
            ValueError: another number of feature maps than strides.
        """
        return [RotatedBoxes(anchors) for anchors in self._grid_anchors(_sizes(features))]


def build_anchor_generator(cfg: CfgNode, input_shape: list[ShapeSpec]) -> nn.Module:
    """Build the anchor generator that `cfg.MODEL.ANCHOR_GENERATOR.NAME` names.

    Args:
        cfg: a full config.
        input_shape: the feature maps, with their strides, fine to coarse.

    Returns:
        A module from a list of feature maps to a list of boxes.

    Raises:
        KeyError: no anchor generator of that name is registered.
    """
    found: nn.Module = ANCHOR_GENERATOR_REGISTRY.get(cfg.MODEL.ANCHOR_GENERATOR.NAME)(
        cfg, input_shape
    )
    return found
