"""Keypoints, and their way to and from the heat maps of the keypoint head."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Keypoints", "heatmaps_to_keypoints"]


class Keypoints:
    """K keypoints of each of R instances.

    Args:
        keypoints: (R, K, 3) as x, y in absolute pixels and visibility (0 not labelled, 1 hidden,
            2 visible); becomes float32.

    Raises:
        ValueError: if the shape is not (R, K, 3).
    """

    def __init__(self, keypoints: Tensor | np.ndarray | list[list[float]]) -> None:
        if not isinstance(keypoints, Tensor):
            keypoints = torch.as_tensor(np.asarray(keypoints))
        if keypoints.dim() != 3 or keypoints.shape[2] != 3:
            raise ValueError(f"Keypoints: expected shape (R, K, 3), got {tuple(keypoints.shape)}")
        self.tensor = keypoints.to(torch.float32)

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def to(self, *args: Any, **kwargs: Any) -> "Keypoints":
        """Return the keypoints after `Tensor.to(*args, **kwargs)`."""
        return type(self)(self.tensor.to(*args, **kwargs))

    @property
    def device(self) -> torch.device:
        """The device of the keypoints."""
        return self.tensor.device

    def to_heatmap(self, boxes: Tensor, heatmap_size: int) -> tuple[Tensor, Tensor]:
        """Find the cell of each keypoint in a grid over the instance's box.

        Args:
            boxes: (R, 4) XYXY, absolute pixels.
            heatmap_size: S cells per side.

        Returns:
            (R, K) int64, index y * S + x of the cell, 0 where not valid; (R, K) int64, 1 where the
            keypoint is labelled and inside the box, else 0.
        """
        return _keypoints_to_heatmap(self.tensor, boxes, heatmap_size)

    def __getitem__(self, item: int | slice | Tensor) -> "Keypoints":
        """Select instances by an integer (gives one), a slice, a bool mask or indices."""
        if isinstance(item, int):
            return Keypoints(self.tensor[item][None])
        return Keypoints(self.tensor[item])

    def __repr__(self) -> str:
        return f"Keypoints(num_instances={len(self)})"

    @staticmethod
    def cat(keypoints_list: Sequence["Keypoints"]) -> "Keypoints":
        """Concatenate at least one `Keypoints`.

        Raises:
            ValueError: if the list is empty.
        """
        if not keypoints_list:
            raise ValueError("Keypoints.cat: expected at least one element, got an empty list")
        return Keypoints(torch.cat([k.tensor for k in keypoints_list], dim=0))


def _keypoints_to_heatmap(
    keypoints: Tensor, rois: Tensor, heatmap_size: int
) -> tuple[Tensor, Tensor]:
    """As `Keypoints.to_heatmap`, from a (R, K, 3) tensor."""
    start, end = rois[:, None, :2], rois[:, None, 2:]
    point = keypoints[..., :2]
    cell = ((point - start) * (heatmap_size / (end - start))).floor().long()
    # the far sides of the box belong to the last cell
    cell = torch.where(point == end, heatmap_size - 1, cell)
    inside = ((cell >= 0) & (cell < heatmap_size)).all(dim=2)
    valid = (inside & (keypoints[..., 2] > 0)).long()
    return (cell[..., 1] * heatmap_size + cell[..., 0]) * valid, valid


@torch.no_grad()
def heatmaps_to_keypoints(maps: Tensor, rois: Tensor) -> Tensor:
    """Find the best position of each keypoint, at the resolution of the image.

    Each heat map is resized bicubically to its box, rounded up to whole pixels.

    Args:
        maps: (R, K, S, S) logits.
        rois: (R, 4) XYXY, absolute pixels.

    Returns:
        (R, K, 4) float32: x, y in pixels (the centre of the best one), its logit, and a score: the
        exponential of the logit over the sum of those of the cells of the heat map. It may exceed 1
        where the interpolation overshoots.
    """
    maps = maps.float()
    if torch.jit.is_tracing():
        found: Tensor = _heatmaps_to_keypoints_scripted(maps, rois)
        return found
    keypoints = maps.new_zeros((*maps.shape[:2], 4))
    if len(maps) == 0:
        return keypoints
    size = (rois[:, 2:] - rois[:, :2]).clamp(min=1)
    whole = size.ceil()
    for index, (width, height) in enumerate(whole.long().tolist()):
        fine = F.interpolate(
            maps[index : index + 1], size=(height, width), mode="bicubic", align_corners=False
        )[0].flatten(1)
        logit, at = fine.max(dim=1)
        # normalised over the cells, so that the score does not depend on the size of the box
        total = (maps[index].flatten(1) - logit[:, None]).exp().sum(dim=1)
        position = torch.stack([at % width, at.div(width, rounding_mode="floor")], dim=1)
        step = size[index] / whole[index]
        keypoints[index, :, :2] = (position + 0.5) * step + rois[index, :2]
        keypoints[index, :, 2] = logit
        keypoints[index, :, 3] = 1 / total
    return keypoints


@torch.jit.script_if_tracing
def _heatmaps_to_keypoints_scripted(maps: Tensor, rois: Tensor) -> Tensor:
    """Do the same in TorchScript, whose trace would repeat the loop for one number of boxes."""
    keypoints = torch.zeros((maps.shape[0], maps.shape[1], 4), device=maps.device)
    size = (rois[:, 2:] - rois[:, :2]).clamp(min=1)
    whole = size.ceil()
    for index in range(maps.shape[0]):
        width, height = int(whole[index, 0].item()), int(whole[index, 1].item())
        fine = F.interpolate(
            maps[index : index + 1], size=[height, width], mode="bicubic", align_corners=False
        )[0].flatten(1)
        logit, at = fine.max(dim=1)
        total = (maps[index].flatten(1) - logit[:, None]).exp().sum(dim=1)
        position = torch.stack([at % width, at.div(width, rounding_mode="floor")], dim=1)
        step = size[index] / whole[index]
        keypoints[index, :, :2] = (position + 0.5) * step + rois[index, :2]
        keypoints[index, :, 2] = logit
        keypoints[index, :, 3] = 1 / total
    return keypoints
