"""From class scores and boxes to detections: threshold, suppression, best of the image."""

from collections.abc import Sequence

import torch
from torch import Tensor

from d2kit.modeling.boxes import boxes_of, sides_of, suppress_by_group
from d2kit.structures import Instances
from d2kit.utils.tracing import is_symbolic


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
    finite = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores).all(dim=1)
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
    by_class = values.unflatten(1, (-1, box_dim))
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
