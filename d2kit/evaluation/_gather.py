"""What all evaluators do before they compute: bring the parts of all processes together."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import Any, TypeVar

from d2kit.utils import comm

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
