"""From `Instances` to COCO's result format."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from d2kit.layers.mask_ops import bitmasks_to_rle, masks_to_rle
from d2kit.structures import BitMasks, Boxes, Instances, ROIMasks
from d2kit.structures.masks import rle_problem
from d2kit.utils.file_io import load_json
from d2kit.utils.logger import create_small_table
from d2kit.utils.text import one_line

if TYPE_CHECKING:
    from pycocotools.coco import COCO

LARGEST = 1e12  # pixels, ids: larger ones are no numbers of a result


def instances_to_coco_json(instances: Instances, img_id: int | str) -> list[dict[str, Any]]:
    """Turn the detections of one image into dicts of COCO's result format.

    Args:
        instances: R detections with `pred_boxes` (R, 4), `scores` (R,), `pred_classes` (R,);
            optionally `pred_masks`, a bool tensor or `BitMasks` (R, H, W), `ROIMasks` or
            probabilities (R, M, M) inside the boxes (thresholded at 0.5 and encoded without a
            full-size mask), or RLE dicts; optionally `pred_keypoints` (R, 17, 3), x, y, score.
        img_id: goes into every dict.

    Returns:
        R dicts with ``image_id``, ``category_id`` (the contiguous class), ``bbox`` (XYWH),
        ``score`` and where predicted ``segmentation`` (RLE, ``counts`` as str) and ``keypoints``.
    """
    return list(HeldResults(instances, img_id))


class HeldResults(Sequence[dict[str, Any]]):
    """Results of one image, kept as arrays until somebody looks at one of them.

    A hundred dicts take 50 kB and lengthen every garbage collection; their numbers take 3 kB.

    Args:
        instances: see `instances_to_coco_json`.
        image_id: goes into every dict.
    """

    def __init__(self, instances: Instances, image_id: int | str) -> None:
        self._image_id = image_id
        self._count = len(instances)
        self._rows: list[dict[str, Any]] | None = None
        if not self._count:  # perhaps without the other fields
            self._rows = []
            return
        self._boxes = _array(instances.pred_boxes)
        self._boxes[:, 2:] -= self._boxes[:, :2]
        self._scores = _array(instances.scores)
        self._classes = _array(instances.pred_classes)
        self._masks: tuple[np.ndarray, Any] | None = None
        if instances.has("pred_masks"):
            encoded = _encode_masks(instances)
            sides = np.array([rle["size"] for rle in encoded])
            runs = [rle["counts"] for rle in encoded]  # lists where they are not compressed
            texts = all(isinstance(one, str) for one in runs)
            self._masks = sides, "\n".join(runs) if texts else runs
        self._keypoints = None
        if instances.has("pred_keypoints"):
            keypoints = _array(instances.pred_keypoints)
            keypoints[:, :, :2] -= 0.5  # COCO names pixels, we name points: centres are at +0.5
            self._keypoints = keypoints.reshape(self._count, -1)

    def _all(self) -> list[dict[str, Any]]:
        """Return the dicts, which are made once: what is changed in one stays."""
        if self._rows is not None:
            return self._rows
        columns = (self._boxes.tolist(), self._scores.tolist(), self._classes.tolist())
        self._rows = [
            {"image_id": self._image_id, "category_id": category, "bbox": box, "score": score}
            for box, score, category in zip(*columns, strict=True)
        ]
        if self._masks is not None:
            sides, counts = self._masks
            counts = counts.split("\n") if isinstance(counts, str) else counts
            for row, size, runs in zip(self._rows, sides.tolist(), counts, strict=True):
                row["segmentation"] = {"size": size, "counts": runs}
        if self._keypoints is not None:
            for row, flat in zip(self._rows, self._keypoints.tolist(), strict=True):
                row["keypoints"] = flat
        return self._rows

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int | slice) -> Any:
        return self._all()[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._all())

    def __add__(self, other: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [*self, *other]

    def __radd__(self, other: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [*other, *self]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self._all() == list(other)

    __hash__ = None  # type: ignore[assignment]


def _array(value: object) -> np.ndarray:
    """Return a copy of a tensor, or of the one inside `Boxes`, `Keypoints`, ...; no half floats."""
    tensor = _tensor(value).detach().cpu()
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    return np.array(tensor.numpy())


def _tensor(value: Any) -> torch.Tensor:
    """Return the tensor inside `Boxes`, `Keypoints`, ..., or the tensor itself."""
    return value if isinstance(value, torch.Tensor) else value.tensor


def _encode_masks(instances: Instances) -> list[dict[str, Any]]:
    """Encode `pred_masks` as RLE with ``counts`` as str."""
    masks = instances.pred_masks
    if isinstance(masks, Sequence) and len(masks) and isinstance(masks[0], dict):
        return [_text_rle(rle) for rle in masks]
    if isinstance(masks, BitMasks):
        masks = masks.tensor
    if isinstance(masks, ROIMasks) or (
        isinstance(masks, torch.Tensor) and masks.is_floating_point()
    ):
        probabilities = masks.tensor if isinstance(masks, ROIMasks) else masks
        if probabilities.dim() == 4:
            probabilities = probabilities[:, 0]
        boxes = _tensor(instances.pred_boxes)
        if isinstance(masks, ROIMasks):
            boxes = masks.places(boxes)
        return [_text_rle(r) for r in masks_to_rle(probabilities, boxes, instances.image_size)]
    return encode_bitmasks(masks)


def encode_bitmasks(masks: torch.Tensor | np.ndarray) -> list[dict[str, Any]]:
    """Encode full-size masks as RLE.

    Args:
        masks: (R, H, W) bool or uint8.

    Returns:
        R dicts ``{"size": [H, W], "counts": str}``.
    """
    return [_text_rle(rle) for rle in bitmasks_to_rle(masks)]


def _text_rle(rle: dict[str, Any]) -> dict[str, Any]:
    """Make ``counts`` a str, so that the dict can be written as JSON."""
    counts = rle["counts"]
    text = counts.decode("ascii") if isinstance(counts, bytes) else counts
    return {"size": [int(side) for side in rle["size"]], "counts": text}


def read_coco_results(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read a file of COCO's results, and check what every reader of it needs.

    Args:
        path: JSON list of results: ``image_id``, ``category_id``, ``bbox`` of four numbers (five:
            rotated), ``score``; perhaps ``segmentation`` and ``keypoints``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not such a list; the message has file, number of the result, field, value.
    """
    found = load_json(path)
    if not isinstance(found, list):
        raise ValueError(f"{path}: expected a list of COCO results, got {type(found).__name__}")
    for number, result in enumerate(found):
        problem = _result_problem(result)
        if problem:
            raise ValueError(f"{path}: result number {number}: {problem}")
    return found


def _result_problem(result: object) -> str | None:
    """Say what is wrong with a result, of which a mask is only looked at roughly."""
    if not isinstance(result, dict):
        return f"expected an object, got {one_line(repr(result), 60)}"

    def is_number(value: Any) -> bool:
        return type(value) in (int, float) and abs(value) < LARGEST

    def numbers(value: Any, *lengths: int) -> bool:
        sound = isinstance(value, list) and (not lengths or len(value) in lengths)
        return sound and all(map(is_number, value))

    def mask(value: Any) -> bool:
        size: Any = value.get("size") if isinstance(value, dict) else None
        return numbers(size, 2) and rle_problem(value, *size) is None

    checks: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
        ("image_id", "an integer or text", lambda v: type(v) in (int, str)),
        ("category_id", "an integer", lambda v: type(v) is int and is_number(v)),
        ("bbox", "four or five finite numbers", lambda v: numbers(v, 4, 5)),
        ("score", "a finite number", is_number),
        ("segmentation", "a run-length mask", mask),
        ("keypoints", "finite numbers: x, y, score of each", numbers),
    )
    for key, wanted, fits in checks:
        optional = key in ("segmentation", "keypoints") or (
            key == "bbox" and "segmentation" in result
        )
        if key not in result and optional:
            continue
        value = result.get(key)
        if not fits(value):
            got = one_line(repr(value), 60) if key in result else "nothing: it is missing"
            return f"{key}: expected {wanted}, got {got}"
    return None


def instances_from_coco_json(
    results: Sequence[Mapping[str, Any]],
    image_size: tuple[int, int],
    to_class: Mapping[int, int] | None = None,
) -> Instances:
    """Turn results of one image back into detections; the reverse of `instances_to_coco_json`.

    Args:
        results: R dicts of COCO's result format.
        image_size: (h, w) in pixels.
        to_class: category id -> contiguous class; None: the ids are classes.

    Returns:
        R detections with `pred_boxes`, `scores`, `pred_classes`, and where all results have them
        `pred_masks` (run-length masks) and `pred_keypoints` (R, K, 3).

    Raises:
        ValueError: a result lacks a field, or has a category that is not in `to_class`.
    """
    rows = []
    for result in results:
        missing = [key for key in ("category_id", "bbox", "score") if key not in result]
        if missing:
            raise ValueError(f"a result has no {', '.join(missing)}: {str(dict(result)):.80}")
        category = result["category_id"]
        if to_class is not None and category not in to_class:
            raise ValueError(f"category id {category} of a result is not one of the dataset")
        rows.append((result, category if to_class is None else to_class[category]))
    boxes = torch.tensor([r["bbox"] for r, _ in rows], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    instances = Instances(image_size, pred_boxes=Boxes(boxes))
    instances.scores = torch.tensor([float(r["score"]) for r, _ in rows])
    instances.pred_classes = torch.tensor([c for _, c in rows], dtype=torch.int64)
    if rows and all("segmentation" in r for r, _ in rows):
        instances.pred_masks = [r["segmentation"] for r, _ in rows]
    if rows and all("keypoints" in r for r, _ in rows):
        points = torch.tensor([r["keypoints"] for r, _ in rows], dtype=torch.float32)
        points = points.reshape(len(rows), -1, 3)
        points[..., :2] += 0.5  # from pixels to points, see `instances_to_coco_json`
        instances.pred_keypoints = points
    return instances


METRICS: dict[str, tuple[str, ...]] = {
    "bbox": ("AP", "AP50", "AP75", "APs", "APm", "APl"),
    "segm": ("AP", "AP50", "AP75", "APs", "APm", "APl"),
    "keypoints": ("AP", "AP50", "AP75", "APm", "APl"),
}
_SELECTION: dict[str, tuple[float | None, str]] = {  # metric: (IoU or all, area range)
    "AP": (None, "all"),
    "AP50": (0.5, "all"),
    "AP75": (0.75, "all"),
    "APs": (None, "small"),
    "APm": (None, "medium"),
    "APl": (None, "large"),
}
_TABLE_WIDTH = 100  # characters
_LONGEST_NAME = 40  # characters


def _percent(precision: np.ndarray) -> float:
    """Mean of the defined (> -1) entries in percent; nan where there is none."""
    defined = precision[precision > -1]
    return float(np.mean(defined) * 100) if defined.size else float("nan")


def derive_results(
    coco_eval: Any, iou_type: str, class_names: Sequence[str] | None
) -> dict[str, float]:
    """Read AP figures from an accumulated COCO evaluation.

    Args:
        coco_eval: after `accumulate`: ``eval["precision"]`` is (T, R, K, A, M).
        iou_type: ``bbox``, ``segm`` or ``keypoints``.
        class_names: K names in the order of the category axis, a number is added to equal ones;
            None or one name: no figure per class.

    Returns:
        Percent; nan where no ground truth defines the figure. ``AP``, ``AP50``, ... and
        ``AP-<class>``.
    """
    precision = np.asarray(coco_eval.eval["precision"])
    areas = list(coco_eval.params.areaRngLbl)
    ious = np.asarray(coco_eval.params.iouThrs)
    results: dict[str, float] = {}
    for metric in METRICS[iou_type]:
        iou, area = _SELECTION[metric]
        chosen = precision if iou is None else precision[np.isclose(ious, iou)]
        results[metric] = _percent(chosen[..., areas.index(area), -1])
    if class_names is None or len(class_names) <= 1:
        return results
    if len(class_names) != precision.shape[2]:
        raise ValueError(
            f"{len(class_names)} class names for {precision.shape[2]} evaluated categories; the "
            "metadata's thing_classes and the annotation file do not belong together"
        )
    for index, name in enumerate(unique_names(class_names)):
        results[f"AP-{name}"] = _percent(precision[:, :, index, areas.index("all"), -1])
    return results


def unique_names(names: Sequence[str]) -> list[str]:
    """Return class names with their number behind those that several classes have."""
    return [
        f"{name} ({names[:index].count(name) + 1})" if names.count(name) > 1 else name
        for index, name in enumerate(names)
    ]


def summary_table(results: Mapping[str, float]) -> str:
    """Lay the figures that are not per class out as one row."""
    return create_small_table({k: v for k, v in results.items() if not k.startswith("AP-")})


def per_class_table(results: Mapping[str, float]) -> str:
    """Lay ``AP-<class>`` out in as many (class, AP) columns as 100 characters hold; "" if none."""
    rows = [(k[len("AP-") :], v) for k, v in results.items() if k.startswith("AP-")]
    if not rows:
        return ""
    cells = [
        (name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…", value)
        for name, value in rows
    ]
    table = ""
    for columns in range(min(4, len(cells)), 0, -1):
        table = _in_columns(cells, columns)
        if max(map(len, table.splitlines())) <= _TABLE_WIDTH:
            break
    return table


def _in_columns(cells: Sequence[tuple[str, float]], columns: int) -> str:
    """Fill `columns` pairs of columns, reading downwards."""
    from tabulate import tabulate

    height = math.ceil(len(cells) / columns)
    rows = [
        [value for cell in cells[row::height] for value in cell][: 2 * columns]
        for row in range(height)
    ]
    return tabulate(rows, headers=["class", "AP"] * columns, tablefmt="pipe", floatfmt=".3f")


AREA_RANGES: dict[str, tuple[float, float]] = {  # square pixels
    "all": (0**2, 1e5**2),
    "small": (0**2, 32**2),
    "medium": (32**2, 96**2),
    "large": (96**2, 1e5**2),
    "96-128": (96**2, 128**2),
    "128-256": (128**2, 256**2),
    "256-512": (256**2, 512**2),
    "512-inf": (512**2, 1e5**2),
}


def _evaluate_box_proposals(
    dataset_predictions: Sequence[dict[str, Any]],
    coco_api: COCO,
    thresholds: torch.Tensor | None = None,
    area: str = "all",
    limit: int | None = None,
) -> dict[str, Any]:
    """Measure how many ground-truth boxes the best `limit` proposals of each image cover.

    Proposals and ground truths are matched one to one, greedily by IoU.

    Args:
        dataset_predictions: per image ``image_id`` and ``proposals``: `Instances` with
            `proposal_boxes` (R, 4) and `objectness_logits` (R,).
        coco_api: ground truth, pycocotools or hotcoco ``COCO``.
        thresholds: (T,) IoU thresholds; default 0.5, 0.55, ..., 0.95.
        area: a key of `AREA_RANGES`; ground truths of another ``area`` are not counted.
        limit: proposals per image, highest `objectness_logits` first; default all.

    Returns:
        ``ar`` (mean of the recalls), ``recalls`` (T,), ``thresholds`` (T,), ``gt_overlaps``: the
        sorted IoU of each ground truth with its proposal, ``num_pos``: how many there are.

    Raises:
        ValueError: unknown `area`.

    Source: Hosang et al., "What makes for effective detection proposals?", section 5 (AR).
    """
    if area not in AREA_RANGES:
        raise ValueError(f"Unknown area range {area!r}; there are {', '.join(AREA_RANGES)}")
    if thresholds is None:
        thresholds = torch.arange(0.5, 0.95 + 1e-5, 0.05, dtype=torch.float32)
    overlaps = []
    for prediction in dataset_predictions:
        truths = _ground_truth_boxes(coco_api, prediction["image_id"], AREA_RANGES[area])
        proposals = prediction["proposals"]
        order = proposals.objectness_logits.argsort(descending=True, stable=True)[:limit]
        boxes = proposals.proposal_boxes.tensor[order].detach().cpu()
        overlaps.append(_greedy_overlaps(boxes, truths))
    gt_overlaps = torch.cat(overlaps).sort().values if overlaps else torch.zeros(0)
    num_pos = len(gt_overlaps)
    covered = (gt_overlaps[None, :] >= thresholds[:, None]).float().sum(dim=1)
    recalls = covered / num_pos if num_pos else torch.full_like(thresholds, float("nan"))
    return {
        "ar": recalls.mean(),
        "recalls": recalls,
        "thresholds": thresholds,
        "gt_overlaps": gt_overlaps,
        "num_pos": num_pos,
    }


def _ground_truth_boxes(
    coco_api: COCO, image_id: int, area_range: tuple[float, float]
) -> torch.Tensor:
    """Return the (G, 4) XYXY boxes of an image that are no crowd and of the right area."""
    low, high = area_range
    annotations = coco_api.loadAnns(coco_api.getAnnIds(imgIds=[image_id]))
    boxes = [
        ann["bbox"]
        for ann in annotations
        if not ann.get("iscrowd", 0) and low <= ann["area"] <= high
    ]
    tensor = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    tensor[:, 2:] += tensor[:, :2]
    return tensor


def _greedy_overlaps(boxes: torch.Tensor, truths: torch.Tensor) -> torch.Tensor:
    """Match (R, 4) boxes to (G, 4) truths by falling IoU; return (G,) IoU, 0 if unmatched."""
    from torchvision.ops import box_iou

    result = torch.zeros(len(truths))
    if len(truths) == 0 or len(boxes) == 0:
        return result
    iou = box_iou(boxes, truths).numpy()
    for _ in range(min(iou.shape)):
        box, truth = np.unravel_index(iou.argmax(), iou.shape)
        if iou[box, truth] <= 0:
            break
        result[truth] = float(iou[box, truth])
        iou[box, :] = -1
        iou[:, truth] = -1
    return result
