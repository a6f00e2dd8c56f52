"""Saving and loading of weights and training state."""

from fvcore.common.checkpoint import Checkpointer, PeriodicCheckpointer

from d2kit.checkpoint.detection_checkpoint import DetectionCheckpointer
from d2kit.checkpoint.files import recorded_config

__all__ = ["Checkpointer", "DetectionCheckpointer", "PeriodicCheckpointer", "recorded_config"]
