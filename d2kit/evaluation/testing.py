"""Printing results and comparing them with expected ones."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from d2kit.utils.registry import nearest_names

logger = logging.getLogger(__name__)


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


def default_expected_results(cfg: Any) -> list[Sequence[Any]]:
    """Read ``TEST.EXPECTED_RESULTS``: rows (task, metric, value, tolerance)."""
    return list(cfg.TEST.EXPECTED_RESULTS)


def verify_results(cfg: Any, results: Mapping[str, Any]) -> bool:
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
    expected = default_expected_results(cfg)
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
