"""Implicit PointRend: each region has a point head of its own, whose weights are predicted.

`MODEL.ROI_MASK_HEAD.NAME ImplicitPointRendMaskHead` with `MODEL.POINT_HEAD.NAME ImplicitPointHead`;
the further keys come from `add_pointrend_config` of `d2kit.projects.point_rend`.

Source: Pointly-Supervised Instance Segmentation (Cheng et al. 2022), section 5.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from d2kit.config import CfgNode, configurable
from d2kit.layers import ShapeSpec
from d2kit.modeling._shapes import region_shape
from d2kit.modeling.roi_heads._classification import region_count
from d2kit.modeling.roi_heads._layers import own_class
from d2kit.modeling.roi_heads._point_features import (
    generate_regular_grid_point_coords,
    uniform_points,
)
from d2kit.modeling.roi_heads._point_head import (
    POINT_HEAD_REGISTRY,
    ConvFCHead,
    build_point_head,
    roi_mask_point_loss,
)
from d2kit.modeling.roi_heads.mask_head import ROI_MASK_HEAD_REGISTRY, mask_rcnn_inference
from d2kit.modeling.roi_heads.point_rend import (
    SamplingMaskHead,
    build_point_shape,
    build_region_shape,
    point_labels,
    subdivide,
)
from d2kit.structures import Boxes, Instances

__all__ = ["ImplicitPointHead", "ImplicitPointRendMaskHead"]


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


@ROI_MASK_HEAD_REGISTRY.register()
class ImplicitPointRendMaskHead(SamplingMaskHead):
    """A head that predicts the weights of each region's point head, and that point head.

    Args:
        coarse_in_features: see `SamplingMaskHead`, as the next three.
        point_in_features: see there.
        feature_scales: see there.
        coarse_side: see there.
        parameter_head: (R, C, S, S) -> (R, num_params).
        point_head: see `ImplicitPointHead`.
        first_side: cells per side of the mask that subdivision begins with.
        train_num_points: points per region in training, drawn uniformly.
        subdivision_steps: doublings of the mask's side at inference.
        subdivision_num_points: points that are predicted at each of them.
        params_l2_regularizer: factor of the mean over regions of the parameters' squared norm.
    """

    @configurable
    def __init__(
        self,
        *,
        coarse_in_features: Sequence[str],
        point_in_features: Sequence[str],
        feature_scales: dict[str, float],
        coarse_side: int,
        parameter_head: nn.Module,
        point_head: nn.Module,
        first_side: int,
        train_num_points: int = 14 * 14,
        subdivision_steps: int = 5,
        subdivision_num_points: int = 28 * 28,
        params_l2_regularizer: float = 1e-5,
    ) -> None:
        super().__init__(coarse_in_features, point_in_features, feature_scales, coarse_side)
        self.parameter_head = parameter_head
        self.point_head = point_head
        self.first_side = first_side
        self.train_num_points = train_num_points
        self.subdivision_steps = subdivision_steps
        self.subdivision_num_points = subdivision_num_points
        self.params_l2_regularizer = params_l2_regularizer

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg` and the shapes of the levels.

        Raises:
            ValueError: if the point head has weights of its own; see also the base class.
        """
        arguments = super().from_config(cfg, input_shape)
        node, point = cfg.MODEL.ROI_MASK_HEAD, cfg.MODEL.POINT_HEAD
        point_head: Any = build_point_head(cfg, build_point_shape(cfg, input_shape))
        if not hasattr(point_head, "num_params"):
            raise ValueError(
                "ImplicitPointRendMaskHead predicts the weights of its point head: set "
                f"MODEL.POINT_HEAD.NAME ImplicitPointHead, got {point.NAME}"
            )
        return {
            **arguments,
            "parameter_head": ConvFCHead(
                build_region_shape(cfg, input_shape),
                output_shape=(point_head.num_params,),
                conv_dim=node.CONV_DIM,
                fc_dims=[node.FC_DIM] * node.NUM_FC,
            ),
            "point_head": point_head,
            "first_side": node.OUTPUT_SIDE_RESOLUTION,
            "train_num_points": point.TRAIN_NUM_POINTS,
            "subdivision_steps": point.SUBDIVISION_STEPS,
            "subdivision_num_points": point.SUBDIVISION_NUM_POINTS,
            "params_l2_regularizer": cfg.MODEL.IMPLICIT_POINTREND.PARAMS_L2_REGULARIZER,
        }

    def forward(self, features: dict[str, Tensor], instances: list[Instances]) -> Any:
        """Compute the losses in training, or the masks; see `PointRendMaskHead.forward`.

        Returns:
            ``loss_mask_point`` and ``loss_mask_params`` in training; else `instances`, with
            `pred_masks` (R, 1, M, M) set, probabilities.
        """
        boxes = [x.proposal_boxes if self.training else x.pred_boxes for x in instances]
        parameters = self.parameter_head(self._pooled(features, boxes))
        if self.training:
            return self._losses(features, parameters, boxes, instances)
        classes = torch.cat([x.pred_classes for x in instances])

        def predict(points: Tensor) -> Tensor:
            return own_class(self._logits(features, parameters, boxes, points)[0], classes)

        regions, side = len(parameters), self.first_side
        grid = generate_regular_grid_point_coords(regions, side, parameters.device)
        mask = predict(grid).view(regions, 1, side, side)
        mask = subdivide(mask, predict, self.subdivision_steps, self.subdivision_num_points)
        mask_rcnn_inference(mask, instances)
        return instances

    def _logits(
        self, features: dict[str, Tensor], parameters: Tensor, boxes: list[Boxes], points: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the logits of points (R, K, P), and the points in pixels."""
        fine, places = self._sample(features, self.point_in_features, boxes, points)
        return self.point_head(fine, points, parameters), places

    def _losses(
        self,
        features: dict[str, Tensor],
        parameters: Tensor,
        boxes: list[Boxes],
        instances: list[Instances],
    ) -> dict[str, Tensor]:
        regions, device = len(parameters), parameters.device
        per_image = [len(x) for x in instances]
        points = uniform_points(
            regions, self.train_num_points, device, per_image, "implicit_points"
        )
        logits, places = self._logits(features, parameters, boxes, points)
        labels = point_labels(instances, places)
        size = parameters.square().sum() / region_count(parameters)
        return {
            "loss_mask_point": roi_mask_point_loss(logits, instances, labels),
            "loss_mask_params": size * self.params_l2_regularizer,
        }
