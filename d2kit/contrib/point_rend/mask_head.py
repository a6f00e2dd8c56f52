"""PointRend's mask head: a coarse mask, refined at the points where it is uncertain.

`MODEL.ROI_MASK_HEAD.NAME PointRendMaskHead`; its further keys come from `add_pointrend_config` of
`d2kit.contrib.point_rend`.

Source: PointRend: Image Segmentation as Rendering (Kirillov et al. 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2kit.config import CfgNode, configurable
from d2kit.contrib.point_rend.point_head import (
    ConvFCHead,
    build_point_head,
    generate_regular_grid_point_coords,
    get_point_coords_wrt_image,
    get_uncertain_point_coords_on_grid,
    get_uncertain_point_coords_with_randomness,
    point_sample,
    point_sample_fine_grained_features,
    roi_mask_point_loss,
    sample_bitmaps,
    uniform_points,
)
from d2kit.layers import ShapeSpec
from d2kit.layers.wrappers import shapes_of
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


def build_coarse_head(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> nn.Module:
    """Build the head of `PointRendMaskHead` for whole regions."""
    node = cfg.MODEL.ROI_MASK_HEAD
    classes = 1 if node.CLS_AGNOSTIC_MASK else cfg.MODEL.ROI_HEADS.NUM_CLASSES
    return ConvFCHead(
        build_region_shape(cfg, input_shape),
        output_shape=(classes, node.OUTPUT_SIDE_RESOLUTION, node.OUTPUT_SIDE_RESOLUTION),
        conv_dim=node.CONV_DIM,
        fc_dims=[node.FC_DIM] * node.NUM_FC,
    )


def build_point_arguments(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
    """Return the point head of `PointRendMaskHead` and its numbers of points, if it is on.

    Raises:
        ValueError: if the numbers of classes of the two heads differ.
    """
    if not cfg.MODEL.ROI_MASK_HEAD.POINT_HEAD_ON:
        return {}
    point, classes = cfg.MODEL.POINT_HEAD, cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if classes != point.NUM_CLASSES:
        raise ValueError(
            "MODEL.POINT_HEAD.NUM_CLASSES must be MODEL.ROI_HEADS.NUM_CLASSES, got "
            f"{point.NUM_CLASSES} and {classes}"
        )
    return {
        "point_head": build_point_head(cfg, build_point_shape(cfg, input_shape)),
        "train_num_points": point.TRAIN_NUM_POINTS,
        "oversample_ratio": point.OVERSAMPLE_RATIO,
        "importance_sample_ratio": point.IMPORTANCE_SAMPLE_RATIO,
        "subdivision_steps": point.SUBDIVISION_STEPS,
        "subdivision_num_points": point.SUBDIVISION_NUM_POINTS,
    }


def build_implicit_arguments(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
    """Return both heads of `ImplicitPointRendMaskHead` and its numbers of points.

    Raises:
        ValueError: if the point head has weights of its own.
    """
    node, point = cfg.MODEL.ROI_MASK_HEAD, cfg.MODEL.POINT_HEAD
    point_head: Any = build_point_head(cfg, build_point_shape(cfg, input_shape))
    if not hasattr(point_head, "num_params"):
        raise ValueError(
            "ImplicitPointRendMaskHead predicts the weights of its point head: set "
            f"MODEL.POINT_HEAD.NAME ImplicitPointHead, got {point.NAME}"
        )
    parameter_head = ConvFCHead(
        build_region_shape(cfg, input_shape),
        output_shape=(point_head.num_params,),
        conv_dim=node.CONV_DIM,
        fc_dims=[node.FC_DIM] * node.NUM_FC,
    )
    return {
        "parameter_head": parameter_head,
        "point_head": point_head,
        "first_side": node.OUTPUT_SIDE_RESOLUTION,
        "train_num_points": point.TRAIN_NUM_POINTS,
        "subdivision_steps": point.SUBDIVISION_STEPS,
        "subdivision_num_points": point.SUBDIVISION_NUM_POINTS,
        "params_l2_regularizer": cfg.MODEL.IMPLICIT_POINTREND.PARAMS_L2_REGULARIZER,
    }


class SamplingMaskHead(nn.Module):
    """Base of mask heads that sample feature maps at points of the boxes by themselves.

    Args:
        coarse_in_features: names of the levels of the head for whole regions; channels are joined.
        point_in_features: names of the levels of the point head, likewise.
        feature_scales: name -> 1 / stride.
        coarse_side: samples per side that the head for whole regions gets.
        train_num_points: points per region in training.
        subdivision_steps: doublings of the mask's side at inference.
        subdivision_num_points: points that are predicted at each of them.
    """

    not_deterministic_on_cuda = "grid_sample (backward)"

    def __init__(
        self,
        coarse_in_features: Sequence[str],
        point_in_features: Sequence[str],
        feature_scales: dict[str, float],
        coarse_side: int,
        train_num_points: int = 14 * 14,
        subdivision_steps: int = 5,
        subdivision_num_points: int = 28 * 28,
    ) -> None:
        super().__init__()
        self.roi_pooler_in_features = list(coarse_in_features)
        self.mask_point_in_features = list(point_in_features)
        self._feature_scales = feature_scales
        self.roi_pooler_size = coarse_side
        self.mask_point_train_num_points = train_num_points
        self.mask_point_subdivision_steps = subdivision_steps
        self.mask_point_subdivision_num_points = subdivision_num_points

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

    def _roi_pooler(self, features: list[Tensor], boxes: list[Boxes]) -> Tensor:
        """Sample a regular grid over each box (R, C, S, S); user classes override it.

        Args:
            features: per level of `roi_pooler_in_features` (N, C, Hi, Wi).
            boxes: per image.
        """
        side, names = self.roi_pooler_size, self.roi_pooler_in_features
        grid = generate_regular_grid_point_coords(sum(map(len, boxes)), side, features[0].device)
        scales = [self._feature_scales[name] for name in names]
        sampled, _ = point_sample_fine_grained_features(features, scales, boxes, grid)
        found: Tensor = sampled.unflatten(2, (side, side))
        return found

    def _pooled(self, features: dict[str, Tensor], boxes: list[Boxes]) -> Tensor:
        """Return the samples that the head for whole regions gets."""
        return self._roi_pooler([features[name] for name in self.roi_pooler_in_features], boxes)

    def _point_features(
        self, features: dict[str, Tensor], boxes: list[Boxes], points: Tensor
    ) -> Tensor:
        """Return the features of points (R, C, P)."""
        names = self.mask_point_in_features
        levels = [features[name] for name in names]
        scales = [self._feature_scales[name] for name in names]
        return point_sample_fine_grained_features(levels, scales, boxes, points)[0]

    def _get_point_logits(
        self, fine_grained_features: Tensor, point_coords: Tensor, representation: Tensor
    ) -> Tensor:
        """Return the logits of points (R, K, P); user classes override it.

        Args:
            fine_grained_features: (R, C, P).
            point_coords: (R, P, 2) in [0, 1] of the boxes.
            representation: what the head for whole regions made of each.
        """
        raise NotImplementedError

    def _first_mask(
        self, representation: Tensor, classes: Tensor, predict: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return the logits (R, 1, S, S) that subdivision begins with."""
        raise NotImplementedError

    def _subdivision_inference(
        self,
        features: dict[str, Tensor],
        mask_representations: Tensor,
        instances: list[Instances],
    ) -> Tensor:
        """Refine each region's own mask; user classes override it.

        Args:
            features: name -> (N, C, Hi, Wi).
            mask_representations: see `_get_point_logits`.
            instances: per image, with `pred_boxes` and `pred_classes`.

        Returns:
            (R, 1, M, M) logits.
        """
        boxes = [x.pred_boxes for x in instances]
        classes = torch.cat([x.pred_classes for x in instances])

        def predict(points: Tensor) -> Tensor:
            fine = self._point_features(features, boxes, points)
            return own_class(self._get_point_logits(fine, points, mask_representations), classes)

        return subdivide(
            self._first_mask(mask_representations, classes, predict),
            predict,
            self.mask_point_subdivision_steps,
            self.mask_point_subdivision_num_points,
        )


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
        train_num_points: see there, as the other two of its kind.
        oversample_ratio: see `get_uncertain_point_coords_with_randomness`.
        importance_sample_ratio: see there.
        subdivision_steps: see `SamplingMaskHead`.
        subdivision_num_points: see there.
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
        super().__init__(
            coarse_in_features,
            point_in_features,
            feature_scales,
            coarse_side,
            train_num_points,
            subdivision_steps,
            subdivision_num_points,
        )
        self.coarse_head = coarse_head
        self.point_head = point_head
        self.mask_point_on = point_head is not None
        self.mask_point_oversample_ratio = oversample_ratio
        self.mask_point_importance_sample_ratio = importance_sample_ratio
        self.vis_period = vis_period

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg` and the shapes of the levels.

        Raises:
            ValueError: if the numbers of classes of the two heads differ; see also the base class.
        """
        return {
            **super().from_config(cfg, input_shape),
            "vis_period": cfg.VIS_PERIOD,
            **cls._init_roi_head(cfg, input_shape),
            **cls._init_point_head(cfg, input_shape),
        }

    @classmethod
    def _init_roi_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Return the arguments of the head for whole regions; user classes override it."""
        return {"coarse_head": build_coarse_head(cfg, input_shape)}

    @classmethod
    def _init_point_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Return the arguments of the point head, if it is on; user classes override it."""
        return build_point_arguments(cfg, input_shape)

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
            if self.mask_point_on:
                points, labels = self._sample_train_points(coarse, instances)
                fine = self._point_features(features, boxes, points)
                logits = self._get_point_logits(fine, points, coarse)
                losses["loss_mask_point"] = roi_mask_point_loss(logits, instances, labels)
            return losses
        if self.mask_point_on:
            masks = self._subdivision_inference(features, coarse, instances)
        else:
            masks = own_class(coarse, torch.cat([x.pred_classes for x in instances]))
        mask_rcnn_inference(masks, instances)
        return instances

    def _get_point_logits(
        self, fine_grained_features: Tensor, point_coords: Tensor, representation: Tensor
    ) -> Tensor:
        """Return the point head's logits (R, K, P); `representation` is the coarse mask."""
        assert self.point_head is not None
        found: Tensor = self.point_head(
            fine_grained_features, point_sample(representation, point_coords)
        )
        return found

    def _sample_train_points(
        self, coarse_mask: Tensor, instances: list[Instances]
    ) -> tuple[Tensor, Tensor]:
        """Choose the points to train on; user classes override it.

        Args:
            coarse_mask: (R, K, S, S) logits.
            instances: per image, with `gt_classes`, `gt_masks` and `proposal_boxes`.

        Returns:
            Points (R, P, 2) in [0, 1] of the boxes, and their labels (R, P) in [0, 1].
        """
        empty = torch.zeros(0, dtype=torch.int64, device=coarse_mask.device)
        classes = torch.cat([empty, *(x.gt_classes for x in instances if len(x))])
        points = get_uncertain_point_coords_with_randomness(
            coarse_mask,
            lambda logits: -own_class(logits, classes).abs(),
            self.mask_point_train_num_points,
            self.mask_point_oversample_ratio,
            self.mask_point_importance_sample_ratio,
            regions_per_image=[len(x) for x in instances],
        )
        return points, labels_of_points(instances, points)

    def _first_mask(
        self, representation: Tensor, classes: Tensor, predict: Callable[[Tensor], Tensor]
    ) -> Tensor:
        del predict
        return own_class(representation, classes)


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


def labels_of_points(instances: list[Instances], points: Tensor) -> Tensor:
    """Sample the ground-truth masks at points (R, P, 2) in [0, 1] of the `proposal_boxes`."""
    boxes = torch.cat([x.proposal_boxes.tensor for x in instances])
    return point_labels(instances, get_point_coords_wrt_image(boxes, points))


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
        train_num_points: see `SamplingMaskHead`, as the next two; drawn uniformly.
        subdivision_steps: see there.
        subdivision_num_points: see there.
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
        super().__init__(
            coarse_in_features,
            point_in_features,
            feature_scales,
            coarse_side,
            train_num_points,
            subdivision_steps,
            subdivision_num_points,
        )
        self.parameter_head = parameter_head
        self.point_head = point_head
        self.first_side = first_side
        self.params_l2_regularizer = params_l2_regularizer

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg` and the shapes of the levels.

        Raises:
            ValueError: if the point head has weights of its own; see also the base class.
        """
        return {**super().from_config(cfg, input_shape), **cls._init_point_head(cfg, input_shape)}

    @classmethod
    def _init_point_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Return the arguments of the point head and of its parameters; user classes override."""
        return build_implicit_arguments(cfg, input_shape)

    def forward(self, features: dict[str, Tensor], instances: list[Instances]) -> Any:
        """Compute the losses in training, or the masks; see `PointRendMaskHead.forward`.

        Returns:
            ``loss_mask_point`` and ``loss_mask_params`` in training; else `instances`, with
            `pred_masks` (R, 1, M, M) set, probabilities.
        """
        boxes = [x.proposal_boxes if self.training else x.pred_boxes for x in instances]
        parameters = self.parameter_head(self._pooled(features, boxes))
        if self.training:
            points, labels = self._uniform_sample_train_points(instances)
            fine = self._point_features(features, boxes, points)
            logits = self._get_point_logits(fine, points, parameters)
            size = parameters.square().sum() / region_count(parameters)
            return {
                "loss_mask_point": roi_mask_point_loss(logits, instances, labels),
                "loss_mask_params": size * self.params_l2_regularizer,
            }
        mask_rcnn_inference(self._subdivision_inference(features, parameters, instances), instances)
        return instances

    def _get_point_logits(
        self, fine_grained_features: Tensor, point_coords: Tensor, representation: Tensor
    ) -> Tensor:
        """Return the logits of points (R, K, P); `representation`: the regions' parameters."""
        found: Tensor = self.point_head(fine_grained_features, point_coords, representation)
        return found

    def _uniform_sample_train_points(self, instances: list[Instances]) -> tuple[Tensor, Tensor]:
        """Draw the points to train on; see `PointRendMaskHead._sample_train_points`."""
        per_image = [len(x) for x in instances]
        points = uniform_points(
            sum(per_image),
            self.mask_point_train_num_points,
            instances[0].proposal_boxes.device,
            per_image,
            "implicit_points",
        )
        return points, labels_of_points(instances, points)

    def _first_mask(
        self, representation: Tensor, classes: Tensor, predict: Callable[[Tensor], Tensor]
    ) -> Tensor:
        del classes
        regions, side = len(representation), self.first_side
        grid = generate_regular_grid_point_coords(regions, side, representation.device)
        return predict(grid).view(regions, 1, side, side)
