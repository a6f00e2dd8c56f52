"""PointRend's mask head: a coarse mask, refined at the points where it is uncertain.

`MODEL.ROI_MASK_HEAD.NAME PointRendMaskHead`; its further keys come from `add_pointrend_config` of
`d2kit.contrib.point_rend`.

Source: PointRend: Image Segmentation as Rendering (Kirillov et al. 2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2kit.config import CfgNode, configurable
from d2kit.contrib.point_rend.point_features import (
    generate_regular_grid_point_coords,
    get_uncertain_point_coords_on_grid,
    get_uncertain_point_coords_with_randomness,
    point_sample,
    point_sample_fine_grained_features,
    sample_bitmaps,
    uniform_points,
)
from d2kit.contrib.point_rend.point_head import (
    POINT_HEAD_REGISTRY,
    ConvFCHead,
    build_point_head,
    roi_mask_point_loss,
)
from d2kit.layers import ShapeSpec
from d2kit.layers.shape_spec import region_shape, shapes_of
from d2kit.modeling.roi_heads.box_head import own_class
from d2kit.modeling.roi_heads.fast_rcnn import region_count
from d2kit.modeling.roi_heads.mask_head import (
    ROI_MASK_HEAD_REGISTRY,
    mask_rcnn_inference,
    mask_rcnn_loss,
)
from d2kit.modeling.sampling import SampledBitMasks
from d2kit.structures import BitMasks, Boxes, Instances, PolygonMasks


def build_region_shape(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> ShapeSpec:
    """Return the shape of the samples that the head for whole regions gets."""
    node = cfg.MODEL.ROI_MASK_HEAD
    shapes = shapes_of(node.IN_FEATURES, input_shape, "MODEL.ROI_MASK_HEAD.IN_FEATURES")
    channels, side = sum(shape.channels or 0 for shape in shapes), node.POOLER_RESOLUTION
    return ShapeSpec(channels=channels, height=side, width=side)


def build_point_shape(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> ShapeSpec:
    """Return the shape of the features that the point head gets."""
    names = cfg.MODEL.POINT_HEAD.IN_FEATURES
    shapes = shapes_of(names, input_shape, "MODEL.POINT_HEAD.IN_FEATURES")
    return ShapeSpec(channels=sum(shape.channels or 0 for shape in shapes), height=1, width=1)


class SamplingMaskHead(nn.Module):
    """Base of mask heads that sample feature maps at points of the boxes by themselves.

    Args:
        coarse_in_features: names of the levels of the head for whole regions; channels are joined.
        point_in_features: names of the levels of the point head, likewise.
        feature_scales: name -> 1 / stride.
        coarse_side: samples per side that the head for whole regions gets.
    """

    not_deterministic_on_cuda = "grid_sample (backward)"

    def __init__(
        self,
        coarse_in_features: Sequence[str],
        point_in_features: Sequence[str],
        feature_scales: dict[str, float],
        coarse_side: int,
    ) -> None:
        super().__init__()
        self.coarse_in_features = list(coarse_in_features)
        self.point_in_features = list(point_in_features)
        self.feature_scales = feature_scales
        self.coarse_side = coarse_side

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Return the arguments that all such heads take, for `cfg` and the shapes of the levels.

        Raises:
            ValueError: if keys are missing, or the features are pooled by somebody else.
        """
        if "POINT_HEAD" not in cfg.MODEL:
            raise ValueError(
                f"{cls.__name__} needs the keys MODEL.POINT_HEAD.*: call "
                "d2kit.contrib.point_rend.add_pointrend_config(cfg) before the file is merged"
            )
        if not isinstance(input_shape, dict):
            raise ValueError(
                f"{cls.__name__} samples the feature maps by itself: set "
                "MODEL.ROI_MASK_HEAD.POOLER_TYPE '' and MODEL.ROI_HEADS.NAME StandardROIHeads"
            )
        return {
            "coarse_in_features": cfg.MODEL.ROI_MASK_HEAD.IN_FEATURES,
            "point_in_features": cfg.MODEL.POINT_HEAD.IN_FEATURES,
            "feature_scales": {name: 1.0 / (s.stride or 1) for name, s in input_shape.items()},
            "coarse_side": cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION,
        }

    def _pooled(self, features: dict[str, Tensor], boxes: list[Boxes]) -> Tensor:
        """Sample a regular grid over each box (R, C, S, S)."""
        count = sum(map(len, boxes))
        first = features[self.coarse_in_features[0]]
        grid = generate_regular_grid_point_coords(count, self.coarse_side, first.device)
        sampled, _ = self._sample(features, self.coarse_in_features, boxes, grid)
        return sampled.unflatten(2, (self.coarse_side, self.coarse_side))

    def _sample(
        self,
        features: dict[str, Tensor],
        names: list[str],
        boxes: list[Boxes],
        points: Tensor,
    ) -> tuple[Tensor, Tensor]:
        levels = [features[name] for name in names]
        scales = [self.feature_scales[name] for name in names]
        return point_sample_fine_grained_features(levels, scales, boxes, points)


@ROI_MASK_HEAD_REGISTRY.register()
class PointRendMaskHead(SamplingMaskHead):
    """Coarse mask of each region, and a point head that refines it by subdivision.

    It pools by itself: `MODEL.ROI_MASK_HEAD.POOLER_TYPE` must be empty.

    Args:
        coarse_in_features: see `SamplingMaskHead`, as the next three.
        point_in_features: see there.
        feature_scales: see there.
        coarse_side: see there.
        coarse_head: (R, C, S, S) -> logits (R, K or 1, M, M).
        point_head: see `StandardPointHead`; None: the coarse mask is the result.
        train_num_points: points per region in training.
        oversample_ratio: see `get_uncertain_point_coords_with_randomness`.
        importance_sample_ratio: see there.
        subdivision_steps: doublings of the mask's side at inference.
        subdivision_num_points: points that are predicted at each of them.
        vis_period: see `mask_rcnn_loss`.
    """

    @configurable
    def __init__(
        self,
        *,
        coarse_in_features: Sequence[str],
        point_in_features: Sequence[str],
        feature_scales: dict[str, float],
        coarse_side: int,
        coarse_head: nn.Module,
        point_head: nn.Module | None = None,
        train_num_points: int = 14 * 14,
        oversample_ratio: float = 3,
        importance_sample_ratio: float = 0.75,
        subdivision_steps: int = 5,
        subdivision_num_points: int = 28 * 28,
        vis_period: int = 0,
    ) -> None:
        super().__init__(coarse_in_features, point_in_features, feature_scales, coarse_side)
        self.coarse_head = coarse_head
        self.point_head = point_head
        self.train_num_points = train_num_points
        self.oversample_ratio = oversample_ratio
        self.importance_sample_ratio = importance_sample_ratio
        self.subdivision_steps = subdivision_steps
        self.subdivision_num_points = subdivision_num_points
        self.vis_period = vis_period

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg` and the shapes of the levels.

        Raises:
            ValueError: if the numbers of classes of the two heads differ; see also the base class.
        """
        node, classes = cfg.MODEL.ROI_MASK_HEAD, cfg.MODEL.ROI_HEADS.NUM_CLASSES
        arguments = super().from_config(cfg, input_shape)
        cells = node.OUTPUT_SIDE_RESOLUTION
        arguments |= {
            "coarse_head": ConvFCHead(
                build_region_shape(cfg, input_shape),
                output_shape=(1 if node.CLS_AGNOSTIC_MASK else classes, cells, cells),
                conv_dim=node.CONV_DIM,
                fc_dims=[node.FC_DIM] * node.NUM_FC,
            ),
            "vis_period": cfg.VIS_PERIOD,
        }
        if node.POINT_HEAD_ON:
            point = cfg.MODEL.POINT_HEAD
            if classes != point.NUM_CLASSES:
                raise ValueError(
                    "MODEL.POINT_HEAD.NUM_CLASSES must be MODEL.ROI_HEADS.NUM_CLASSES, got "
                    f"{point.NUM_CLASSES} and {classes}"
                )
            arguments |= {
                "point_head": build_point_head(cfg, build_point_shape(cfg, input_shape)),
                "train_num_points": point.TRAIN_NUM_POINTS,
                "oversample_ratio": point.OVERSAMPLE_RATIO,
                "importance_sample_ratio": point.IMPORTANCE_SAMPLE_RATIO,
                "subdivision_steps": point.SUBDIVISION_STEPS,
                "subdivision_num_points": point.SUBDIVISION_NUM_POINTS,
            }
        return arguments

    def forward(self, features: dict[str, Tensor], instances: list[Instances]) -> Any:
        """Compute the losses in training, or the masks.

        Args:
            features: name -> (N, C, Hi, Wi).
            instances: per image; with `gt_classes`, `gt_masks` and `proposal_boxes` in training,
                with `pred_boxes` and `pred_classes` at inference.

        Returns:
            ``loss_mask`` (of the coarse mask) and ``loss_mask_point`` in training; else
            `instances`, with `pred_masks` (R, 1, M, M) set, probabilities; M is the coarse side
            doubled as often as there are subdivision steps.
        """
        boxes = [x.proposal_boxes if self.training else x.pred_boxes for x in instances]
        coarse = self.coarse_head(self._pooled(features, boxes))
        if self.training:
            losses = {"loss_mask": mask_rcnn_loss(coarse, instances, self.vis_period)}
            if self.point_head is not None:
                losses["loss_mask_point"] = self._point_loss(features, coarse, boxes, instances)
            return losses
        classes = torch.cat([x.pred_classes for x in instances])
        masks = own_class(coarse, classes)
        if self.point_head is not None:
            masks = self._subdivided(features, coarse, boxes, classes)
        mask_rcnn_inference(masks, instances)
        return instances

    def _point_logits(
        self, features: dict[str, Tensor], coarse: Tensor, boxes: list[Boxes], points: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the point head's logits (R, K, P), and the points in pixels."""
        assert self.point_head is not None
        fine, places = self._sample(features, self.point_in_features, boxes, points)
        return self.point_head(fine, point_sample(coarse, points)), places

    def _point_loss(
        self,
        features: dict[str, Tensor],
        coarse: Tensor,
        boxes: list[Boxes],
        instances: list[Instances],
    ) -> Tensor:
        empty = torch.zeros(0, dtype=torch.int64, device=coarse.device)
        classes = torch.cat([empty, *(x.gt_classes for x in instances if len(x))])
        points = get_uncertain_point_coords_with_randomness(
            coarse,
            lambda logits: -own_class(logits, classes).abs(),
            self.train_num_points,
            self.oversample_ratio,
            self.importance_sample_ratio,
            regions_per_image=[len(x) for x in instances],
        )
        logits, places = self._point_logits(features, coarse, boxes, points)
        return roi_mask_point_loss(logits, instances, point_labels(instances, places))

    def _subdivided(
        self, features: dict[str, Tensor], coarse: Tensor, boxes: list[Boxes], classes: Tensor
    ) -> Tensor:
        """Refine each region's own mask: logits (R, 1, M, M)."""
        return subdivide(
            own_class(coarse, classes),
            lambda points: own_class(
                self._point_logits(features, coarse, boxes, points)[0], classes
            ),
            self.subdivision_steps,
            self.subdivision_num_points,
        )


def subdivide(
    mask: Tensor, predict: Callable[[Tensor], Tensor], steps: int, num_points: int
) -> Tensor:
    """Double the side of masks, predicting anew where they are uncertain.

    Args:
        mask: (R, 1, S, S) logits.
        predict: points (R, P, 2) in [0, 1] of the boxes -> logits (R, 1, P).
        steps: doublings.
        num_points: points predicted at each of them.

    Returns:
        (R, 1, M, M) logits, M = S * 2 ** steps.

    Source: PointRend, section 3.1, "Inference", and figure 4.
    """
    for left in reversed(range(steps)):
        mask = F.interpolate(mask, scale_factor=2.0, mode="bilinear", align_corners=False)
        if left > 0 and (2 * mask.shape[-1]) ** 2 <= num_points:
            continue  # the next step predicts every point anyway
        index, points = get_uncertain_point_coords_on_grid(-mask.abs(), num_points)
        refined = predict(points).to(mask.dtype)
        mask = mask.flatten(2).scatter(2, index.unsqueeze(1), refined).view_as(mask)
    return mask


@torch.no_grad()
def point_labels(instances: list[Instances], points: Tensor) -> Tensor:
    """Sample the ground-truth masks of all regions at points.

    Polygons are rasterised first; sampling a bitmap is exact where they would be tested anew for
    every point.

    Args:
        instances: per image, with `gt_masks` where it has regions.
        points: (R, P, 2), absolute pixels.

    Returns:
        (R, P) in [0, 1].
    """
    labels = [points.new_zeros(0, points.shape[1])]
    for one, places in zip(instances, points.split([len(x) for x in instances]), strict=True):
        if len(one) == 0:
            continue
        bitmaps, index = _bitmaps(one.gt_masks, one.image_size)
        labels.append(sample_bitmaps(bitmaps.to(points.device), index.to(points.device), places))
    return torch.cat(labels)


def _bitmaps(masks: BitMasks | PolygonMasks, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return bitmaps (G, H, W) and which of them is each region's (R,), each held once."""
    if isinstance(masks, SampledBitMasks):
        return masks.source, masks.index
    if isinstance(masks, BitMasks):
        return masks.tensor, torch.arange(len(masks), device=masks.device)
    # regions that were matched to one ground truth share its polygons
    rows = {id(polygons): row for row, polygons in enumerate(masks.polygons)}
    distinct = masks[list(rows.values())]
    place = {key: i for i, key in enumerate(rows)}
    index = torch.tensor([place[id(polygons)] for polygons in masks.polygons])
    return BitMasks.from_polygon_masks(distinct, *image_size).tensor, index


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
