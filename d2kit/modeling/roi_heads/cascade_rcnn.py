"""Cascade heads: several box heads in a row, each trained on the boxes of the one before.

Source: Cascade R-CNN (Cai and Vasconcelos 2018).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from d2kit.config import CfgNode, configurable
from d2kit.layers import ShapeSpec
from d2kit.modeling._metrics import put_scalars
from d2kit.modeling.matcher import Matcher
from d2kit.modeling.poolers import ROIPooler
from d2kit.modeling.proposal_generator._matching import match_boxes
from d2kit.modeling.roi_heads._base import ROI_HEADS_REGISTRY
from d2kit.modeling.roi_heads._build import build_cascade_branch
from d2kit.modeling.roi_heads._selection import check_targets
from d2kit.modeling.roi_heads._standard import StandardROIHeads
from d2kit.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from d2kit.structures import Boxes, ImageList, Instances
from d2kit.utils.events import get_event_storage, has_event_storage

__all__ = ["CascadeROIHeads"]


class _ScaleGradient(torch.autograd.Function):
    """Identity, whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, scale: float) -> Tensor:  # type: ignore[override]
        ctx.scale = scale
        return input.view_as(input)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad_output * ctx.scale, None


@contextmanager
def _metrics_of(stage: int) -> Iterator[None]:
    """Put ``stage<k>/`` before the names of training statistics."""
    if not has_event_storage():
        yield
        return
    with get_event_storage().name_scope(f"stage{stage}"):
        yield


@ROI_HEADS_REGISTRY.register()
class CascadeROIHeads(StandardROIHeads):
    """Box heads in a row: each refines the boxes of the one before, at a stricter IoU.

    Masks and keypoints are those of `StandardROIHeads`: trained on the sampled proposals of the
    first stage, predicted for the boxes of the last.

    Args:
        box_in_features: names of the levels that all stages pool from.
        box_pooler: levels and boxes -> (R, C, H, W).
        box_heads: one per stage, pooled features -> one vector per region.
        box_predictors: one per stage, see `FastRCNNOutputLayers`; their boxes must not depend on
            the class.
        proposal_matchers: one per stage. The first one labels the proposals, which are then
            sampled; the others label all boxes of the stage before.
        **kwargs: see `StandardROIHeads`.

    Raises:
        ValueError: if there is no stage, or the numbers of heads, predictors and matchers differ.

    Source: Cai and Vasconcelos 2018, sections 4.1 and 4.2 and figure 3 (d).
    """

    box_head: Any

    @configurable
    def __init__(
        self,
        *,
        box_in_features: list[str],
        box_pooler: ROIPooler,
        box_heads: Sequence[nn.Module],
        box_predictors: Sequence[nn.Module],
        proposal_matchers: Sequence[Matcher],
        **kwargs: Any,
    ) -> None:
        counts = (len(box_heads), len(box_predictors), len(proposal_matchers))
        if len(set(counts)) != 1 or 0 in counts:
            raise ValueError(
                "CascadeROIHeads needs as many heads as predictors and matchers, at least one of "
                f"each, got {counts[0]}, {counts[1]} and {counts[2]}"
            )
        if kwargs.get("train_on_pred_boxes"):
            raise ValueError(
                "CascadeROIHeads trains masks and keypoints on the sampled proposals: set "
                "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES False"
            )
        super().__init__(
            box_in_features=box_in_features,
            box_pooler=box_pooler,
            box_head=nn.ModuleList(box_heads),
            box_predictor=nn.ModuleList(box_predictors),
            proposal_matcher=proposal_matchers[0],
            **kwargs,
        )
        self.num_cascade_stages = len(box_heads)
        self.proposal_matchers = list(proposal_matchers)

    @classmethod
    def from_config(  # type: ignore[override]
        cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]
    ) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg` and the backbone's output shapes."""
        arguments = super().from_config(cfg, input_shape)
        del arguments["proposal_matcher"]
        return arguments

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Return the box branch's arguments; user classes override it."""
        return build_cascade_branch(cfg, input_shape)

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """See `ROIHeads.forward`; the losses of the boxes are ``loss_*_stage<k>``."""
        del images
        if not self.training:
            detections = self._forward_box(features, proposals)
            return self.forward_with_given_boxes(features, detections), {}
        targets = check_targets(targets, type(self).__name__)
        proposals = self.label_and_sample_proposals(proposals, targets)
        losses = self._forward_box(features, proposals, targets)
        losses.update(self._forward_mask(features, proposals))
        losses.update(self._forward_keypoint(features, proposals))
        return proposals, losses

    def _forward_box(
        self,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> Any:
        """Return the box losses of all stages in training, else the detections of each image."""
        losses: dict[str, Tensor] = {}
        probabilities: list[Sequence[Tensor]] = []
        boxes: Sequence[Tensor] = ()
        for stage, predictor in enumerate(self.box_predictor):
            if stage > 0:
                proposals = self._refined(boxes, proposals)
                if targets is not None:
                    proposals = self._label(stage, proposals, targets)
            predictions = self._run_stage(stage, features, proposals)
            boxes = predictor.predict_boxes(predictions, proposals)
            if targets is not None:
                with _metrics_of(stage):
                    own = predictor.losses(predictions, proposals)
                losses.update({f"{name}_stage{stage}": value for name, value in own.items()})
            else:
                probabilities.append(predictor.predict_probs(predictions, proposals))
        if targets is not None:
            return losses
        # No box was dropped on the way, so that row i is one object at all stages.
        scores = [torch.stack(stages).mean(dim=0) for stages in zip(*probabilities, strict=True)]
        return fast_rcnn_inference(
            boxes,
            scores,
            [p.image_size for p in proposals],
            predictor.test_score_thresh,
            predictor.test_nms_thresh,
            predictor.test_topk_per_image,
            min_size=predictor.test_min_size,
        )[0]

    def _run_stage(
        self, stage: int, features: dict[str, Tensor], proposals: list[Instances]
    ) -> Any:
        """Return the predictions of one stage for all proposals."""
        levels = [features[name] for name in self.box_in_features]
        pooled = self.box_pooler(levels, [p.proposal_boxes for p in proposals])
        if self.training:  # the stages together pull at the features as one head would
            pooled = _ScaleGradient.apply(pooled, 1.0 / self.num_cascade_stages)
        return self.box_predictor[stage](self.box_head[stage](pooled))

    def _refined(self, boxes: Sequence[Tensor], proposals: list[Instances]) -> list[Instances]:
        """Return the boxes that a stage has predicted as the proposals of the next.

        They are clipped to the image and pass no gradient; empty ones are dropped in training.
        """
        refined = []
        for box, proposal in zip(boxes, proposals, strict=True):
            clipped = Boxes(box.detach())
            clipped.clip(proposal.image_size)
            if self.training:
                clipped = clipped[clipped.nonempty()]
            refined.append(Instances(proposal.image_size, proposal_boxes=clipped))
        return refined

    @torch.no_grad()
    def _label(
        self, stage: int, proposals: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        """Set classes and matched ground truths of all proposals of a stage, without sampling."""
        foreground, total = torch.zeros((), device=proposals[0].proposal_boxes.device), 0
        for proposal, target in zip(proposals, targets, strict=True):
            matched, label = match_boxes(
                self.proposal_matchers[stage], target.gt_boxes, proposal.proposal_boxes
            )
            proposal.gt_classes = self._classes_of(matched, label, target)
            if len(target) > 0:
                proposal.gt_boxes = target.gt_boxes[matched]
            foreground += (label == 1).sum()
            total += len(label)
        count = len(proposals)
        put_scalars(
            f"stage{stage}/roi_head",
            num_fg_samples=foreground / count,
            num_bg_samples=(total - foreground) / count,
        )
        return proposals
