"""Cascade heads: several box heads in a row, each trained on the boxes of the one before.

Source: Cascade R-CNN (Cai and Vasconcelos 2018).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from d2kit.config import CfgNode, configurable
from d2kit.layers import ShapeSpec
from d2kit.modeling.box_regression import Matcher, match_boxes, rows_or_zeros
from d2kit.modeling.poolers import ROIPooler
from d2kit.modeling.roi_heads.build import build_cascade_branch
from d2kit.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from d2kit.modeling.roi_heads.roi_heads import ROI_HEADS_REGISTRY, StandardROIHeads
from d2kit.modeling.sampling import check_targets
from d2kit.structures import Boxes, Instances
from d2kit.utils.events import get_event_storage, has_event_storage, put_scalars

__all__ = ["CascadeROIHeads"]


class _ScaleGradient(torch.autograd.Function):
    """Leave a tensor as it is, and multiply its gradient by a number (under a name users know)."""

    @staticmethod
    def forward(values: Tensor, factor: float) -> Tensor:  # type: ignore[override]
        del factor
        return values.view_as(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        del output
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.factor * gradient, None


class _Stage(NamedTuple):
    """What one stage was given and what it makes of it."""

    number: int
    predictor: Any
    predictions: Any
    proposals: list[Instances]
    boxes: Sequence[Tensor]


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
        **kwargs: object,
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

    def _box_losses(
        self, features: dict[str, Tensor], sampled: list[Instances], targets: list[Instances]
    ) -> dict[str, Tensor]:
        """Return the box losses of all stages, ``loss_*_stage<k>``."""
        found: dict[str, Tensor] = self._forward_box(features, sampled, targets)
        return found

    def _forward_box(
        self,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> Any:
        """Return the box losses of all stages in training, else the detections of each image."""
        levels = [features[name] for name in self.box_in_features]
        sizes = [p.image_size for p in proposals]
        stages: list[_Stage] = []
        for number in range(len(self.box_head)):
            if stages:
                proposals = self._create_proposals_from_boxes(stages[-1].boxes, sizes)
                if self.training:
                    truths = check_targets(targets, type(self).__name__)
                    proposals = self._match_and_label_boxes(proposals, number, truths)
            predictions = self._run_stage(levels, proposals, number)
            predictor: Any = self.box_predictor[number]
            boxes = predictor.predict_boxes(predictions, proposals)
            stages.append(_Stage(number, predictor, predictions, proposals, boxes))
        return self._summed(stages) if self.training else self._scored(stages)

    def _run_stage(self, features: list[Tensor], proposals: list[Instances], stage: int) -> Any:
        """Return what the predictor of a stage gives for its proposals; user classes override it.

        Args:
            features: per level (N, C, Hi, Wi).
            proposals: per image, with `proposal_boxes`.
            stage: from 0.
        """
        pooled = self.box_pooler(features, [p.proposal_boxes for p in proposals])
        if self.training:  # the stages together pull at the features as one would
            pooled = _ScaleGradient.apply(pooled, 1 / self.num_cascade_stages)
        return self.box_predictor[stage](self.box_head[stage](pooled))

    def _summed(self, stages: list[_Stage]) -> dict[str, Tensor]:
        """Return the losses of all stages."""
        losses: dict[str, Tensor] = {}
        for stage in stages:
            with _metrics_of(stage.number):
                own = stage.predictor.losses(stage.predictions, stage.proposals)
            losses |= {f"{name}_stage{stage.number}": loss for name, loss in own.items()}
        return losses

    def _scored(self, stages: list[_Stage]) -> list[Instances]:
        """Return the boxes of the last stage with the mean scores of all."""
        # No box is dropped on the way, so that row i is one object at all stages.
        probabilities = [s.predictor.predict_probs(s.predictions, s.proposals) for s in stages]
        last = stages[-1]
        return fast_rcnn_inference(
            last.boxes,
            [torch.stack(of_image).mean(dim=0) for of_image in zip(*probabilities, strict=True)],
            [p.image_size for p in last.proposals],
            last.predictor.test_score_thresh,
            last.predictor.test_nms_thresh,
            last.predictor.test_topk_per_image,
            min_size=last.predictor.test_min_size,
        )[0]

    def _create_proposals_from_boxes(
        self, boxes: Sequence[Tensor], image_sizes: Sequence[tuple[int, int]]
    ) -> list[Instances]:
        """Return the boxes that a stage has predicted as the proposals of the next.

        They are clipped to the image and pass no gradient; empty ones are dropped in training.

        Args:
            boxes: per image (R, 4) XYXY pixels.
            image_sizes: (height, width) per image.
        """
        refined = []
        for box, image_size in zip(boxes, image_sizes, strict=True):
            clipped = Boxes(box.detach())
            clipped.clip(image_size)
            if self.training:
                clipped = clipped[clipped.nonempty()]
            refined.append(Instances(image_size, proposal_boxes=clipped))
        return refined

    @torch.no_grad()
    def _match_and_label_boxes(
        self, proposals: list[Instances], stage: int, targets: list[Instances]
    ) -> list[Instances]:
        """Give all proposals of a stage a class and a ground-truth box, in place; none is drawn.

        Args:
            proposals: per image, with `proposal_boxes`.
            stage: from 0.
            targets: per image, with `gt_boxes` and `gt_classes`.

        Returns:
            The proposals.
        """
        matcher = self.proposal_matchers[stage]
        labels = []
        for proposal, target in zip(proposals, targets, strict=True):
            index, label = match_boxes(matcher, target.gt_boxes, proposal.proposal_boxes)
            proposal.gt_classes = self._classes_of(index, label, target.gt_classes)
            proposal.gt_boxes = type(target.gt_boxes)(rows_or_zeros(target.gt_boxes.tensor, index))
            labels.append(label)
        positive = torch.cat(labels) == 1
        put_scalars(
            f"stage{stage}/roi_head",
            num_fg_samples=positive.sum() / len(proposals),
            num_bg_samples=(~positive).sum() / len(proposals),
        )
        return proposals
