"""From scored boxes to a short list of proposals per image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from d2kit.layers.nms import keep_masks
from d2kit.modeling.box_regression import (
    boxes_of,
    clip_to_images,
    finite_rows,
    sides_of,
    suppress_by_group,
    true_rows,
)
from d2kit.structures import Boxes, Instances
from d2kit.utils.devices import is_symbolic, note_exactness, smallest

__all__ = [
    "add_ground_truth_to_proposals",
    "add_ground_truth_to_proposals_single_image",
    "find_top_rpn_proposals",
]


_GROUND_TRUTH_LOGIT = math.log(1e10)
"""Objectness of a ground truth among the proposals: the logit of 1 - 1e-10."""


def find_top_rpn_proposals(
    proposals: list[Tensor],
    pred_objectness_logits: list[Tensor],
    image_sizes: list[tuple[int, int]],
    nms_thresh: float,
    pre_nms_topk: int,
    post_nms_topk: int,
    min_box_size: float,
    training: bool,
) -> list[Instances]:
    """Keep the best boxes of each level, suppress overlaps level by level, and keep the best.

    Args:
        proposals: per level, boxes (N, Hi*Wi*A, 4), XYXY pixels.
        pred_objectness_logits: per level, scores (N, Hi*Wi*A).
        image_sizes: (height, width) of each image; boxes are clipped to them.
        nms_thresh: IoU above which the weaker of two boxes of one level goes.
        pre_nms_topk: boxes kept per level and image before suppression.
        post_nms_topk: boxes kept per image after it.
        min_box_size: boxes with a side not longer than this (pixels) are dropped.
        training: whether a non-finite box or score is an error (else it is dropped).

    Returns:
        One `Instances` per image with `proposal_boxes` and `objectness_logits`, best first.

    Raises:
        FloatingPointError: if `training` and a box or score is NaN or infinite.

    Source: Faster R-CNN (Ren et al. 2015), section 3.3; per level: FPN (Lin et al. 2017), 4.1.
    """
    scores, boxes, levels = [], [], []
    for level, (level_boxes, logits) in enumerate(
        zip(proposals, pred_objectness_logits, strict=True)
    ):
        top, index = top_of_level(logits, pre_nms_topk)
        scores.append(top)
        numbers = level_boxes.shape[-1]
        boxes.append(level_boxes.gather(1, index.unsqueeze(-1).expand(-1, -1, numbers)))
        levels.append(torch.full_like(index[0], level))
    return suppress_and_trim(
        torch.cat(boxes, dim=1),
        torch.cat(scores, dim=1),
        torch.cat(levels),
        image_sizes,
        nms_thresh=nms_thresh,
        post_nms_topk=post_nms_topk,
        min_box_size=min_box_size,
        training=training,
    )


def top_of_level(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the `k` highest of `logits` (N, A) per image, descending, and where they are."""
    return logits.topk(smallest(int(k), logits.shape[1]), dim=1)


def suppress_and_trim(
    boxes: Tensor,
    scores: Tensor,
    levels: Tensor,
    image_sizes: Sequence[tuple[int, int]],
    *,
    nms_thresh: float,
    post_nms_topk: int,
    min_box_size: float,
    training: bool,
) -> list[Instances]:
    """Clip, filter and suppress the chosen boxes of each image.

    Args:
        boxes: (N, P, 4) XYXY pixels, or (N, P, 5) XYWHA.
        scores: (N, P).
        levels: (P,) int64, the feature level of each column.
        image_sizes: see `find_top_rpn_proposals`, as the other arguments.
        nms_thresh: IoU.
        post_nms_topk: boxes kept per image.
        min_box_size: pixels.
        training: see there.

    Returns:
        One `Instances` per image.
    """
    boxes, scores = boxes.float(), scores.float()
    finite = finite_rows(torch.cat([boxes, scores.unsqueeze(-1)], dim=-1))
    clipped = clip_to_images(boxes, image_sizes)
    usable = finite & (sides_of(clipped) > min_box_size).all(dim=-1)
    if is_symbolic():
        return _survivors(
            clipped,
            scores,
            levels,
            [usable[i].nonzero().squeeze(1) for i in range(len(image_sizes))],
            image_sizes,
            (nms_thresh, post_nms_topk),
        )
    numbers = usable.sum(dim=1)
    if training:  # one wait for the numbers of all images and for the check
        numbers = torch.cat([numbers, (~finite).sum().reshape(1)])
    counts = numbers.tolist()
    wrong = counts.pop() if training else 0
    if wrong:
        what = "box regression" if bool(torch.isfinite(scores).all()) else "objectness"
        raise FloatingPointError(
            f"the RPN's {what} output is NaN or infinite in {wrong} of "
            f"{finite.numel()} proposals: training has diverged; lower SOLVER.BASE_LR, lengthen "
            "SOLVER.WARMUP_ITERS or enable SOLVER.CLIP_GRADIENTS"
        )
    chosen = [true_rows(rows, count) for rows, count in zip(usable, counts, strict=True)]
    return _survivors(clipped, scores, levels, chosen, image_sizes, (nms_thresh, post_nms_topk))


def suppress_and_pad(
    boxes: Tensor,
    scores: Tensor,
    counts: Sequence[int],
    image_sizes: Sequence[tuple[int, int]],
    *,
    nms_thresh: float,
    post_nms_topk: int,
    min_box_size: float,
) -> list[Instances]:
    """Do what `suppress_and_trim` does, at inference, with as many boxes of each image.

    Args:
        boxes: (N, P, 4) XYXY pixels, level after level, in each the best first.
        scores: (N, P).
        counts: boxes of each level, P in total.
        image_sizes: see `suppress_and_trim`, as the other arguments.
        nms_thresh: IoU.
        post_nms_topk: boxes of each image.
        min_box_size: pixels.

    Returns:
        One `Instances` per image; rows behind its last box have zeros and the objectness -inf.
    """
    boxes, scores = boxes.float(), scores.float()
    clipped = _clipped_by_numbers(boxes, image_sizes)
    usable = finite_rows(boxes) & finite_rows(scores.unsqueeze(-1))
    usable &= (sides_of(clipped) > min_box_size).all(dim=-1)
    lacking = [max(counts) - count for count in counts]
    by_level = zip(clipped.split(list(counts), dim=1), lacking, strict=True)
    grouped = torch.stack([F.pad(x, (0, 0, 0, n)) for x, n in by_level], dim=1)
    valid_by_level = zip(usable.split(list(counts), dim=1), lacking, strict=True)
    valid = torch.stack([F.pad(x, (0, n)) for x, n in valid_by_level], dim=1)
    keep, final = keep_masks(grouped.flatten(0, 1), valid.flatten(0, 1), nms_thresh)
    note_exactness(final.all())
    of_level = keep.view(valid.shape).unbind(dim=1)
    keep = torch.cat([x[:, :n] for x, n in zip(of_level, counts, strict=True)], dim=1)
    best, order = _best_kept(keep, scores, post_nms_topk)
    chosen = clipped.gather(1, order.unsqueeze(-1).expand(-1, -1, 4))
    chosen = torch.where(best.unsqueeze(-1) > -math.inf, chosen, 0.0)
    return [
        Instances(size, proposal_boxes=Boxes(box), objectness_logits=score)
        for size, box, score in zip(image_sizes, chosen, best, strict=True)
    ]


def _clipped_by_numbers(boxes: Tensor, image_sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Do what `clip_to_images` does, without a tensor of limits that would have to be uploaded."""
    inside = []
    for rows, size in zip(boxes.unbind(), image_sizes, strict=True):
        of_image = Boxes(rows)
        of_image.clip(size)
        inside.append(of_image.tensor)
    return torch.stack(inside)


def _best_kept(keep: Tensor, scores: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return the scores of the best `most` kept boxes (N, P), -inf behind them, and their places.

    Boxes of one score stay in order, as in a suppression that returns indices.
    """
    ranked = torch.where(keep, scores, -math.inf).sort(dim=1, descending=True, stable=True)
    return ranked.values[:, :most], ranked.indices[:, :most]


def padded_detections(
    boxes: Tensor,
    valid: Tensor,
    deltas: Tensor,
    probs: Tensor,
    image_sizes: Sequence[tuple[int, int]],
    transform: Any,
    *,
    score_thresh: float,
    nms_thresh: float,
    topk: int,
    min_size: float = 0.0,
) -> list[Instances]:
    """Do what `fast_rcnn_inference` does, with as many detections of each image.

    The best 10 * `topk` pairs of region and class are looked at; where that is not enough, the
    result is noted as not exact.

    Args:
        boxes: (N, R, 4) XYXY pixels.
        valid: (N, R) bool, which of them are regions.
        deltas: (N, R, K*4 or 4).
        probs: (N, R, K+1), background last.
        image_sizes: (height, width) per image.
        transform: deltas and boxes -> boxes.
        score_thresh: see there, as the others.
        nms_thresh: IoU.
        topk: detections of each image.
        min_size: pixels.

    Returns:
        One `Instances` per image; rows behind its last detection have zeros and the score -inf.
    """
    scores = probs[..., :-1]
    wanted = (scores > score_thresh) & valid.unsqueeze(-1)
    looked_at = min(10 * topk, wanted[0].numel())
    values, index = _best_kept(wanted.flatten(1), scores.flatten(1), looked_at)
    rows, classes = index // scores.shape[2], index % scores.shape[2]
    by_class = deltas.unflatten(2, (-1, 4))
    place = rows * by_class.shape[2] + classes.clamp(max=by_class.shape[2] - 1)
    own = by_class.flatten(1, 2).gather(1, place.unsqueeze(-1).expand(-1, -1, 4))
    sources = boxes.gather(1, rows.unsqueeze(-1).expand(-1, -1, 4))
    decoded = transform.apply_deltas(own.flatten(0, 1), sources.flatten(0, 1)).view_as(sources)
    clipped = _clipped_by_numbers(decoded, image_sizes)
    usable = (values > -math.inf) & finite_rows(decoded)
    if min_size > 0:
        usable &= (sides_of(clipped) >= min_size).all(dim=-1)
    keep, final = keep_masks(clipped, usable, nms_thresh, groups=classes)
    enough = (keep.sum(dim=1) >= topk) | (wanted.flatten(1).sum(dim=1) <= looked_at)
    note_exactness((final & enough).all())
    best, order = _best_kept(keep, values, topk)
    chosen = clipped.gather(1, order.unsqueeze(-1).expand(-1, -1, 4))
    chosen = torch.where(best.unsqueeze(-1) > -math.inf, chosen, 0.0)
    parts = zip(image_sizes, chosen, best, classes.gather(1, order), strict=True)
    return [
        Instances(size, pred_boxes=Boxes(box), scores=score, pred_classes=kind)
        for size, box, score, kind in parts
    ]


def _survivors(
    boxes: Tensor,
    scores: Tensor,
    levels: Tensor,
    rows: Sequence[Tensor],
    image_sizes: Sequence[tuple[int, int]],
    limits: tuple[float, int],
) -> list[Instances]:
    """Suppress overlaps among the chosen boxes of each image, level by level, and keep the best.

    Args:
        boxes: see `suppress_and_trim`, as the others.
        scores: (N, P).
        levels: (P,).
        rows: per image, the columns to look at.
        image_sizes: (height, width).
        limits: IoU, and boxes kept per image.
    """
    nms_thresh, post_nms_topk = limits
    results = []
    for i, (chosen, image_size) in enumerate(zip(rows, image_sizes, strict=True)):
        image_boxes, image_scores = boxes[i, chosen], scores[i, chosen]
        keep = suppress_by_group(image_boxes, image_scores, levels[chosen], nms_thresh)
        keep = keep[:post_nms_topk]
        result = Instances(image_size)
        result.proposal_boxes = boxes_of(image_boxes[keep])
        result.objectness_logits = image_scores[keep]
        results.append(result)
    return results


def add_ground_truth_to_proposals(
    gt: Sequence[Instances | Boxes], proposals: list[Instances]
) -> list[Instances]:
    """Append each image's ground-truth boxes to its proposals: positives from the first step on.

    Args:
        gt: per image, `Instances` with `gt_boxes`, or the boxes themselves.
        proposals: per image, with `proposal_boxes` and, where known, `objectness_logits`.

    Returns:
        New `Instances`, the ground truths last.

    Raises:
        ValueError: if the two lists are not of one length.

    Source: the second stage's view of Faster R-CNN (Ren et al. 2015), section 3.2.
    """
    if len(gt) != len(proposals):
        raise ValueError(
            f"expected one ground truth per image, got {len(gt)} ground truths "
            f"for the proposals of {len(proposals)} images"
        )
    return [
        add_ground_truth_to_proposals_single_image(one_gt, one)
        for one_gt, one in zip(gt, proposals, strict=True)
    ]


def add_ground_truth_to_proposals_single_image(
    gt: Instances | Boxes, proposals: Instances
) -> Instances:
    """Append the ground-truth boxes of one image to its proposals.

    Args:
        gt: `Instances` with `gt_boxes` (and every other field that `proposals` has), or boxes.
        proposals: with `proposal_boxes` and, where known, `objectness_logits`.

    Returns:
        New `Instances`, the ground truths last, with an objectness of almost 1.

    Raises:
        ValueError: if `proposals` has a field that the ground truth cannot fill.
    """
    boxes = gt.gt_boxes if isinstance(gt, Instances) else gt
    extra = Instances(proposals.image_size, proposal_boxes=boxes)
    for name, value in proposals.get_fields().items():
        if name == "objectness_logits":
            extra.set(name, value.new_full((len(boxes),), _GROUND_TRUTH_LOGIT))
        elif name != "proposal_boxes":
            if not (isinstance(gt, Instances) and gt.has(name)):
                raise ValueError(
                    f"proposals have the field '{name}', which the ground truth lacks, so they "
                    "cannot be joined: add it to the ground truth or set "
                    "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT False"
                )
            extra.set(name, gt.get(name))
    return Instances.cat([proposals, extra])


def fast_rcnn_inference(
    boxes: Sequence[Tensor],
    scores: Sequence[Tensor],
    image_shapes: Sequence[tuple[int, int]],
    score_thresh: float,
    nms_thresh: float,
    topk_per_image: int,
    *,
    box_dim: int = 4,
    min_size: float = 0.0,
) -> tuple[list[Instances], list[Tensor]]:
    """Turn the decoded boxes and scores of each image into detections.

    Args:
        boxes: per image (R, K*4), or (R, 4) where boxes do not depend on the class; XYXY pixels.
        scores: per image (R, K+1), probabilities, background last.
        image_shapes: (height, width) per image.
        score_thresh: only scores above it count.
        nms_thresh: IoU above which the weaker of two detections of one class goes.
        topk_per_image: detections kept per image.
        box_dim: numbers per box: 4, or 5 for rotated boxes (XYWHA).
        min_size: boxes with a shorter side inside the image go, pixels.

    Returns:
        Per image: `Instances` with `pred_boxes`, `scores`, `pred_classes`, best first; and the row
        of `boxes` (int64) from which each came.

    Source: Fast R-CNN (Girshick 2015), section 3; Detectron's per-image limit.
    """
    results = [
        fast_rcnn_inference_single_image(
            b,
            s,
            shape,
            score_thresh,
            nms_thresh,
            topk_per_image,
            box_dim=box_dim,
            min_size=min_size,
        )
        for b, s, shape in zip(boxes, scores, image_shapes, strict=True)
    ]
    return [r[0] for r in results], [r[1] for r in results]


def fast_rcnn_inference_single_image(
    boxes: Tensor,
    scores: Tensor,
    image_shape: tuple[int, int],
    score_thresh: float,
    nms_thresh: float,
    topk_per_image: int,
    *,
    box_dim: int = 4,
    min_size: float = 0.0,
) -> tuple[Instances, Tensor]:
    """Do what `fast_rcnn_inference` does, for one image.

    Args:
        boxes: (R, K*4) or (R, 4), XYXY pixels.
        scores: (R, K+1).
        image_shape: (height, width).
        score_thresh: see there, as the others.
        nms_thresh: IoU.
        topk_per_image: count.
        box_dim: see there.
        min_size: pixels.

    Returns:
        Detections, and the row of `boxes` from which each came.
    """
    finite = finite_rows(boxes) & finite_rows(scores)
    rows, classes = ((scores[:, :-1] > score_thresh) & finite.unsqueeze(1)).nonzero(as_tuple=True)
    chosen = boxes_of_class(boxes, rows, classes, box_dim)
    return suppress(
        chosen,
        scores[rows, classes],
        classes,
        rows,
        image_shape,
        nms_thresh=nms_thresh,
        topk=topk_per_image,
        min_size=min_size,
    )


def boxes_of_class(values: Tensor, rows: Tensor, classes: Tensor, box_dim: int) -> Tensor:
    """Pick the box, or the deltas, that regions have for a class.

    Args:
        values: (R, K * box_dim), or (R, box_dim) where the class makes no difference.
        rows: (P,) int64, regions.
        classes: (P,) int64; K (background) and above count as K - 1.
        box_dim: 4, or 5 for rotated boxes.

    Returns:
        (P, box_dim).
    """
    by_class = values.reshape(-1, int(values.shape[1]) // box_dim, box_dim)
    return by_class[rows, classes.clamp(0, by_class.shape[1] - 1)]


def suppress(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    rows: Tensor,
    image_shape: tuple[int, int],
    *,
    nms_thresh: float,
    topk: int,
    min_size: float = 0.0,
) -> tuple[Instances, Tensor]:
    """Clip the candidates of one image, suppress overlaps within each class, and keep the best.

    Args:
        boxes: (Q, 4) XYXY pixels, or (Q, 5) XYWHA.
        scores: (Q,).
        classes: (Q,) int64.
        rows: (Q,) int64, where each came from.
        image_shape: (height, width).
        nms_thresh: IoU.
        topk: detections kept; negative: all.
        min_size: candidates with a shorter side inside the image go, pixels.

    Returns:
        Detections, best first; and their `rows`.
    """
    clipped = boxes_of(boxes)
    clipped.clip(image_shape)
    if min_size > 0:
        large = (sides_of(clipped.tensor) >= min_size).all(dim=1).nonzero().squeeze(1)
        clipped, scores = clipped[large], scores[large]
        classes, rows = classes[large], rows[large]
    keep = _best_survivors(clipped.tensor, scores, classes, nms_thresh, topk)
    result = Instances(image_shape)
    result.pred_boxes = clipped[keep]
    result.scores = scores[keep]
    result.pred_classes = classes[keep]
    return result, rows[keep]


def _best_survivors(
    boxes: Tensor, scores: Tensor, classes: Tensor, nms_thresh: float, topk: int
) -> Tensor:
    """Return the first `topk` of `batched_nms`, looking at the best candidates first.

    Greedy suppression goes from the best candidate down, so that those below never change the
    fate of those above: where the best ones leave `topk` survivors, these are the answer. With a
    score threshold of 0 there are R*K candidates: 10 ms instead of 320 for 80,000 on one core.
    """
    if topk < 0:
        return suppress_by_group(boxes, scores, classes, nms_thresh)
    if is_symbolic():  # the number of rounds would be that of one image
        return suppress_by_group(boxes, scores, classes, nms_thresh)[:topk]
    prefix = 10 * topk
    if prefix < len(scores):
        order = scores.argsort(descending=True, stable=True)
        while prefix < len(scores):
            best = order[:prefix]
            keep = suppress_by_group(boxes[best], scores[best], classes[best], nms_thresh)
            if len(keep) >= topk:
                return best[keep[:topk]]
            prefix *= 4
    return suppress_by_group(boxes, scores, classes, nms_thresh)[:topk]
