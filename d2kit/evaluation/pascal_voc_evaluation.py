"""AP of boxes as Pascal VOC defines it.

Source: Everingham et al., "The Pascal Visual Object Classes (VOC) Challenge", 2010, section 4.2
(overlap, difficult objects, 11-point interpolation), and "... Challenge: A Retrospective", 2015,
section 3.4.1 (area under the curve, from 2010 on).
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from d2kit.data.catalog import MetadataCatalog
from d2kit.data.datasets.pascal_voc import VocObject, read_voc_annotation, read_voc_split
from d2kit.evaluation.evaluator import DatasetEvaluator, gather_on_main, once_per_image
from d2kit.utils.file_io import PathManager
from d2kit.utils.logger import create_small_table

__all__ = ["PascalVOCDetectionEvaluator", "voc_ap"]

THRESHOLDS = range(50, 100, 5)
"""Overlaps in percent that "AP" is the mean over."""


class PascalVOCDetectionEvaluator(DatasetEvaluator):
    """Computes VOC's AP: the mean over the classes at an overlap of 0.5, 0.75 and 0.5 to 0.95.

    Every image of the split counts, also one that was not processed. Detections are taken from all
    processes.

    Args:
        dataset_name: a dataset whose metadata has `dirname`, `split`, `year` and `thing_classes`
            (see `register_pascal_voc`). Year 2007: 11-point AP; others: area under the curve.

    Raises:
        ValueError: the metadata lack one of these.
    """

    def __init__(self, dataset_name: str) -> None:
        self._dataset_name = dataset_name
        metadata = MetadataCatalog.get(dataset_name)
        missing = [k for k in ("dirname", "split", "year", "thing_classes") if not metadata.get(k)]
        if missing:
            raise ValueError(
                f"dataset '{dataset_name}' has no {', '.join(missing)} in its metadata; "
                "PascalVOCDetectionEvaluator needs a dataset of register_pascal_voc"
            )
        self._dirname, self._split = metadata.dirname, metadata.split
        # read by user classes alone
        self._anno_file_template = os.path.join(metadata.dirname, "Annotations", "{}.xml")
        split = os.path.join(metadata.dirname, "ImageSets", "Main", f"{metadata.split}.txt")
        self._image_set_path = split
        self._cpu_device = torch.device("cpu")
        self._is_2007 = int(metadata.year) == 2007
        self._class_names = list(metadata.thing_classes)
        self._logger = logging.getLogger(__name__)
        self.reset()

    def reset(self) -> None:
        """Forget all detections."""
        self._predictions: list[dict[str, Any]] = []

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Any]) -> None:
        """Take in one batch.

        Args:
            inputs: per image a dict with ``image_id``.
            outputs: per image a dict with ``instances``: `pred_boxes`, `scores`, `pred_classes`.
        """
        for image, output in zip(inputs, outputs, strict=True):
            instances = output["instances"].to(self._cpu_device)
            self._predictions.append(
                {
                    "image_id": str(image["image_id"]),
                    "boxes": instances.pred_boxes.tensor.numpy().astype(np.float64),
                    "scores": instances.scores.numpy(),
                    "classes": instances.pred_classes.numpy(),
                }
            )

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Compute the figures.

        Returns:
            ``{"bbox": {"AP": ..., "AP50": ..., "AP75": ...}}`` in percent, means over the classes
            that have objects; empty on other processes than the main one.

        Raises:
            ValueError: an image is not in the split.
            DatasetError: an annotation file is damaged.
        """
        gathered = gather_on_main(self._predictions)
        if gathered is None:
            return {}
        predictions = {p["image_id"]: p for p in once_per_image(gathered)}
        truths = self._read_truths()
        unknown = predictions.keys() - truths.keys()
        if unknown:
            raise ValueError(
                f"image {min(unknown)!r} is not in split {self._split!r} of {self._dirname}: was "
                "the loader built for another dataset?"
            )
        if len(predictions) < len(truths):
            self._logger.warning(
                "%d of %d images were not processed and count as images without detections",
                len(truths) - len(predictions),
                len(truths),
            )
        table = np.array(
            [
                _ap_of_class(name, index, truths, predictions, self._is_2007)
                for index, name in enumerate(self._class_names)
            ]
        )
        return self._results(table * 100)

    def _read_truths(self) -> dict[str, list[VocObject]]:
        folder = PathManager.get_local_path(os.path.join(self._dirname, "Annotations"))
        return {
            image_id: read_voc_annotation(os.path.join(folder, f"{image_id}.xml"))[2]
            for image_id in read_voc_split(self._dirname, self._split)
        }

    def _results(self, table: np.ndarray) -> dict[str, dict[str, float]]:
        """Average a table (classes, thresholds) in percent over the classes with objects."""
        per_class = dict(zip(self._class_names, table[:, 0].tolist(), strict=True))
        self._logger.info("AP50 per class:\n%s", create_small_table(per_class))
        present = table[~np.isnan(table).all(axis=1)]
        means = present.mean(axis=0) if len(present) else np.full(len(THRESHOLDS), np.nan)
        at = dict(zip(THRESHOLDS, means.tolist(), strict=True))
        results = {"AP": float(means.mean()), "AP50": at[50], "AP75": at[75]}
        self._logger.info(
            "Evaluation results for %s by VOC %s metric:\n%s",
            self._dataset_name,
            "2007's 11-point" if self._is_2007 else "2012's area",
            create_small_table(results),
        )
        return OrderedDict(bbox=results)


@dataclass
class _Matches:
    """Detections of one class over all images, highest score first.

    Args:
        overlap: (D,) highest IoU with an object of the image; -1 where it has none.
        target: (D,) number of that object, over all images.
        difficult: (G,) of every object.
    """

    overlap: np.ndarray
    target: np.ndarray
    difficult: np.ndarray


def _ap_of_class(
    name: str,
    index: int,
    truths: Mapping[str, Sequence[VocObject]],
    predictions: Mapping[str, Mapping[str, Any]],
    is_2007: bool,
) -> list[float]:
    """Return AP in [0, 1] of one class at each of `THRESHOLDS`; nan where it has no objects."""
    matches = _match(name, index, truths, predictions)
    positives = int((~matches.difficult).sum())
    if positives == 0:
        return [float("nan")] * len(THRESHOLDS)
    return [
        voc_ap(*_precision_recall(matches, threshold / 100, positives), is_2007)
        for threshold in THRESHOLDS
    ]


def _match(
    name: str,
    index: int,
    truths: Mapping[str, Sequence[VocObject]],
    predictions: Mapping[str, Mapping[str, Any]],
) -> _Matches:
    """Find for each detection of a class the object of its image that it overlaps most."""
    overlaps, targets, scores = [np.zeros(0)], [np.zeros(0, np.int64)], [np.zeros(0)]
    difficult: list[bool] = []
    for image_id, objects in truths.items():
        mine = [o for o in objects if o.name == name]
        found = predictions.get(image_id)
        if found is not None:
            chosen = found["classes"] == index
            iou = _iou(found["boxes"][chosen], np.array([o.box for o in mine]).reshape(-1, 4))
            padded = np.concatenate([np.full((len(iou), 1), -1.0), iou], axis=1)
            overlaps.append(padded.max(axis=1))
            targets.append(padded.argmax(axis=1) - 1 + len(difficult))
            scores.append(found["scores"][chosen])
        difficult += [o.difficult for o in mine]
    order = np.argsort(-np.concatenate(scores), kind="stable")
    return _Matches(
        np.concatenate(overlaps)[order],
        np.concatenate(targets)[order],
        np.array(difficult, dtype=bool),
    )


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the IoU (A, B) of XYXY boxes in continuous coordinates."""
    corner0 = np.maximum(a[:, None, :2], b[None, :, :2])
    corner1 = np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.clip(corner1 - corner0, 0, None).prod(axis=2)
    areas = [np.clip(x[:, 2:] - x[:, :2], 0, None).prod(axis=1) for x in (a, b)]
    union = areas[0][:, None] + areas[1][None, :] - shared
    found: np.ndarray = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return found


def _precision_recall(
    matches: _Matches, threshold: float, positives: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return recall and precision after each detection that counts.

    An object is found by the first detection that overlaps it more than the threshold; later ones
    are false. Detections on difficult objects do not count.
    """
    hit = matches.overlap > threshold
    target = matches.target.clip(0)
    counts = ~(hit & matches.difficult[target]) if len(matches.difficult) else ~hit
    hit, target = hit[counts], target[counts]
    first = np.zeros(len(hit), dtype=bool)
    hits = np.flatnonzero(hit)
    first[hits[np.unique(target[hits], return_index=True)[1]]] = True
    found = np.cumsum(first)
    return found / positives, found / np.arange(1, len(found) + 1)


def voc_ap(rec: np.ndarray, prec: np.ndarray, use_07_metric: bool = False) -> float:
    """Compute AP from a curve.

    Args:
        rec: (D,) recall after each detection, not falling.
        prec: (D,) precision.
        use_07_metric: mean of the highest precision at recall 0, 0.1, ..., 1 or more, as until
            2009; otherwise the area under the curve, made monotone.

    Returns:
        AP in [0, 1].
    """
    if use_07_metric:
        levels = np.arange(0.0, 1.1, 0.1)
        return float(np.mean([prec[rec >= level].max(initial=0.0) for level in levels]))
    best_from_here = np.maximum.accumulate(prec[::-1])[::-1]
    return float(np.sum(np.diff(rec, prepend=0.0) * best_from_here))
