"""How other libraries order the rows of predictors."""

import torch
from torch import Tensor

from d2kit.checkpoint._naming import Facts, Rows

__all__ = ["BACKGROUND_FIRST", "RATIO_MAJOR", "BackgroundRows"]

ANCHOR_GRID = (3, 3)  # aspect ratios, sizes: the nine anchors of RetinaNet


class _BackgroundFirst(Rows):
    """Class scores (K+1, ...): theirs begin with background, ours end with it."""

    def to_ours(self, rows: Tensor, facts: Facts) -> Tensor:
        return torch.cat([rows[1:], rows[:1]])

    def to_theirs(self, rows: Tensor, facts: Facts) -> Tensor:
        return torch.cat([rows[-1:], rows[:-1]])


class BackgroundRows(Rows):
    """Rows per class: theirs begin with rows of background, which nothing reads; ours have none.

    Args:
        per_class: rows of one class, 4 for boxes, 1 for masks.
    """

    def __init__(self, per_class: int) -> None:
        self.per_class = per_class

    def to_ours(self, rows: Tensor, facts: Facts) -> Tensor:
        return rows[self.per_class :]

    def to_theirs(self, rows: Tensor, facts: Facts) -> Tensor:
        if len(rows) != self.per_class * facts.classes:
            raise ValueError(
                f"torchvision's heads have {self.per_class} rows for each of the {facts.classes} "
                f"classes, got {len(rows)}: class-agnostic heads cannot be converted to torchvision"
            )
        return torch.cat([torch.zeros_like(rows[: self.per_class]), rows])


class _RatioMajor(Rows):
    """Rows per anchor: theirs go through the sizes first (fastest), ours through the ratios."""

    def to_ours(self, rows: Tensor, facts: Facts) -> Tensor:
        return self._swap(rows, facts, *ANCHOR_GRID)

    def to_theirs(self, rows: Tensor, facts: Facts) -> Tensor:
        return self._swap(rows, facts, *ANCHOR_GRID[::-1])

    @staticmethod
    def _swap(rows: Tensor, facts: Facts, slow: int, fast: int) -> Tensor:
        anchors = facts.anchors
        if all(anchors % n for n in range(2, anchors)):
            return rows  # one size or one ratio: there is only one order
        if anchors != slow * fast:
            raise ValueError(
                f"a head with {anchors} anchors per position: only {slow * fast} (3 sizes, 3 "
                "aspect ratios) and prime numbers can be converted, for the order of others is "
                "not known"
            )
        by_anchor = rows.unflatten(0, (slow, fast, -1))
        return by_anchor.transpose(0, 1).reshape(rows.shape)


BACKGROUND_FIRST = _BackgroundFirst()
RATIO_MAJOR = _RatioMajor()
