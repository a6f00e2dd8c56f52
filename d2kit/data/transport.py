"""What workers send to the training: an error where that cannot be sent, instead of a wait.

A worker's queue pickles in a thread of its own; where that fails, Python prints a traceback and
goes on, and the training waits for ever. Here the queue sends the reason in place of the batch.
"""

import errno
import multiprocessing
import multiprocessing.context
import multiprocessing.queues
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch.multiprocessing
from torch._utils import ExceptionWrapper

from d2kit.data.common import describe_record
from d2kit.utils.text import one_line

__all__ = ["CANNOT_SEND", "SHARED_MEMORY", "cause_of", "telling_context"]

CANNOT_SEND = "a loader worker cannot send"
SHARED_MEMORY = (
    "/dev/shm is full: give it more room (docker run --shm-size=8g), or set DATALOADER.NUM_WORKERS "
    "lower or to 0"
)
_DESCRIPTORS = (
    "no file descriptor is left: raise the limit (ulimit -n 65536), or set DATALOADER.NUM_WORKERS "
    "lower or to 0"
)


class WorkerSendError(RuntimeError):
    """A sample or an exception of a worker cannot be sent to the training."""


def cause_of(error: BaseException) -> str:
    """Say what to do about an error of sending or receiving between processes."""
    text, number = str(error).lower(), getattr(error, "errno", None)
    if number in (errno.EMFILE, errno.ENFILE) or "too many open files" in text:
        return _DESCRIPTORS
    if "ancdata" in text or "file descriptor" in text:
        return _DESCRIPTORS
    if number == errno.ENOSPC or "no space left" in text or "shared memory" in text:
        return SHARED_MEMORY
    return (
        "what a mapper returns or raises must be picklable: tensors, arrays, numbers, text, "
        "Instances; with DATALOADER.NUM_WORKERS 0 nothing is sent"
    )


def _parts(data: Any) -> Iterator[tuple[str, Any]]:
    """Yield the fields of the samples of a batch, with their place."""
    for sample in data if isinstance(data, (list, tuple)) else [data]:
        if isinstance(sample, dict):
            for key, value in sample.items():
                yield f"field '{key}' ({type(value).__name__}) of {describe_record(sample)}", value
        else:
            yield f"a sample of type {type(sample).__name__}", sample


def _culprit(data: Any) -> str:
    """Say which part of a batch, or which exception, cannot be pickled."""
    if isinstance(data, ExceptionWrapper):
        return f"an exception of type {data.exc_type.__name__}: {data.exc_msg.strip()}"
    names = []
    for name, value in _parts(data):
        names.append(name.rpartition(" of ")[2])
        try:
            ForkingPickler.dumps(value)
        except Exception:
            return name
    return "a batch of " + ", ".join(dict.fromkeys(names))


class _TellingQueue(multiprocessing.queues.Queue):
    """A queue that sends an error in place of what it cannot pickle."""

    def _on_queue_feeder_error(self, e: Exception, obj: Any) -> None:  # type: ignore[override]
        if not (isinstance(obj, tuple) and len(obj) == 2):
            return super()._on_queue_feeder_error(e, obj)  # type: ignore[misc, no-any-return]
        number, data = obj
        text = f"{CANNOT_SEND} {_culprit(data)} ({type(e).__name__}: {one_line(e)}); {cause_of(e)}"
        wrapped = ExceptionWrapper((WorkerSendError, WorkerSendError(text), None), "")
        wrapped.exc_msg = text
        self.put((number, wrapped))
        return None


def telling_context(given: Any = None) -> multiprocessing.context.BaseContext:
    """Return a context of multiprocessing whose queues send the reason of a failure.

    Args:
        given: a context or the name of a start method; None: the default one.
    """
    name = given if isinstance(given, str) or given is None else given.get_start_method()
    name = name or torch.multiprocessing.get_start_method()
    base = torch.multiprocessing.get_context(name)

    class Telling(type(base)):  # type: ignore[misc]
        def Queue(self, maxsize: int = 0) -> Any:  # noqa: N802 the name of multiprocessing
            return _TellingQueue(maxsize, ctx=base)

    return Telling()  # type: ignore[no-any-return]
