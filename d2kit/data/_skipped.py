"""Damaged images: the error that names one, and the count of those that a training skips."""

import logging

import torch

__all__ = ["SampleError", "SkippedRecords"]

logger = logging.getLogger(__name__)


class SampleError(RuntimeError, ValueError):
    """The image or the annotations of a record are damaged: one line that names the image.

    A `ValueError`, because the data are the user's; scripts print it without a traceback.
    """


class SkippedRecords:
    """Remembers which records were damaged, over all workers of a loader.

    Args:
        count: number of records of the dataset.
        limit: how many of them may be damaged, at least 0.

    Raises:
        ValueError: if `limit` is negative.
    """

    def __init__(self, count: int, limit: int) -> None:
        if limit < 0:
            raise ValueError(f"DATALOADER.MAX_SKIPPED_IMAGES must be >= 0, got {limit}")
        self.limit = limit
        # Shared with the workers. A mark per record needs no lock: it is only ever set.
        self._marks = torch.zeros(count, dtype=torch.uint8).share_memory_()

    def add(self, index: int, error: SampleError) -> None:
        """Count a record, and say so once.

        Args:
            index: of the record.
            error: what is wrong with it.

        Raises:
            SampleError: more than `limit` records are damaged.
        """
        if self._marks[index]:
            return
        self._marks[index] = 1
        number = int(self._marks.sum())
        if number > self.limit:
            raise SampleError(
                f"{error}; it is damaged image number {number} of this process, and "
                f"DATALOADER.MAX_SKIPPED_IMAGES allows {self.limit}"
            ) from error
        logger.warning("Skipped image %d of at most %d: %s", number, self.limit, error)

    def indices(self) -> list[int]:
        """Return the records counted so far, in the order of the dataset."""
        return self._marks.nonzero()[:, 0].tolist()
