"""Per-region heads: registry, and what all of them share.

Source: Fast R-CNN (Girshick 2015), Mask R-CNN (He et al. 2017).
"""

from typing import Any

import torch
from torch import Tensor, nn

from d2kit.config import CfgNode, configurable
from d2kit.layers import ShapeSpec
from d2kit.modeling._metrics import put_scalars
from d2kit.modeling.matcher import Matcher
from d2kit.modeling.proposal_generator._matching import match_boxes, matched_classes
from d2kit.modeling.proposal_generator.proposal_utils import add_ground_truth_to_proposals
from d2kit.modeling.roi_heads._selection import (
    attach_targets,
    check_classes,
    check_targets,
)
from d2kit.modeling.sampling import generator_for, subsample_labels
from d2kit.structures import ImageList, Instances
from d2kit.utils.registry import Registry

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
    return ROI_HEADS_REGISTRY.get(cfg.MODEL.ROI_HEADS.NAME)(cfg, input_shape)


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
        sampled, foreground, background = [], 0, 0
        for i, (proposal, target) in enumerate(zip(proposals, targets, strict=True)):
            matched, label = match_boxes(
                self.proposal_matcher, target.gt_boxes, proposal.proposal_boxes
            )
            classes = self._classes_of(matched, label, target)
            positive, negative = subsample_labels(
                classes,
                self.batch_size_per_image,
                self.positive_fraction,
                self.num_classes,
                generator=generator_for(i, "roi_heads", classes.device),
            )
            index = torch.cat([positive, negative])
            chosen = proposal[index]
            chosen.gt_classes = classes[index]
            attach_targets(chosen, target, matched[index])
            sampled.append(chosen)
            foreground += len(positive)
            background += len(negative)
        put_scalars(
            "roi_head",
            num_fg_samples=foreground / max(1, len(targets)),
            num_bg_samples=background / max(1, len(targets)),
        )
        return sampled

    def _classes_of(self, matched: Tensor, label: Tensor, target: Instances) -> Tensor:
        """Return the class of each proposal (R,): K for background, -1 for ignored."""
        classes = check_classes(target.gt_classes, self.num_classes)
        return matched_classes(classes, matched, label, self.num_classes)

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
