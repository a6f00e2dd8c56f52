"""RetinaNet: anchors of a pyramid classified with the focal loss.

Source: Lin et al., Focal Loss for Dense Object Detection (2017).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2kit.config import CfgNode, configurable
from d2kit.layers import CycleBatchNormList, ShapeSpec, SyncBatchNorm, get_norm
from d2kit.layers.blocks import normal_fill
from d2kit.layers.wrappers import region_shape, shapes_of
from d2kit.modeling.anchor_generator import build_anchor_generator
from d2kit.modeling.backbone import build_backbone
from d2kit.modeling.box_regression import (
    Box2BoxTransform,
    Matcher,
    match_boxes,
    matched_classes,
    rows_or_zeros,
)
from d2kit.modeling.meta_arch.build import META_ARCH_REGISTRY
from d2kit.modeling.meta_arch.dense_detector import (
    OneStageDetector,
    build_shared_arguments,
    permute_to_N_HWA_K,
)
from d2kit.structures import Boxes, ImageList, Instances

__all__ = ["RetinaNet", "RetinaNetHead", "permute_to_N_HWA_K"]


class RetinaNetHead(nn.Module):
    """One tower for the classes and one for the boxes.

    With ``BN`` or ``SyncBN`` every level has its own statistics (the affine map is shared): the
    levels differ too much for one mean (Wu and Johnson, Rethinking "Batch" in BatchNorm, 2021,
    section 5).

    Args:
        input_shape: shape of each level.
        num_classes: K.
        num_anchors: A, anchors per position, the same on every level.
        conv_dims: output channels of each convolution of a tower.
        norm: after each convolution, as `d2kit.layers.get_norm` takes it.
        prior_prob: score of every anchor at the start.

    Source: Lin et al., Focal Loss for Dense Object Detection (2017), sections 3.3 and 4.
    """

    @configurable
    def __init__(
        self,
        *,
        input_shape: Sequence[ShapeSpec],
        num_classes: int,
        num_anchors: int,
        conv_dims: Sequence[int],
        norm: str | Callable[[int], nn.Module] = "",
        prior_prob: float = 0.01,
    ) -> None:
        super().__init__()
        channels = {region_shape(shape, type(self).__name__)[0] for shape in input_shape}
        if len(channels) != 1:
            raise ValueError(
                "the head of a one-stage detector is shared by all levels, so all need the same "
                f"channels; got {sorted(channels)} (see MODEL.RETINANET.IN_FEATURES)"
            )
        if not 0 < prior_prob < 1:
            raise ValueError(f"prior_prob (MODEL.RETINANET.PRIOR_PROB) in (0, 1), got {prior_prob}")
        dims = [channels.pop(), *conv_dims]
        make_norm = _norm_per_level(norm, len(input_shape))
        self.cls_subnet = _tower(dims, make_norm)
        self.bbox_subnet = _tower(dims, make_norm)
        self.cls_score = nn.Conv2d(dims[-1], num_anchors * num_classes, 3, padding=1)
        self.bbox_pred = nn.Conv2d(dims[-1], num_anchors * 4, 3, padding=1)
        for layer in (*self.cls_subnet, *self.bbox_subnet):
            if isinstance(layer, nn.Conv2d):
                normal_fill(layer, std=0.01)
        normal_fill(self.cls_score, std=0.01, bias=math.log(prior_prob / (1 - prior_prob)))
        normal_fill(self.bbox_pred, std=0.01)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Sequence[ShapeSpec]) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg` and the levels' shapes.

        Raises:
            ValueError: if the levels differ in anchors per position.
        """
        node = cfg.MODEL.RETINANET
        generator: Any = build_anchor_generator(cfg, list(input_shape))
        anchors = set(generator.num_anchors)
        if len(anchors) != 1:
            raise ValueError(
                "RetinaNet's head is shared by all levels, so all need the same number of anchors "
                f"per position; got {sorted(anchors)} (see MODEL.ANCHOR_GENERATOR)"
            )
        return {
            "input_shape": input_shape,
            "num_classes": node.NUM_CLASSES,
            "num_anchors": anchors.pop(),
            "conv_dims": [input_shape[0].channels] * node.NUM_CONVS,
            "norm": node.NORM,
            "prior_prob": node.PRIOR_PROB,
        }

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Predict classes and boxes on every level.

        Args:
            features: per level (N, C, Hi, Wi).

        Returns:
            Per level: logits (N, A*K, Hi, Wi); deltas (N, A*4, Hi, Wi).
        """
        logits = [self.cls_score(self.cls_subnet(x)) for x in features]
        return logits, [self.bbox_pred(self.bbox_subnet(x)) for x in features]


def _tower(dims: Sequence[int], make_norm: Callable[[int], nn.Module | None]) -> nn.Sequential:
    """Make 3x3 convolutions from `dims[0]` over `dims[1]` ... channels, each with norm and ReLU."""
    layers: list[nn.Module] = []
    for before, after in zip(dims[:-1], dims[1:], strict=True):
        layers.append(nn.Conv2d(before, after, 3, padding=1))
        norm = make_norm(after)
        if norm is not None:
            layers.append(norm)
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def _norm_per_level(
    norm: str | Callable[[int], nn.Module] | None, levels: int
) -> Callable[[int], nn.Module | None]:
    """Return what makes the norm of one layer: batch norms have statistics for each level."""
    batch_norms: dict[str, Any] = {
        "BN": nn.BatchNorm2d,
        "SyncBN": SyncBatchNorm,
    }
    if isinstance(norm, str) and norm in batch_norms:
        return lambda c: CycleBatchNormList(levels, batch_norms[norm], num_features=c)
    return lambda c: get_norm(norm, c)


@META_ARCH_REGISTRY.register()
class RetinaNet(OneStageDetector):
    """A one-stage detector with anchors.

    Args:
        head_in_features: names of the levels, fine to coarse.
        anchor_matcher: IoU matrix (G, A) -> matches and labels.
        smooth_l1_beta: where L1 begins; 0 is plain L1.
        box_reg_loss_type: ``smooth_l1``, ``giou``, ``diou`` or ``ciou``.
        **kwargs: as of `OneStageDetector`; the head maps a list of features to two lists, logits
            (N, A*K, Hi, Wi) and deltas (N, A*4, Hi, Wi).

    Source: Lin et al. (2017), section 4.
    """

    @configurable
    def __init__(
        self,
        *,
        head_in_features: list[str],
        anchor_matcher: Matcher,
        smooth_l1_beta: float = 0.0,
        box_reg_loss_type: str = "smooth_l1",
        **kwargs: Any,
    ) -> None:
        super().__init__(head_in_features=head_in_features, **kwargs)
        self.anchor_matcher = anchor_matcher
        self.smooth_l1_beta = smooth_l1_beta
        self.box_reg_loss_type = box_reg_loss_type

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg`."""
        node = cfg.MODEL.RETINANET
        backbone = build_backbone(cfg)
        known = backbone.output_shape()
        shapes = shapes_of(node.IN_FEATURES, known, "MODEL.RETINANET.IN_FEATURES")
        return {
            **build_shared_arguments(cfg, node),
            "backbone": backbone,
            "head": RetinaNetHead(cfg, shapes),
            "anchor_generator": build_anchor_generator(cfg, shapes),
            "box2box_transform": Box2BoxTransform(weights=node.BBOX_REG_WEIGHTS),
            "anchor_matcher": Matcher(
                node.IOU_THRESHOLDS, node.IOU_LABELS, allow_low_quality_matches=True
            ),
            "smooth_l1_beta": node.SMOOTH_L1_LOSS_BETA,
            "box_reg_loss_type": node.BBOX_REG_LOSS_TYPE,
            "test_clip_boxes": node.CLIP_BOXES_TEST,
        }

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: list[list[Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        """Compute the losses, see `DenseDetector.forward_training`."""
        logits, deltas = self._transpose_dense_predictions(predictions, [self.num_classes, 4])
        anchors = self.anchor_generator(features)
        labels, boxes = self.label_anchors(anchors, gt_instances)
        return self.losses(anchors, logits, labels, deltas, boxes)

    @torch.no_grad()
    def label_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Match anchors to ground truths.

        Args:
            anchors: per level.
            gt_instances: per image, with `gt_boxes` and `gt_classes`.

        Returns:
            Per image: labels (A,) int64, a class, `num_classes` for background, -1 for ignored;
            and the matched ground-truth box of each anchor (A, 4), zeros where the image has none.

        Source: Lin et al. (2017), section 4, Anchors.
        """
        all_anchors = Boxes.cat(anchors)
        labels, boxes = [], []
        for gt in gt_instances:
            index, label = match_boxes(self.anchor_matcher, gt.gt_boxes, all_anchors)
            boxes.append(rows_or_zeros(gt.gt_boxes.tensor, index))
            labels.append(matched_classes(gt.gt_classes, index, label, self.num_classes))
        return labels, boxes

    def losses(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """Compute the losses: sums over the anchors, divided by the running count of positives.

        Args:
            anchors: per level.
            pred_logits: per level (N, Hi*Wi*A, K).
            gt_labels: per image (A,), see `label_anchors`.
            pred_anchor_deltas: per level (N, Hi*Wi*A, 4).
            gt_boxes: per image (A, 4).

        Returns:
            ``loss_cls`` and ``loss_box_reg``.

        Source: Lin et al. (2017), section 4, Training.
        """
        of_classes, of_boxes, _, _ = self._common_losses(
            anchors,
            pred_logits,
            torch.stack(gt_labels),
            pred_anchor_deltas,
            gt_boxes,
            self.box_reg_loss_type,
            self.smooth_l1_beta,
        )
        return {"loss_cls": of_classes, "loss_box_reg": of_boxes}

    def forward_inference(
        self, images: ImageList, features: list[Tensor], predictions: list[list[Tensor]]
    ) -> list[Instances]:
        """Detect, see `DenseDetector.forward_inference`: all images at once until suppression."""
        logits, deltas = self._transpose_dense_predictions(predictions, [self.num_classes, 4])
        anchors = self.anchor_generator(features)
        return self._detect(anchors, logits, deltas, images.image_sizes, logits=True)
