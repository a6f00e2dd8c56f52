"""Evaluation of instances and label images by Cityscapes' rules (see `_cityscapes_metrics`)."""

from __future__ import annotations

import logging
import os
import tempfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from d2kit.data.catalog import CITYSCAPES_CATEGORIES, MetadataCatalog
from d2kit.data.datasets.cityscapes import ground_truth_file
from d2kit.data.detection_utils import read_label_map
from d2kit.evaluation.evaluator import DatasetEvaluator, gather_on_main
from d2kit.evaluation.sem_seg_evaluation import confusion, mean_of_defined, ratio
from d2kit.utils.logger import create_small_table

__all__ = ["CityscapesEvaluator", "CityscapesInstanceEvaluator", "CityscapesSemSegEvaluator"]


LABEL_IDS = np.array([category["id"] for category in CITYSCAPES_CATEGORIES])
"""(19,) label id of each train id."""
THING_IDS = {c["name"]: c["id"] for c in CITYSCAPES_CATEGORIES if c["isthing"]}
MAX_LABEL = 33
OVERLAPS = np.arange(10) * 0.05 + 0.5
MIN_PIXELS = 100
"""Smaller instances of the ground truth are not counted."""
FIRST_INSTANCE = 1000
"""Pixel values from here on are label * 1000 + number; those below are labels (groups, stuff)."""

GROUPS = (
    ("road", "sidewalk"),
    ("building", "wall", "fence"),
    ("pole", "traffic light", "traffic sign"),
    ("vegetation", "terrain"),
    ("sky",),
    ("person", "rider"),
    ("car", "truck", "bus", "train", "motorcycle", "bicycle"),
)
"""The classes of each category."""

# pixels of an instance, mean over the training set; published with the benchmark
MEAN_SIZES = {
    "person": 3462.4756337644,
    "rider": 3930.4788056518,
    "car": 12794.0202738185,
    "truck": 27855.1264367816,
    "bus": 35732.1511111111,
    "train": 67583.7075812274,
    "motorcycle": 6298.7200839748,
    "bicycle": 4672.3249222261,
}


@dataclass(frozen=True)
class InstanceOverlaps:
    """What the AP needs to know of one image: P predictions, G instances of things.

    Args:
        scores: (P,).
        labels: (P,) label ids.
        pixels: (P,) sizes of the predictions.
        void: (P,) of them, pixels that are not labelled.
        shared: (P, G) pixels in both.
        truth_labels: (G,) label ids.
        truth_pixels: (G,).
        counted: (G,) bool: neither a group nor too small.
    """

    scores: np.ndarray
    labels: np.ndarray
    pixels: np.ndarray
    void: np.ndarray
    shared: np.ndarray
    truth_labels: np.ndarray
    truth_pixels: np.ndarray
    counted: np.ndarray


def overlaps_of_image(
    masks: Sequence[np.ndarray], scores: np.ndarray, labels: np.ndarray, truth: np.ndarray
) -> InstanceOverlaps:
    """Count the pixels that predictions share with the ground truth.

    Args:
        masks: P masks (H, W) bool.
        scores: (P,).
        labels: (P,) label ids.
        truth: (H, W) pixel values of ``*_instanceIds.png``.

    Returns:
        The counts; empty masks are left out.
    """
    values, inverse, pixels = _values(truth)
    of_value = np.where(values < FIRST_INSTANCE, values, values // FIRST_INSTANCE)
    things = np.isin(of_value, list(THING_IDS.values()))
    void = (values <= MAX_LABEL) & ~np.isin(values, LABEL_IDS)
    counts = np.array(
        [np.bincount(inverse[mask], minlength=len(values)) for mask in masks]
    ).reshape(-1, len(values))
    kept = counts.sum(axis=1) > 0
    counts = counts[kept]
    return InstanceOverlaps(
        scores=np.asarray(scores, dtype=np.float64)[kept],
        labels=np.asarray(labels)[kept],
        pixels=counts.sum(axis=1),
        void=counts[:, void].sum(axis=1),
        shared=counts[:, things],
        truth_labels=of_value[things],
        truth_pixels=pixels[things],
        counted=(values[things] >= FIRST_INSTANCE) & (pixels[things] >= MIN_PIXELS),
    )


def _values(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the V values of an image in [0, 65535], their numbers (H, W), their pixels (V,).

    As ``np.unique``, without its sorting, which takes longest on images of 2 megapixels.
    """
    counts = np.bincount(image.ravel())
    values = np.flatnonzero(counts)
    number = np.zeros(len(counts), dtype=np.int64)
    number[values] = np.arange(len(values))
    return values, number[image], counts[values]


def average_precisions(images: Sequence[InstanceOverlaps]) -> np.ndarray:
    """Return (8, 10) AP in [0, 1] of each thing class at each overlap; nan without instances."""
    return np.array(
        [
            [_class_ap(images, label, overlap) for overlap in OVERLAPS]
            for label in THING_IDS.values()
        ]
    )


def _class_ap(images: Sequence[InstanceOverlaps], label: int, overlap: float) -> float:
    scores, hits, positives = [], [], 0
    for image in images:
        mine, theirs = image.labels == label, image.truth_labels == label
        counted = image.counted[theirs]
        positives += int(counted.sum())
        if mine.any():
            found = _judge(image, mine, theirs, overlap)
            scores.append(found[0])
            hits.append(found[1])
    if positives == 0:
        return float("nan")
    if not scores:
        return 0.0
    return _area(np.concatenate(scores), np.concatenate(hits), positives)


def _judge(
    image: InstanceOverlaps, mine: np.ndarray, theirs: np.ndarray, overlap: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return (scores, whether true) of the predictions of one class that count.

    An instance is found by the best of the predictions that overlap it enough; the others are
    false. A prediction without an instance counts unless most of it is void, group or too small.
    """
    scores, counted = image.scores[mine], image.counted[theirs]
    shared = image.shared[mine][:, theirs]
    union = image.pixels[mine][:, None] + image.truth_pixels[theirs][None] - shared
    overlapping = shared > overlap * union
    on_counted = overlapping & counted[None]
    best = np.where(on_counted, scores[:, None], -np.inf).argmax(axis=0)
    true = np.zeros(len(scores), dtype=bool)
    true[best[on_counted.any(axis=0)]] = True
    ignorable = image.void[mine] + shared[:, ~counted].sum(axis=1)
    lonely = ~overlapping.any(axis=1) & (ignorable <= overlap * image.pixels[mine])
    counts = on_counted.any(axis=1) | lonely
    return scores[counts], true[counts]


def _area(scores: np.ndarray, true: np.ndarray, positives: int) -> float:
    """Return the area under precision over recall, with a point for each distinct score.

    The curve starts at (recall 0, precision 1) and is joined by straight lines.
    """
    if len(scores) == 0:
        return 0.0
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    found = np.cumsum(true[order])[ends]
    precision = np.concatenate([[1.0], found / (ends + 1)])
    recall = np.concatenate([[0.0], found / positives])
    return float(np.sum(np.diff(recall) * (precision[1:] + precision[:-1]) / 2))


@dataclass
class SemanticCounts:
    """Pixels of label images, summed over images.

    Args:
        matrix: (19, 20) by true and predicted class; last: no class.
        weighted: (4, 19) per class of instances, each weighted to the mean size of its class:
            found as the class, not so, found as a class of its category, not so.
    """

    matrix: np.ndarray
    weighted: np.ndarray

    @classmethod
    def empty(cls) -> SemanticCounts:
        """Return counts of no image."""
        classes = len(LABEL_IDS)
        return cls(np.zeros((classes, classes + 1), np.int64), np.zeros((4, classes)))

    def __add__(self, other: SemanticCounts) -> SemanticCounts:
        return SemanticCounts(self.matrix + other.matrix, self.weighted + other.weighted)


def count_labels(predicted: np.ndarray, truth: np.ndarray, instances: np.ndarray) -> SemanticCounts:
    """Count the pixels of one image.

    Args:
        predicted: (H, W) train ids.
        truth: (H, W) label ids, of ``*_labelIds.png``.
        instances: (H, W) pixel values of ``*_instanceIds.png``.
    """
    classes = len(LABEL_IDS)
    to_train = np.full(256, classes)
    to_train[LABEL_IDS] = np.arange(classes)
    weighted = np.zeros((4, classes))
    group_of = np.full(classes + 1, -1)
    for number, names in enumerate(_group_indices()):
        group_of[names] = number
    values, inverse, size = _values(instances)
    target = to_train[np.clip(values // FIRST_INSTANCE, 0, 255)]
    wanted = (values > FIRST_INSTANCE) & (target < classes)
    of_pixel = target[inverse]
    same = np.bincount(inverse[predicted == of_pixel], minlength=len(values))
    related = group_of[predicted] == group_of[of_pixel]
    kin = np.bincount(inverse[related], minlength=len(values))
    rows = np.flatnonzero(wanted)
    counts = np.stack([same, size - same, kin, size - kin])[:, rows]
    mean_size = np.array([MEAN_SIZES.get(c["name"], 0.0) for c in CITYSCAPES_CATEGORIES])
    factors = mean_size[target[rows]] / size[rows]
    np.add.at(weighted.T, target[rows], (counts * factors).T)
    return SemanticCounts(confusion(to_train[truth], predicted, classes), weighted)


def _group_indices() -> list[list[int]]:
    """Return the train ids of each of `GROUPS`."""
    names = [category["name"] for category in CITYSCAPES_CATEGORIES]
    return [[names.index(name) for name in group] for group in GROUPS]


def semantic_scores(counts: SemanticCounts) -> dict[str, float]:
    """Return the four scores of the benchmark in [0, 1]; nan where nothing defines one."""
    matrix, weighted = counts.matrix, counts.weighted
    hits = np.diagonal(matrix)
    missed = matrix.sum(axis=1) - hits
    false = matrix[:, :-1].sum(axis=0) - hits
    found, lost, kin_found, kin_lost = weighted
    things = np.array([category["isthing"] for category in CITYSCAPES_CATEGORIES], dtype=bool)
    groups, groups_weighted = [], []
    for group in _group_indices():
        group_hits = matrix[np.ix_(group, group)].sum()
        group_false = matrix[:, group].sum() - group_hits
        rows = matrix[group].sum()
        groups.append(ratio(group_hits, rows + group_false))
        if things[group].all():
            part, rest = kin_found[group].sum(), kin_lost[group].sum()
            groups_weighted.append(ratio(part, part + rest + group_false))
    instance = ratio(found, found + lost + false)
    return {
        "IoU": mean_of_defined(ratio(hits, hits + missed + false)),
        "iIoU": mean_of_defined(instance[things]),
        "IoU_sup": mean_of_defined(np.array(groups)),
        "iIoU_sup": mean_of_defined(np.array(groups_weighted)),
    }


logger = logging.getLogger(__name__)


class CityscapesEvaluator(DatasetEvaluator):
    """What both evaluators share: from an image to its ground truth, and one result per image.

    Args:
        dataset_name: a dataset whose metadata has `image_dir` and `gt_dir`.

    Raises:
        ValueError: the metadata lack one of these.
    """

    def __init__(self, dataset_name: str) -> None:
        self._metadata = MetadataCatalog.get(dataset_name)
        missing = [key for key in ("image_dir", "gt_dir") if not self._metadata.get(key)]
        if missing:
            raise ValueError(
                f"dataset '{dataset_name}' has no {', '.join(missing)} in its metadata; "
                f"{type(self).__name__} needs a dataset in Cityscapes' layout"
            )
        self._cpu_device = torch.device("cpu")
        self._logger = logger
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self._images: dict[str, Any] = {}
        self.__dict__.pop("_working_dir", None)

    @cached_property
    def _working_dir(self) -> tempfile.TemporaryDirectory[str]:
        """A folder of this round, for user classes that write files; none is made here."""
        return tempfile.TemporaryDirectory(prefix="cityscapes_eval_")

    @property
    def _temp_dir(self) -> str:
        return self._working_dir.name

    def _read(self, file_name: str, kind: str) -> np.ndarray:
        """Read the ground truth of an image: "instanceIds" or "labelIds"."""
        metadata = self._metadata
        return read_label_map(
            ground_truth_file(file_name, metadata.image_dir, metadata.gt_dir, f"{kind}.png")
        )

    def _check_size(self, file_name: str, truth: np.ndarray, size: tuple[int, ...]) -> None:
        if truth.shape != tuple(size):
            raise ValueError(
                f"{file_name}: the ground truth is {truth.shape} (h, w), the prediction {size}"
            )

    def _gather(self) -> list[Any] | None:
        """Return what `process` kept of each image, once; None but on the main process."""
        gathered = gather_on_main(list(self._images.items()))
        if gathered is None:
            return None
        images = dict(gathered)
        logger.info("Evaluating %d images of %s", len(images), self._metadata.name)
        return list(images.values())


class CityscapesInstanceEvaluator(CityscapesEvaluator):
    """Computes Cityscapes' AP of instances; only images that were processed count.

    Args:
        dataset_name: a dataset with `image_dir`, `gt_dir` and `thing_classes` in its metadata.
    """

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Any]) -> None:
        """Take in one batch.

        Args:
            inputs: per image a dict with ``file_name``.
            outputs: per image a dict with ``instances``: `scores`, `pred_classes`, `pred_masks`
                (R, H, W) bool.

        Raises:
            ValueError: a class that Cityscapes does not evaluate; masks of another size.
        """
        names = self._metadata.thing_classes
        unknown = set(names) - set(THING_IDS)
        if unknown:
            raise ValueError(
                f"'{self._metadata.name}': Cityscapes does not evaluate instances of "
                f"{', '.join(sorted(unknown))}; it does of {', '.join(THING_IDS)}"
            )
        for image, output in zip(inputs, outputs, strict=True):
            file_name = os.fspath(image["file_name"])
            truth = self._read(file_name, "instanceIds")
            instances = output["instances"].to("cpu")
            masks = np.asarray(getattr(instances.pred_masks, "tensor", instances.pred_masks)) != 0
            self._check_size(file_name, truth, masks.shape[1:] if len(masks) else truth.shape)
            labels = [THING_IDS[names[c]] for c in instances.pred_classes.tolist()]
            self._images[file_name] = overlaps_of_image(
                list(masks), instances.scores.numpy(), np.array(labels, dtype=np.int64), truth
            )

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Compute the figures.

        Returns:
            ``{"segm": {"AP": ..., "AP50": ...}}`` in percent, means over the classes that have
            instances; None on other processes than the main one.
        """
        images = self._gather()
        if images is None:
            return None
        table = average_precisions(images) * 100
        per_class = dict(zip(THING_IDS, table.mean(axis=1).tolist(), strict=True))
        logger.info("AP per class:\n%s", create_small_table(per_class))
        results = {
            "AP": mean_of_defined(table),
            "AP50": mean_of_defined(table[:, 0]),
        }
        logger.info("Evaluation results for segm:\n%s", create_small_table(results))
        return OrderedDict(segm=results)


class CityscapesSemSegEvaluator(CityscapesEvaluator):
    """Computes Cityscapes' IoU and instance-weighted IoU; only processed images count.

    Args:
        dataset_name: a dataset with `image_dir` and `gt_dir` in its metadata.
    """

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Any]) -> None:
        """Take in one batch.

        Args:
            inputs: per image a dict with ``file_name``.
            outputs: per image a dict with ``sem_seg``: (19, H, W) scores, or (H, W) train ids.

        Raises:
            ValueError: a class that does not exist; an output of another size.
        """
        classes = len(LABEL_IDS)
        for image, output in zip(inputs, outputs, strict=True):
            file_name = os.fspath(image["file_name"])
            scores = output["sem_seg"]
            labels = scores.argmax(dim=0) if scores.dim() == 3 else scores
            predicted = labels.cpu().numpy()
            truth = self._read(file_name, "labelIds")
            self._check_size(file_name, truth, predicted.shape)
            if predicted.size and not 0 <= predicted.min() <= predicted.max() < classes:
                raise ValueError(
                    f"{file_name}: predicted classes up to {predicted.max()}, Cityscapes has "
                    f"{classes}; set MODEL.SEM_SEG_HEAD.NUM_CLASSES to this"
                )
            instances = self._read(file_name, "instanceIds")
            self._images[file_name] = count_labels(predicted, truth, instances)

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Compute the figures.

        Returns:
            ``{"sem_seg": {"IoU", "iIoU", "IoU_sup", "iIoU_sup"}}`` in percent, over the classes
            and over the categories (``sup``); None on other processes than the main one.
        """
        images = self._gather()
        if images is None:
            return None
        counts = sum(images, start=SemanticCounts.empty())
        results = {k: v * 100 for k, v in semantic_scores(counts).items()}
        logger.info("Evaluation results for sem_seg:\n%s", create_small_table(results))
        return OrderedDict(sem_seg=results)
