"""Training metrics: put by anyone into the current `EventStorage`, written by the writers."""

from d2kit.utils.event_storage import (
    CommonMetricPrinter,
    EventStorage,
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
    get_event_storage,
    has_event_storage,
)
from d2kit.utils.remote_writers import MLflowWriter, WandbWriter

__all__ = [
    "CommonMetricPrinter",
    "EventStorage",
    "EventWriter",
    "JSONWriter",
    "MLflowWriter",
    "TensorboardXWriter",
    "WandbWriter",
    "get_event_storage",
    "has_event_storage",
]
