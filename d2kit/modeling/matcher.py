"""Assignment of predictions (anchors, proposals) to ground truth by a quality such as IoU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from d2kit.layers import nonzero_tuple

__all__ = ["Matcher", "nonzero_tuple"]


class Matcher:
    """Gives every prediction its best ground truth and a label by how good that match is.

    Args:
        thresholds: ascending, positive bounds between the labels, in units of the quality.
        labels: one more than `thresholds`; a best quality in [thresholds[i-1], thresholds[i]) gets
            `labels[i]`. 0 is background, 1 foreground, -1 ignored.
        allow_low_quality_matches: for every ground truth, also label its best predictions (ties
            included) foreground; each keeps its own best ground truth.

    Raises:
        ValueError: thresholds that do not ascend from above 0, a wrong number of labels, or a
            label other than -1, 0, 1.

    Source: Ren et al., Faster R-CNN (2015), section 3.1.2.
    """

    def __init__(
        self,
        thresholds: Sequence[float],
        labels: Sequence[int],
        allow_low_quality_matches: bool = False,
    ) -> None:
        bounds = [float(t) for t in thresholds]
        ascending = all(a <= b for a, b in zip(bounds[:-1], bounds[1:], strict=True))
        if not bounds or bounds[0] <= 0 or not ascending:
            raise ValueError(f"Matcher thresholds must ascend from above 0, got {bounds}.")
        if len(labels) != len(bounds) + 1 or any(label not in {-1, 0, 1} for label in labels):
            raise ValueError(
                f"Matcher labels must be {len(bounds) + 1} values out of -1, 0, 1 "
                f"(one more than the {len(bounds)} thresholds), got {list(labels)}."
            )
        self.thresholds = bounds
        self.labels = list(labels)
        self.allow_low_quality_matches = allow_low_quality_matches

    def __call__(self, match_quality_matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Match predictions to ground truths, without a host-device sync.

        Args:
            match_quality_matrix: float (G, A), >= 0; quality of prediction a for ground truth g.

        Returns:
            matches: int64 (A,), index in [0, G) of the best ground truth (0 where G is 0).
            match_labels: int8 (A,), label of each prediction.

        Raises:
            ValueError: the matrix has not two dimensions.
        """
        if match_quality_matrix.dim() != 2:
            raise ValueError(
                "Matcher takes a matrix (ground truths, predictions), got shape "
                f"{tuple(match_quality_matrix.shape)}."
            )
        count = match_quality_matrix.shape[1]
        device = match_quality_matrix.device
        match_labels = torch.full((count,), self.labels[0], dtype=torch.int8, device=device)
        if match_quality_matrix.numel() == 0:  # as if every quality was 0
            return torch.zeros(count, dtype=torch.int64, device=device), match_labels
        best, matches = match_quality_matrix.max(dim=0)
        for bound, label in zip(self.thresholds, self.labels[1:], strict=True):
            match_labels.masked_fill_(best >= bound, label)
        if self.allow_low_quality_matches:
            self.set_low_quality_matches_(match_labels, match_quality_matrix)
        return matches, match_labels

    def set_low_quality_matches_(self, match_labels: Tensor, match_quality_matrix: Tensor) -> None:
        """Label the best predictions of every ground truth foreground, in place.

        A ground truth that no prediction touches (quality 0 everywhere: a box without area) has
        no best prediction; otherwise every untouched prediction would become foreground.

        Args:
            match_labels: int8 (A,), changed in place.
            match_quality_matrix: float (G, A), >= 0, G at least 1.
        """
        best = match_quality_matrix.amax(dim=1, keepdim=True)
        is_best = (match_quality_matrix == best) & (best > 0)
        match_labels.masked_fill_(is_best.any(dim=0), 1)
