"""Random choice of anchors and proposals to train on.

The choice for an image is a function of that image's seed, not of its place in the batch or of the
number of processes: a training step runs inside `per_image_seeds`, and whoever draws for image i
asks `generator_for(i, ...)`.
"""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from d2kit.utils.env import derive_seed

__all__ = [
    "for_image",
    "generator_for",
    "generator_of_image",
    "per_image_seeds",
    "subsample_labels",
    "subsample_masks",
]

_SEEDS: ContextVar[tuple[int, ...] | None] = ContextVar("d2kit_per_image_seeds", default=None)
_IMAGE: ContextVar[int | None] = ContextVar("d2kit_image_of_batch", default=None)


@contextmanager
def per_image_seeds(seeds: Sequence[int] | None) -> Iterator[None]:
    """Let random choices inside the block depend on one seed for each image.

    Args:
        seeds: one integer for each image of the batch; None for torch's global generator.
    """
    token = _SEEDS.set(None if seeds is None else tuple(int(seed) for seed in seeds))
    try:
        yield
    finally:
        _SEEDS.reset(token)


def generator_for(
    image_index: int, stage: str, device: torch.device | str = "cpu"
) -> torch.Generator | None:
    """Return the generator for one random choice on one image of the batch.

    Args:
        image_index: place of the image in the batch.
        stage: names the choice ("rpn", "roi_heads", ...), so that two of them are independent.
        device: where the random numbers are needed.

    Returns:
        A freshly seeded generator, or None (torch's global one) outside `per_image_seeds`.

    Raises:
        ValueError: there are fewer seeds than images.
    """
    seeds = _SEEDS.get()
    if seeds is None:
        return None
    if image_index >= len(seeds):
        raise ValueError(
            f"per_image_seeds got {len(seeds)} seeds, but image {image_index} of the batch needs "
            "one; give one seed for each image."
        )
    seed = derive_seed(seeds[image_index], zlib.crc32(stage.encode()))
    return torch.Generator(device=device).manual_seed(seed)


@contextmanager
def for_image(image_index: int) -> Iterator[None]:
    """Say which image of the batch the choices inside the block are for.

    Args:
        image_index: place of the image in the batch.
    """
    token = _IMAGE.set(image_index)
    try:
        yield
    finally:
        _IMAGE.reset(token)


def generator_of_image(stage: str, device: torch.device | str = "cpu") -> torch.Generator | None:
    """Return `generator_for` the image that `for_image` names; torch's global one outside of it.

    Methods that a subclass may call by itself have no argument for the image.
    """
    image_index = _IMAGE.get()
    return None if image_index is None else generator_for(image_index, stage, device)


def subsample_labels(
    labels: Tensor,
    num_samples: int,
    positive_fraction: float,
    bg_label: int,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw positives and negatives at random.

    Args:
        labels: integer (R,): -1 is ignored, `bg_label` negative, all else positive.
        num_samples: how many to draw; fewer where there are not enough.
        positive_fraction: at most this fraction of `num_samples` (rounded down) are positives;
            negatives fill up.
        bg_label: the label of negatives.
        generator: source of randomness, on the device of `labels`; by default torch's global one.

    Returns:
        Indices of the positives and of the negatives, int64, each in random order.
    """
    order_pos, is_pos, order_neg, is_neg = _draw(
        labels, num_samples, positive_fraction, bg_label, generator
    )
    # the drawn ones come first in both orders, so that one wait for two numbers is enough
    positives, negatives = torch.stack([is_pos.sum(), is_neg.sum()]).tolist()
    return order_pos[:positives], order_neg[:negatives]


def subsample_masks(
    labels: Tensor,
    num_samples: int,
    positive_fraction: float,
    bg_label: int,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw exactly what `subsample_labels` draws, as masks and without a host-device sync.

    Args:
        labels: integer (R,): -1 is ignored, `bg_label` negative, all else positive.
        num_samples: how many to draw; fewer where there are not enough.
        positive_fraction: at most this fraction of `num_samples` (rounded down) are positives.
        bg_label: the label of negatives.
        generator: source of randomness, on the device of `labels`; by default torch's global one.

    Returns:
        Two bool masks (R,): the drawn positives, the drawn negatives.
    """
    order_pos, is_pos, order_neg, is_neg = _draw(
        labels, num_samples, positive_fraction, bg_label, generator
    )
    empty = torch.zeros_like(labels, dtype=torch.bool)
    return empty.scatter(0, order_pos, is_pos), empty.scatter(0, order_neg, is_neg)


def _draw(
    labels: Tensor,
    num_samples: int,
    positive_fraction: float,
    bg_label: int,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Candidates in random order and which of them are drawn: positives, then negatives.

    Every element gets a random key; those with the smallest keys among their kind are drawn.
    """
    keys = torch.rand(labels.shape, generator=generator, device=labels.device)
    negative = labels == bg_label
    positive = (labels != -1) & ~negative
    excluded = 2.0  # keys are below 1
    max_positives = min(int(num_samples * positive_fraction), labels.numel())
    drawn, order_pos = keys.masked_fill(~positive, excluded).topk(max_positives, largest=False)
    is_pos = drawn < excluded
    max_negatives = min(num_samples, labels.numel())
    drawn, order_neg = keys.masked_fill(~negative, excluded).topk(max_negatives, largest=False)
    rank = torch.arange(max_negatives, device=labels.device)
    is_neg = (drawn < excluded) & (rank < num_samples - is_pos.sum())
    return order_pos, is_pos, order_neg, is_neg
