"""The training loader: seeded samples in global batches, from any batch on."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import multiprocessing.context
import multiprocessing.queues
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any

import torch
import torch.multiprocessing
from torch._utils import ExceptionWrapper
from torch.utils import data as torchdata

from d2kit.data.common import (
    AspectRatioGroupedDataset,
    GlobalBatches,
    MapDataset,
    SampleError,
    describe_record,
)
from d2kit.utils.env import derive_seed, rng_scope, seed_all_rng
from d2kit.utils.stopping import StopAsked
from d2kit.utils.text import one_line

__all__ = [
    "GroupedSamples",
    "IterableLoader",
    "SeededDataset",
    "TestLoader",
    "TrainLoader",
    "WorkerSeed",
    "outlive_stop_signals",
]


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


def _parts(data: object) -> Iterator[tuple[str, Any]]:
    """Yield the fields of the samples of a batch, with their place."""
    for sample in data if isinstance(data, (list, tuple)) else [data]:
        if isinstance(sample, dict):
            for key, value in sample.items():
                yield f"field '{key}' ({type(value).__name__}) of {describe_record(sample)}", value
        else:
            yield f"a sample of type {type(sample).__name__}", sample


def _culprit(data: object) -> str:
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


if TYPE_CHECKING:
    _Queue = multiprocessing.queues.Queue[Any]
else:
    _Queue = multiprocessing.queues.Queue  # no generic class before Python 3.12


class _TellingQueue(_Queue):
    """A queue that sends an error in place of what it cannot pickle."""

    def _on_queue_feeder_error(self, e: Exception, obj: object) -> None:  # type: ignore[override]
        if not (isinstance(obj, tuple) and len(obj) == 2):
            return super()._on_queue_feeder_error(e, obj)  # type: ignore[misc, no-any-return]
        number, data = obj
        text = f"{CANNOT_SEND} {_culprit(data)} ({type(e).__name__}: {one_line(e)}); {cause_of(e)}"
        wrapped = ExceptionWrapper((WorkerSendError, WorkerSendError(text), None), "")
        wrapped.exc_msg = text
        self.put((number, wrapped))
        return None


def telling_context(
    given: str | multiprocessing.context.BaseContext | None = None,
) -> multiprocessing.context.BaseContext:
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


def _telling(options: dict[str, Any]) -> dict[str, Any]:
    """Return options of a `DataLoader`, with a telling context where it has workers."""
    if not options.get("num_workers"):
        return options
    return options | {CONTEXT: telling_context(options.get(CONTEXT))}


CONTEXT = "multiprocessing_context"
NOTHING = -1
PARENT_PAUSE = 1.0  # seconds between two looks of a worker whether the trainer lives
CANNOT_RECEIVE = "a batch of a loader worker could not be received"
WORKER_GRACE = 8  # seconds that a worker lives on after SIGTERM

SAMPLE_SEED_SALT = 1
"""Keeps the seed that travels with a sample apart from the one its mapper ran under."""


class WatchedDataset(torchdata.Dataset[Any]):
    """Notes which record each worker is working on.

    Args:
        dataset: map-style.
        num_workers: of the loader.
    """

    def __init__(self, dataset: Any, num_workers: int = 0) -> None:
        self.dataset = dataset
        # Shared memory, so that the main process can say what a dead worker was working on.
        self._in_work = torch.full((num_workers,), NOTHING, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        """Return a sample.

        Raises:
            RuntimeError: the mapper wants to end the process, which would only end a worker.
        """
        worker = torchdata.get_worker_info()
        if worker is None:
            return self.dataset[index]
        self._in_work[worker.id] = index
        try:
            sample = self.dataset[index]
        except SystemExit as error:
            names = "; ".join(self.names_in_work([worker.id]))
            raise RuntimeError(f"the mapper calls sys.exit({error.code!r}) at {names}") from error
        self._in_work[worker.id] = NOTHING
        return sample

    def names_in_work(self, workers: Collection[int] = ()) -> list[str]:
        """Say which images workers are working on, a dead one included.

        Args:
            workers: numbers of those that count; none: all.
        """
        places = enumerate(self._in_work.tolist())
        indices = [i for k, i in places if i != NOTHING and (k in workers or not workers)]
        mapped = isinstance(self.dataset, MapDataset)
        return [
            f"record {i}, {describe_record(self.dataset.record(i) if mapped else None)}"
            for i in indices
        ]


class SeededDataset(WatchedDataset):
    """Makes each sample a function of (seed, position).

    Args:
        dataset: map-style; may draw from `random`, `numpy.random` and torch's CPU generator.
        seed: of the run.
        num_workers: of the loader.
    """

    def __init__(self, dataset: Any, seed: int, num_workers: int = 0) -> None:
        super().__init__(dataset, num_workers)
        self.seed = seed

    def __getitem__(self, place: tuple[int, int]) -> Any:
        """Return the sample for (index, position), with `sample_seed` where it is a dictionary."""
        index, position = place
        with rng_scope(self.seed, position):
            sample = super().__getitem__(index)
        if isinstance(sample, dict):
            seed = derive_seed(self.seed, position, SAMPLE_SEED_SALT)
            sample = {**sample, "sample_seed": seed}
        return sample


class WorkerSeed:
    """Seeds a loader worker by (seed, rank, worker), for iterable datasets.

    Args:
        seed: of the run.
        rank: of this process.
    """

    def __init__(self, seed: int, rank: int) -> None:
        self.seed = seed
        self.rank = rank

    def __call__(self, worker_id: int) -> None:
        """Set up worker `worker_id` of this process."""
        outlive_stop_signals()
        seed_all_rng(derive_seed(self.seed, self.rank, worker_id))


def outlive_stop_signals() -> None:
    """Let a worker live on for some seconds when a cluster asks all processes of a job to stop.

    The training needs it until the end of the step, and then stops it itself. Without its parent it
    ends, also in the middle of a sample.
    """
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    if not hasattr(signal, "SIGALRM"):
        return
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE) and None)


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_PAUSE)
    os._exit(1)


class NamingLoader(torchdata.DataLoader[Any]):
    """A `DataLoader` whose errors say which image they are about, and which never waits in vain.

    Args:
        samples: what workers take samples from: where there are any, a `WatchedDataset`.
        kwargs: `num_workers`, `prefetch_factor`, ... of `torch.utils.data.DataLoader`.
    """

    def __init__(self, samples: Any, **kwargs: Any) -> None:
        super().__init__(samples, **_telling(kwargs))
        self.samples = samples

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield batches.

        Raises:
            SampleError: an image is damaged; one line that names it.
            RuntimeError: a worker died or raised; the message names the image.
        """
        with _without_child_signals():
            batches = super().__iter__()
        try:
            yield from self._named(batches)
        except StopAsked:  # a worker that is stuck in an image would be waited for
            for worker in getattr(batches, "_workers", []):
                worker.kill()
            raise
        finally:
            self._stop(batches)

    def _named(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Pass batches on; an error says which image it is about."""
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except SampleError as error:
                raise SampleError(_own_line(str(error))) from error
            except Exception as error:
                if not self.num_workers or str(error).startswith(("Caught ", CANNOT_SEND)):
                    raise  # what the worker says names its own image
                raise RuntimeError(self._diagnosis(error, batches)) from error
            yield batch

    def _diagnosis(self, error: Exception, batches: object) -> str:
        """Say why a batch did not arrive, where no worker has said so."""
        text = f"{type(error).__name__}: {str(error).strip() or 'no message'}"
        lost = _lost(error, batches)
        dead = _dead_workers(batches)
        names = "; ".join(self.samples.names_in_work(dead)) or "nothing"
        if dead or lost or str(error).startswith("DataLoader worker (pid"):
            return f"{_why_dead(batches)} ({text}). In work: {names}"
        return f"{CANNOT_RECEIVE} ({text}); {cause_of(error)}. In work: {names}"

    def _stop(self, batches: Iterator[Any]) -> None:
        """End the workers now.

        The garbage collector may close the queues by which they are told to end before it deletes
        the iterator, which then waits: 20 s for two workers, after an error.
        """
        if self.num_workers and not self.persistent_workers:
            batches._shutdown_workers()  # type: ignore[attr-defined]


class TrainLoader(NamingLoader):
    """A loader over global batches, which can start at any of them.

    Args:
        samples: seeded samples.
        batches: this process's slices of the global batches.
        collate_fn: list of samples -> batch.
        seed: of the run; keeps the loader from drawing from torch's global generator.
        kwargs: `num_workers`, `prefetch_factor`, ... of `torch.utils.data.DataLoader`.
    """

    def __init__(
        self,
        samples: SeededDataset,
        batches: GlobalBatches,
        *,
        collate_fn: Callable[[list[Any]], Any],
        seed: int,
        **kwargs: Any,
    ) -> None:
        generator = torch.Generator()
        generator.manual_seed(seed)
        super().__init__(
            samples, batch_sampler=batches, collate_fn=collate_fn, generator=generator, **kwargs
        )
        self.batches = batches

    @property
    def start_batch(self) -> int:
        """Number of the global batch with which the next iteration begins; may be set."""
        return self.batches.start

    @start_batch.setter
    def start_batch(self, number: int) -> None:
        if number < 0:
            raise ValueError(f"start_batch must be >= 0, got {number}")
        self.batches.start = number

    def skipped(self) -> list[str]:
        """Name the damaged images that were skipped so far."""
        dataset = self.samples.dataset
        return dataset.skipped() if isinstance(dataset, MapDataset) else []


class TestLoader(NamingLoader):
    """A loader of an evaluation: each record once, in order.

    Args:
        dataset: of samples, map-style.
        kwargs: of `torch.utils.data.DataLoader`.
    """

    __test__ = False  # its name does not make it a test

    def __init__(self, dataset: torchdata.Dataset[Any], **kwargs: Any) -> None:
        kwargs.setdefault("worker_init_fn", _outlive)
        workers = kwargs.get("num_workers", 0)
        super().__init__(_Transparent(dataset, workers) if workers else dataset, **kwargs)


class _Transparent(WatchedDataset):
    """Has the attributes of the dataset inside, for code that takes them from a loader."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") or "dataset" not in self.__dict__:  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)


def _outlive(worker_id: int) -> None:
    """Set up a worker of an evaluation, which draws nothing."""
    outlive_stop_signals()


def _own_line(text: str) -> str:
    """Return the message of a `SampleError`, out of the worker's traceback if it is in one."""
    start = f"{SampleError.__module__}.{SampleError.__name__}: "
    lines = [line for line in text.splitlines() if line.startswith(start)]
    return lines[-1].removeprefix(start) if lines else text


def _dead_workers(batches: object) -> list[int]:
    """Return the numbers of the workers that have ended."""
    workers = getattr(batches, "_workers", [])
    return [k for k, worker in enumerate(workers) if worker.exitcode is not None]


def _why_dead(batches: object) -> str:
    """Say what has probably ended a worker, by its exit code."""
    codes = {worker.exitcode for worker in getattr(batches, "_workers", [])} - {None}
    if -7 in codes:  # SIGBUS
        return f"a worker found no room in shared memory; {SHARED_MEMORY}"
    if -9 in codes or not codes:
        return "a worker was killed, perhaps because the memory is full"
    if crashed := codes & {-4, -6, -8, -11}:
        number = -min(crashed)
        return f"a worker crashed in native code (signal {number}), perhaps over a damaged image"
    if min(codes) < 0:
        return f"a worker was ended by signal {-min(codes)}"
    return (
        f"a worker has left with exit code {max(codes)}: something that the mapper calls ends the "
        "process (os._exit); with DATALOADER.NUM_WORKERS 0 it ends the training itself"
    )


def _lost(error: Exception, batches: object) -> bool:
    """Tell whether a connection broke because a worker died while it handed over a batch."""
    if not isinstance(error, (ConnectionError, EOFError, FileNotFoundError)):
        return False
    workers = getattr(batches, "_workers", [])
    end = time.monotonic() + 2  # the system closes its files before it can be waited for
    while workers and time.monotonic() < end:
        if any(not worker.is_alive() for worker in workers):
            return True
        time.sleep(0.01)
    return False


@contextlib.contextmanager
def _without_child_signals() -> Iterator[None]:
    """Undo what starting workers does to SIGCHLD.

    torch's handler raises wherever the main thread happens to be, in the middle of a training step
    for example. Without it the death of a worker is seen, within 5 s, where its batch is awaited.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before if before is not None else signal.SIG_DFL)


class _OnlyFromTheStart:
    """The attribute `start_batch` of a loader that cannot skip: 0, and an error for another."""

    def __get__(self, loader: object, owner: type) -> int:
        return 0

    def __set__(self, loader: object, number: int) -> None:
        if number:
            raise ValueError(
                f"start_batch={number} cannot be reached without decoding: the dataset is "
                "iterable, or its records have no width and height to group by. Give a list of "
                "records, or set DATALOADER.ASPECT_RATIO_GROUPING False"
            )


class IterableLoader(torchdata.DataLoader[Any]):
    """Loader of an iterable dataset, which begins where the dataset begins."""

    start_batch = _OnlyFromTheStart()

    def __init__(self, dataset: torchdata.Dataset[Any], **kwargs: Any) -> None:
        super().__init__(dataset, **_telling(kwargs))


class GroupedSamples:
    """Batches of equal aspect group from a loader that yields samples.

    Serves datasets that do not know the sizes of their images beforehand.

    Args:
        loader: yields dictionaries with `width` and `height`, one at a time.
        batch_size: samples per batch.
        collate_fn: list of samples -> batch.
    """

    start_batch = _OnlyFromTheStart()

    def __init__(
        self,
        loader: torchdata.DataLoader[Any],
        batch_size: int,
        collate_fn: Callable[[list[Any]], Any],
    ) -> None:
        self.loader = loader
        self.dataset = loader.dataset
        self.batch_size = batch_size
        self.collate_fn = collate_fn

    def skipped(self) -> list[str]:
        """Name the damaged images that were skipped so far."""
        return self.loader.skipped() if isinstance(self.loader, TrainLoader) else []

    def __iter__(self) -> Iterator[Any]:
        for batch in AspectRatioGroupedDataset(self.loader, self.batch_size):
            yield self.collate_fn(batch)
