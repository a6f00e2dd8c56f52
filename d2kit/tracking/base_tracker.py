"""Registry and interface of trackers."""

from __future__ import annotations

from typing import Any

from d2kit.config import CfgNode, configurable
from d2kit.structures import Instances
from d2kit.utils.registry import Registry

__all__ = ["TRACKER_HEADS_REGISTRY", "BaseTracker", "build_tracker_head"]

TRACKER_HEADS_REGISTRY = Registry("TRACKER_HEADS")
"""Trackers: called with ``(cfg)``, they return a `BaseTracker`."""


class BaseTracker:
    """What every tracker does: `update` is called with the detections of one frame after another.

    Args:
        **kwargs: ignored, so that a subclass may pass all that it was given.
    """

    @configurable
    def __init__(self, **kwargs: Any) -> None:
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
    return TRACKER_HEADS_REGISTRY.get(cfg.TRACKER_HEADS.TRACKER_NAME)(cfg)
