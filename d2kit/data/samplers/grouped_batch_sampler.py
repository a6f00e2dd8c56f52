"""A batch sampler that keeps records of different groups apart."""

from collections.abc import Iterator, Sequence

from torch.utils.data.sampler import BatchSampler, Sampler

from d2kit.data.common import batches_by_group

__all__ = ["GroupedBatchSampler"]


class GroupedBatchSampler(BatchSampler):
    """Forms batches within groups, in the order in which they become full.

    Args:
        sampler: yields record indices.
        group_ids: group of each record, `group_ids[index]`.
        batch_size: indices per batch. A group that never fills a batch is not yielded.

    Raises:
        ValueError: `sampler` is not a Sampler, or the batch size is not positive.
    """

    def __init__(self, sampler: Sampler[int], group_ids: Sequence[int], batch_size: int) -> None:
        if not isinstance(sampler, Sampler):
            raise ValueError(
                "GroupedBatchSampler expects a torch.utils.data.Sampler, got "
                f"{type(sampler).__name__}"
            )
        if batch_size < 1:
            raise ValueError(f"GroupedBatchSampler expects batch_size >= 1, got {batch_size}")
        self.sampler = sampler
        self.group_ids = [int(g) for g in group_ids]
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[int]]:
        return batches_by_group(self.sampler, self.group_ids.__getitem__, self.batch_size)

    def __len__(self) -> int:
        raise NotImplementedError(
            "the number of batches depends on the order of the groups and is not known beforehand"
        )
