"""Mask head: a small mask per region.

Source: Mask R-CNN (He et al. 2017), section 3 and figure 4.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2kit.config import CfgNode, configurable
from d2kit.layers import ShapeSpec
from d2kit.layers.blocks import msra_fill, normal_fill
from d2kit.layers.wrappers import region_shape
from d2kit.modeling.box_regression import split_like
from d2kit.modeling.roi_heads.box_head import add_convs, in_turn, own_class
from d2kit.modeling.roi_heads.fast_rcnn import region_count
from d2kit.modeling.sampling import SampledPolygonMasks, crop_sampled_polygons
from d2kit.structures import Instances
from d2kit.utils.devices import is_symbolic
from d2kit.utils.events import picture_due, put_image, put_scalars
from d2kit.utils.registry import Registry

__all__ = [
    "ROI_MASK_HEAD_REGISTRY",
    "BaseMaskRCNNHead",
    "MaskRCNNConvUpsampleHead",
    "build_mask_head",
    "mask_rcnn_inference",
    "mask_rcnn_loss",
]

ROI_MASK_HEAD_REGISTRY = Registry("ROI_MASK_HEAD")
"""Mask heads: called with ``(cfg, input_shape: ShapeSpec)``; see `BaseMaskRCNNHead`."""


def build_mask_head(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
    """Build the mask head that ``cfg.MODEL.ROI_MASK_HEAD.NAME`` names.

    Args:
        cfg: the config.
        input_shape: channels, height and width of a pooled region.

    Returns:
        The head.
    """
    found: nn.Module = ROI_MASK_HEAD_REGISTRY.get(cfg.MODEL.ROI_MASK_HEAD.NAME)(cfg, input_shape)
    return found


def mask_rcnn_loss(
    pred_mask_logits: Tensor, instances: list[Instances], vis_period: int = 0
) -> Tensor:
    """Mean binary cross-entropy over the masks of the foreground regions' own classes.

    Args:
        pred_mask_logits: (R, K, M, M), or (R, 1, M, M) where the mask does not depend on the
            class or the class was already picked. R counts the regions of all images in order.
        instances: per image, with `proposal_boxes`, `gt_classes` and `gt_masks`.
        vis_period: publish one region's mask beside its target every this many steps; 0: never.

    Returns:
        0-dim loss; 0 (with a graph) without regions. Across processes the mean over regions is
        taken over all of them, so that the number of processes does not change the result.

    Source: Mask R-CNN, section 3, the loss L_mask.
    """
    filled = [x for x in instances if len(x) > 0]
    regions = region_count(pred_mask_logits)  # every process counts, also one without regions
    if not filled:
        return pred_mask_logits.sum() * 0
    truth = _mask_targets(filled, pred_mask_logits)
    logits = own_class(pred_mask_logits, torch.cat([x.gt_classes for x in filled])).squeeze(1)
    logits = logits.float()
    _put_mask_statistics(logits.detach() > 0, truth)
    if picture_due(vis_period):
        pair = torch.cat([logits[0].detach().sigmoid(), truth[0].float()], dim=1)
        put_image("Left: mask prediction;   Right: mask GT", pair.expand(3, -1, -1))
    total = F.binary_cross_entropy_with_logits(logits, truth.float(), reduction="sum")
    return total / (regions * truth[0].numel())


@torch.no_grad()
def _mask_targets(instances: list[Instances], like: Tensor) -> Tensor:
    """Return the ground truth in each region's grid, (R, M, M) bool where `like` (..., M) is."""
    masks, boxes = [x.gt_masks for x in instances], [x.proposal_boxes.tensor for x in instances]
    if all(type(of_image) is SampledPolygonMasks for of_image in masks):
        return crop_sampled_polygons(masks, boxes, like.shape[-1]).to(like.device)
    crops = [
        x.gt_masks.crop_and_resize(x.proposal_boxes.tensor, like.shape[-1]).to(like.device)
        for x in instances
    ]
    target = torch.cat(crops)
    return target > 0.5 if target.is_floating_point() else target.bool()


def _put_mask_statistics(claimed: Tensor, truth: Tensor) -> None:
    """Publish the share of wrong pixels, in all, in the background, in the foreground.

    Args:
        claimed: bool, the pixels taken for foreground.
        truth: bool, of the same shape.
    """
    found, inside = (claimed & truth).sum(), truth.sum()
    missed, invented = inside - found, claimed.sum() - found
    put_scalars(
        "mask_rcnn",
        accuracy=1 - (missed + invented) / truth.numel(),
        false_positive=invented / (truth.numel() - inside).clamp(min=1),
        false_negative=missed / inside.clamp(min=1),
    )


def mask_rcnn_inference(pred_mask_logits: Tensor, pred_instances: list[Instances]) -> None:
    """Set `pred_masks` (R, 1, M, M), probabilities of the predicted class, on each image's results.

    Args:
        pred_mask_logits: (R, K, M, M) or (R, 1, M, M), R over all images in order.
        pred_instances: per image, with `pred_classes`; changed in place.
    """
    if not pred_instances:
        return
    classes = torch.cat([x.pred_classes for x in pred_instances])
    masks = own_class(pred_mask_logits, classes).sigmoid()
    per_image = split_like(masks, [x.pred_classes for x in pred_instances])
    for instances, own in zip(pred_instances, per_image, strict=True):
        instances.pred_masks = own


class BaseMaskRCNNHead(nn.Module):
    """What every mask head shares: the loss and the inference around `layers`.

    Args:
        loss_weight: factor of the loss.
        vis_period: see `mask_rcnn_loss`.
    """

    @configurable
    def __init__(self, *, loss_weight: float = 1.0, vis_period: int = 0) -> None:
        super().__init__()
        self.vis_period = vis_period
        self.loss_weight = loss_weight

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg`."""
        del input_shape
        return {"vis_period": cfg.VIS_PERIOD}

    def forward(self, x: Tensor, instances: list[Instances]) -> Any:
        """Compute the loss in training, or the masks.

        Args:
            x: pooled features (R, C, H, W), R over all images in order.
            instances: per image; with `gt_classes`, `gt_masks` and `proposal_boxes` in training,
                with `pred_classes` at inference.

        Returns:
            ``{"loss_mask": ...}`` in training; else `instances`, with `pred_masks` set.
        """
        logits = self._own_class_logits(x, instances)
        if self.training:
            loss = mask_rcnn_loss(logits, instances, self.vis_period)
            return {"loss_mask": loss * self.loss_weight}
        mask_rcnn_inference(logits, instances)
        return instances

    def _own_class_logits(self, x: Tensor, instances: list[Instances]) -> Tensor:
        """Return logits of all classes (R, K, M, M), or of each region's own (R, 1, M, M)."""
        del instances
        return self.layers(x)

    def layers(self, x: Tensor) -> Tensor:
        """Map pooled features (R, C, H, W) to logits (R, K or 1, M, M); subclasses define it."""
        raise NotImplementedError(f"{type(self).__name__} must define layers(x)")


@ROI_MASK_HEAD_REGISTRY.register()
class MaskRCNNConvUpsampleHead(BaseMaskRCNNHead):
    """3x3 convolutions, one 2x up-sampling transposed convolution, one 1x1 convolution per class.

    Args:
        input_shape: channels of a pooled region.
        num_classes: K, or 1 for masks that do not depend on the class.
        conv_dims: output channels of each 3x3 convolution and, last, of the transposed one.
        conv_norm: normalisation of the 3x3 convolutions, see `d2kit.layers.get_norm`.
        **kwargs: see `BaseMaskRCNNHead`.

    Raises:
        ValueError: if `conv_dims` is empty.

    Source: Mask R-CNN (He et al. 2017), figure 4.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        num_classes: int,
        conv_dims: Sequence[int],
        conv_norm: str = "",
        **kwargs: object,
    ) -> None:
        super().__init__(**kwargs)
        if not conv_dims:
            raise ValueError("MaskRCNNConvUpsampleHead: conv_dims needs at least one entry")
        channels = region_shape(input_shape, "MaskRCNNConvUpsampleHead")[0]
        *convolved, upsampled = conv_dims
        self.conv_names = add_convs(self, "mask_fcn", channels, convolved, conv_norm)
        channels = convolved[-1] if convolved else channels
        self.deconv = nn.ConvTranspose2d(channels, upsampled, kernel_size=2, stride=2)
        msra_fill(self.deconv)
        self.predictor = nn.Conv2d(upsampled, num_classes, kernel_size=1)
        normal_fill(self.predictor, std=0.001)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg`."""
        head = cfg.MODEL.ROI_MASK_HEAD
        return {
            **super().from_config(cfg, input_shape),
            "input_shape": input_shape,
            "num_classes": 1 if head.CLS_AGNOSTIC_MASK else cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "conv_dims": [head.CONV_DIM] * (head.NUM_CONV + 1),
            "conv_norm": head.NORM,
        }

    @property
    def conv_norm_relus(self) -> list[nn.Module]:
        """The 3x3 convolutions, each with its norm and activation."""
        return [self.get_submodule(name) for name in self.conv_names]

    def layers(self, x: Tensor) -> Tensor:
        """Map pooled features (R, C, H, W) to logits (R, K, 2H, 2W)."""
        found: Tensor = self.predictor(torch.relu_(self.deconv(in_turn(self, self.conv_names, x))))
        return found

    def _own_class_logits(self, x: Tensor, instances: list[Instances]) -> Tensor:
        """Evaluate the last two layers as matrix products, the last for each region's class only.

        A 2x2 transposed convolution of stride 2 is a linear map of each pixel to four; its outputs
        do not overlap. So the four values stay together until one number per pixel is left.
        Equal to `layers` up to rounding; a subclass that redefines `layers` is obeyed.
        """
        if type(self).layers is not MaskRCNNConvUpsampleHead.layers:
            return self.layers(x)
        if not is_symbolic() and len(x) == 0:
            return self.layers(x)
        field = "gt_classes" if self.training else "pred_classes"
        x = in_turn(self, self.conv_names, x)
        regions, channels, height, width = x.shape
        middle = self.deconv.out_channels
        pixels = x.permute(0, 2, 3, 1).reshape(-1, channels)
        weight = self.deconv.weight.permute(2, 3, 1, 0).reshape(4 * middle, channels)
        bias = cast(Tensor, self.deconv.bias).repeat(4)
        hidden = F.linear(pixels, weight, bias).relu_()
        hidden = hidden.view(regions, height * width * 4, middle)
        if self.predictor.out_channels == 1:
            classes = torch.zeros(regions, dtype=torch.int64, device=x.device)
        else:
            classes = torch.cat([i.get(field) for i in instances])
        rows = self.predictor.weight[classes].flatten(1).unsqueeze(2)
        logits = torch.bmm(hidden, rows.to(hidden.dtype)).view(regions, height, width, 2, 2)
        logits = logits + cast(Tensor, self.predictor.bias)[classes].view(-1, 1, 1, 1, 1)
        return logits.permute(0, 1, 3, 2, 4).reshape(regions, 1, 2 * height, 2 * width)
