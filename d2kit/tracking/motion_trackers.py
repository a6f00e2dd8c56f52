"""ByteTrack, OC-SORT and BoT-SORT of the package `trackers`, behind the interface of this one."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

from d2kit.config import CfgNode, configurable
from d2kit.structures import Instances
from d2kit.tracking.base_tracker import TRACKER_HEADS_REGISTRY, BaseTracker
from d2kit.tracking.memory import canonical_order, with_state
from d2kit.utils.registry import nearest_names

__all__ = ["OCSORT", "BoTSORT", "ByteTrack", "MotionTracker"]


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
        **kwargs: Any,
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
