"""Texts and segments of a picture's objects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch


def _create_text_labels(
    classes: Sequence[int] | None,
    scores: Any,
    class_names: Sequence[str] | None,
    is_crowd: Sequence[Any] | None = None,
) -> list[str] | None:
    """Write one label per instance: class, score in percent, whether it is a crowd.

    Args:
        classes: R class indices; None: no class in the label.
        scores: R scores in [0, 1], or None.
        class_names: names by index; where it is None or too short, the index is shown.
        is_crowd: R flags, or None.

    Returns:
        R labels such as ``"person 98%"`` or ``"person|crowd"``; None if there is nothing to say.
    """
    parts: list[list[str]] = []
    if classes is not None:
        names = class_names or ()
        indices = [int(c) for c in classes]
        parts.append([str(names[c]) if 0 <= c < len(names) else str(c) for c in indices])
    if scores is not None:
        parts.append([f"{float(score):.0%}" for score in scores])
    if not parts:
        return None
    labels = [" ".join(words) for words in zip(*parts, strict=True)]
    if is_crowd is None:
        return labels
    marks = {True: "|crowd", False: ""}
    return [label + marks[bool(crowd)] for label, crowd in zip(labels, is_crowd, strict=True)]


class _PanopticPrediction:
    """The segments of a panoptic prediction, stuff and things apart.

    Args:
        panoptic_seg: (H, W) integer tensor of segment ids.
        segments_info: per segment a dict with ``id``, ``isthing``, ``category_id``; None: ids are
            class * `metadata.label_divisor` + instance, negative ids are void.
        metadata: needed where `segments_info` is None.
    """

    def __init__(
        self,
        panoptic_seg: torch.Tensor | np.ndarray,
        segments_info: Sequence[dict[str, Any]] | None,
        metadata: Any = None,
    ) -> None:
        self._seg = np.asarray(
            panoptic_seg.cpu() if isinstance(panoptic_seg, torch.Tensor) else panoptic_seg
        )
        ids, areas = np.unique(self._seg, return_counts=True)
        self._areas = {int(i): int(a) for i, a in zip(ids, areas, strict=True)}
        if segments_info is None:
            segments_info = self._infos_from_ids(metadata)
        self._infos = {int(info["id"]): info for info in segments_info}
        # large ones first, so that small ones are drawn on top
        order = sorted(self._areas, key=lambda i: -self._areas[i])
        self._ids = [i for i in order if i in self._infos]

    def _infos_from_ids(self, metadata: Any) -> list[dict[str, Any]]:
        divisor = None if metadata is None else metadata.get("label_divisor")
        if not divisor:
            raise ValueError("Without segments_info, the metadata must have label_divisor")
        things = set((metadata.get("thing_dataset_id_to_contiguous_id") or {}).values())
        return [
            {"id": i, "category_id": i // divisor, "isthing": i // divisor in things}
            for i in self._areas
            if i >= 0 and i // divisor != metadata.get("ignore_label", -1)
        ]

    def non_empty_mask(self) -> np.ndarray:
        """Return (H, W) bool: pixels that belong to a segment."""
        return np.isin(self._seg, list(self._ids))

    def semantic_masks(self) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        """Yield mask (H, W) bool and info of each stuff segment, large ones first."""
        yield from self._masks(things=False)

    def instance_masks(self) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        """Yield mask (H, W) bool and info of each thing, large ones first."""
        yield from self._masks(things=True)

    def _masks(self, things: bool) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        for index in self._ids:
            if bool(self._infos[index]["isthing"]) == things:
                yield self._seg == index, self._infos[index]
