"""The evaluator interface, the loop that feeds it, and the printing and checking of results."""

from __future__ import annotations

import datetime
import hashlib
import io
import itertools
import json
import logging
import math
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from torch import nn

from d2kit.config import CfgNode
from d2kit.utils import comm
from d2kit.utils.comm import get_world_size, is_main_process
from d2kit.utils.events import has_event_storage
from d2kit.utils.file_io import PathManager, atomic_write
from d2kit.utils.logger import auxiliary, log_every_n_seconds
from d2kit.utils.names import nearest_names
from d2kit.utils.stopping import in_progress, leave_if_asked
from d2kit.utils.text import file_name, one_line

T = TypeVar("T")

logger = logging.getLogger(__name__)


def gather_on_main(items: Sequence[T], distributed: bool = True) -> list[T] | None:
    """Join the lists of all processes.

    Args:
        items: what this process has; picklable.
        distributed: False: every process goes on with its own.

    Returns:
        The items of all processes by rank, on the main process; None on the others.
    """
    if not distributed:
        return list(items)
    comm.synchronize()
    parts = comm.gather(items, dst=0)
    return list(itertools.chain(*parts)) if comm.is_main_process() else None


def once_per_image(predictions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep the first prediction of each ``image_id``; say how many others there were."""
    by_image: dict[Any, dict[str, Any]] = {}
    for prediction in predictions:
        by_image.setdefault(prediction["image_id"], prediction)
    if len(by_image) < len(predictions):
        logger.warning(
            "%d image(s) were processed more than once; their first predictions count",
            len(predictions) - len(by_image),
        )
    return list(by_image.values())


OWNERS = "evaluated.json"
"""Beside results: file name -> its test set and the SHA-256 of the annotations it was made with."""


@contextmanager
def results_file(
    folder: str | os.PathLike[str],
    name: str,
    dataset: str,
    truth: str | os.PathLike[str] | None = None,
    mode: str = "w",
    beside: Sequence[str] = (),
) -> Iterator[IO[Any]]:
    """Write a file of results; one of another test set moves to a folder of that set's name first.

    Args:
        folder: made where it is missing.
        name: of the file.
        dataset: the test set that the results are of.
        truth: its annotation file, whose digest is kept beside the results.
        mode: as in `atomic_write`.
        beside: names of files that belong to this one and move with it.

    Yields:
        The open file; it takes its name when it is complete.

    Raises:
        OSError: it cannot be written; within a training that is a warning.
    """
    root = Path(folder)
    PathManager.mkdirs(str(root))
    owners = _owners(root)
    before = owners.get(name, {}).get("dataset", dataset)
    if before != dataset and (root / name).exists():
        apart = root / file_name(before)
        apart.mkdir(exist_ok=True)
        for moved in (name, *beside):
            if (root / moved).exists():
                os.replace(root / moved, apart / moved)
        _write_owners(apart, {**_owners(apart), name: owners[name]})
        logger.warning("%s is of test set '%s': moved to %s", root / name, one_line(before), apart)
    path, opened = root / name, False
    try:
        with atomic_write(path, mode) as file:
            opened = True
            yield file
        _write_owners(root, {**owners, name: {"dataset": dataset, "annotations": _sha256(truth)}})
    except OSError as error:
        if not has_event_storage():
            raise
        # Within a training the metrics and the next checkpoint count for more; what an earlier
        # evaluation has left there would pass for the results of this one.
        with auxiliary(path):
            path.unlink(missing_ok=True)
            raise error
        if not opened:
            yield io.BytesIO() if "b" in mode else io.StringIO()


def _owners(folder: Path) -> dict[str, dict[str, str]]:
    try:
        found = json.loads((folder / OWNERS).read_text("utf-8"))
        return {name: {k: str(v) for k, v in entry.items()} for name, entry in found.items()}
    except (OSError, ValueError, AttributeError):
        return {}  # none, or one of others: nothing is known of the results


def _write_owners(folder: Path, owners: Mapping[str, Mapping[str, str]]) -> None:
    with atomic_write(folder / OWNERS, "w") as file:
        json.dump(owners, file, indent=1)


def _sha256(path: str | os.PathLike[str] | None) -> str:
    if path is None or not os.path.isfile(path):
        return ""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def stale_results(results: str | os.PathLike[str], truth: str | os.PathLike[str]) -> str:
    """Say that results were made with other annotations than those they are compared with.

    Args:
        results: file of results, beside which `results_file` has noted what it was made with.
        truth: annotation file of now.

    Returns:
        One sentence; "" where they fit, or where nothing is known.
    """
    path = Path(results)
    known = _owners(path.parent).get(path.name, {})
    if not known.get("annotations") or known["annotations"] == _sha256(truth):
        return ""
    return (
        f"{path} was made with annotations of '{one_line(known['dataset'])}' that have changed "
        f"since, or are not those of {os.fspath(truth)}: evaluate again (--eval-only)"
    )


_WARMUP_BATCHES = 5  # the first batches pay for allocation and kernel selection: not timed
Callbacks = Mapping[str, Callable[[], Any]]


class DatasetEvaluator:
    """Base class: collects (input, output) pairs, then turns them into metrics.

    `inference_on_dataset` calls `reset` once, `process` per batch, `evaluate` at the end.
    """

    @property
    def accepts_roi_masks(self) -> bool:
        """Whether `process` takes `ROIMasks`, so that no full-size masks need be made for it."""
        return False

    def reset(self) -> None:
        """Forget everything; called before a new round of evaluation."""

    def process(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Take in one batch.

        Args:
            inputs: what the model was called with, one dict per image.
            outputs: what it returned, one per image, in the same order.
        """

    def evaluate(self) -> dict[str, Any] | None:
        """Compute the metrics after all batches have been processed.

        Returns:
            ``{task: {metric: value}}``; on other processes than the main one, empty or None.
        """


class DatasetEvaluators(DatasetEvaluator):
    """Several evaluators fed by one pass over the data.

    Args:
        evaluators: the evaluators; their `evaluate` must give different task names.
    """

    def __init__(self, evaluators: Sequence[DatasetEvaluator]) -> None:
        super().__init__()
        self._evaluators = list(evaluators)

    @property
    def accepts_roi_masks(self) -> bool:
        """Whether all evaluators take `ROIMasks`."""
        return all(evaluator.accepts_roi_masks for evaluator in self._evaluators)

    def reset(self) -> None:
        """Reset every evaluator."""
        for evaluator in self._evaluators:
            evaluator.reset()

    def process(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Hand the batch to every evaluator."""
        for evaluator in self._evaluators:
            evaluator.process(inputs, outputs)

    def evaluate(self) -> dict[str, Any]:
        """Merge the results of all evaluators.

        Returns:
            ``{task: {metric: value}}`` of all of them; empty on other processes than the main one.

        Raises:
            ValueError: two evaluators report the same task.
        """
        found = [(type(e).__name__, e.evaluate() or {}) for e in self._evaluators]
        merged: OrderedDict[str, Any] = OrderedDict()
        for name, results in found if is_main_process() else ():
            twice = merged.keys() & results.keys()
            if twice:
                raise ValueError(
                    f"Two evaluators report the task {min(twice)!r}; the second is {name}. Give "
                    "each evaluator its own `tasks`."
                )
            merged.update(results)
        return merged


class _Stopwatch:
    """Seconds spent on waiting for data, in the model and in the evaluator."""

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.data = self.compute = self.evaluate = 0.0
        self.images = self.batches = 0
        self.start = time.perf_counter()

    def add(self, data: float, compute: float, evaluate: float, images: int) -> None:
        if self.batches == self.warmup and self.batches > 0:
            self.data = self.compute = self.evaluate = 0.0
            self.images = 0
        self.data += data
        self.compute += compute
        self.evaluate += evaluate
        self.images += images
        self.batches += 1

    def per_image(self) -> str:
        """Say the mean seconds per image, in all and by part."""
        count = max(self.images, 1)
        parts = (self.data / count, self.compute / count, self.evaluate / count)
        return (
            f"{sum(parts):.4f} s/img (data {parts[0]:.4f}, compute {parts[1]:.4f}, "
            f"evaluate {parts[2]:.4f})"
        )

    def elapsed(self) -> str:
        return str(datetime.timedelta(seconds=round(time.perf_counter() - self.start)))


def _progress(data_loader: Iterable[Any], total: int | None) -> Any:
    """A progress bar on a terminal; elsewhere (log files, other processes) nothing is drawn."""
    from tqdm import tqdm

    disable = None if is_main_process() else True  # None: tqdm itself disables where no terminal is
    return tqdm(data_loader, total=total, desc="Inference", unit="batch", disable=disable)


def _call(callbacks: Callbacks | None, name: str) -> None:
    if callbacks is not None:
        callbacks.get(name, lambda: None)()


def _wait_for_device(model: object) -> None:
    """Wait for the CUDA work that a model has queued, so that the time measured is the model's."""
    weight = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if weight is not None:
        if weight.is_cuda:
            torch.cuda.synchronize(weight.device)
    elif torch.cuda.is_initialized():
        torch.cuda.synchronize()


def inference_on_dataset(
    model: Callable[[Any], Any],
    data_loader: Iterable[Any],
    evaluator: DatasetEvaluator | Sequence[DatasetEvaluator] | None,
    callbacks: Callbacks | None = None,
) -> dict[str, Any]:
    """Run the model over a data set and evaluate what it returns.

    The model is put into eval mode for the run and back into its former mode afterwards, also
    after an exception.

    Args:
        model: takes a batch (list of N dicts), returns a list of N outputs.
        data_loader: gives the batches; its length, where it has one, is the progress bar's.
        evaluator: one, several or None (only run the model, to measure its speed).
        callbacks: functions without arguments under ``on_start``, ``before_inference``,
            ``after_inference`` (both per batch) and ``on_end``.

    Returns:
        What the evaluator returns; an empty dict where it returns None or `evaluator` is None.
    """
    if evaluator is None:
        evaluator = DatasetEvaluators([])
    elif not isinstance(evaluator, DatasetEvaluator) and isinstance(evaluator, Sequence):
        evaluator = DatasetEvaluators(evaluator)
    total = len(data_loader) if isinstance(data_loader, Sized) else None
    logger.info(
        "Start inference on %s batches", f"{total:,}" if total is not None else "an unknown number"
    )
    evaluator.reset()
    watch = _Stopwatch(
        _WARMUP_BATCHES if total is None else min(_WARMUP_BATCHES, max(total - 1, 0))
    )
    with ExitStack() as stack:
        if isinstance(model, nn.Module):
            stack.enter_context(inference_context(model))
        if evaluator.accepts_roi_masks:
            from d2kit.modeling.postprocessing import roi_masks_kept  # results need no models

            stack.enter_context(roi_masks_kept())
        stack.enter_context(torch.no_grad())
        stack.enter_context(in_progress("an evaluation", data_loader))
        _run_batches(model, data_loader, evaluator, callbacks, watch, total)
    logger.info(
        "Inference done: %s batches in %s; %s per process, on %d process(es)",
        f"{watch.batches:,}",
        watch.elapsed(),
        watch.per_image(),
        get_world_size(),
    )
    results = evaluator.evaluate()
    return {} if results is None else results


def _run_batches(
    model: Callable[[Any], Any],
    data_loader: Iterable[Any],
    evaluator: DatasetEvaluator,
    callbacks: Callbacks | None,
    watch: _Stopwatch,
    total: int | None,
) -> None:
    """Feed every batch to the model and its outputs to the evaluator."""
    _call(callbacks, "on_start")
    progress = _progress(data_loader, total)
    asked = time.perf_counter()
    for inputs in progress:
        leave_if_asked()
        started = time.perf_counter()
        _call(callbacks, "before_inference")
        outputs = model(inputs)
        _wait_for_device(model)
        _call(callbacks, "after_inference")
        computed = time.perf_counter()
        evaluator.process(inputs, outputs)
        processed = time.perf_counter()
        images = len(inputs) if isinstance(inputs, Sized) else 1
        watch.add(started - asked, computed - started, processed - computed, images)
        if progress.disable and watch.batches > watch.warmup:
            log_every_n_seconds(
                logging.INFO,
                f"Inference: {watch.batches}/{total or '?'} batches; {watch.per_image()}",
                n=10,
                name=__name__,
            )
        asked = time.perf_counter()
    _call(callbacks, "on_end")


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Put `model` and each of its parts back into their modes after the ``with`` block."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def inference_context(model: nn.Module) -> Iterator[None]:
    """Put `model` into eval mode inside the ``with`` block and back into its former mode after it.

    Args:
        model: its own mode and those of all its submodules are restored one by one, so that a
            frozen part that was in eval mode stays there.
    """
    with modes_kept(model):
        model.eval()
        yield


def print_csv_format(results: Mapping[str, Any]) -> None:
    """Log the main metrics as comma-separated lines that can be pasted into a spreadsheet.

    Per-class metrics (``AP-person``) are left out.

    Args:
        results: ``{task: {metric: value}}`` or ``{metric: value}``.

    Raises:
        TypeError: `results` is no mapping.
    """
    if not isinstance(results, Mapping):
        raise TypeError(
            f"print_csv_format expects a dict of results, got {type(results).__name__}: {results!r}"
        )
    for task, found in results.items():
        for line in _lines_of(task, found) if isinstance(found, Mapping) else [f"{task}={found}"]:
            logger.info("copypaste: %s", line)


def _lines_of(task: str, metrics: Mapping[str, float]) -> tuple[str, str, str]:
    """Return the name of a task, of its main metrics, and their values."""
    names = [name for name in metrics if "-" not in name]
    values = (f"{metrics[name]:.4f}" for name in names)
    return f"Task: {task}", ",".join(names), ",".join(values)


def read_expected_results(cfg: CfgNode) -> list[Sequence[Any]]:
    """Read ``TEST.EXPECTED_RESULTS``: rows (task, metric, value, tolerance)."""
    return list(cfg.TEST.EXPECTED_RESULTS)


def verify_results(cfg: CfgNode, results: Mapping[str, Any]) -> bool:
    """Compare results with those that the config expects; exit with code 1 where they differ.

    Args:
        cfg: its ``TEST.EXPECTED_RESULTS`` has rows (task, metric, expected value, tolerance), e.g.
            ``["bbox", "AP", 38.5, 0.2]``.
        results: ``{task: {metric: value}}``.

    Returns:
        True (also where nothing is expected).

    Raises:
        SystemExit: a value is missing, not finite, or further than its tolerance from the
            expected one. Each such row is logged.
    """
    expected = read_expected_results(cfg)
    if not expected:
        return True
    problems = [text for row in expected if (text := _problem(row, results)) is not None]
    if not problems:
        logger.info("Results verification passed: %d value(s) as expected.", len(expected))
        return True
    for text in problems:
        logger.error("Result verification failed: %s", text)
    logger.error("Expected (TEST.EXPECTED_RESULTS): %s", expected)
    logger.error("Actual: %s", {task: dict(metrics) for task, metrics in results.items()})
    sys.exit(1)


def _problem(row: Sequence[Any], results: Mapping[str, Any]) -> str | None:
    """Say what is wrong with one expected row; None if nothing is."""
    if len(row) != 4:
        return f"TEST.EXPECTED_RESULTS needs rows (task, metric, value, tolerance), got {row!r}"
    task, metric, value, tolerance = row
    if task not in results:
        return f"no task {task!r} among the results; nearest: {nearest_names(task, list(results))}"
    if metric not in results[task]:
        near = nearest_names(metric, list(results[task]))
        return f"no metric {metric!r} for task {task!r}; nearest: {near}"
    actual = results[task][metric]
    if actual is None or not math.isfinite(actual) or abs(actual - value) > tolerance:
        return f"{task} {metric} is {actual}, expected {value} +- {tolerance}"
    return None


def flatten_results_dict(results: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested results into one level.

    Args:
        results: ``{"bbox": {"AP": 1.0}}``, nested to any depth.

    Returns:
        ``{"bbox/AP": 1.0}``.
    """
    return dict(_leaves(results, ""))


def _leaves(results: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    """Yield what is no mapping, with its path from the top."""
    for name, value in results.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{name}/")
        else:
            yield f"{path}{name}", value
