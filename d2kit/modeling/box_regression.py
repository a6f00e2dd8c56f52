"""Encoding of boxes relative to other boxes, the losses on it, and the matching of boxes.

Source: Girshick et al., R-CNN (2014), appendix C; Ma et al., Rotation Proposals (2018), equations
2 and 3; Tian et al., FCOS (2019), equation 1.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from d2kit.layers import (
    batched_nms,
    batched_nms_rotated,
    ciou_loss,
    diou_loss,
    giou_loss,
    nonzero_tuple,
)
from d2kit.structures import Boxes, RotatedBoxes, pairwise_iou, pairwise_iou_rotated
from d2kit.utils.devices import is_symbolic, upload

__all__ = [
    "Box2BoxTransform",
    "Box2BoxTransformLinear",
    "Box2BoxTransformRotated",
    "Matcher",
    "nonzero_tuple",
]


class Matcher:
    """Gives every prediction its best ground truth and a label by how good that match is.

    Args:
        thresholds: ascending, positive bounds between the labels, in units of the quality.
        labels: one more than `thresholds`; a best quality in [thresholds[i-1], thresholds[i]) gets
            `labels[i]`. 0 is background, 1 foreground, -1 ignored.
        allow_low_quality_matches: for every ground truth, also label its best predictions (ties
            included) foreground; each keeps its own best ground truth.

    Raises:
        ValueError: thresholds that do not ascend from above 0, a wrong number of labels, or a
            label other than -1, 0, 1.

    Source: Ren et al., Faster R-CNN (2015), section 3.1.2.
    """

    def __init__(
        self,
        thresholds: Sequence[float],
        labels: Sequence[int],
        allow_low_quality_matches: bool = False,
    ) -> None:
        bounds = [float(t) for t in thresholds]
        ascending = all(a <= b for a, b in zip(bounds[:-1], bounds[1:], strict=True))
        if not bounds or bounds[0] <= 0 or not ascending:
            raise ValueError(f"Matcher thresholds must ascend from above 0, got {bounds}.")
        if len(labels) != len(bounds) + 1 or any(label not in {-1, 0, 1} for label in labels):
            raise ValueError(
                f"Matcher labels must be {len(bounds) + 1} values out of -1, 0, 1 "
                f"(one more than the {len(bounds)} thresholds), got {list(labels)}."
            )
        self.thresholds = bounds
        self.labels = list(labels)
        self.allow_low_quality_matches = allow_low_quality_matches

    def __call__(self, match_quality_matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Match predictions to ground truths, without a host-device sync.

        Args:
            match_quality_matrix: float (G, A), >= 0; quality of prediction a for ground truth g.

        Returns:
            matches: int64 (A,), index in [0, G) of the best ground truth (0 where G is 0).
            match_labels: int8 (A,), label of each prediction.

        Raises:
            ValueError: the matrix has not two dimensions.
        """
        if match_quality_matrix.dim() != 2:
            raise ValueError(
                "Matcher takes a matrix (ground truths, predictions), got shape "
                f"{tuple(match_quality_matrix.shape)}."
            )
        count = match_quality_matrix.shape[1]
        device = match_quality_matrix.device
        match_labels = torch.full((count,), self.labels[0], dtype=torch.int8, device=device)
        if match_quality_matrix.numel() == 0:  # as if every quality was 0
            return torch.zeros(count, dtype=torch.int64, device=device), match_labels
        best, matches = match_quality_matrix.max(dim=0)
        for bound, label in zip(self.thresholds, self.labels[1:], strict=True):
            match_labels.masked_fill_(best >= bound, label)
        if self.allow_low_quality_matches:
            self.set_low_quality_matches_(match_labels, match_quality_matrix)
        return matches, match_labels

    def set_low_quality_matches_(self, match_labels: Tensor, match_quality_matrix: Tensor) -> None:
        """Label the best predictions of every ground truth foreground, in place.

        A ground truth that no prediction touches (quality 0 everywhere: a box without area) has
        no best prediction; otherwise every untouched prediction would become foreground.

        Args:
            match_labels: int8 (A,), changed in place.
            match_quality_matrix: float (G, A), >= 0, G at least 1.
        """
        best = match_quality_matrix.amax(dim=1, keepdim=True)
        is_best = (match_quality_matrix == best) & (best > 0)
        match_labels.masked_fill_(is_best.any(dim=0), 1)


def boxes_of(rows: Tensor) -> Boxes:
    """Wrap boxes (R, 4) XYXY or (R, 5) XYWHA."""
    return RotatedBoxes(rows) if rows.shape[-1] == 5 else Boxes(rows)


def overlaps(boxes1: Boxes, boxes2: Boxes) -> Tensor:
    """Return the IoU of each pair of boxes of one kind, (R1, R2)."""
    if isinstance(boxes1, RotatedBoxes) and isinstance(boxes2, RotatedBoxes):
        return pairwise_iou_rotated(boxes1, boxes2)
    if isinstance(boxes1, RotatedBoxes) or isinstance(boxes2, RotatedBoxes):
        raise ValueError(
            f"cannot match {type(boxes1).__name__} with {type(boxes2).__name__}: a rotated model "
            "(MODEL.PROPOSAL_GENERATOR.NAME RRPN, MODEL.ROI_HEADS.NAME RROIHeads) needs rotated "
            "ground truth (XYWHA), other models upright ones"
        )
    return pairwise_iou(boxes1, boxes2)


def suppress_by_group(boxes: Tensor, scores: Tensor, groups: Tensor, iou: float) -> Tensor:
    """Return the survivors of `batched_nms` or, for five numbers, `batched_nms_rotated`."""
    nms = batched_nms_rotated if boxes.shape[-1] == 5 else batched_nms
    return nms(boxes, scores, groups, iou)


def clip_to_images(boxes: Tensor, image_sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Clip the boxes of each image to it; rotated ones only where they are nearly upright.

    Args:
        boxes: (N, P, 4) XYXY or (N, P, 5) XYWHA, pixels.
        image_sizes: (height, width) of the N images.

    Returns:
        The same shape.
    """
    if boxes.shape[-1] == 4 and is_symbolic():
        inside = []
        for rows, size in zip(boxes.unbind(), image_sizes, strict=True):
            of_image = Boxes(rows)
            of_image.clip(size)
            inside.append(of_image.tensor)
        return torch.stack(inside)
    if boxes.shape[-1] == 4:
        limits = torch.tensor([(w, h, w, h) for h, w in image_sizes], dtype=boxes.dtype)
        return torch.minimum(boxes.clamp(min=0), upload(limits, boxes.device).unsqueeze(1))
    clipped = []
    for rows, size in zip(boxes, image_sizes, strict=True):
        wrapped = RotatedBoxes(rows)
        wrapped.clip(size)
        clipped.append(wrapped.tensor)
    return torch.stack(clipped)


def split_like(rows: Tensor, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Split `rows` (R, ...) of all images into those of each, as many as its part (R_i, ...)."""
    # `len` would make the numbers of one image constants of a trace
    return (rows,) if len(parts) == 1 else rows.split([part.shape[0] for part in parts])


def true_rows(mask: Tensor, count: int) -> Tensor:
    """Return where a mask (R,) is true, ascending, given how often that is; without a wait."""
    return mask.argsort(descending=True, stable=True)[:count]


def finite_rows(values: Tensor) -> Tensor:
    """Tell which rows (..., D) hold finite numbers only, (...,) bool; D at least 1.

    The largest magnitude is NaN or infinite where one number is: 3 kernels on CUDA, `isfinite` and
    `all` are 6. Exported graphs need not keep NaN in a maximum, and ask for each number.
    """
    if is_symbolic():
        return torch.isfinite(values).all(dim=-1)
    return values.abs().amax(dim=-1) < math.inf


def sides_of(boxes: Tensor) -> Tensor:
    """Return widths and heights (..., 2) of boxes (..., 4) XYXY or (..., 5) XYWHA."""
    return boxes[..., 2:4] - boxes[..., :2] if boxes.shape[-1] == 4 else boxes[..., 2:4]


def outlines_of(boxes: Tensor) -> Tensor:
    """Return upright boxes (R, 4) as they are, rotated ones (R, 5) as four corners (R, 8)."""
    if boxes.shape[-1] == 4:
        return boxes
    angle = boxes[:, 4] * (math.pi / 180)
    along = torch.stack([angle.cos(), -angle.sin()], dim=1) * boxes[:, 2:3] / 2
    down = torch.stack([angle.sin(), angle.cos()], dim=1) * boxes[:, 3:4] / 2
    centre = boxes[:, :2]
    corners = (centre - along - down, centre + along - down, centre + along + down)
    return torch.cat([*corners, centre - along + down], dim=1)


_MAX_PAIRS = 2**26
"""Largest IoU matrix held at once: 256 MiB in float32, or 250 ground truths at 800x1333."""


def match_boxes(
    matcher: Matcher, gt_boxes: Boxes, boxes: Boxes, max_pairs: int = _MAX_PAIRS
) -> tuple[Tensor, Tensor]:
    """Match `boxes` to `gt_boxes` by IoU, in parts where the whole matrix would be too large.

    Args:
        matcher: thresholds and labels.
        gt_boxes: G boxes.
        boxes: A boxes, rotated where these are.
        max_pairs: largest part of the (G, A) matrix to hold.

    Returns:
        Per box: index of the best ground truth (A,) int64, and its label (A,) int8.
    """
    rows = max(1, max_pairs // max(1, len(boxes)))
    if len(gt_boxes) <= rows:
        return matcher(overlaps(gt_boxes, boxes))
    best = torch.full((len(boxes),), -1.0, device=boxes.device)
    index = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    favourite = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    for start in range(0, len(gt_boxes), rows):
        iou = overlaps(gt_boxes[start : start + rows], boxes)
        value, row = iou.max(dim=0)
        better = value > best
        best = torch.where(better, value, best)
        index = torch.where(better, row + start, index)
        row_best = iou.amax(dim=1, keepdim=True)
        favourite |= ((iou == row_best) & (row_best > 0)).any(dim=0)
    by_threshold = copy.copy(matcher)
    by_threshold.allow_low_quality_matches = False
    labels = by_threshold(best.unsqueeze(0))[1]
    if matcher.allow_low_quality_matches:
        labels = labels.masked_fill(favourite, 1)
    return index, labels


def rows_or_zeros(values: Tensor, index: Tensor) -> Tensor:
    """Return `values` (G, ...) at the matches `index` (A,); zeros where G is 0."""
    if len(values) == 0:
        return values.new_zeros((len(index), *values.shape[1:]))
    return values[index]


def check_classes(gt_classes: Tensor, num_classes: int, where: str = "") -> None:
    """Make sure that ground truths have classes of the model.

    On CUDA the device itself looks, and stops the program at its next wait; on other devices
    nothing is checked. So check before the upload.

    Args:
        gt_classes: (G,) integers.
        num_classes: K.
        where: which image it is, for the message.

    Raises:
        ValueError: if a class is not in [0, K).
    """
    if gt_classes.is_cuda:
        known = ((gt_classes >= 0) & (gt_classes < num_classes)).all()
        torch._assert_async(known, f"a ground-truth class is not in 0..{num_classes - 1}")
    if len(gt_classes) == 0 or gt_classes.device.type != "cpu":
        return
    low, high = torch.stack(torch.aminmax(gt_classes)).tolist()
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"{f'{where}: ' if where else ''}ground-truth classes must be in 0..{num_classes - 1} "
            f"(NUM_CLASSES {num_classes} of the model's heads), got {low}..{high}"
        )


def matched_classes(gt_classes: Tensor, index: Tensor, label: Tensor, background: int) -> Tensor:
    """Return the class that each box is to be given.

    Args:
        gt_classes: (G,) int64.
        index: (A,) the match of each box, see `match_boxes`.
        label: (A,) its label, or whether it is positive.
        background: class of the boxes labelled 0, and of all where there is no ground truth.

    Returns:
        (A,) int64; -1 for boxes labelled -1.
    """
    if len(gt_classes) == 0:
        return torch.full_like(index, background)
    return gt_classes[index].masked_fill(label == 0, background).masked_fill(label == -1, -1)


# exp of a larger log-scale would blow a 16 pixel anchor up beyond a 1000 pixel image.
_DEFAULT_SCALE_CLAMP = math.log(1000.0 / 16)


def _per_axis(x: float, y: float, like: Tensor) -> float | Tensor:
    """One weight for both axes where they agree (no tensor, no copy to the device), else two."""
    return x if x == y else like.new_tensor((x, y))


def _centers_and_sizes(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """XYXY (..., 4) to centres (..., 2) and sizes (..., 2), in pixels."""
    sizes = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + 0.5 * sizes, sizes


def _per_class(deltas: Tensor, numbers: int) -> Tensor:
    """(..., K * numbers) to (..., K, numbers), each size given: ONNX infers none of no boxes."""
    return deltas.reshape(*deltas.shape[:-1], int(deltas.shape[-1]) // numbers, numbers)


class Box2BoxTransform:
    """Deltas (dx, dy, dw, dh): shift of the centre over the size, and log of the ratio of sizes.

    Args:
        weights: factors of dx, dy, dw, dh, to bring them to about unit variance.
        scale_clamp: upper bound of dw and dh (after division by the weight) when applied.
    """

    def __init__(
        self,
        weights: tuple[float, float, float, float],
        scale_clamp: float = _DEFAULT_SCALE_CLAMP,
    ) -> None:
        self.weights = weights
        self.scale_clamp = scale_clamp

    def get_deltas(self, src_boxes: Tensor, target_boxes: Tensor) -> Tensor:
        """Return the deltas that turn `src_boxes` into `target_boxes`.

        Args:
            src_boxes: float (..., R, 4), XYXY in pixels, with positive sizes.
            target_boxes: the same, broadcast against `src_boxes`.

        Returns:
            Float (..., R, 4): dx, dy, dw, dh times the weights.
        """
        wx, wy, ww, wh = self.weights
        src_centers, src_sizes = _centers_and_sizes(src_boxes)
        centers, sizes = _centers_and_sizes(target_boxes)
        shift = (centers - src_centers) / src_sizes * _per_axis(wx, wy, src_boxes)
        scale = torch.log(sizes / src_sizes) * _per_axis(ww, wh, src_boxes)
        return torch.cat((shift, scale), dim=-1)

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Move and scale `boxes` by `deltas`.

        Args:
            deltas: float (..., R, 4 * K): K quadruples for each box, K at least 1.
            boxes: (..., R, 4), XYXY in pixels, broadcast over leading dimensions.

        Returns:
            Float32 (or float64, as `deltas`) of the shape of `deltas`: XYXY in pixels.
        """
        deltas = deltas if deltas.dtype == torch.float64 else deltas.float()
        wx, wy, ww, wh = self.weights
        centers, sizes = _centers_and_sizes(boxes.to(deltas.dtype).unsqueeze(-2))
        by_class = _per_class(deltas, 4)
        shift = by_class[..., :2] / _per_axis(wx, wy, deltas)
        scale = (by_class[..., 2:] / _per_axis(ww, wh, deltas)).clamp(max=self.scale_clamp)
        new_centers = shift * sizes + centers
        half = torch.exp(scale) * (0.5 * sizes)
        return torch.cat((new_centers - half, new_centers + half), dim=-1).reshape(deltas.shape)


class Box2BoxTransformRotated:
    """Deltas (dx, dy, dw, dh, da): as `Box2BoxTransform`, and the difference of angles in radians.

    Args:
        weights: factors of dx, dy, dw, dh, da.
        scale_clamp: upper bound of dw and dh (after division by the weight) when applied.
    """

    def __init__(
        self,
        weights: tuple[float, float, float, float, float],
        scale_clamp: float = _DEFAULT_SCALE_CLAMP,
    ) -> None:
        self.weights = weights
        self.scale_clamp = scale_clamp

    def get_deltas(self, src_boxes: Tensor, target_boxes: Tensor) -> Tensor:
        """Return the deltas that turn `src_boxes` into `target_boxes`.

        Args:
            src_boxes: float (..., R, 5), XYWHA in pixels and degrees, with positive sizes.
            target_boxes: the same, broadcast against `src_boxes`.

        Returns:
            Float (..., R, 5): dx, dy, dw, dh, da times the weights.
        """
        wx, wy, ww, wh, wa = self.weights
        sizes = src_boxes[..., 2:4]
        offset = target_boxes[..., :2] - src_boxes[..., :2]
        shift = offset / sizes * _per_axis(wx, wy, src_boxes)
        scale = torch.log(target_boxes[..., 2:4] / sizes) * _per_axis(ww, wh, src_boxes)
        turn = _wrap_degrees(target_boxes[..., 4:] - src_boxes[..., 4:])
        return torch.cat((shift, scale, turn * (wa * math.pi / 180)), dim=-1)

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Move, scale and turn `boxes` by `deltas`.

        Args:
            deltas: float (..., R, 5 * K): K quintuples for each box, K at least 1.
            boxes: (..., R, 5), XYWHA in pixels and degrees, broadcast over leading dimensions.

        Returns:
            Float of the shape and type of `deltas`: XYWHA, angles in [-180, 180).
        """
        wx, wy, ww, wh, wa = self.weights
        base = boxes.to(deltas.dtype).unsqueeze(-2)
        by_class = _per_class(deltas, 5)
        shift = by_class[..., :2] / _per_axis(wx, wy, deltas)
        scale = (by_class[..., 2:4] / _per_axis(ww, wh, deltas)).clamp(max=self.scale_clamp)
        centers = shift * base[..., 2:4] + base[..., :2]
        sizes = torch.exp(scale) * base[..., 2:4]
        angles = _wrap_degrees(by_class[..., 4:] * (180 / (wa * math.pi)) + base[..., 4:])
        return torch.cat((centers, sizes, angles), dim=-1).reshape(deltas.shape)


def _wrap_degrees(angles: Tensor) -> Tensor:
    """Bring angles into [-180, 180)."""
    return (angles + 180.0) % 360.0 - 180.0


class Box2BoxTransformLinear:
    """Deltas (left, top, right, bottom): distances from the centre of the source to the sides.

    Args:
        normalize_by_size: express them in widths and heights of the source box, not in pixels.
    """

    def __init__(self, normalize_by_size: bool = True) -> None:
        self.normalize_by_size = normalize_by_size

    def get_deltas(self, src_boxes: Tensor, target_boxes: Tensor) -> Tensor:
        """Return the deltas that turn `src_boxes` into `target_boxes`.

        Args:
            src_boxes: float (..., R, 4), XYXY in pixels.
            target_boxes: the same, broadcast against `src_boxes`; valid targets hold the centre
                of their source, so that all deltas are positive.

        Returns:
            Float (..., R, 4): left, top, right, bottom.
        """
        centers, sizes = _centers_and_sizes(src_boxes)
        distances = (centers - target_boxes[..., :2], target_boxes[..., 2:] - centers)
        if self.normalize_by_size:
            distances = (distances[0] / sizes, distances[1] / sizes)
        return torch.cat(distances, dim=-1)

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Place the sides of a box around the centres of `boxes`.

        Args:
            deltas: float (..., R, 4 * K); negative ones count as 0, so that boxes are valid.
            boxes: (..., R, 4), XYXY in pixels, broadcast over leading dimensions.

        Returns:
            Float of the shape and type of `deltas`: XYXY in pixels.
        """
        centers, sizes = _centers_and_sizes(boxes.to(deltas.dtype).unsqueeze(-2))
        distances = _per_class(F.relu(deltas), 4)
        low, high = distances[..., :2], distances[..., 2:]
        if self.normalize_by_size:
            low, high = low * sizes, high * sizes
        return torch.cat((centers - low, centers + high), dim=-1).reshape(deltas.shape)


_IOU_LOSSES = {"giou": giou_loss, "diou": diou_loss, "ciou": ciou_loss}


def _dense_box_regression_loss(
    anchors: Sequence[Boxes | Tensor],
    box2box_transform: Box2BoxTransform | Box2BoxTransformLinear | Box2BoxTransformRotated,
    pred_anchor_deltas: Sequence[Tensor],
    gt_boxes: Sequence[Tensor],
    fg_mask: Tensor,
    box_reg_loss_type: str = "smooth_l1",
    smooth_l1_beta: float = 0.0,
) -> Tensor:
    """Sum the box losses of all foreground anchors, without a host-device sync.

    Every anchor is computed and the background masked: selecting the foreground would make shapes
    depend on data.

    Args:
        anchors: for each level the anchors, (A_l, 4) XYXY (5 for rotated).
        box2box_transform: how deltas encode boxes.
        pred_anchor_deltas: for each level (N, A_l, 4).
        gt_boxes: for each image (A, 4) XYXY, the ground truth matched to every anchor; A is the
            sum of A_l.
        fg_mask: bool (N, A).
        box_reg_loss_type: "smooth_l1" (on deltas), or "giou", "diou", "ciou" (on boxes).
        smooth_l1_beta: where smooth L1 turns from quadratic to linear; 0 is plain L1.

    Returns:
        Scalar loss, a sum; divide it by a count.

    Raises:
        ValueError: an unknown `box_reg_loss_type`.
    """
    all_anchors = torch.cat([a if isinstance(a, Tensor) else a.tensor for a in anchors])
    predicted = torch.cat(list(pred_anchor_deltas), dim=1)
    targets = torch.stack(list(gt_boxes))
    fg = fg_mask.unsqueeze(-1)
    if box_reg_loss_type == "smooth_l1":
        # A background target may be infinite; its own prediction has loss and gradient 0.
        deltas = box2box_transform.get_deltas(all_anchors, targets)
        deltas = torch.where(fg, deltas, predicted.detach())
        return F.smooth_l1_loss(predicted, deltas, reduction="sum", beta=smooth_l1_beta)
    if box_reg_loss_type not in _IOU_LOSSES:
        raise ValueError(
            f"unknown box regression loss {box_reg_loss_type!r} (MODEL.*.BBOX_REG_LOSS_TYPE); "
            f"choose from {['smooth_l1', *_IOU_LOSSES]}."
        )
    # A background box is its own anchor: finite loss, whose gradient the mask then stops.
    boxes = box2box_transform.apply_deltas(predicted, all_anchors)
    boxes = torch.where(fg, boxes, all_anchors)
    targets = torch.where(fg, targets, all_anchors)
    losses = _IOU_LOSSES[box_reg_loss_type](boxes, targets, reduction="none")
    return torch.where(fg_mask, losses, 0.0).sum()
