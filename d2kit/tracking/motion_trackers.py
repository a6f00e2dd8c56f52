"""The interface and registry of trackers, and trackers that foresee motion."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch

from d2kit.config import CfgNode, configurable
from d2kit.structures import BitMasks, Instances, pairwise_iou
from d2kit.utils.names import nearest_names
from d2kit.utils.registry import Registry

__all__ = [
    "OCSORT",
    "TRACKER_HEADS_REGISTRY",
    "BaseTracker",
    "BoTSORT",
    "ByteTrack",
    "MotionTracker",
    "build_tracker_head",
]


TRACKER_HEADS_REGISTRY = Registry("TRACKER_HEADS")
"""Trackers: called with ``(cfg)``, they return a `BaseTracker`."""


class BaseTracker:
    """What every tracker does: `update` is called with the detections of one frame after another.

    Args:
        **kwargs: ignored, so that a subclass may pass all that it was given.
    """

    @configurable
    def __init__(self, **kwargs: object) -> None:
        self._prev_instances: Instances | None = None
        self._id_count = 0

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Return the constructor's arguments.

        Raises:
            NotImplementedError: unless a subclass says what they are.
        """
        raise NotImplementedError(f"{cls.__name__} does not say how it is built from a config")

    def update(self, predictions: Instances) -> Instances:
        """Give the detections of the next frame their identities.

        Args:
            predictions: R detections of one frame.

        Returns:
            The same detections in the same order, with the field `ID`.

        Raises:
            NotImplementedError: unless a subclass does it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement update")


def build_tracker_head(cfg: CfgNode) -> BaseTracker:
    """Build the tracker that ``cfg.TRACKER_HEADS.TRACKER_NAME`` names.

    Args:
        cfg: the config.

    Returns:
        A new tracker, at the first frame of a video.

    Raises:
        KeyError: if there is no such tracker; the message lists the nearest names.
    """
    found: BaseTracker = TRACKER_HEADS_REGISTRY.get(cfg.TRACKER_HEADS.TRACKER_NAME)(cfg)
    return found


ASSOCIATIONS = ("box", "mask")


def check_association(association: str) -> str:
    """Return `association`, or raise a ValueError that names the choices."""
    if association not in ASSOCIATIONS:
        raise ValueError(
            f"TRACKER_HEADS.ASSOCIATION: expected one of {ASSOCIATIONS}, got {association!r}"
        )
    return association


def overlap(instances: Instances, previous: Instances, association: str) -> np.ndarray:
    """Return the IoU of every detection with every object of the previous frame.

    Args:
        instances: R detections with `pred_boxes`; for masks with `pred_masks`.
        previous: P objects with the same fields.
        association: "box" or "mask".

    Returns:
        (R, P) float64 in [0, 1].

    Raises:
        ValueError: for "mask" where the detections have none.
    """
    if len(instances) == 0 or len(previous) == 0:
        return np.zeros((len(instances), len(previous)))
    if association == "box":
        iou = pairwise_iou(instances.pred_boxes, previous.pred_boxes)
        return iou.detach().cpu().numpy().astype(np.float64)
    for side in (instances, previous):
        if not side.has("pred_masks"):
            raise ValueError(
                "TRACKER_HEADS.ASSOCIATION mask: the detections have no field 'pred_masks' "
                f"(they have {sorted(side.get_fields())}); use a model with masks, or "
                "TRACKER_HEADS.ASSOCIATION box"
            )
    return mask_iou(instances.pred_masks, previous.pred_masks)


def mask_iou(first: object, second: object) -> np.ndarray:
    """Return the pairwise IoU of masks.

    Args:
        first: (R, H, W) bool tensor or `BitMasks`, or a list of R RLE dicts.
        second: P masks, in the same form.

    Returns:
        (R, P) float64 in [0, 1]; 0 where both masks are empty.
    """
    if isinstance(first, list) and isinstance(second, list):
        from pycocotools import mask as mask_util

        return np.asarray(mask_util.iou(first, second, [0] * len(second)), np.float64)
    flat = [_bits(masks).flatten(1).to(torch.float32) for masks in (first, second)]
    common = flat[0] @ flat[1].T
    union = flat[0].sum(1)[:, None] + flat[1].sum(1)[None] - common
    return (common / union.clamp(min=1)).cpu().numpy().astype(np.float64)


def _bits(masks: object) -> torch.Tensor:
    tensor = masks.tensor if isinstance(masks, BitMasks) else masks
    if not isinstance(tensor, torch.Tensor) or tensor.dim() != 3:
        raise ValueError(
            "TRACKER_HEADS.ASSOCIATION mask: pred_masks must be full-size masks (R, H, W), "
            f"BitMasks or a list of run-length dicts, got {type(masks).__name__}"
        )
    return tensor.detach() > 0.5 if tensor.is_floating_point() else tensor.detach() != 0


def canonical_order(instances: Instances) -> np.ndarray:
    """Return an order of detections that depends on what they are, not on where they stand.

    Best score first, then class and box. Two detections that tie are equal in all of it.

    Args:
        instances: R detections with `pred_boxes`, optionally `scores` and `pred_classes`.

    Returns:
        (R,) int64 permutation.
    """
    keys = list(instances.pred_boxes.tensor.detach().cpu().numpy().T[::-1])
    if instances.has("pred_classes"):
        keys.append(instances.pred_classes.detach().cpu().numpy())
    if instances.has("scores"):
        keys.append(-instances.scores.detach().cpu().numpy())
    return np.lexsort(keys)


_STATE = ("ID", "ID_period", "lost_frame_count")


class OverlapTracker(BaseTracker):
    """Identities by overlap with the previous frame; subclasses choose the pairs.

    An object that is not found again is remembered where it was last seen, for some frames.

    Args:
        video_height: pixels; 0: that of each frame.
        video_width: pixels; 0: that of each frame.
        max_num_instances: most objects in memory, detected and lost ones together.
        max_lost_frame_count: frames for which a lost object is remembered.
        min_box_rel_dim: a lost object is remembered only if its box is at least this share of the
            video wide and high: small ones leave through the border.
        min_instance_period: a lost object is remembered only if it was seen in more frames.
        track_iou_threshold: least overlap of a pair that counts as good.
        association: "box" or "mask": what overlaps.
        min_match_iou: least overlap of a pair that is left over after the good ones; 0: any.
        **kwargs: ignored.

    Raises:
        ValueError: if a number is outside of its range.
    """

    @configurable
    def __init__(  # noqa: D417 - **kwargs
        self,
        video_height: int = 0,
        video_width: int = 0,
        max_num_instances: int = 200,
        max_lost_frame_count: int = 0,
        min_box_rel_dim: float = 0.02,
        min_instance_period: int = 1,
        track_iou_threshold: float = 0.5,
        association: str = "box",
        min_match_iou: float = 0.0,
        **kwargs: object,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 <= track_iou_threshold <= 1 or not 0 <= min_match_iou <= 1:
            raise ValueError(
                "TRACKER_HEADS.TRACK_IOU_THRESHOLD and MIN_MATCH_IOU must be in [0, 1], "
                f"got {track_iou_threshold} and {min_match_iou}"
            )
        if max_lost_frame_count < 0 or max_num_instances < 1:
            raise ValueError(
                "TRACKER_HEADS.MAX_LOST_FRAME_COUNT must be at least 0 and MAX_NUM_INSTANCES at "
                f"least 1, got {max_lost_frame_count} and {max_num_instances}"
            )
        self._video_height = video_height
        self._video_width = video_width
        self._max_num_instances = max_num_instances
        self._max_lost_frame_count = max_lost_frame_count
        self._min_box_rel_dim = min_box_rel_dim
        self._min_instance_period = min_instance_period
        self._track_iou_threshold = track_iou_threshold
        self._association = check_association(association)
        self._min_match_iou = min_match_iou
        self._reset_fields()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Return the constructor's arguments, from ``cfg.TRACKER_HEADS``.

        The keys that Detectron2 does not have may be missing: a config that was written for it
        works.
        """
        node = cfg.TRACKER_HEADS
        return {
            "video_height": node.VIDEO_HEIGHT,
            "video_width": node.VIDEO_WIDTH,
            "max_num_instances": node.get("MAX_NUM_INSTANCES", 200),
            "max_lost_frame_count": node.get("MAX_LOST_FRAME_COUNT", 0),
            "min_box_rel_dim": node.get("MIN_BOX_REL_DIM", 0.02),
            "min_instance_period": node.get("MIN_INSTANCE_PERIOD", 1),
            "track_iou_threshold": node.get("TRACK_IOU_THRESHOLD", 0.5),
            "association": node.get("ASSOCIATION", "box"),
            "min_match_iou": node.get("MIN_MATCH_IOU", 0.0),
        }

    def _pairs(self, instances: Instances, previous: Instances) -> list[tuple[int, int]]:
        """Choose (row of `instances`, row of `previous`) that are the same object."""
        raise NotImplementedError

    def update(self, instances: Instances) -> Instances:
        """Give the detections of the next frame their identities.

        Which detections belong together does not depend on their order: they are sorted by score,
        class and box before they are compared. New identities are numbered by falling score, equal
        scores in the order given.

        Args:
            instances: R detections with `pred_boxes`; `scores`, `pred_classes` and `pred_masks`
                where there are some. Not changed.

        Returns:
            The same detections in the same order, with `ID` (from 0), `ID_period` (frames in which
            the object was seen) and `lost_frame_count` (0), lists of int.
        """
        order = torch.from_numpy(canonical_order(instances))
        tracked = self._initialize_extra_fields(instances)
        self._reset_fields()
        previous = self._prev_instances
        pairs: list[tuple[int, int]] = []
        if previous is not None and len(tracked) and len(previous):
            pairs = self._pairs(tracked[order], previous)
        rows = np.array([int(order[row]) for row, _ in pairs], dtype=np.int64)
        columns = np.array([column for _, column in pairs], dtype=np.int64)
        tracked = self._process_matched_idx(tracked, rows, columns)
        tracked = self._process_unmatched_idx(tracked, rows)
        self._prev_instances = self._process_unmatched_prev_idx(tracked[order], columns)
        return tracked

    def _reset_fields(self) -> None:
        """Forget which rows and identities were matched in the frame before."""
        before = self._prev_instances
        self._matched_idx: set[int] = set()
        self._matched_ID: set[int] = set()
        self._untracked_prev_idx = set() if before is None else set(range(len(before)))

    def _initialize_extra_fields(self, instances: Instances) -> Instances:
        """Return a copy with `ID` (-1: none yet), `ID_period` and `lost_frame_count`."""
        count = len(instances)
        return with_state(instances, [-1] * count, [1] * count, [0] * count)

    def _process_matched_idx(
        self, instances: Instances, matched_idx: np.ndarray, matched_prev_idx: np.ndarray
    ) -> Instances:
        """Give matched detections the identity of their object of the frame before.

        Args:
            instances: those of this frame, see `_initialize_extra_fields`; changed in place.
            matched_idx: (M,) rows of it.
            matched_prev_idx: (M,) rows of the frame before.
        """
        previous: Any = self._prev_instances
        for row, column in zip(matched_idx.tolist(), matched_prev_idx.tolist(), strict=True):
            instances.ID[row] = previous.ID[column]
            instances.ID_period[row] = previous.ID_period[column] + 1
            instances.lost_frame_count[row] = 0
            self._matched_idx.add(row)
            self._matched_ID.add(previous.ID[column])
            self._untracked_prev_idx.discard(column)
        return instances

    def _process_unmatched_idx(self, instances: Instances, matched_idx: np.ndarray) -> Instances:
        """Number the detections that were not matched, best score first, in place.

        Args:
            instances: those of this frame.
            matched_idx: (M,) rows that have an identity.
        """
        matched = set(matched_idx.tolist())
        for row in _by_score(instances):
            if row not in matched:
                instances.ID[row] = self._id_count
                self._id_count += 1
        return instances

    def _process_unmatched_prev_idx(
        self, instances: Instances, matched_prev_idx: np.ndarray
    ) -> Instances:
        """Join this frame's objects and the lost ones still remembered.

        Args:
            instances: this frame's, in canonical order.
            matched_prev_idx: (M,) rows of the frame before that were found again.
        """
        previous, found = self._prev_instances, set(matched_prev_idx.tolist())
        if previous is None or len(previous) == 0:
            return instances
        height = self._video_height or instances.image_size[0]
        width = self._video_width or instances.image_size[1]
        sides = previous.pred_boxes.tensor[:, 2:] - previous.pred_boxes.tensor[:, :2]
        large = (
            ((sides / sides.new_tensor([width, height])) >= self._min_box_rel_dim).all(1).tolist()
        )
        lost = [
            row
            for row in range(len(previous))
            if row not in found
            and large[row]
            and previous.lost_frame_count[row] < self._max_lost_frame_count
            and previous.ID_period[row] > self._min_instance_period
        ]
        lost = lost[: max(0, self._max_num_instances - len(instances))]
        if not lost:
            return instances
        kept = previous[torch.tensor(lost)]
        kept.lost_frame_count = [n + 1 for n in kept.lost_frame_count]
        return _joined(instances, kept) if len(instances) else kept


def _by_score(instances: Instances) -> list[int]:
    """Return the rows by falling score; equal scores, or none, keep their order."""
    if not instances.has("scores"):
        return list(range(len(instances)))
    found: list[int] = np.argsort(-instances.scores.detach().cpu().numpy(), kind="stable").tolist()
    return found


def with_state(
    instances: Instances, ids: list[int], periods: list[int], lost: list[int]
) -> Instances:
    """Return a copy of the table of fields with the state of a tracker added."""
    fields = {k: v for k, v in instances.get_fields().items() if k not in _STATE}
    return Instances(
        instances.image_size, **fields, ID=ids, ID_period=periods, lost_frame_count=lost
    )


def _joined(first: Instances, second: Instances) -> Instances:
    """Concatenate what two frames have in common: the first may come with masks, the next not."""
    common = first.get_fields().keys() & second.get_fields().keys()
    sides = []
    for side in (first, second):
        fields = {k: v for k, v in side.get_fields().items() if k in common}
        sides.append(Instances(first.image_size, **fields))
    return Instances.cat(sides)


class MotionTracker(BaseTracker):
    """A tracker of the package `trackers`: overlap with where a motion model expects an object.

    Args:
        max_lost_frame_count: frames for which a lost object is remembered.
        min_instance_period: an object gets its identity when it was found again this often.
        params: other arguments of the package's class, by name; they win over the two above.
        **kwargs: ignored.

    Raises:
        ValueError: if `params` has a name that the package's class does not take.
    """

    algorithm = ""
    """Name of the class in the package."""
    uses_image = False
    """Whether `update` looks at the picture."""

    @configurable
    def __init__(  # noqa: D417 - **kwargs
        self,
        *,
        max_lost_frame_count: int = 30,
        min_instance_period: int = 1,
        params: dict[str, Any] | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__(**kwargs)
        import trackers

        made_by = getattr(trackers, self.algorithm)
        known = inspect.signature(made_by).parameters
        for name in params or {}:
            if name not in known:
                near = nearest_names(name, known) or sorted(known)
                raise ValueError(
                    f"TRACKER_HEADS.PARAMS: {type(self).__name__} has no '{name}' "
                    f"(nearest: {', '.join(near)})"
                )
        arguments = {
            "lost_track_buffer": max_lost_frame_count,
            "frame_rate": 30.0,  # at which the package counts the buffer in frames as they are
            "minimum_consecutive_frames": min_instance_period,
        }
        self._tracker = made_by(**{**arguments, **(params or {})})
        self._periods: dict[int, int] = {}

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Return the constructor's arguments, from ``cfg.TRACKER_HEADS``."""
        node = cfg.TRACKER_HEADS
        flat = list(node.get("PARAMS", []))
        if len(flat) % 2 or not all(isinstance(name, str) for name in flat[::2]):
            raise ValueError(
                f"TRACKER_HEADS.PARAMS: expected [name, value, name, value, ...], got {flat}"
            )
        return {
            "max_lost_frame_count": node.get("MAX_LOST_FRAME_COUNT", 30),
            "min_instance_period": node.get("MIN_INSTANCE_PERIOD", 1),
            "params": dict(zip(flat[::2], flat[1::2], strict=True)),
        }

    @classmethod
    def start_score(cls, params: dict[str, Any]) -> float:
        """Return the score that a detection needs to begin a track, with these arguments.

        The package's classes that have no threshold for it begin tracks with the sure detections.
        """
        import trackers

        known = inspect.signature(getattr(trackers, cls.algorithm)).parameters
        names = ("track_activation_threshold", "high_conf_det_threshold")
        name = next(name for name in names if name in known)
        return float(params.get(name, known[name].default))

    def update(self, instances: Instances, image: np.ndarray | None = None) -> Instances:
        """Give the detections of the next frame their identities.

        Args:
            instances: R detections with `pred_boxes`; `scores` and `pred_classes` where there are
                some. Not changed. Their order does not matter.
            image: (H, W, 3) uint8 BGR, for trackers with `uses_image`: the motion of the camera is
                taken out.

        Returns:
            The same detections in the same order, with `ID` (from 0; -1: none yet), `ID_period`
            (frames in which the object was seen) and `lost_frame_count` (0), lists of int.
        """
        import supervision

        order = canonical_order(instances)
        boxes = instances.pred_boxes.tensor.detach().cpu().numpy().astype(np.float64)
        scores = np.ones(len(order))
        if instances.has("scores"):
            scores = instances.scores.detach().cpu().numpy().astype(np.float64)
        given = supervision.Detections(
            xyxy=boxes[order], confidence=scores[order], data={"row": order}
        )
        frame = {"frame": image} if self.uses_image and image is not None else {}
        found = self._tracker.update(given, **frame)
        ids = [-1] * len(order)
        if len(found):
            for row, identity in zip(found.data["row"], found.tracker_id, strict=True):
                ids[int(row)] = int(identity)
        for identity in ids:
            if identity >= 0:
                self._periods[identity] = self._periods.get(identity, 0) + 1
        periods = [self._periods.get(identity, 0) for identity in ids]
        return with_state(instances, ids, periods, [0] * len(ids))


@TRACKER_HEADS_REGISTRY.register()
class ByteTrack(MotionTracker):
    """Sure detections first, then the unsure ones for objects that were left over.

    See `MotionTracker`.

    Source: Zhang et al. 2022, "ByteTrack: multi-object tracking by associating every detection
    box", section 3.
    """

    algorithm = "ByteTrackTracker"


@TRACKER_HEADS_REGISTRY.register()
class OCSORT(MotionTracker):
    """Momentum from observations instead of from the filter's estimates.

    See `MotionTracker`.

    Source: Cao et al. 2023, "Observation-centric SORT", section 4.
    """

    algorithm = "OCSORTTracker"


@TRACKER_HEADS_REGISTRY.register()
class BoTSORT(MotionTracker):
    """ByteTrack with the motion of the camera taken out.

    See `MotionTracker`; ``enable_cmc`` False in `params` for a camera that stands still.

    Source: Aharon et al. 2022, "BoT-SORT: robust associations multi-pedestrian tracking",
    section 3.
    """

    algorithm = "BoTSORTTracker"
    uses_image = True
