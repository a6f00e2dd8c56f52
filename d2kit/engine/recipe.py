"""A recipe from the data: config keys that fit a dataset, a device and a time, with reasons."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Budget", "Choice", "DataFacts", "anchor_recall", "data_facts", "make_recipe"]

SMALLEST = 16.0
"""Pixels that a small object (10th percentile) should have in the network's input."""
SHORT_SIDES = (128, 800)
PIXELS_PER_IMAGE = {"cpu": 256, "cuda": 800}
"""Longest short side that a device is asked for without a reason in the data."""
SIZE_SHARES = (0.75, 0.85, 0.9, 1.0)
"""Short sides in training, of the largest."""
TEST_SHARE = 0.95
"""Of the largest short side in training, whose objects are larger than the usual ones. Penn-Fudan,
1,001 iterations up to 256: box AP 62.8 at 240, 60.9 at 256."""
DEFAULT_SIZES = (16.0, 32.0, 64.0, 128.0, 256.0)
DEFAULT_RATIOS = (0.5, 1.0, 2.0)
GOOD_RECALL = 0.95
LEVELS = ("p2", "p3", "p4", "p5", "p6")
LOST_RECALL = 0.03
"""Share of the boxes that may lose their anchor where proposals leave out the finest level."""
RARE = 0.1
"""Share of the images below which a class is shown more often."""
EVALUATIONS = 4
EVALUATION_SHARE = 0.15
"""Of the time budget, for evaluations, starting and writing."""
ITERATIONS = (300, 30_000)
ENOUGH_ITERATIONS = 600
"""Below these a smaller input is tried, down to `LEAST_SIDE`."""
LEAST_SIDE = 192
PASSES = (12, 100)
"""Least and most epochs where only the data decide."""


class DataFacts(NamedTuple):
    """What a recipe needs to know of a dataset.

    Args:
        images: number of training images.
        empty: those without objects.
        sizes: (N, 2) float, width and height of each image in pixels.
        boxes: (R, 2) float, width and height of each object in shares of its image's short side.
        classes: names in the order of the ids.
        image_share: class -> share of the images that have it.
        masks: objects that have a mask.
        keypoints: names, where all objects have keypoints; else empty.
        most: objects of the fullest image.
    """

    images: int
    empty: int
    sizes: np.ndarray
    boxes: np.ndarray
    classes: tuple[str, ...]
    image_share: Mapping[str, float]
    masks: int
    keypoints: tuple[str, ...]
    most: int


class Budget(NamedTuple):
    """What a training may cost.

    Args:
        minutes: of training and evaluation together; 0: what the data need.
        epochs: in place of it.
        device: cpu or cuda.
        seconds: measured for an iteration of `batch` images of `pixels` each; 0: not measured.
        pixels: of each image in that measurement.
        batch: images per iteration.
    """

    minutes: float = 0.0
    epochs: float = 0.0
    device: str = "cpu"
    seconds: float = 0.0
    pixels: float = 240.0 * 320.0
    batch: int = 2


class Choice(NamedTuple):
    """One config key of a recipe.

    Args:
        key: full name.
        value: of the key.
        reason: why, with the numbers that decided.
    """

    key: str
    value: Any
    reason: str


def data_facts(coco: Mapping[str, Any]) -> DataFacts:
    """Measure a COCO dictionary; crowds are left out.

    Raises:
        ValueError: no image or no object.
    """
    sides = {i["id"]: (float(i["width"]), float(i["height"])) for i in coco["images"]}
    objects = [a for a in coco["annotations"] if not a.get("iscrowd")]
    if not sides or not objects:
        raise ValueError(
            f"expected images with objects, got {len(sides)} images and {len(objects)} objects"
        )
    boxes = []
    for a in objects:
        short = min(sides[a["image_id"]])
        w, h = (a["bbox"][2], a["bbox"][3])
        if w > 0 and h > 0:
            boxes.append((w / short, h / short))
    names = {c["id"]: c["name"] for c in sorted(coco["categories"], key=lambda c: c["id"])}
    seen = {(a["image_id"], a["category_id"]) for a in objects}
    of_class = Counter(names[category] for _, category in seen)
    per_image = Counter(a["image_id"] for a in objects)
    points: tuple[str, ...] = ()
    lists = {tuple(c.get("keypoints") or ()) for c in coco["categories"]}
    if all(a.get("keypoints") for a in objects) and len(lists) == 1:
        points = lists.pop()
    return DataFacts(
        images=len(sides),
        empty=len(sides) - len(per_image),
        sizes=np.array([*sides.values()]),
        boxes=np.array(boxes).reshape(-1, 2),
        classes=tuple(names.values()),
        image_share={name: of_class[name] / len(sides) for name in names.values()},
        masks=sum(bool(a.get("segmentation")) for a in objects),
        keypoints=points,
        most=max(per_image.values()),
    )


def anchor_recall(boxes: np.ndarray, sizes: np.ndarray, ratios: np.ndarray) -> float:
    """Return the share of boxes that an anchor of the same centre overlaps by an IoU >= 0.5.

    Args:
        boxes: (R, 2) width and height in pixels.
        sizes: (S,) square root of the anchors' areas, pixels.
        ratios: (A,) height over width.
    """
    size, ratio = (v.ravel() for v in np.meshgrid(sizes, ratios))
    anchors = np.stack([size / np.sqrt(ratio), size * np.sqrt(ratio)], 1)
    shared = np.minimum(boxes[:, None], anchors[None]).prod(2)
    union = boxes.prod(1)[:, None] + anchors.prod(1)[None] - shared
    return float(((shared / union).max(1) >= 0.5).mean())


def make_recipe(facts: DataFacts, budget: Budget) -> list[Choice]:
    """Return the keys of a training on a dataset.

    Args:
        facts: of the training images.
        budget: time and device.
    """
    short, size_choices = _input_size(facts, budget)
    iterations, length = _length(facts, budget, short)
    return [
        *_task(facts),
        *size_choices,
        *_anchors(facts, short),
        *length,
        *_rates(budget, iterations),
        *_sampling(facts),
        *_evaluation(facts, iterations),
    ]


def _task(facts: DataFacts) -> list[Choice]:
    total, count = len(facts.boxes), len(facts.classes)
    mask = facts.masks >= total
    why = f"{facts.masks} of {total} objects have a mask"
    if facts.masks and not mask:
        why += ": those without would be holes in the truth, so boxes are learned from all"
    found = [
        Choice("MODEL.ROI_HEADS.NUM_CLASSES", count, f"classes: {', '.join(facts.classes)}"[:200]),
        Choice("MODEL.MASK_ON", mask, why),
    ]
    if facts.keypoints:
        points = len(facts.keypoints)
        found += [
            Choice("MODEL.KEYPOINT_ON", True, f"all objects have {points} keypoints"),
            Choice("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", points, "as many as are named"),
            Choice("TEST.KEYPOINT_OKS_SIGMAS", [0.05] * points, "no sigmas are known: all equal"),
            Choice("INPUT.RANDOM_FLIP", "none", "which keypoints are left and right is not known"),
        ]
    if facts.most > 80:
        limit = math.ceil(1.25 * facts.most / 50) * 50
        why = f"the fullest image has {facts.most} objects"
        found.append(Choice("TEST.DETECTIONS_PER_IMAGE", limit, why))
    return found


def _input_size(facts: DataFacts, budget: Budget) -> tuple[int, list[Choice]]:
    small = float(np.percentile(np.sqrt(facts.boxes.prod(1)), 10))
    own = float(np.median(facts.sizes.min(1)))
    cap = PIXELS_PER_IMAGE.get(budget.device, PIXELS_PER_IMAGE["cuda"])
    wanted = SMALLEST / max(small, 1e-6)
    # Tiny objects may cost up to twice the usual side: area, and so time, is four times as large.
    usual = min(cap, own)
    short = min(max(usual, wanted), 2 * cap, own, SHORT_SIDES[1])
    short = max(SHORT_SIDES[0], int(short // 16 * 16))
    # Where the time is short and objects are large, more iterations are worth more than pixels.
    while short > LEAST_SIDE and small * (short - 16) >= 2 * SMALLEST:
        if not 0 < _fitting(facts, budget, short) < ENOUGH_ITERATIONS:
            break
        short -= 16
    seen = small * short
    why = (
        f"a small object (10th percentile) is {small:.1%} of the short side: {seen:.0f} pixels of "
        f"{short}; {budget.device}, images of {own:.0f}"
    )
    if seen < SMALLEST * 0.9:
        why += f"; {SMALLEST:.0f} would need {wanted:.0f}: cut the images into tiles"
    aspect = float(np.percentile(facts.sizes.max(1) / facts.sizes.min(1), 95))
    longest = math.ceil(short * max(min(aspect, 2.0), 1.0) / 16) * 16
    steps = sorted({max(64, int(short * share // 16 * 16)) for share in SIZE_SHARES})
    test = max(64, int(short * TEST_SHARE // 16 * 16))
    return short, [
        Choice("INPUT.MIN_SIZE_TRAIN", steps, why),
        Choice("INPUT.MAX_SIZE_TRAIN", longest, f"95 % of the images are at most {aspect:.2f}: 1"),
        Choice("INPUT.MIN_SIZE_TEST", test, "among the training sizes, not the largest of them"),
        Choice("INPUT.MAX_SIZE_TEST", longest, "as in training"),
    ]


def _anchors(facts: DataFacts, short: int) -> list[Choice]:
    boxes = facts.boxes * short
    before = anchor_recall(boxes, np.array(DEFAULT_SIZES), np.array(DEFAULT_RATIOS))
    told = f"{before:.1%} of the boxes have a default anchor of IoU >= 0.5"
    if before >= GOOD_RECALL:
        return _levels(boxes, DEFAULT_SIZES, DEFAULT_RATIOS, told)
    ratios = np.sort(np.exp(_clusters(np.log(boxes[:, 1] / boxes[:, 0]), 3)))
    low, high = np.percentile(np.sqrt(boxes.prod(1)), [4, 96])
    sizes = np.geomspace(max(low, 4.0), max(high, 2 * low, 8.0), 5)
    after = anchor_recall(boxes, sizes, ratios)
    kept_sizes: tuple[float, ...] = DEFAULT_SIZES
    kept_ratios: tuple[float, ...] = DEFAULT_RATIOS
    if after > before:
        kept_sizes = tuple(float(f"{s:.3g}") for s in sizes)
        kept_ratios = tuple(float(f"{r:.3g}") for r in ratios)
    why = f"{told}; with sizes and ratios of the boxes {max(after, before):.1%}"
    return _levels(boxes, kept_sizes, kept_ratios, why)


def _levels(
    boxes: np.ndarray, sizes: tuple[float, ...], ratios: tuple[float, ...], why: str
) -> list[Choice]:
    """Return the anchors, and the levels of the pyramid that propose objects.

    The finest level has three quarters of the pixels. It is left out where no object needs it,
    even in the smallest of the training's sizes.
    """
    smallest = boxes * SIZE_SHARES[0]
    lost = anchor_recall(smallest, np.array(sizes), np.array(ratios))
    lost -= anchor_recall(smallest, np.array(sizes[1:]), np.array(ratios))
    first = 1 if lost <= LOST_RECALL else 0
    told = "no object needs the finest" if first else f"{lost:.1%} of the objects need the finest"
    whole = [[int(s) if s == int(s) else s] for s in sizes[first:]]
    return [
        Choice("MODEL.ANCHOR_GENERATOR.SIZES", whole, why),
        Choice("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [list(ratios)], why),
        Choice("MODEL.RPN.IN_FEATURES", list(LEVELS[first:]), f"of the pyramid's levels {told}"),
    ]


def _clusters(values: np.ndarray, count: int) -> np.ndarray:
    """Return the means of clusters of numbers: Lloyd's algorithm from quantiles."""
    centres: np.ndarray = np.percentile(values, np.linspace(0, 100, count + 2)[1:-1])
    for _ in range(50):
        nearest = np.abs(values[:, None] - centres[None]).argmin(1)
        means = [
            values[nearest == k].mean() if (nearest == k).any() else c
            for k, c in enumerate(centres)
        ]
        if np.allclose(means, centres):
            break
        centres = np.array(means)
    # Equal ratios would make equal anchors: they are drawn apart.
    for k in range(1, count):
        centres[k] = max(centres[k], centres[k - 1] + 0.2)
    return centres


def _seconds(facts: DataFacts, budget: Budget, short: int) -> float:
    """Estimate the seconds of an iteration: a part of it does not grow with the image."""
    aspect = float(np.median(facts.sizes.max(1) / facts.sizes.min(1)))
    return budget.seconds * (0.4 + 0.6 * short * short * min(aspect, 2.0) / budget.pixels)


def _fitting(facts: DataFacts, budget: Budget, short: int) -> int:
    """Return the iterations that fit into the time; 0 where it is not limited."""
    if not (budget.minutes and budget.seconds):
        return 0
    time = budget.minutes * 60 * (1 - EVALUATION_SHARE)
    return max(1, int(time / _seconds(facts, budget, short)))


def _length(facts: DataFacts, budget: Budget, short: int) -> tuple[int, list[Choice]]:
    per_epoch = facts.images / budget.batch
    if budget.epochs:
        iterations = max(1, math.ceil(budget.epochs * per_epoch))
        why = f"{budget.epochs:g} epochs were asked for"
    else:
        epochs = min(max(3600 / facts.images, PASSES[0]), PASSES[1])
        iterations = min(max(math.ceil(epochs * per_epoch), ITERATIONS[0]), ITERATIONS[1])
        why = f"{facts.images} images: {iterations / per_epoch:.0f} epochs"
        if fits := _fitting(facts, budget, short):
            each = _seconds(facts, budget, short)
            if fits < iterations:
                why = f"{budget.minutes:g} minutes at {each:.2f} s an iteration (wanted: {why})"
            iterations = min(iterations, fits)
    period = math.ceil(iterations / EVALUATIONS)  # the last one is that of the end
    return iterations, [
        Choice("SOLVER.MAX_ITER", iterations, why),
        Choice("SOLVER.CHECKPOINT_PERIOD", period, "at each evaluation"),
        Choice("TEST.EVAL_PERIOD", period, f"{EVALUATIONS} evaluations"),
    ]


def _rates(budget: Budget, iterations: int) -> list[Choice]:
    rate = float(f"{4e-4 * math.sqrt(budget.batch / 2):.2g}")
    warm = min(max(round(0.05 * iterations), min(10, iterations // 4)), 1000)
    decay = float(f"{1 - 1 / min(max(iterations / 20, 10), 5000):.4g}")
    return [
        Choice("SOLVER.IMS_PER_BATCH", budget.batch, f"device {budget.device}"),
        Choice("SOLVER.OPTIMIZER", "AdamW", "reaches more than SGD in few iterations"),
        Choice("SOLVER.BASE_LR", rate, f"AdamW: 0.0004 at 2 images, x sqrt({budget.batch} / 2)"),
        Choice("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "ends at 0 whatever the length"),
        Choice("SOLVER.WARMUP_ITERS", warm, f"5 % of {iterations} iterations"),
        Choice("SOLVER.EMA.ENABLED", True, "averaged weights are steadier after short trainings"),
        Choice("SOLVER.EMA.DECAY", decay, f"an average over about 1 / 20 of {iterations}"),
    ]


def _sampling(facts: DataFacts) -> list[Choice]:
    found = []
    rare = {n: s for n, s in facts.image_share.items() if 0 < s < RARE}
    if rare and len(facts.classes) > 1:
        name = min(rare, key=lambda n: rare[n])
        factor = math.sqrt(RARE / rare[name])
        why = f"'{name}' is in {rare[name]:.1%} of the images: shown {factor:.1f} times as often"
        found = [
            Choice("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler", why),
            Choice("DATALOADER.REPEAT_THRESHOLD", RARE, "classes in fewer images are repeated"),
        ]
    if facts.empty and facts.empty <= facts.images / 2:
        why = f"{facts.empty} images without objects teach what is none"
        found.append(Choice("DATALOADER.FILTER_EMPTY_ANNOTATIONS", False, why))
    return found


def _evaluation(facts: DataFacts, iterations: int) -> list[Choice]:
    metric = "segm/AP" if facts.masks >= len(facts.boxes) else "bbox/AP"
    found = [
        Choice("TEST.BEST_METRIC", metric, "model_best.pth is that of the best evaluation"),
        Choice("SOLVER.EARLY_STOPPING.METRIC", metric, "as for the best checkpoint"),
    ]
    # The rate of a cosine falls to the end: only a training that gets worse twice is hopeless.
    patience = 2 if iterations >= 1000 else 0
    why = "ends a training that two evaluations did not better" if patience else "short: never"
    return [*found, Choice("SOLVER.EARLY_STOPPING.PATIENCE", patience, why)]
