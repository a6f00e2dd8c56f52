"""Runs COCO's matching with hotcoco (Rust) or pycocotools, behind pycocotools' interface."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pycocotools.cocoeval import COCOeval

from d2kit.data.datasets.validate import read_json
from d2kit.layers.rotated_boxes import pairwise_iou_rotated

if TYPE_CHECKING:
    from pycocotools.coco import COCO


def to_hotcoco(coco: COCO) -> Any:
    """Turn a pycocotools ``COCO`` (or anything with its ``dataset`` dict) into a hotcoco one.

    Args:
        coco: a pycocotools or hotcoco ``COCO``, or None.

    Returns:
        A ``hotcoco.COCO``: the object itself where it is one, else a converted copy.
    """
    import hotcoco

    if coco is None or isinstance(coco, hotcoco.COCO):
        return coco
    dataset = dict(coco.dataset)
    dataset.setdefault("annotations", [])
    return hotcoco.COCO(dataset)


class COCOeval_opt:  # noqa: N801 - Detectron2's name
    """``pycocotools.cocoeval.COCOeval`` computed by hotcoco: same interface, same numbers.

    Args:
        cocoGt: ground truth; pycocotools or hotcoco ``COCO``.
        cocoDt: detections, as ``cocoGt.loadRes`` gives them.
        iouType: ``bbox``, ``segm`` or ``keypoints``.
    """

    def __init__(
        self,
        cocoGt: object = None,  # noqa: N803 - pycocotools' names
        cocoDt: object = None,  # noqa: N803
        iouType: str = "segm",  # noqa: N803
    ) -> None:
        import hotcoco

        self._impl = hotcoco.COCOeval(to_hotcoco(cocoGt), to_hotcoco(cocoDt), iouType)

    @property
    def params(self) -> Any:
        """Live evaluation settings; assign whole lists (reads give copies)."""
        return self._impl.params

    @params.setter
    def params(self, value: Any) -> None:
        self._impl.params = value

    @property
    def eval(self) -> dict[str, Any]:
        """The result of `accumulate`: ``precision`` (T, R, K, A, M), ``recall`` (T, K, A, M), ...

        T IoU thresholds, R recall thresholds, K categories, A area ranges, M detection limits.
        """
        return self._impl.eval or {}

    @property
    def evalImgs(self) -> list[dict[str, Any] | None]:  # noqa: N802
        """Per category, area range and image: matches, as pycocotools lists them."""
        return self._impl.eval_imgs

    @property
    def stats(self) -> np.ndarray | list[float]:
        """The twelve (keypoints: ten) summary figures, in [0, 1], -1 where undefined."""
        return self._impl.stats

    @property
    def cocoGt(self) -> Any:  # noqa: N802
        """The ground truth."""
        return self._impl.coco_gt

    @property
    def cocoDt(self) -> Any:  # noqa: N802
        """The detections."""
        return self._impl.coco_dt

    def evaluate(self) -> None:
        """Match detections to ground truth, image by image."""
        self._impl.evaluate()

    def accumulate(self, p: Any = None) -> None:
        """Turn the matches into precision and recall.

        Args:
            p: settings to use instead of `params`, as in pycocotools.
        """
        if p is not None:
            self._impl.params = p
        self._impl.accumulate()

    def summarize(self) -> None:
        """Fill `stats` and print the summary table."""
        self._impl.summarize()


class COCOevalMaxDets(COCOeval):
    """`COCOeval` whose summary takes the last entry of ``params.maxDets`` instead of 100."""

    def summarize(self) -> None:
        """Fill and print `stats` (12 figures, keypoints 10) at the limits in ``params.maxDets``.

        Raises:
            RuntimeError: `accumulate` has not been called.
        """
        if not self.eval:
            raise RuntimeError("Call evaluate() and accumulate() before summarize()")
        last = len(self.params.maxDets) - 1
        if self.params.iouType == "keypoints":
            areas = ("all", "medium", "large")
            rows = [(True, None, "all"), (True, 0.5, "all"), (True, 0.75, "all")]
            rows += [(True, None, area) for area in areas[1:]]
            rows += [(False, iou, area) for _, iou, area in rows]
            limits = [last] * 10
        else:
            areas = ("small", "medium", "large")
            rows = [(True, None, "all"), (True, 0.5, "all"), (True, 0.75, "all")]
            rows += [(True, None, area) for area in areas]
            rows += [(False, None, "all")] * 3 + [(False, None, area) for area in areas]
            limits = [last] * 6 + [0, 1, last] + [last] * 3
        self.stats = np.array(
            [self._figure(*row, limit) for row, limit in zip(rows, limits, strict=True)]
        )

    def _figure(self, precision: bool, iou: float | None, area: str, limit: int) -> float:
        """Mean of the defined entries of precision or recall; -1 where none is; printed too."""
        values = self.eval["precision" if precision else "recall"]
        if iou is not None:
            values = values[np.isclose(self.params.iouThrs, iou)]
        values = values[..., self.params.areaRngLbl.index(area), limit]
        values = values[values > -1]
        figure = float(np.mean(values)) if values.size else -1.0
        name = "AP" if precision else "AR"
        shown = "0.50:0.95" if iou is None else f"{iou:.2f}"
        limit_text = self.params.maxDets[limit]
        print(
            f" {name} @[ IoU={shown:<9} | area={area:>6} | maxDets={limit_text:>3} ] = {figure:.3f}"
        )
        return figure


logger = logging.getLogger(__name__)


def load_ground_truth(json_file: str, use_fast_impl: bool) -> COCO:
    """Read a COCO annotation file.

    Args:
        json_file: path on this machine.
        use_fast_impl: a ``hotcoco.COCO`` if True, else a ``pycocotools.coco.COCO``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not COCO JSON.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            if use_fast_impl:
                import hotcoco

                try:
                    return hotcoco.COCO(json_file)
                except ValueError:  # it is strict about fields that no figure depends on
                    return hotcoco.COCO(_for_figures(read_json(json_file, json_file)))
            from pycocotools.coco import COCO

            truth = COCO()
            truth.dataset = _for_figures(read_json(json_file, json_file))
            truth.createIndex()
            return truth
        except FileNotFoundError:
            raise FileNotFoundError(
                f"The annotation file {json_file} does not exist; check the `json_file` under "
                "which the dataset was registered"
            ) from None
        except Exception as error:
            raise ValueError(f"{json_file} is not a COCO annotation file: {error}") from error


_FIGURE_KEYS = {
    "images": ("id", "file_name", "width", "height"),
    "categories": ("id", "name"),
    "annotations": (
        *("id", "image_id", "category_id", "bbox", "area", "iscrowd"),
        *("segmentation", "keypoints", "num_keypoints"),
    ),
}
"""What the figures depend on; hotcoco is strict about the rest (Roboflow writes years as text)."""


def _for_figures(coco: Mapping[str, Any]) -> dict[str, Any]:
    """Copy ground truth with the fields that figures depend on, as both backends need them.

    Annotation ids become 1, 2, ... where they are not positive and unique: pycocotools takes a
    match with id 0 for none. Objects are no crowds unless they say so, without an area have that of
    their box, and where the number of keypoints is none, it is counted.
    """
    kept = {
        part: [
            {k: e[k] for k in keys if e.get(k) is not None}
            for e in coco.get(part, [])
            if isinstance(e, Mapping)
        ]
        for part, keys in _FIGURE_KEYS.items()
    }
    objects = kept["annotations"]
    ids = [a.get("id") for a in objects]
    sound = all(type(i) is int and i > 0 for i in ids) and len(set(ids)) == len(ids)
    for number, entry in enumerate(objects, 1):
        entry["id"] = entry["id"] if sound else number
        entry["iscrowd"] = int(entry.get("iscrowd", 0))
        entry.setdefault("area", float(entry["bbox"][2] * entry["bbox"][3]))
        count = entry.get("num_keypoints", 0)
        if type(count) is not int or not 0 <= count < 1 << 31:
            entry["num_keypoints"] = sum(v > 0 for v in entry.get("keypoints", ())[2::3])
    return kept


def _load_detections(coco_gt: COCO, coco_results: list[dict[str, Any]]) -> Any:
    """Load results (possibly none) beside the ground truth they belong to, on its backend."""
    import hotcoco

    if isinstance(coco_gt, hotcoco.COCO):
        return coco_gt.load_res(coco_results)
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):
        if coco_results:
            return coco_gt.loadRes([dict(result) for result in coco_results])  # it writes into them
        empty = COCO()
        empty.dataset = {**coco_gt.dataset, "annotations": []}
        empty.createIndex()
        return empty


def _of_task(results: Sequence[Mapping[str, Any]], iou_type: str) -> list[dict[str, Any]]:
    """Return results with the keys of one task only: what is not passed need not be converted.

    Without the box, COCO takes an object's area from its mask. Results that have these keys alone
    are returned as they are.
    """
    keys = {
        "bbox": ("bbox",),
        "segm": ("segmentation",),
        "keypoints": ("bbox", "keypoints"),
    }[iou_type]
    keys = ("image_id", "category_id", "score", *keys)
    # each has these: if none has more, they have no others
    if isinstance(results, list) and sum(map(len, results)) == len(keys) * len(results):
        return results
    return [{key: result[key] for key in keys if key in result} for result in results]


def _detection_limits(max_dets_per_image: int | Sequence[int] | None) -> list[int]:
    """Return the three limits of detections per image that recall is reported at."""
    if max_dets_per_image is None:
        return [1, 10, 100]
    if isinstance(max_dets_per_image, int):
        if max_dets_per_image < 1:
            raise ValueError(f"max_dets_per_image must be at least 1, got {max_dets_per_image}")
        # pycocotools sorts the limits and takes the last: none may exceed what was asked for
        return [min(limit, max_dets_per_image) for limit in (1, 10)] + [max_dets_per_image]
    limits = sorted(int(limit) for limit in max_dets_per_image)
    if len(limits) != 3:
        raise ValueError(f"max_dets_per_image must be one or three numbers, got {limits}")
    return limits


def _check_keypoints(
    coco_gt: COCO, results: Sequence[Mapping[str, Any]], sigmas: Sequence[float]
) -> None:
    """Raise ValueError where predicted, annotated and weighted keypoints differ in number."""
    predicted = len(results[0]["keypoints"]) // 3 if results else len(sigmas)
    annotated = len(sigmas)
    ids = coco_gt.getAnnIds()
    if ids:
        annotated = len(coco_gt.loadAnns([ids[0]])[0].get("keypoints") or []) // 3 or annotated
    if not predicted == annotated == len(sigmas):
        raise ValueError(
            f"Predictions have {predicted} keypoints, the ground truth {annotated}, and there are "
            f"{len(sigmas)} OKS sigmas (17 unless given): the three must be equal. Give "
            "COCOEvaluator(kpt_oks_sigmas=...) or TEST.KEYPOINT_OKS_SIGMAS one value per keypoint"
        )


def _evaluate_predictions_on_coco(
    coco_gt: COCO,
    coco_results: Sequence[Mapping[str, Any]],
    iou_type: str,
    kpt_oks_sigmas: Sequence[float] | None = None,
    use_fast_impl: bool = True,
    img_ids: Iterable[int] | None = None,
    max_dets_per_image: int | Sequence[int] | None = None,
    *,
    cocoeval_fn: Callable[..., Any] | None = None,
) -> Any:
    """Evaluate results of one task.

    Args:
        coco_gt: ground truth; pycocotools or hotcoco ``COCO``.
        coco_results: dicts of COCO's result format with the dataset's own category ids.
        iou_type: ``bbox``, ``segm`` or ``keypoints``.
        kpt_oks_sigmas: per keypoint, its standard deviation relative to the object's scale;
            None or empty for COCO's 17.
        use_fast_impl: hotcoco if True, else pycocotools.
        img_ids: evaluate these images only; None for all.
        max_dets_per_image: count this many highest-scoring detections of each image and class
            (default 100; keypoints always 20), or the three limits for recall.
        cocoeval_fn: class to use in place of the two, called as ``COCOeval``.

    Returns:
        The evaluation after ``evaluate``, ``accumulate`` and ``summarize``.
    """
    coco_results = _of_task(coco_results, iou_type)
    if cocoeval_fn is None:
        if use_fast_impl:
            cocoeval_fn = COCOeval_opt
        else:
            cocoeval_fn = COCOevalMaxDets
    if cocoeval_fn is COCOeval_opt:
        coco_gt = to_hotcoco(coco_gt)
    coco_eval = cocoeval_fn(coco_gt, _load_detections(coco_gt, coco_results), iou_type)
    if iou_type != "keypoints":  # COCO counts 20 people per image there
        coco_eval.params.maxDets = _detection_limits(max_dets_per_image)
    if img_ids is not None:
        coco_eval.params.imgIds = list(img_ids)
    if iou_type == "keypoints":
        if kpt_oks_sigmas is not None and len(kpt_oks_sigmas):
            coco_eval.params.kpt_oks_sigmas = _sigmas(kpt_oks_sigmas, cocoeval_fn)
        _check_keypoints(coco_gt, coco_results, list(coco_eval.params.kpt_oks_sigmas))
    summary = io.StringIO()
    with contextlib.redirect_stdout(summary), warnings.catch_warnings():
        # hotcoco warns of limits other than [1, 10, 100]: here they were asked for
        warnings.filterwarnings("ignore", message="hotcoco: max_dets differ")
        coco_eval.evaluate()
        coco_eval.accumulate()
        summary.seek(0)
        summary.truncate()
        coco_eval.summarize()
    logger.info("COCO summary for %s:\n%s", iou_type, summary.getvalue().rstrip())
    return coco_eval


def _sigmas(values: Sequence[float], cocoeval_fn: Callable[..., Any]) -> np.ndarray | list[float]:
    """Give the sigmas the type that the backend computes with."""
    return list(values) if cocoeval_fn is COCOeval_opt else np.asarray(values, dtype=np.float64)


class RotatedCOCOeval(COCOevalMaxDets):
    """`COCOeval` of boxes whose annotations and results have `obb`.

    `obb` is centre x and y, width, height in pixels and radians clockwise as seen in the image.
    """

    def computeIoU(self, imgId: int, catId: int) -> Any:  # noqa: N802, N803 - pycocotools' names
        """Return the overlap of each detection with each ground truth of one image and class.

        Args:
            imgId: image id.
            catId: category id; not used without `params.useCats`.

        Returns:
            (D, G) float64, detections by falling score; for crowd regions the share of the
            detection's area. An empty list where there is neither.
        """
        categories = [catId] if self.params.useCats else self.params.catIds
        truths = [t for c in categories for t in self._gts[imgId, c]]
        found = [d for c in categories for d in self._dts[imgId, c]]
        if not truths and not found:
            return []
        order = np.argsort([-d["score"] for d in found], kind="stable")[: self.params.maxDets[-1]]
        boxes, regions = _boxes([found[i] for i in order]), _boxes(truths)
        iou = pairwise_iou_rotated(boxes, regions).double().numpy()
        area = (boxes[:, 2] * boxes[:, 3]).numpy()[:, None]
        region_area = (regions[:, 2] * regions[:, 3]).numpy()[None, :]
        shared = iou * (area + region_area) / (1 + iou)
        crowd = np.array([bool(t.get("iscrowd", 0)) for t in truths], dtype=bool)[None, :]
        of_detection = np.divide(shared, area, out=np.zeros_like(shared), where=area > 0)
        return np.where(crowd, of_detection, iou)


def _boxes(entries: list[dict[str, Any]]) -> torch.Tensor:
    """Return boxes (R, 5) float64 XYWHA in degrees counter-clockwise."""
    rows = torch.tensor([entry["obb"] for entry in entries], dtype=torch.float64).reshape(-1, 5)
    rows[:, 4] *= -180 / math.pi
    return rows
