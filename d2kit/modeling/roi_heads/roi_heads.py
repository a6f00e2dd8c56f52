"""Per-region heads: registry, base class, and the two kinds that Detectron2's zoo uses.

Source: Fast R-CNN (Girshick 2015), Mask R-CNN (He et al. 2017).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from d2kit.config import CfgNode, configurable
from d2kit.layers import ShapeSpec
from d2kit.modeling.box_regression import Matcher, check_classes, match_boxes, matched_classes
from d2kit.modeling.poolers import ROIPooler
from d2kit.modeling.proposal_generator.proposal_utils import add_ground_truth_to_proposals
from d2kit.modeling.roi_heads.build import (
    build_box_branch,
    build_keypoint_branch,
    build_mask_branch,
    build_pooler,
    build_res5_stage,
)
from d2kit.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from d2kit.modeling.roi_heads.mask_head import build_mask_head
from d2kit.modeling.sampling import (
    attach_targets,
    check_targets,
    for_image,
    generator_of_image,
    select_foreground_proposals,
    select_proposals_with_visible_keypoints,
    subsample_labels,
)
from d2kit.structures import Boxes, ImageList, Instances
from d2kit.utils.events import put_scalars
from d2kit.utils.registry import Registry

__all__ = [
    "ROI_HEADS_REGISTRY",
    "ROIHeads",
    "Res5ROIHeads",
    "StandardROIHeads",
    "build_roi_heads",
    "select_foreground_proposals",
    "select_proposals_with_visible_keypoints",
]


ROI_HEADS_REGISTRY = Registry("ROI_HEADS")
"""Per-region heads: called with ``(cfg, input_shape: dict[str, ShapeSpec])``; see `ROIHeads`."""


def build_roi_heads(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> nn.Module:
    """Build the heads that ``cfg.MODEL.ROI_HEADS.NAME`` names.

    Args:
        cfg: the config.
        input_shape: feature name -> its shape, as the backbone gives it.

    Returns:
        The heads.
    """
    found: nn.Module = ROI_HEADS_REGISTRY.get(cfg.MODEL.ROI_HEADS.NAME)(cfg, input_shape)
    return found


class ROIHeads(nn.Module):
    """Base of all per-region heads: matches and samples proposals for training.

    Args:
        num_classes: K, foreground classes; K itself stands for background.
        batch_size_per_image: proposals sampled per image for the losses.
        positive_fraction: largest share of foreground among them.
        proposal_matcher: IoU matrix (G, R) -> matches and labels.
        proposal_append_gt: add the ground truths to the proposals in training.
    """

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        batch_size_per_image: int,
        positive_fraction: float,
        proposal_matcher: Matcher,
        proposal_append_gt: bool = True,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.batch_size_per_image = batch_size_per_image
        self.positive_fraction = positive_fraction
        self.proposal_matcher = proposal_matcher
        self.proposal_append_gt = proposal_append_gt

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg`."""
        heads = cfg.MODEL.ROI_HEADS
        return {
            "num_classes": heads.NUM_CLASSES,
            "batch_size_per_image": heads.BATCH_SIZE_PER_IMAGE,
            "positive_fraction": heads.POSITIVE_FRACTION,
            "proposal_matcher": Matcher(
                heads.IOU_THRESHOLDS, heads.IOU_LABELS, allow_low_quality_matches=False
            ),
            "proposal_append_gt": heads.PROPOSAL_APPEND_GT,
        }

    @torch.no_grad()
    def label_and_sample_proposals(
        self, proposals: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        """Match proposals to ground truths and sample those that enter the losses.

        Args:
            proposals: per image, with `proposal_boxes` and `objectness_logits`.
            targets: per image, with `gt_boxes`, `gt_classes` and any other `gt_*`.

        Returns:
            Per image, the sampled proposals, foreground first, with `gt_classes` (K: background)
            and, where the image has ground truths, the `gt_*` fields of the matched ones.

        Source: Fast R-CNN, section 2.3, "Mini-batch sampling".
        """
        targets = check_targets(targets, "ROI_HEADS")
        if self.proposal_append_gt:
            proposals = add_ground_truth_to_proposals(targets, proposals)
        sampled, backgrounds = [], []
        for i, (proposal, target) in enumerate(zip(proposals, targets, strict=True)):
            matched, label = match_boxes(
                self.proposal_matcher, target.gt_boxes, proposal.proposal_boxes
            )
            with for_image(i):
                index, classes = self._sample_proposals(matched, label, target.gt_classes)
            chosen = proposal[index]
            chosen.gt_classes = classes
            attach_targets(chosen, target, matched[index])
            sampled.append(chosen)
            backgrounds.append((classes == self.num_classes).sum())
        total = sum(map(len, sampled))
        background = torch.stack(backgrounds).sum() if backgrounds else 0
        put_scalars(
            "roi_head",
            num_fg_samples=(total - background) / max(1, len(targets)),
            num_bg_samples=background / max(1, len(targets)),
        )
        return sampled

    def _classes_of(self, matched: Tensor, label: Tensor, gt_classes: Tensor) -> Tensor:
        """Return the class of each proposal (R,): K for background, -1 for ignored."""
        if gt_classes.device.type == "cpu":  # models check before the upload: `ground_truth`
            check_classes(gt_classes, self.num_classes)
        return matched_classes(gt_classes, matched, label, self.num_classes)

    def _sample_proposals(
        self, matched_idxs: Tensor, matched_labels: Tensor, gt_classes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Draw the proposals of one image that enter the losses; user classes override it.

        Args:
            matched_idxs: (R,) the ground truth that each proposal is matched to.
            matched_labels: (R,) 1 foreground, 0 background, -1 ignored.
            gt_classes: (G,) int64.

        Returns:
            Rows of the drawn proposals, foreground first, and their classes (K: background).
        """
        classes = self._classes_of(matched_idxs, matched_labels, gt_classes)
        drawn = subsample_labels(
            classes,
            self.batch_size_per_image,
            self.positive_fraction,
            self.num_classes,
            generator=generator_of_image("roi_heads", classes.device),
        )
        index = torch.cat(drawn)
        return index, classes[index]

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Compute the losses in training, or detections; subclasses define it.

        Args:
            images: the batch.
            features: name -> (N, C, Hi, Wi).
            proposals: per image, with `proposal_boxes` and `objectness_logits`.
            targets: per image ground truths, in training.

        Returns:
            Per image results (in training the sampled proposals); losses (empty at inference).
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward()")


class TwoPhaseHeads(ROIHeads):
    """Heads that sample and lose in training, detect and then refine at inference.

    A subclass defines `_losses`, `_detect` and `forward_with_given_boxes`.
    """

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """See `ROIHeads.forward`; `images` is not used."""
        if not self.training:
            found = self._detect(features, proposals)
            return self.forward_with_given_boxes(features, found), {}
        truths = check_targets(targets, type(self).__name__)
        sampled = self.label_and_sample_proposals(proposals, truths)
        return sampled, self._losses(features, sampled, truths)

    def _losses(
        self, features: dict[str, Tensor], sampled: list[Instances], targets: list[Instances]
    ) -> dict[str, Tensor]:
        """Return the losses of all heads for the sampled proposals."""
        raise NotImplementedError

    def _detect(self, features: dict[str, Tensor], proposals: list[Instances]) -> list[Instances]:
        """Return the boxes, classes and scores of each image."""
        raise NotImplementedError

    def forward_with_given_boxes(
        self, features: dict[str, Tensor], instances: list[Instances]
    ) -> list[Instances]:
        """Predict what the box head does not for boxes and classes that are already known.

        Args:
            features: name -> (N, C, Hi, Wi).
            instances: per image, with `pred_boxes` and `pred_classes`.

        Returns:
            The same objects, with `pred_masks` (R, 1, M, M) and `pred_keypoints` (R, K, 3) where
            there are such heads.

        Raises:
            ValueError: in training mode, or where a field is missing.
        """
        if self.training:
            raise ValueError("forward_with_given_boxes is for inference: call model.eval() first")
        for one in instances:
            if not (one.has("pred_boxes") and one.has("pred_classes")):
                raise ValueError(
                    "detected instances need pred_boxes and pred_classes, got "
                    f"{sorted(one.get_fields())}"
                )
        return self._refine(features, instances)

    def _refine(self, features: dict[str, Tensor], instances: list[Instances]) -> list[Instances]:
        """Return `instances` with masks and keypoints, where there are such heads."""
        raise NotImplementedError


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeads(TwoPhaseHeads):
    """Pool from one level, run res5 on each region, predict boxes from its mean and masks from it.

    Args:
        in_features: name of the level, in a list.
        pooler: level and boxes -> (R, C, H, W).
        res5: the stage, or its blocks in order.
        box_predictor: see `FastRCNNOutputLayers`.
        mask_head: see `BaseMaskRCNNHead`; None: no masks.
        **kwargs: see `ROIHeads`.

    Source: Mask R-CNN (He et al. 2017), figure 4, left.
    """

    box_predictor: Any
    mask_head: Any

    @configurable
    def __init__(
        self,
        *,
        in_features: list[str],
        pooler: ROIPooler,
        res5: nn.Module | Sequence[nn.Module],
        box_predictor: nn.Module,
        mask_head: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__(**kwargs)
        self.in_features = in_features
        self.pooler = pooler
        self.res5 = res5 if isinstance(res5, nn.Module) else nn.Sequential(*res5)
        self.box_predictor = box_predictor
        self.mask_on = mask_head is not None
        if mask_head is not None:
            self.mask_head = mask_head

    @classmethod
    def from_config(  # type: ignore[override]
        cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]
    ) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg` and the backbone's output shapes.

        Raises:
            ValueError: if more than one level is named, or keypoints are wanted.
        """
        if cfg.MODEL.KEYPOINT_ON:
            raise ValueError(
                "MODEL.KEYPOINT_ON True: Res5ROIHeads has no keypoint head; set "
                "MODEL.ROI_HEADS.NAME StandardROIHeads"
            )
        names, pooler, shape = build_pooler(cfg, cfg.MODEL.ROI_BOX_HEAD, input_shape)
        if len(names) != 1:
            raise ValueError(
                f"Res5ROIHeads pools from one level, MODEL.ROI_HEADS.IN_FEATURES names {names}"
            )
        # the method may be one of instances, as in code for older versions of Detectron2
        build: Any = cls._build_res5_block
        if not inspect.ismethod(build):
            build = partial(build, cls)
        res5, channels = build(cfg)
        arguments = {
            **super().from_config(cfg),
            "in_features": names,
            "pooler": pooler,
            "res5": res5,
            "box_predictor": FastRCNNOutputLayers(cfg, ShapeSpec(channels=channels)),
        }
        if cfg.MODEL.MASK_ON:
            side = shape.height
            arguments["mask_head"] = build_mask_head(
                cfg, ShapeSpec(channels=channels, height=side, width=side)
            )
        return arguments

    @classmethod
    def _build_res5_block(cls, cfg: CfgNode) -> tuple[nn.Module, int]:
        """Return the stage and its output channels; user classes override it."""
        return build_res5_stage(cfg)

    def _losses(
        self, features: dict[str, Tensor], sampled: list[Instances], targets: list[Instances]
    ) -> dict[str, Tensor]:
        del targets
        regions = self._shared_roi_transform(
            self._levels(features), [p.proposal_boxes for p in sampled]
        )
        losses: dict[str, Tensor] = self.box_predictor.losses(self._predict(regions), sampled)
        if not self.mask_on:
            return losses
        chosen, kept = select_foreground_proposals(sampled, self.num_classes)
        return {**losses, **self.mask_head(regions[torch.cat(kept)], chosen)}

    def _detect(self, features: dict[str, Tensor], proposals: list[Instances]) -> list[Instances]:
        regions = self._shared_roi_transform(
            self._levels(features), [p.proposal_boxes for p in proposals]
        )
        found: list[Instances] = self.box_predictor.inference(self._predict(regions), proposals)[0]
        return found

    def _refine(self, features: dict[str, Tensor], instances: list[Instances]) -> list[Instances]:
        if not self.mask_on:
            return instances
        regions = self._shared_roi_transform(
            self._levels(features), [one.pred_boxes for one in instances]
        )
        found: list[Instances] = self.mask_head(regions, instances)
        return found

    def _levels(self, features: dict[str, Tensor]) -> list[Tensor]:
        return [features[name] for name in self.in_features]

    def _shared_roi_transform(self, features: list[Tensor], boxes: list[Boxes]) -> Tensor:
        """Return res5's features of each box (R, C, H/2, W/2); user classes override it.

        Args:
            features: per level (N, C, Hi, Wi).
            boxes: per image.
        """
        found: Tensor = self.res5(self.pooler(features, boxes))
        return found

    def _predict(self, regions: Tensor) -> Any:
        """Return scores and deltas from the mean of each region's features (R, C, H, W)."""
        return self.box_predictor(regions.mean(dim=(2, 3)))


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
        **kwargs: object,
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
        arguments = super().from_config(cfg)
        arguments["train_on_pred_boxes"] = cfg.MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES
        for build in (cls._init_box_head, cls._init_mask_head, cls._init_keypoint_head):
            # one that is a method of instances is called by its own class, in its constructor
            if inspect.ismethod(build):
                arguments |= build(cfg, input_shape)
        return arguments

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
        found: dict[str, Tensor] = self._forward_box(features, sampled)
        return found

    def _detect(self, features: dict[str, Tensor], proposals: list[Instances]) -> list[Instances]:
        found: list[Instances] = self._forward_box(features, proposals)
        return found

    def _refine(self, features: dict[str, Tensor], instances: list[Instances]) -> list[Instances]:
        found: list[Instances] = self._forward_keypoint(
            features, self._forward_mask(features, instances)
        )
        return found

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
    def _use_predicted_boxes(self, predictions: object, proposals: list[Instances]) -> None:
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
