"""Heads of PointRend: the coarse mask of a region, and the logits of single points.

Source: PointRend (Kirillov et al. 2020), sections 3.2, 3.3 and 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2kit.config import CfgNode, configurable
from d2kit.layers import Conv2d, ShapeSpec
from d2kit.layers.shape_spec import region_shape
from d2kit.layers.weight_init import msra_fill, normal_fill
from d2kit.modeling.roi_heads.box_head import add_fcs, own_class
from d2kit.modeling.roi_heads.fast_rcnn import region_count
from d2kit.structures import Instances
from d2kit.utils.event_storage import put_scalars
from d2kit.utils.registry import Registry

POINT_HEAD_REGISTRY = Registry("POINT_HEAD")
"""Point heads: called with ``(cfg, input_shape: ShapeSpec)``; see `StandardPointHead`."""


def build_point_head(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
    """Build the point head that ``cfg.MODEL.POINT_HEAD.NAME`` names.

    Args:
        cfg: the config, with the keys of `add_pointrend_config`.
        input_shape: channels of the fine-grained features.

    Returns:
        The head.
    """
    return POINT_HEAD_REGISTRY.get(cfg.MODEL.POINT_HEAD.NAME)(cfg, input_shape)


def roi_mask_point_loss(
    mask_logits: Tensor, instances: list[Instances], point_labels: Tensor
) -> Tensor:
    """Mean binary cross-entropy over the points of the foreground regions' own classes.

    Args:
        mask_logits: (R, K, P), or (R, 1, P); R over the regions of all images in order.
        instances: per image, with `gt_classes`.
        point_labels: (R, P) in [0, 1], the ground truth at the points.

    Returns:
        0-dim loss; 0 (with a graph) without regions. Across processes the mean is taken over the
        regions of all of them.

    Source: PointRend, section 3.3.
    """
    count = region_count(mask_logits)
    filled = [x for x in instances if len(x)]
    if not filled:
        return mask_logits.sum() * 0
    logits = own_class(mask_logits, torch.cat([x.gt_classes for x in filled]))[:, 0].float()
    wrong = (logits.detach() > 0) != (point_labels > 0.5)
    put_scalars("point", accuracy=1 - wrong.float().mean())
    total = F.binary_cross_entropy_with_logits(logits, point_labels, reduction="sum")
    return total / (count * mask_logits.shape[2])


class ConvFCHead(nn.Module):
    """A convolution that halves the side, fully connected layers, and all numbers of a region.

    Args:
        input_shape: channels and side of a pooled region.
        output_shape: of the result of one region, for example (K, M, M) for coarse masks.
        conv_dim: channels of the convolutions; a 1x1 convolution leads to them from more.
        fc_dims: width of each fully connected layer.

    Source: PointRend, section 4.1: "a lightweight version of the box head".
    """

    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        output_shape: Sequence[int],
        conv_dim: int,
        fc_dims: Sequence[int],
    ) -> None:
        super().__init__()
        channels, height, width = region_shape(input_shape, "ConvFCHead")
        self.output_shape = tuple(output_shape)
        self.reduce_channel_dim_conv: nn.Module = nn.Identity()
        if channels > conv_dim:
            conv = Conv2d(channels, conv_dim, kernel_size=1, activation=nn.ReLU())
            msra_fill(conv)
            self.reduce_channel_dim_conv = conv
            channels = conv_dim
        self.reduce_spatial_dim_conv = Conv2d(
            channels, conv_dim, kernel_size=2, stride=2, activation=nn.ReLU()
        )
        msra_fill(self.reduce_spatial_dim_conv)
        size = conv_dim * (height // 2) * (width // 2)
        self.fc_names = add_fcs(self, size, fc_dims)
        self.prediction = nn.Linear([size, *fc_dims][-1], math.prod(self.output_shape))
        normal_fill(self.prediction, std=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """Map pooled features (R, C, H, W) to (R, *output_shape)."""
        x = self.reduce_spatial_dim_conv(self.reduce_channel_dim_conv(x)).flatten(1)
        for name in self.fc_names:
            x = F.relu(getattr(self, name)(x))
        return self.prediction(x).view(-1, *self.output_shape)


@POINT_HEAD_REGISTRY.register()
class StandardPointHead(nn.Module):
    """The same small network for every point, on its features and its coarse prediction.

    Args:
        input_channels: of the fine-grained features.
        coarse_channels: of the coarse prediction.
        num_classes: K, or 1 for masks that do not depend on the class.
        fc_dims: width of each hidden layer.
        coarse_pred_each_layer: give the coarse prediction to every layer, not to the first alone.

    Source: PointRend, section 3.3; the coarse prediction at every layer: section 4.1.
    """

    @configurable
    def __init__(
        self,
        *,
        input_channels: int,
        coarse_channels: int,
        num_classes: int,
        fc_dims: Sequence[int],
        coarse_pred_each_layer: bool = True,
    ) -> None:
        super().__init__()
        self.coarse_pred_each_layer = coarse_pred_each_layer
        size = input_channels + coarse_channels
        self.fc_names = []
        for k, dim in enumerate(fc_dims, start=1):
            fc = nn.Conv1d(size, dim, kernel_size=1)
            msra_fill(fc)
            self.add_module(f"fc{k}", fc)
            self.fc_names.append(f"fc{k}")
            size = dim + (coarse_channels if coarse_pred_each_layer else 0)
        self.predictor = nn.Conv1d(size, num_classes, kernel_size=1)
        normal_fill(self.predictor, std=0.001)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg`."""
        node, classes = cfg.MODEL.POINT_HEAD, cfg.MODEL.POINT_HEAD.NUM_CLASSES
        return {
            "input_channels": region_shape(input_shape, "StandardPointHead")[0],
            "coarse_channels": 1 if cfg.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK else classes,
            "num_classes": 1 if node.CLS_AGNOSTIC_MASK else classes,
            "fc_dims": [node.FC_DIM] * node.NUM_FC,
            "coarse_pred_each_layer": node.COARSE_PRED_EACH_LAYER,
        }

    def forward(self, fine_grained_features: Tensor, coarse_features: Tensor) -> Tensor:
        """Map features (R, C, P) and coarse logits (R, K, P) to logits (R, K, P)."""
        x = torch.cat([fine_grained_features, coarse_features], dim=1)
        for name in self.fc_names:
            x = F.relu(getattr(self, name)(x))
            if self.coarse_pred_each_layer:
                x = torch.cat([x, coarse_features], dim=1)
        return self.predictor(x)


@POINT_HEAD_REGISTRY.register()
class ImplicitPointHead(nn.Module):
    """A network for points without weights of its own: they are given for each region.

    Args:
        input_channels: C of the features of a point; even.
        num_classes: K, or 1 for masks that do not depend on the class.
        fc_dims: width of each hidden layer.
        image_feature_enabled: whether a point is described by its features.
        positional_encoding_enabled: whether it is described by its place in the box; with both,
            the two are added.

    Raises:
        ValueError: if a point is described by nothing, or C is odd.

    Source: Cheng et al. 2022, section 5; the encoding: Fourier Features (Tancik et al. 2020),
    section 6.1, Gaussian.
    """

    positional_encoding_gaussian_matrix: Tensor

    @configurable
    def __init__(
        self,
        *,
        input_channels: int,
        num_classes: int,
        fc_dims: Sequence[int],
        image_feature_enabled: bool = True,
        positional_encoding_enabled: bool = True,
    ) -> None:
        super().__init__()
        if not (image_feature_enabled or positional_encoding_enabled) or input_channels % 2:
            raise ValueError(
                "ImplicitPointHead needs image features or encoded positions, of an even number "
                f"of channels, got {image_feature_enabled}, {positional_encoding_enabled} and "
                f"{input_channels}"
            )
        self.image_feature_enabled = image_feature_enabled
        self.positional_encoding_enabled = positional_encoding_enabled
        if positional_encoding_enabled:
            directions = torch.randn(2, input_channels // 2)
            self.register_buffer("positional_encoding_gaussian_matrix", directions)
        self.layer_shapes = list(pairwise([input_channels, *fc_dims, num_classes]))
        self.num_params = sum((size + 1) * width for size, width in self.layer_shapes)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg`."""
        node, implicit = cfg.MODEL.POINT_HEAD, cfg.MODEL.IMPLICIT_POINTREND
        return {
            "input_channels": region_shape(input_shape, "ImplicitPointHead")[0],
            "num_classes": 1 if node.CLS_AGNOSTIC_MASK else node.NUM_CLASSES,
            "fc_dims": [node.FC_DIM] * node.NUM_FC,
            "image_feature_enabled": implicit.IMAGE_FEATURE_ENABLED,
            "positional_encoding_enabled": implicit.POS_ENC_ENABLED,
        }

    def forward(
        self, fine_grained_features: Tensor, point_coords: Tensor, parameters: Tensor
    ) -> Tensor:
        """Compute the logits of points.

        Args:
            fine_grained_features: (R, C, P).
            point_coords: (R, P, 2) in [0, 1] of the boxes.
            parameters: (R, num_params), the weights and biases of all layers in order.

        Returns:
            (R, K, P).
        """
        x = fine_grained_features if self.image_feature_enabled else 0 * fine_grained_features
        if self.positional_encoding_enabled:
            x = x + self._encoded(point_coords).to(x.dtype)
        sizes = [n for size, width in self.layer_shapes for n in (size * width, width)]
        parts = parameters.split(sizes, dim=1)
        last = len(self.layer_shapes) - 1
        for i, (size, width) in enumerate(self.layer_shapes):
            weight, bias = parts[2 * i].view(-1, width, size), parts[2 * i + 1].unsqueeze(2)
            x = torch.baddbmm(bias, weight, x)
            x = x if i == last else x.relu()
        return x

    def _encoded(self, point_coords: Tensor) -> Tensor:
        """Return sines and cosines of places (R, C, P)."""
        angle = 2 * math.pi * (2 * point_coords - 1) @ self.positional_encoding_gaussian_matrix
        return torch.cat([angle.sin(), angle.cos()], dim=2).transpose(1, 2)
