"""AP of instances, IoU and instance-weighted IoU as Cityscapes defines them.

Source: Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding", 2016,
sections 4.1 and 5.1 (arXiv 1604.01685). The published package cityscapesScripts needs a numpy
before 2.4; the tests compare with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from d2kit.data.datasets.builtin_meta import CITYSCAPES_CATEGORIES
from d2kit.evaluation._confusion import confusion, mean_of_defined, ratio

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
