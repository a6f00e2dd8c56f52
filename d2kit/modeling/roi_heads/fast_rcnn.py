"""Box predictor of the second stage: class scores, box deltas, their losses, and detections.

Source: Fast R-CNN (Girshick 2015), section 2.3.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2kit.config import CfgNode, configurable
from d2kit.layers import ShapeSpec
from d2kit.layers.blocks import normal_fill
from d2kit.layers.losses import weighted, weights_per_loss
from d2kit.layers.wrappers import region_shape
from d2kit.modeling.box_regression import (
    Box2BoxTransform,
    _dense_box_regression_loss,
    finite_rows,
    split_like,
)
from d2kit.modeling.proposal_generator.proposal_utils import (
    boxes_of_class,
    fast_rcnn_inference,
    fast_rcnn_inference_single_image,
    padded_detections,
    suppress,
)
from d2kit.structures import Instances
from d2kit.utils import comm
from d2kit.utils.devices import shapes_are_fixed
from d2kit.utils.events import put_scalars
from d2kit.utils.registry import class_weights

__all__ = [
    "FastRCNNOutputLayers",
    "fast_rcnn_inference",
    "fast_rcnn_inference_single_image",
]


BALANCED = "balanced"


def region_count(of_regions: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the number of regions, the mean over processes, at least 1.

    Args:
        of_regions: (R, ...), of all images of this process; with `weights` (R,) int64, classes.
        weights: (K+1,) a region of class c counts as ``weights[c]``; None: as 1. The sum is then
            bounded from below by a tiny number only.
    """
    if weights is not None:
        return comm.mean_over_ranks(weights[of_regions].sum()).clamp(min=1e-6)
    count = torch.full((), float(len(of_regions)), device=of_regions.device)
    return comm.mean_over_ranks(count).clamp(min=1)


def full_class_weights(weights: Sequence[float] | str, num_classes: int) -> Tensor:
    """Return the weight of each class and of the background in the classification loss.

    Args:
        weights: K numbers, the background has 1; or K+1, the background's last.
        num_classes: K.

    Returns:
        (K+1,) float32.

    Raises:
        ValueError: if they are not K or K+1 finite numbers of at least 0, or all 0.
    """
    numbers = [] if isinstance(weights, str) else [float(weight) for weight in weights]
    if len(numbers) == num_classes:
        numbers.append(1.0)
    found = torch.tensor(numbers)
    fine = torch.isfinite(found).all() and (found >= 0).all() and (found > 0).any()
    if len(found) != num_classes + 1 or not fine:
        raise ValueError(
            f"MODEL.ROI_HEADS.CLASS_WEIGHTS needs one weight of at least 0 for each of the "
            f"{num_classes} classes (MODEL.ROI_HEADS.NUM_CLASSES), and may have one more, for the "
            f"background; got {weights!r}"
        )
    return found


def loss_weights(weights: Tensor | str | None) -> Tensor | None:
    """Return the weights that a loss may use.

    Raises:
        ValueError: if nobody has put numbers in the place of "balanced".
    """
    if isinstance(weights, str):
        raise ValueError(
            f"MODEL.ROI_HEADS.CLASS_WEIGHTS '{weights}' is computed from the training set by "
            "DefaultTrainer alone; in a training loop of your own write one weight per class into "
            "the config before build_model: (number of all objects) / (number of classes x number "
            "of objects of the class)"
        )
    return weights


def federated_weights(
    get_weights: Callable[[], Tensor] | None, num_classes: int, use_sigmoid_ce: bool
) -> Tensor:
    """Return the drawing weight of each class (K,) for the federated loss.

    Args:
        get_weights: returns them.
        num_classes: K.
        use_sigmoid_ce: whether classes are scored independently, which the loss needs.

    Raises:
        ValueError: if one of these is missing, or the weights are not K.
    """
    if not use_sigmoid_ce or get_weights is None:
        raise ValueError(
            "the federated loss (MODEL.ROI_BOX_HEAD.USE_FED_LOSS) needs "
            "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE True and the class frequencies: pass "
            "get_fed_loss_cls_weights, a function that returns one weight per class, to "
            f"FastRCNNOutputLayers; got use_sigmoid_ce={use_sigmoid_ce}, "
            f"get_fed_loss_cls_weights={get_weights}"
        )
    weights = get_weights()
    if len(weights) != num_classes:
        raise ValueError(
            f"the federated loss needs one weight per class, {num_classes} "
            f"(MODEL.ROI_HEADS.NUM_CLASSES), got {len(weights)}"
        )
    return weights


def draw_federated_classes(
    gt_classes: Tensor, num_fed_loss_classes: int, num_classes: int, weight: Tensor
) -> Tensor:
    """See `FastRCNNOutputLayers.get_fed_loss_classes`."""
    present: Tensor = torch.unique(gt_classes)
    waiting = weight.float().clone()
    waiting[present[present < num_classes]] = 0
    candidates = waiting.nonzero().flatten()
    places = min(num_fed_loss_classes - len(present), len(candidates))
    if places <= 0:
        return present
    drawn = torch.multinomial(waiting[candidates], places, replacement=False)
    return torch.cat([present, candidates[drawn]])


def _log_classification_stats(
    pred_logits: Tensor, gt_classes: Tensor, prefix: str = "fast_rcnn"
) -> None:
    """Publish accuracy, accuracy on foreground, and the share of foreground called background.

    The two shares of the foreground are 0 where there is none.

    Args:
        pred_logits: (R, K+1), background last.
        gt_classes: (R,) int64.
        prefix: first part of the names.
    """
    if gt_classes.numel() == 0:
        return
    background = pred_logits.shape[1] - 1
    predicted = pred_logits.detach().argmax(dim=1)
    right = predicted == gt_classes
    foreground = (gt_classes >= 0) & (gt_classes < background)
    count = foreground.sum().clamp(min=1)
    put_scalars(
        prefix,
        cls_accuracy=right.float().mean(),
        fg_cls_accuracy=(right & foreground).sum() / count,
        false_negative=((predicted == background) & foreground).sum() / count,
    )


Predictions = tuple[Tensor, Tensor]
"""Class logits (R, K+1) and box deltas (R, K*4) or (R, 4), R over all images in order."""


class FastRCNNOutputLayers(nn.Module):
    """Two linear layers, for K+1 class scores and for 4 box deltas per class.

    Args:
        input_shape: of one region's features; they are flattened.
        box2box_transform: proposals + deltas <-> boxes.
        num_classes: K, foreground classes.
        test_score_thresh: detections need a higher score.
        test_nms_thresh: IoU.
        test_topk_per_image: detections per image.
        cls_agnostic_bbox_reg: one box per region instead of one per class.
        smooth_l1_beta: where L1 begins; 0 is plain L1.
        box_reg_loss_type: ``smooth_l1``, ``giou``, ``diou`` or ``ciou``.
        loss_weight: one factor, or one per loss (``loss_cls``, ``loss_box_reg``).
        use_fed_loss: score only the classes present and some drawn ones (needs `use_sigmoid_ce`).
        use_sigmoid_ce: independent sigmoids instead of a softmax.
        get_fed_loss_cls_weights: returns the drawing weight of each class (K,).
        fed_loss_num_classes: classes scored by the federated loss.
        test_min_size: detections with a shorter side, clipped to the image, go before suppression;
            pixels.
        class_weights: K or K+1 numbers: what a region of each class (background last, else 1)
            counts in the classification loss; None: all 1. "balanced": numbers that are not known
            yet, for inference only.

    Raises:
        ValueError: if `use_fed_loss` comes without `use_sigmoid_ce` or one weight per class, or
            `class_weights` are others.

    Source: Fast R-CNN (Girshick 2015); the federated loss: Probabilistic two-stage detection
    (Zhou et al. 2021), section 5, "LVIS".
    """

    fed_loss_cls_weights: Tensor

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        box2box_transform: Box2BoxTransform,
        num_classes: int,
        test_score_thresh: float = 0.0,
        test_nms_thresh: float = 0.5,
        test_topk_per_image: int = 100,
        cls_agnostic_bbox_reg: bool = False,
        smooth_l1_beta: float = 0.0,
        box_reg_loss_type: str = "smooth_l1",
        loss_weight: float | dict[str, float] = 1.0,
        use_fed_loss: bool = False,
        use_sigmoid_ce: bool = False,
        get_fed_loss_cls_weights: Callable[[], Tensor] | None = None,
        fed_loss_num_classes: int = 50,
        test_min_size: float = 0.0,
        class_weights: Sequence[float] | str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(input_shape, int):
            input_shape = ShapeSpec(channels=input_shape)
        self.num_classes = num_classes
        self.box2box_transform = box2box_transform
        self.smooth_l1_beta = smooth_l1_beta
        self.test_score_thresh = test_score_thresh
        self.test_nms_thresh = test_nms_thresh
        self.test_topk_per_image = test_topk_per_image
        self.test_min_size = test_min_size
        self.box_reg_loss_type = box_reg_loss_type
        self.loss_weight = weights_per_loss(loss_weight, ("loss_cls", "loss_box_reg"))
        self.use_fed_loss = use_fed_loss
        self.use_sigmoid_ce = use_sigmoid_ce
        self.fed_loss_num_classes = fed_loss_num_classes

        size = math.prod(region_shape(input_shape, "FastRCNNOutputLayers"))
        box_dim = len(box2box_transform.weights)
        boxes = 1 if cls_agnostic_bbox_reg else num_classes
        self.cls_score = nn.Linear(size, num_classes + 1)
        self.bbox_pred = nn.Linear(size, boxes * box_dim)
        # Independent sigmoids start at a probability of 1 % (Lin et al. 2017, RetinaNet, 4.1).
        start = -math.log(99.0) if use_sigmoid_ce else 0.0
        normal_fill(self.cls_score, std=0.01, bias=start)
        normal_fill(self.bbox_pred, std=0.001)
        if use_fed_loss:
            weights = federated_weights(get_fed_loss_cls_weights, num_classes, use_sigmoid_ce)
            self.register_buffer("fed_loss_cls_weights", weights)
        self.class_weights: Tensor | str | None
        if class_weights and class_weights != BALANCED:
            weights = full_class_weights(class_weights, num_classes)
            self.register_buffer("class_weights", weights, persistent=False)
        else:
            self.class_weights = BALANCED if class_weights else None

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg` and one region's feature shape."""
        head, roi_heads = cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_HEADS
        return {
            "input_shape": input_shape,
            "box2box_transform": Box2BoxTransform(weights=head.BBOX_REG_WEIGHTS),
            "num_classes": roi_heads.NUM_CLASSES,
            "cls_agnostic_bbox_reg": head.CLS_AGNOSTIC_BBOX_REG,
            "smooth_l1_beta": head.SMOOTH_L1_BETA,
            "test_score_thresh": roi_heads.SCORE_THRESH_TEST,
            "test_nms_thresh": roi_heads.NMS_THRESH_TEST,
            "test_topk_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "box_reg_loss_type": head.BBOX_REG_LOSS_TYPE,
            "loss_weight": {"loss_box_reg": head.BBOX_REG_LOSS_WEIGHT},
            "use_fed_loss": head.USE_FED_LOSS,
            "use_sigmoid_ce": head.USE_SIGMOID_CE,
            "get_fed_loss_cls_weights": functools.partial(
                class_weights, cfg.DATASETS.TRAIN, head.FED_LOSS_FREQ_WEIGHT_POWER
            ),
            "fed_loss_num_classes": head.FED_LOSS_NUM_CLASSES,
            "test_min_size": roi_heads.MIN_SIZE_TEST,
            "class_weights": roi_heads.CLASS_WEIGHTS,
        }

    def forward(self, x: Tensor) -> Predictions:
        """Predict logits (R, K+1) and deltas (R, K*4 or 4) from features (R, ...)."""
        x = x.flatten(1) if x.dim() > 2 else x
        return self.cls_score(x), self.bbox_pred(x)

    def losses(self, predictions: Predictions, proposals: list[Instances]) -> dict[str, Tensor]:
        """Compute the losses over the sampled proposals.

        Args:
            predictions: see `forward`.
            proposals: per image, with `gt_classes` (K is background), `proposal_boxes` and, where
                the image has ground truths, `gt_boxes`.

        Returns:
            ``loss_cls`` and ``loss_box_reg``, weighted. With `class_weights` w, ``loss_cls`` is
            sum(w[c] * loss) / sum(w[c]) over the regions, c their classes, of all processes.

        Source: Fast R-CNN, equation 1.
        """
        logits, deltas = predictions
        if not proposals:  # a batch of no images: zeros that keep the head in the graph
            return {"loss_cls": logits.sum() * 0, "loss_box_reg": deltas.sum() * 0}
        classes, sources, targets = [], [], []
        for p in proposals:
            classes.append(p.gt_classes)
            sources.append(p.proposal_boxes.tensor)
            # without ground truths all is background, whose targets are not looked at
            targets.append(p.gt_boxes.tensor if p.has("gt_boxes") else sources[-1])
        gt_classes = torch.cat(classes)
        _log_classification_stats(logits, gt_classes)
        classify = self.sigmoid_cross_entropy_loss if self.use_sigmoid_ce else self._softmax_loss
        return weighted(
            self.loss_weight,
            loss_cls=classify(logits, gt_classes),
            loss_box_reg=self.box_reg_loss(
                torch.cat(sources), torch.cat(targets), deltas, gt_classes
            ),
        )

    def _softmax_loss(self, logits: Tensor, gt_classes: Tensor) -> Tensor:
        """Return the mean cross-entropy over regions, of (R, K+1) logits and (R,) classes."""
        weights = loss_weights(self.class_weights)
        total = F.cross_entropy(logits.float(), gt_classes, weight=weights, reduction="sum")
        return total / region_count(gt_classes, weights)

    def get_fed_loss_classes(
        self, gt_classes: Tensor, num_fed_loss_classes: int, num_classes: int, weight: Tensor
    ) -> Tensor:
        """Return the classes present, filled up with drawn ones.

        Args:
            gt_classes: (R,) int64, background K.
            num_fed_loss_classes: how many classes to reach.
            num_classes: K.
            weight: (K,) drawing weights.

        Returns:
            Distinct classes, int64; background may be among them.

        Source: Zhou et al. (2021), section 5.
        """
        return draw_federated_classes(gt_classes, num_fed_loss_classes, num_classes, weight)

    def sigmoid_cross_entropy_loss(self, pred_class_logits: Tensor, gt_classes: Tensor) -> Tensor:
        """Sum over classes, mean over regions, of the binary cross-entropy of each class.

        With `class_weights` the mean is weighted by the region's own class: all its K binary losses
        count as that.

        Args:
            pred_class_logits: (R, K+1); the last column is not used.
            gt_classes: (R,) int64, background K.

        Returns:
            0-dim loss.
        """
        logits = pred_class_logits[:, :-1]
        columns = torch.arange(logits.shape[1], device=logits.device)
        weights = loss_weights(self.class_weights)
        scored = None if weights is None else weights[gt_classes, None]
        if self.use_fed_loss:
            drawn = self.get_fed_loss_classes(
                gt_classes, self.fed_loss_num_classes, len(columns), self.fed_loss_cls_weights
            )
            own = torch.isin(columns, drawn).to(logits.dtype)
            scored = own if scored is None else own * scored
        truth = (gt_classes[:, None] == columns).to(logits.dtype)  # background: a row of zeros
        total = F.binary_cross_entropy_with_logits(logits, truth, weight=scored, reduction="sum")
        return total / region_count(gt_classes, weights)

    def box_reg_loss(
        self, proposal_boxes: Tensor, gt_boxes: Tensor, pred_deltas: Tensor, gt_classes: Tensor
    ) -> Tensor:
        """Sum over foreground regions of the box loss of their class, by the number of all regions.

        Dividing by all sampled regions gives each foreground region the same weight, however many
        there are.

        Args:
            proposal_boxes: (R, 4).
            gt_boxes: (R, 4).
            pred_deltas: (R, K*4) or (R, 4).
            gt_classes: (R,) int64.

        Returns:
            0-dim loss.
        """
        foreground = (gt_classes >= 0) & (gt_classes < self.num_classes)
        rows = foreground.nonzero().flatten()
        sources, targets = proposal_boxes[rows], gt_boxes[rows]
        own = boxes_of_class(pred_deltas, rows, gt_classes[rows], sources.shape[1])
        total = _dense_box_regression_loss(
            [sources],
            self.box2box_transform,
            [own[None]],
            [targets],
            foreground[rows][None],
            self.box_reg_loss_type,
            self.smooth_l1_beta,
        )
        return total / region_count(gt_classes)

    def inference(
        self, predictions: Predictions, proposals: list[Instances]
    ) -> tuple[list[Instances], list[Tensor]]:
        """Turn predictions into detections.

        Only boxes of a (region, class) pair above the score threshold are decoded: a few hundred
        instead of R*K. A subclass that redefines `predict_boxes` is obeyed.

        Args:
            predictions: see `forward`.
            proposals: per image, with `proposal_boxes`.

        Returns:
            See `fast_rcnn_inference`.
        """
        probs = self.predict_probs(predictions, proposals)
        shapes = [p.image_size for p in proposals]
        if shapes_are_fixed():
            return self._padded_detections(predictions[1], torch.stack(probs), proposals), []
        if type(self).predict_boxes is not FastRCNNOutputLayers.predict_boxes:
            return fast_rcnn_inference(
                self.predict_boxes(predictions, proposals),
                probs,
                shapes,
                self.test_score_thresh,
                self.test_nms_thresh,
                self.test_topk_per_image,
                min_size=self.test_min_size,
            )
        sources_of = [p.proposal_boxes.tensor for p in proposals]
        instances, kept = [], []
        for p, prob, deltas in zip(
            proposals, probs, split_like(predictions[1], sources_of), strict=True
        ):
            rows, classes = (prob[:, :-1] > self.test_score_thresh).nonzero(as_tuple=True)
            scores = prob[rows, classes]
            sources = p.proposal_boxes.tensor[rows]
            chosen = boxes_of_class(deltas, rows, classes, sources.shape[1])
            boxes = self.box2box_transform.apply_deltas(chosen, sources)
            finite = finite_rows(boxes).nonzero().squeeze(1)
            result, index = suppress(
                boxes[finite],
                scores[finite],
                classes[finite],
                rows[finite],
                p.image_size,
                nms_thresh=self.test_nms_thresh,
                topk=self.test_topk_per_image,
                min_size=self.test_min_size,
            )
            instances.append(result)
            kept.append(index)
        return instances, kept

    def _padded_detections(
        self, deltas: Tensor, probs: Tensor, proposals: list[Instances]
    ) -> list[Instances]:
        """Detect among as many proposals of each image, see `padded_detections`."""
        logits = torch.stack([p.objectness_logits for p in proposals])
        return padded_detections(
            torch.stack([p.proposal_boxes.tensor for p in proposals]),
            logits > -math.inf,
            deltas.view(*logits.shape, -1),
            probs,
            [p.image_size for p in proposals],
            self.box2box_transform,
            score_thresh=self.test_score_thresh,
            nms_thresh=self.test_nms_thresh,
            topk=self.test_topk_per_image,
            min_size=self.test_min_size,
        )

    def predict_boxes(
        self, predictions: Predictions, proposals: list[Instances]
    ) -> tuple[Tensor, ...]:
        """Decode all boxes.

        Args:
            predictions: see `forward`.
            proposals: per image, with `proposal_boxes`.

        Returns:
            Per image (R, K*4) or (R, 4), XYXY pixels, not clipped.
        """
        if not proposals:
            return ()
        sources = [p.proposal_boxes.tensor for p in proposals]
        boxes = self.box2box_transform.apply_deltas(predictions[1], torch.cat(sources))
        return split_like(boxes, sources)

    def predict_boxes_for_gt_classes(
        self, predictions: Predictions, proposals: list[Instances]
    ) -> tuple[Tensor, ...]:
        """Decode the box of each region's ground-truth class.

        Args:
            predictions: see `forward`.
            proposals: per image, with `proposal_boxes` and `gt_classes`.

        Returns:
            Per image (R, 4); for background regions the box of the last class.
        """
        decoded = self.predict_boxes(predictions, proposals)
        return tuple(
            boxes_of_class(
                boxes,
                torch.arange(len(boxes), device=boxes.device),
                p.gt_classes,
                p.proposal_boxes.tensor.shape[1],
            )
            for boxes, p in zip(decoded, proposals, strict=True)
        )

    def predict_probs(
        self, predictions: Predictions, proposals: Sequence[Instances]
    ) -> tuple[Tensor, ...]:
        """Turn logits into probabilities.

        Args:
            predictions: see `forward`.
            proposals: per image; only their number counts.

        Returns:
            Per image (R, K+1).
        """
        scores = predictions[0].float()
        probs = scores.sigmoid() if self.use_sigmoid_ce else scores.softmax(dim=1)
        return split_like(probs, [p.proposal_boxes.tensor for p in proposals])
