"""RetinaNet: anchors of a pyramid classified with the focal loss.

Source: Lin et al., Focal Loss for Dense Object Detection (2017).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2kit.config import CfgNode, configurable
from d2kit.layers import cat
from d2kit.modeling._metrics import put_scalars
from d2kit.modeling._shapes import shapes_of
from d2kit.modeling.anchor_generator import build_anchor_generator
from d2kit.modeling.backbone import Backbone, build_backbone
from d2kit.modeling.box_regression import Box2BoxTransform, _dense_box_regression_loss
from d2kit.modeling.matcher import Matcher
from d2kit.modeling.meta_arch._focal import focal_loss_of_labels
from d2kit.modeling.meta_arch._one_stage import OneStageDetector
from d2kit.modeling.meta_arch._retinanet_head import RetinaNetHead
from d2kit.modeling.meta_arch._running_count import RunningCount
from d2kit.modeling.meta_arch.build import META_ARCH_REGISTRY
from d2kit.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from d2kit.modeling.proposal_generator._matching import (
    match_boxes,
    matched_classes,
    rows_or_zeros,
)
from d2kit.structures import Boxes, ImageList, Instances

__all__ = ["RetinaNet", "RetinaNetHead", "permute_to_N_HWA_K"]

_INITIAL_POSITIVES = 100.0  # positive anchors of a few images, before any is counted


@META_ARCH_REGISTRY.register()
class RetinaNet(OneStageDetector):
    """A one-stage detector with anchors.

    Args:
        backbone: images (N, C, H, W) -> name -> features.
        head: list of features -> per level logits (N, A*K, Hi, Wi), deltas (N, A*4, Hi, Wi).
        head_in_features: names of the levels, fine to coarse.
        anchor_generator: features -> anchors of each level (`Boxes`).
        box2box_transform: anchors + deltas <-> boxes.
        anchor_matcher: IoU matrix (G, A) -> matches and labels.
        num_classes: K, background not counted.
        focal_loss_alpha: weight of positives in the focal loss, in [0, 1].
        focal_loss_gamma: exponent of the focal loss.
        smooth_l1_beta: where L1 begins; 0 is plain L1.
        box_reg_loss_type: ``smooth_l1``, ``giou``, ``diou`` or ``ciou``.
        test_score_thresh: only scores above it are detections.
        test_topk_candidates: candidates kept per level before suppression.
        test_nms_thresh: IoU.
        max_detections_per_image: detections kept.
        test_clip_boxes: clip candidates to the image before suppression, not only at the end.
        pixel_mean: per channel, in the order of the input, values in 0..255.
        pixel_std: per channel.
        vis_period: publish a training picture every this many steps; 0: never.
        input_format: ``BGR`` or ``RGB``.

    Source: Lin et al. (2017), section 4.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        head_in_features: list[str],
        anchor_generator: nn.Module,
        box2box_transform: Box2BoxTransform,
        anchor_matcher: Matcher,
        num_classes: int,
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
        smooth_l1_beta: float = 0.0,
        box_reg_loss_type: str = "smooth_l1",
        test_score_thresh: float = 0.05,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.5,
        max_detections_per_image: int = 100,
        test_clip_boxes: bool = False,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        vis_period: int = 0,
        input_format: str = "BGR",
    ) -> None:
        super().__init__(
            backbone=backbone,
            head=head,
            head_in_features=head_in_features,
            anchor_generator=anchor_generator,
            box2box_transform=box2box_transform,
            num_classes=num_classes,
            focal_loss_alpha=focal_loss_alpha,
            focal_loss_gamma=focal_loss_gamma,
            test_score_thresh=test_score_thresh,
            test_topk_candidates=test_topk_candidates,
            test_nms_thresh=test_nms_thresh,
            max_detections_per_image=max_detections_per_image,
            test_clip_boxes=test_clip_boxes,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
        )
        self.anchor_matcher = anchor_matcher
        self.smooth_l1_beta = smooth_l1_beta
        self.box_reg_loss_type = box_reg_loss_type
        self.vis_period = vis_period
        self.input_format = input_format
        self.loss_normalizer = RunningCount(_INITIAL_POSITIVES)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg`."""
        node = cfg.MODEL.RETINANET
        backbone = build_backbone(cfg)
        known = backbone.output_shape()
        shapes = shapes_of(node.IN_FEATURES, known, "MODEL.RETINANET.IN_FEATURES")
        return {
            "backbone": backbone,
            "head": RetinaNetHead(cfg, shapes),
            "head_in_features": node.IN_FEATURES,
            "anchor_generator": build_anchor_generator(cfg, shapes),
            "box2box_transform": Box2BoxTransform(weights=node.BBOX_REG_WEIGHTS),
            "anchor_matcher": Matcher(
                node.IOU_THRESHOLDS, node.IOU_LABELS, allow_low_quality_matches=True
            ),
            "num_classes": node.NUM_CLASSES,
            "focal_loss_alpha": node.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": node.FOCAL_LOSS_GAMMA,
            "smooth_l1_beta": node.SMOOTH_L1_LOSS_BETA,
            "box_reg_loss_type": node.BBOX_REG_LOSS_TYPE,
            "test_score_thresh": node.SCORE_THRESH_TEST,
            "test_topk_candidates": node.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": node.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "test_clip_boxes": node.CLIP_BOXES_TEST,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "vis_period": cfg.VIS_PERIOD,
            "input_format": cfg.INPUT.FORMAT,
        }

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: list[list[Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        """Compute the losses, see `DenseDetector.forward_training`."""
        logits, deltas = self._rows_per_anchor(*predictions)
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
        labels = torch.stack(gt_labels)
        positive = (labels >= 0) & (labels != self.num_classes)
        count = positive.sum()
        put_scalars("", num_pos_anchors=count / len(gt_labels))
        normalizer = self.loss_normalizer(count)
        classification = focal_loss_of_labels(
            cat(pred_logits, dim=1), labels, self.focal_loss_alpha, self.focal_loss_gamma
        )
        location = _dense_box_regression_loss(
            anchors,
            self.box2box_transform,
            [x.float() for x in pred_anchor_deltas],
            gt_boxes,
            positive,
            box_reg_loss_type=self.box_reg_loss_type,
            smooth_l1_beta=self.smooth_l1_beta,
        )
        return {"loss_cls": classification / normalizer, "loss_box_reg": location / normalizer}

    def forward_inference(
        self, images: ImageList, features: list[Tensor], predictions: list[list[Tensor]]
    ) -> list[Instances]:
        """Detect, see `DenseDetector.forward_inference`: all images at once until suppression."""
        logits, deltas = self._rows_per_anchor(*predictions)
        anchors = self.anchor_generator(features)
        boxes, best, classes = self._best_candidates(anchors, logits, deltas)
        return self._detections(boxes, best.float().sigmoid(), classes, images.image_sizes)
