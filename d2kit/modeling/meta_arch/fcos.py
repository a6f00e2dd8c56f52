"""FCOS: a class, a box and a centre-ness at every place of a pyramid, without anchor boxes.

Source: Tian et al., FCOS: Fully Convolutional One-Stage Object Detection (2019); Tian et al., FCOS:
A Simple and Strong Anchor-free Object Detector (2020), for centre sampling and the score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2kit.config import CfgNode, configurable
from d2kit.layers import ShapeSpec, cat
from d2kit.layers.blocks import normal_fill
from d2kit.layers.wrappers import shapes_of
from d2kit.modeling.anchor_generator import DefaultAnchorGenerator
from d2kit.modeling.backbone import Backbone, build_backbone
from d2kit.modeling.box_regression import Box2BoxTransformLinear, matched_classes, rows_or_zeros
from d2kit.modeling.meta_arch.build import META_ARCH_REGISTRY
from d2kit.modeling.meta_arch.dense_detector import OneStageDetector, build_shared_arguments
from d2kit.modeling.meta_arch.retinanet import RetinaNetHead
from d2kit.structures import Boxes, ImageList, Instances
from d2kit.utils.registry import overrides

__all__ = ["FCOS", "FCOSHead"]


_MAX_PAIRS = 2**24
"""Largest (G, A) matrix held at once; about ten of them exist at a time, 640 MiB in all."""


def smallest_box_around(
    places: Sequence[Tensor], gt_boxes: Boxes, radius: float, max_pairs: int = _MAX_PAIRS
) -> tuple[Tensor, Tensor]:
    """Find the ground truth of every place.

    A place may learn a box that it lies in, near whose centre it lies, and whose farthest side is
    4 to 8 strides away (from 0 on the finest level, to infinity on the coarsest: 0, 64, 128, 256,
    512, infinity for strides 8 to 128). Among several it takes the smallest.

    Args:
        places: per level (A_l, 4), squares around each place with the stride as their side.
        gt_boxes: G boxes.
        radius: largest distance to the centre of the box, along x and along y, in strides; 0 or
            less: any.
        max_pairs: places times ground truths looked at together.

    Returns:
        Index of the ground truth (A,) int64, 0 where there is none; bool (A,), whether there is.

    Source: section 3.2; centre sampling: Tian et al. (2020).
    """
    count = sum(map(len, places))
    smallest = places[0].new_full((count,), torch.inf)
    index = torch.zeros_like(smallest, dtype=torch.int64)
    rows = max(1, max_pairs // max(1, count))
    for start in range(0, len(gt_boxes), rows):
        area, row = areas_of_fitting(places, gt_boxes[start : start + rows], radius).min(dim=0)
        index = torch.where(area < smallest, row + start, index)
        smallest = torch.minimum(smallest, area)
    return index, smallest < torch.inf


def areas_of_fitting(places: Sequence[Tensor], gt_boxes: Boxes, radius: float) -> Tensor:
    """Return the area of each box at the places that may learn it, else infinity: (G, A).

    Args:
        places: see `smallest_box_around`.
        gt_boxes: G boxes.
        radius: see `smallest_box_around`.
    """
    all_places = torch.cat(list(places))
    centers = (all_places[:, :2] + all_places[:, 2:]) / 2
    strides = all_places[:, 2] - all_places[:, 0]
    nearest, farthest = 4 * strides, 8 * strides
    nearest[: len(places[0])] = 0
    farthest[len(all_places) - len(places[-1]) :] = torch.inf
    boxes = gt_boxes.tensor[:, None]
    low, high = centers - boxes[..., :2], boxes[..., 2:] - centers  # (G, A, 2)
    reach = torch.maximum(low, high).amax(dim=2)
    fits = (torch.minimum(low, high).amin(dim=2) > 0) & (reach >= nearest) & (reach <= farthest)
    if radius > 0:  # the distance to the centre is half the difference of opposite sides
        fits &= (low - high).abs().amax(dim=2) < 2 * radius * strides
    return torch.where(fits, gt_boxes.area()[:, None], torch.inf)


def centerness(places: Tensor, boxes: Tensor) -> Tensor:
    """Return the geometric mean of the ratios of opposite distances.

    Args:
        places: (A, 4), squares around each place.
        boxes: (N, A, 4) XYXY, the box of each place.

    Returns:
        (N, A) in [0, 1]: 1 in the centre, 0 on the border and outside.

    Source: equation 3.
    """
    centers = (places[:, :2] + places[:, 2:]) / 2
    low, high = centers - boxes[..., :2], boxes[..., 2:] - centers
    shorter, longer = torch.minimum(low, high).clamp(min=0), torch.maximum(low, high)
    return (shorter / longer.clamp(min=1e-6)).prod(dim=-1).sqrt()


_INITIAL_POSITIVES = 300.0  # positive places of a few images, before any is counted


@META_ARCH_REGISTRY.register()
class FCOS(OneStageDetector):
    """A one-stage detector without anchor boxes.

    A place is kept as a square "anchor" with the stride as its side, so that boxes are coded,
    matched and decoded as in the other detectors.

    Args:
        backbone: images (N, C, H, W) -> name -> features.
        head_in_features: names of the levels, fine to coarse; by default all of the backbone's.
        box2box_transform: places + distances <-> boxes; by default distances in strides.
        center_sampling_radius: positives lie within so many strides of the centre of their box;
            0: anywhere inside the box.
        test_score_thresh: only scores above it are detections.
        test_nms_thresh: IoU.
        **kwargs: as of `OneStageDetector`; the head maps a list of features to three lists, logits
            (N, K, Hi, Wi), distances to the sides in strides (N, 4, Hi, Wi), centre-ness logits
            (N, 1, Hi, Wi).

    Source: Tian et al. (2019), section 3.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head_in_features: list[str] | None = None,
        box2box_transform: Box2BoxTransformLinear | None = None,
        center_sampling_radius: float = 1.5,
        test_score_thresh: float = 0.2,
        test_nms_thresh: float = 0.6,
        **kwargs: Any,
    ) -> None:
        shapes = backbone.output_shape()
        if head_in_features is None:
            head_in_features = sorted(shapes, key=lambda name: shapes[name].stride or 0)
        strides = [
            shape.stride or 0 for shape in shapes_of(head_in_features, shapes, "head_in_features")
        ]
        super().__init__(
            backbone=backbone,
            head_in_features=head_in_features,
            anchor_generator=DefaultAnchorGenerator(
                sizes=[[stride] for stride in strides],
                aspect_ratios=[1.0],
                strides=strides,
                offset=0.5,
            ),
            box2box_transform=box2box_transform or Box2BoxTransformLinear(normalize_by_size=True),
            test_score_thresh=test_score_thresh,
            test_nms_thresh=test_nms_thresh,
            initial_positives=_INITIAL_POSITIVES,
            **kwargs,
        )
        self.center_sampling_radius = center_sampling_radius
        self._matches_itself = overrides(self, FCOS, "_match_anchors")

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg`."""
        node = cfg.MODEL.FCOS
        backbone = build_backbone(cfg)
        known = backbone.output_shape()
        return {
            **build_shared_arguments(cfg, node),
            "backbone": backbone,
            "head": FCOSHead(cfg, shapes_of(node.IN_FEATURES, known, "MODEL.FCOS.IN_FEATURES")),
            "center_sampling_radius": node.CENTER_SAMPLING_RADIUS,
        }

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: list[list[Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        """Compute the losses, see `DenseDetector.forward_training`."""
        logits, deltas, centers = self._transpose_dense_predictions(
            predictions, [self.num_classes, 4, 1]
        )
        anchors = self.anchor_generator(features)
        labels, boxes = self.label_anchors(anchors, gt_instances)
        return self.losses(anchors, logits, labels, deltas, boxes, centers)

    @torch.no_grad()
    def label_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Give every place the smallest ground truth that it is responsible for.

        Args:
            anchors: per level.
            gt_instances: per image, with `gt_boxes` and `gt_classes`.

        Returns:
            Per image: labels (A,) int64, a class or `num_classes` for background; and the box of
            each place (A, 4), zeros where the image has none.

        Source: Tian et al. (2019), sections 3.1 and 3.2.
        """
        labels, boxes = [], []
        for gt in gt_instances:
            index, positive = self._responsible(gt.gt_boxes, anchors)
            boxes.append(rows_or_zeros(gt.gt_boxes.tensor, index))
            labels.append(matched_classes(gt.gt_classes, index, positive, self.num_classes))
        return labels, boxes

    def _match_anchors(self, gt_boxes: Boxes, anchors: list[Boxes]) -> Tensor:
        """Return how well each ground truth fits each place, for subclasses to replace.

        Args:
            gt_boxes: G boxes of one image.
            anchors: per level, A places in all.

        Returns:
            (G, A): 1 / area where the place may learn the box, else 0; the highest is learnt.
        """
        places = [x.tensor for x in anchors]
        return 1 / areas_of_fitting(places, gt_boxes, self.center_sampling_radius)

    def _responsible(self, gt_boxes: Boxes, anchors: list[Boxes]) -> tuple[Tensor, Tensor]:
        """Find the ground truth of every place, see `smallest_box_around`."""
        if self._matches_itself and len(gt_boxes):
            quality, index = self._match_anchors(gt_boxes, anchors).max(dim=0)
            return index, quality > 0
        places = [x.tensor for x in anchors]
        return smallest_box_around(places, gt_boxes, self.center_sampling_radius)

    def losses(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
        pred_centerness: list[Tensor],
    ) -> dict[str, Tensor]:
        """Compute the losses: sums over the places, divided by the running count of positives.

        Args:
            anchors: per level.
            pred_logits: per level (N, Hi*Wi, K).
            gt_labels: per image (A,), see `label_anchors`.
            pred_anchor_deltas: per level (N, Hi*Wi, 4).
            gt_boxes: per image (A, 4).
            pred_centerness: per level (N, Hi*Wi, 1), logits.

        Returns:
            ``loss_fcos_cls``, ``loss_fcos_loc`` (GIoU), ``loss_fcos_ctr``.

        Source: Tian et al. (2019), equation 2 and section 3.3.
        """
        of_classes, of_boxes, positive, normalizer = self._common_losses(
            anchors, pred_logits, torch.stack(gt_labels), pred_anchor_deltas, gt_boxes, "giou"
        )
        center = F.binary_cross_entropy_with_logits(
            cat(pred_centerness, dim=1).squeeze(-1).float(),
            self.compute_ctrness_targets(anchors, gt_boxes),
            weight=positive.float(),
            reduction="sum",
        )
        return {
            "loss_fcos_cls": of_classes,
            "loss_fcos_loc": of_boxes,
            "loss_fcos_ctr": center / normalizer,
        }

    @torch.no_grad()
    def compute_ctrness_targets(self, anchors: list[Boxes], gt_boxes: list[Tensor]) -> Tensor:
        """Return how central each place lies in its box.

        Args:
            anchors: per level.
            gt_boxes: per image (A, 4).

        Returns:
            (N, A) in [0, 1], 0 outside of the box.

        Source: Tian et al. (2019), equation 3.
        """
        return centerness(Boxes.cat(anchors).tensor, torch.stack(list(gt_boxes)))

    def forward_inference(
        self, images: ImageList, features: list[Tensor], predictions: list[list[Tensor]]
    ) -> list[Instances]:
        """Detect, see `DenseDetector.forward_inference`: all images at once until suppression.

        The score is the geometric mean of class score and centre-ness (Tian et al. 2020).
        """
        logits, deltas, centers = self._transpose_dense_predictions(
            predictions, [self.num_classes, 4, 1]
        )
        anchors = self.anchor_generator(features)
        scores = [
            (logit.float().sigmoid() * center.float().sigmoid()).sqrt()
            for logit, center in zip(logits, centers, strict=True)
        ]
        return self._detect(anchors, scores, deltas, images.image_sizes, logits=False)


class FCOSHead(RetinaNetHead):
    """The two towers of `RetinaNetHead` with one prediction per place, and the centre-ness.

    Args:
        input_shape: shape of each level.
        conv_dims: output channels of each convolution of a tower.
        **kwargs: `num_classes`, `norm` and `prior_prob` of `RetinaNetHead`.

    Source: Tian et al. (2019), section 3 and figure 2; the centre-ness beside the boxes: Tian et
    al. (2020).
    """

    @configurable
    def __init__(
        self, *, input_shape: Sequence[ShapeSpec], conv_dims: Sequence[int], **kwargs: object
    ) -> None:
        super().__init__(input_shape=input_shape, conv_dims=conv_dims, num_anchors=1, **kwargs)
        self.ctrness = nn.Conv2d(self.bbox_pred.in_channels, 1, 3, padding=1)
        normal_fill(self.ctrness, std=0.01)
        assert self.bbox_pred.bias is not None
        # Distances below 0 count as 0, without a gradient: start at one stride, as exp(0) does.
        nn.init.ones_(self.bbox_pred.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Sequence[ShapeSpec]) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg` and the levels' shapes."""
        node = cfg.MODEL.FCOS
        return {
            "input_shape": input_shape,
            "num_classes": node.NUM_CLASSES,
            "conv_dims": [input_shape[0].channels] * node.NUM_CONVS,
            "norm": node.NORM,
            "prior_prob": node.PRIOR_PROB,
        }

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:  # type: ignore[override]
        """Predict on every level.

        Args:
            features: per level (N, C, Hi, Wi).

        Returns:
            Per level: logits (N, K, Hi, Wi); distances left, top, right, bottom (N, 4, Hi, Wi) in
            strides; centre-ness logits (N, 1, Hi, Wi).
        """
        logits = [self.cls_score(self.cls_subnet(x)) for x in features]
        hidden = [self.bbox_subnet(x) for x in features]
        return logits, [self.bbox_pred(x) for x in hidden], [self.ctrness(x) for x in hidden]
