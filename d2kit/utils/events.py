"""Training metrics: put by anyone into the current `EventStorage`, written by the writers."""

from d2kit.utils._event_storage import EventStorage, get_event_storage, has_event_storage
from d2kit.utils._event_writers import (
    CommonMetricPrinter,
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
)
from d2kit.utils._remote_writers import MLflowWriter, WandbWriter

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
