"""Standard heads: each task pools its own region features."""

from typing import Any

import torch
from torch import Tensor, nn

from d2kit.config import CfgNode, configurable
from d2kit.layers import ShapeSpec
from d2kit.modeling.poolers import ROIPooler
from d2kit.modeling.roi_heads._base import ROI_HEADS_REGISTRY, TwoPhaseHeads
from d2kit.modeling.roi_heads._build import (
    build_box_branch,
    build_keypoint_branch,
    build_mask_branch,
)
from d2kit.modeling.roi_heads._selection import (
    select_foreground_proposals,
    select_proposals_with_visible_keypoints,
)
from d2kit.structures import Boxes, Instances


@ROI_HEADS_REGISTRY.register()
class StandardROIHeads(TwoPhaseHeads):
    """Box, mask and keypoint heads that share nothing but the features.

    Args:
        box_in_features: names of the levels that the box head pools from.
        box_pooler: levels and boxes -> (R, C, H, W).
        box_head: pooled features -> one vector per region.
        box_predictor: that vector -> scores and deltas, see `FastRCNNOutputLayers`.
        mask_in_features: levels of the mask head; None: no masks.
        mask_pooler: its pooler; None: the head gets the dict of its features itself.
        mask_head: see `BaseMaskRCNNHead`.
        keypoint_in_features: levels of the keypoint head; None: no keypoints.
        keypoint_pooler: its pooler, or None as above.
        keypoint_head: see `BaseKeypointRCNNHead`.
        train_on_pred_boxes: train the mask and keypoint heads on the box head's output instead of
            the proposals.
        **kwargs: see `ROIHeads`.

    Source: Mask R-CNN (He et al. 2017), figure 4, right; FPN (Lin et al. 2017), section 4.2.
    """

    box_predictor: Any
    mask_head: Any
    keypoint_head: Any

    @configurable
    def __init__(
        self,
        *,
        box_in_features: list[str],
        box_pooler: ROIPooler,
        box_head: nn.Module,
        box_predictor: nn.Module,
        mask_in_features: list[str] | None = None,
        mask_pooler: ROIPooler | None = None,
        mask_head: nn.Module | None = None,
        keypoint_in_features: list[str] | None = None,
        keypoint_pooler: ROIPooler | None = None,
        keypoint_head: nn.Module | None = None,
        train_on_pred_boxes: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.in_features = self.box_in_features = box_in_features
        self.box_pooler = box_pooler
        self.box_head = box_head
        self.box_predictor = box_predictor
        self.mask_on = mask_in_features is not None
        if mask_in_features is not None:
            self.mask_in_features = mask_in_features
            self.mask_pooler = mask_pooler
            self.mask_head = mask_head
        self.keypoint_on = keypoint_in_features is not None
        if keypoint_in_features is not None:
            self.keypoint_in_features = keypoint_in_features
            self.keypoint_pooler = keypoint_pooler
            self.keypoint_head = keypoint_head
        self.train_on_pred_boxes = train_on_pred_boxes

    @classmethod
    def from_config(  # type: ignore[override]
        cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]
    ) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg` and the backbone's output shapes."""
        return {
            **super().from_config(cfg),
            "train_on_pred_boxes": cfg.MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES,
            **cls._init_box_head(cfg, input_shape),
            **cls._init_mask_head(cfg, input_shape),
            **cls._init_keypoint_head(cfg, input_shape),
        }

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Return the box branch's arguments; user classes override it."""
        return build_box_branch(cfg, input_shape)

    @classmethod
    def _init_mask_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Return the mask branch's arguments, if any; user classes override it."""
        return build_mask_branch(cfg, input_shape)

    @classmethod
    def _init_keypoint_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Return the keypoint branch's arguments, if any; user classes override it."""
        return build_keypoint_branch(cfg, input_shape)

    def _losses(
        self, features: dict[str, Tensor], sampled: list[Instances], targets: list[Instances]
    ) -> dict[str, Tensor]:
        # The masks and keypoints of a region are learnt where its box is foreground; these heads
        # select by themselves, since the box losses need all proposals.
        return {
            **self._box_losses(features, sampled, targets),
            **self._forward_mask(features, sampled),
            **self._forward_keypoint(features, sampled),
        }

    def _box_losses(
        self, features: dict[str, Tensor], sampled: list[Instances], targets: list[Instances]
    ) -> dict[str, Tensor]:
        """Return the losses of the box head; `targets` is for heads that label by themselves."""
        del targets
        return self._forward_box(features, sampled)

    def _detect(self, features: dict[str, Tensor], proposals: list[Instances]) -> list[Instances]:
        return self._forward_box(features, proposals)

    def _refine(self, features: dict[str, Tensor], instances: list[Instances]) -> list[Instances]:
        return self._forward_keypoint(features, self._forward_mask(features, instances))

    def _forward_box(self, features: dict[str, Tensor], proposals: list[Instances]) -> Any:
        """Return the box losses in training, else the detections of each image."""
        levels = [features[name] for name in self.box_in_features]
        pooled = self.box_pooler(levels, [p.proposal_boxes for p in proposals])
        predictions = self.box_predictor(self.box_head(pooled))
        if not self.training:
            return self.box_predictor.inference(predictions, proposals)[0]
        losses = self.box_predictor.losses(predictions, proposals)
        if self.train_on_pred_boxes:
            self._use_predicted_boxes(predictions, proposals)
        return losses

    @torch.no_grad()
    def _use_predicted_boxes(self, predictions: Any, proposals: list[Instances]) -> None:
        """Replace the boxes of the proposals, in place, by those predicted for their classes."""
        predicted = self.box_predictor.predict_boxes_for_gt_classes(predictions, proposals)
        for proposal, boxes in zip(proposals, predicted, strict=True):
            proposal.proposal_boxes = Boxes(boxes)

    def _forward_mask(self, features: dict[str, Tensor], instances: list[Instances]) -> Any:
        """Return the mask loss in training, else `instances` with masks."""
        return self._branch("mask", features, instances)

    def _forward_keypoint(self, features: dict[str, Tensor], instances: list[Instances]) -> Any:
        """Return the keypoint loss in training, else `instances` with keypoints."""
        return self._branch("keypoint", features, instances)

    def _branch(self, task: str, features: dict[str, Tensor], instances: list[Instances]) -> Any:
        """Run the pooler and the head of `task`, in training on the proposals that suit it."""
        if not getattr(self, f"{task}_on"):
            return {} if self.training else instances
        names, pooler = getattr(self, f"{task}_in_features"), getattr(self, f"{task}_pooler")
        field = "pred_boxes"
        if self.training:
            field = "proposal_boxes"
            instances, _ = select_foreground_proposals(instances, self.num_classes)
            if task == "keypoint":
                instances = select_proposals_with_visible_keypoints(instances)
        chosen: Any = {name: features[name] for name in names}
        if pooler is not None:
            chosen = pooler(list(chosen.values()), [one.get(field) for one in instances])
        return getattr(self, f"{task}_head")(chosen, instances)
