"""Keypoint head: one heat map per region and keypoint.

Source: Mask R-CNN (He et al. 2017), section 5.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2kit.config import CfgNode, configurable
from d2kit.layers import ShapeSpec
from d2kit.layers.blocks import msra_fill
from d2kit.layers.wrappers import region_shape
from d2kit.modeling.box_regression import split_like
from d2kit.modeling.roi_heads.box_head import add_convs, in_turn
from d2kit.structures import Instances, heatmaps_to_keypoints
from d2kit.utils import comm
from d2kit.utils.registry import Registry

__all__ = [
    "ROI_KEYPOINT_HEAD_REGISTRY",
    "BaseKeypointRCNNHead",
    "KRCNNConvDeconvUpsampleHead",
    "build_keypoint_head",
    "keypoint_rcnn_inference",
    "keypoint_rcnn_loss",
]

ROI_KEYPOINT_HEAD_REGISTRY = Registry("ROI_KEYPOINT_HEAD")
"""Keypoint heads: called with ``(cfg, input_shape: ShapeSpec)``; see `BaseKeypointRCNNHead`."""

_UNUSED = -100
"""Target of keypoints that take no part in the loss."""


def build_keypoint_head(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
    """Build the keypoint head that ``cfg.MODEL.ROI_KEYPOINT_HEAD.NAME`` names.

    Args:
        cfg: the config.
        input_shape: channels, height and width of a pooled region.

    Returns:
        The head.
    """
    found: nn.Module = ROI_KEYPOINT_HEAD_REGISTRY.get(cfg.MODEL.ROI_KEYPOINT_HEAD.NAME)(
        cfg, input_shape
    )
    return found


def keypoint_rcnn_loss(
    pred_keypoint_logits: Tensor, instances: list[Instances], normalizer: float | None
) -> Tensor:
    """Cross-entropy of each keypoint's cell among all cells of its heat map.

    Args:
        pred_keypoint_logits: (R, K, S, S), R over the regions of all images in order.
        instances: per image, with `proposal_boxes` and `gt_keypoints`; images without regions
            need neither.
        normalizer: what the sum over keypoints is divided by; None: the number of keypoints that
            are labelled and inside their box, the mean over processes, so that the number of
            processes does not change the result.

    Returns:
        0-dim loss; 0 (with a graph) where no keypoint counts.

    Raises:
        ValueError: if the ground truth has another number of keypoints than the head.

    Source: Mask R-CNN, section 5: a softmax over the m^2 positions, one of which is right.
    """
    regions, keypoints, side = pred_keypoint_logits.shape[:3]
    device = pred_keypoint_logits.device
    with torch.no_grad():
        pairs = [
            x.gt_keypoints.to_heatmap(x.proposal_boxes.tensor, side) for x in instances if len(x)
        ]
        empty = torch.zeros(0, keypoints, dtype=torch.int64, device=device)
        cells = torch.cat([empty, *_of_width(keypoints, [cell for cell, _ in pairs])])
        usable = torch.cat([empty, *(valid for _, valid in pairs)]).bool()
    target = cells.masked_fill(~usable, _UNUSED).flatten()
    logits = pred_keypoint_logits.reshape(regions * keypoints, side * side).float()
    total = F.cross_entropy(logits, target, reduction="sum", ignore_index=_UNUSED)
    if normalizer is None:
        return total / comm.mean_over_ranks(usable.sum().float()).clamp(min=1)
    return total / normalizer


def _of_width(keypoints: int, cells: list[Tensor]) -> list[Tensor]:
    """Return `cells`, each (R, keypoints), or raise ValueError."""
    for cell in cells:
        if cell.shape[1] != keypoints:
            raise ValueError(
                f"the ground truth has {cell.shape[1]} keypoints, the head {keypoints}: set "
                f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS to {cell.shape[1]} (and "
                "TEST.KEYPOINT_OKS_SIGMAS to as many values)"
            )
    return cells


@torch.no_grad()
def keypoint_rcnn_inference(pred_keypoint_logits: Tensor, pred_instances: list[Instances]) -> None:
    """Set `pred_keypoints` and `pred_keypoint_heatmaps` on each image's results.

    Args:
        pred_keypoint_logits: (R, K, S, S), R over all images in order.
        pred_instances: per image, with `pred_boxes`; changed in place. `pred_keypoints` becomes
            (R, K, 3): x, y in pixels, score (see `heatmaps_to_keypoints`);
            `pred_keypoint_heatmaps` the image's share of the logits.
    """
    if not pred_instances:
        return
    boxes = [x.pred_boxes.tensor for x in pred_instances]
    found = heatmaps_to_keypoints(pred_keypoint_logits.detach(), torch.cat(boxes))
    keypoints = split_like(found[:, :, [0, 1, 3]], boxes)
    maps = split_like(pred_keypoint_logits.detach(), boxes)
    for instances, points, heat in zip(pred_instances, keypoints, maps, strict=True):
        instances.pred_keypoints = points
        instances.pred_keypoint_heatmaps = heat


class BaseKeypointRCNNHead(nn.Module):
    """What every keypoint head shares: the loss and the inference around `layers`.

    Args:
        num_keypoints: K.
        loss_weight: factor of the loss.
        loss_normalizer: ``"visible"``: divide by the labelled keypoints inside their boxes; a
            number: by that number for each image of the batch.

    Raises:
        ValueError: another text as `loss_normalizer`.
    """

    @configurable
    def __init__(
        self,
        *,
        num_keypoints: int,
        loss_weight: float = 1.0,
        loss_normalizer: float | str = 1.0,
    ) -> None:
        super().__init__()
        if isinstance(loss_normalizer, str) and loss_normalizer != "visible":
            raise ValueError(
                f"loss_normalizer must be a number or 'visible', got {loss_normalizer!r}"
            )
        self.num_keypoints = num_keypoints
        self.loss_weight = loss_weight
        self.loss_normalizer = loss_normalizer

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg`.

        Without ``NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS`` the loss is divided by the number of
        keypoints that the largest possible sample of foreground regions would have.
        """
        del input_shape
        head, roi_heads = cfg.MODEL.ROI_KEYPOINT_HEAD, cfg.MODEL.ROI_HEADS
        regions = roi_heads.BATCH_SIZE_PER_IMAGE * roi_heads.POSITIVE_FRACTION
        by_visible = head.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS
        return {
            "num_keypoints": head.NUM_KEYPOINTS,
            "loss_weight": head.LOSS_WEIGHT,
            "loss_normalizer": "visible" if by_visible else head.NUM_KEYPOINTS * regions,
        }

    def forward(self, x: Any, instances: list[Instances]) -> Any:
        """Compute the loss in training, or the keypoints.

        Args:
            x: pooled features (R, C, H, W), R over all images in order.
            instances: per image; with `proposal_boxes` and `gt_keypoints` in training, with
                `pred_boxes` at inference.

        Returns:
            ``{"loss_keypoint": ...}`` in training; else `instances`, with `pred_keypoints` set.
        """
        logits = self.layers(x)
        if not self.training:
            keypoint_rcnn_inference(logits, instances)
            return instances
        normalizer = None
        if not isinstance(self.loss_normalizer, str):
            normalizer = len(instances) * self.loss_normalizer
        loss = keypoint_rcnn_loss(logits, instances, normalizer)
        return {"loss_keypoint": loss * self.loss_weight}

    def layers(self, x: Any) -> Tensor:
        """Map pooled features (R, C, H, W) to logits (R, K, S, S); subclasses define it."""
        raise NotImplementedError(f"{type(self).__name__} must define layers(x)")


@ROI_KEYPOINT_HEAD_REGISTRY.register()
class KRCNNConvDeconvUpsampleHead(BaseKeypointRCNNHead):
    """3x3 convolutions, a transposed convolution to one map per keypoint, bilinear up-sampling.

    Args:
        input_shape: channels of a pooled region.
        num_keypoints: K.
        conv_dims: output channels of each 3x3 convolution.
        **kwargs: see `BaseKeypointRCNNHead`.

    Source: Mask R-CNN (He et al. 2017), section 5: eight convolutions of 512 channels, a
    deconvolution, and a bilinear step of 2, from 14x14 to 56x56.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        num_keypoints: int,
        conv_dims: Sequence[int],
        **kwargs: object,
    ) -> None:
        super().__init__(num_keypoints=num_keypoints, **kwargs)
        channels = region_shape(input_shape, "KRCNNConvDeconvUpsampleHead")[0]
        self.up_scale = 2  # of the bilinear step
        self.conv_names = add_convs(self, "conv_fcn", channels, conv_dims)
        channels = conv_dims[-1] if conv_dims else channels
        self.score_lowres = nn.ConvTranspose2d(
            channels, num_keypoints, kernel_size=4, stride=2, padding=1
        )
        msra_fill(self.score_lowres)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg`."""
        return {
            **super().from_config(cfg, input_shape),
            "input_shape": input_shape,
            "conv_dims": cfg.MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS,
        }

    def layers(self, x: Tensor) -> Tensor:
        """Map pooled features (R, C, H, W) to logits (R, K, 4H, 4W)."""
        x = self.score_lowres(in_turn(self, self.conv_names, x))
        factor = float(self.up_scale)
        return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
