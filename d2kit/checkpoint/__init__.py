"""Saving and loading of weights and training state."""

from fvcore.common.checkpoint import Checkpointer, PeriodicCheckpointer

from d2kit.checkpoint._recorded import recorded_config
from d2kit.checkpoint.detection_checkpoint import DetectionCheckpointer

__all__ = ["Checkpointer", "DetectionCheckpointer", "PeriodicCheckpointer", "recorded_config"]
