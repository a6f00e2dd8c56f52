"""COCO's AP for rotated boxes."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from d2kit.evaluation.backend import _detection_limits, _load_detections
from d2kit.evaluation.coco_evaluation import COCOEvaluator
from d2kit.evaluation.coco_results import instances_to_coco_json
from d2kit.evaluation.fast_eval_api import COCOeval_opt
from d2kit.structures import Instances

__all__ = ["RotatedCOCOEvaluator", "RotatedCOCOeval"]  # noqa: F822 - the second by __getattr__

logger = logging.getLogger(__name__)


def __getattr__(name: str) -> Any:
    """Load pycocotools' evaluation only when it is asked for."""
    if name == "RotatedCOCOeval":
        from d2kit.evaluation.backend import RotatedCOCOeval

        return RotatedCOCOeval
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _oriented(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return an annotation or result with its box as both backends take it.

    Args:
        entry: `bbox` is XYWH or XYWHA (degrees counter-clockwise as seen in the image).

    Returns:
        A copy: `obb` is centre, size and radians clockwise; `bbox` has the right size, so that
        both backends compute the right area.
    """
    box = [float(v) for v in entry["bbox"]]
    if len(box) == 4:
        x0, y0, width, height = box
        box = [x0 + width / 2, y0 + height / 2, width, height, 0.0]
    x, y, width, height, angle = box
    corner = [x - width / 2, y - height / 2, width, height]
    return {**entry, "obb": [x, y, width, height, -math.radians(angle)], "bbox": corner}


class RotatedCOCOEvaluator(COCOEvaluator):
    """Computes COCO's AP of boxes, by the IoU of rotated boxes.

    The annotation file is COCO's, with boxes XYWH (upright) or XYWHA: centre, size in pixels and
    degrees counter-clockwise. Crowd regions count as in COCO: a detection that matches one by its
    own area is neither right nor wrong.

    Args:
        dataset_name: see `COCOEvaluator`.
        tasks: None or ``("bbox",)``.
        distributed: see `COCOEvaluator`.
        output_dir: see `COCOEvaluator`.
        max_dets_per_image: see `COCOEvaluator`.
        use_fast_impl: hotcoco (Rust); False for pycocotools with our overlap of rotated boxes.
        kpt_oks_sigmas: not used.
        allow_cached_coco: see `COCOEvaluator`.

    Raises:
        ValueError: another task.
        KeyError, FileNotFoundError: see `COCOEvaluator`.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Any = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        max_dets_per_image: int | None = None,
        use_fast_impl: bool = True,
        kpt_oks_sigmas: Sequence[float] = (),
        allow_cached_coco: bool = True,
    ) -> None:
        super().__init__(
            dataset_name,
            tasks,
            distributed,
            output_dir,
            max_dets_per_image=max_dets_per_image,
            use_fast_impl=use_fast_impl,
            kpt_oks_sigmas=kpt_oks_sigmas,
            allow_cached_coco=allow_cached_coco,
        )
        if self._tasks is not None and set(self._tasks) != {"bbox"}:
            raise ValueError(
                f"RotatedCOCOEvaluator evaluates boxes only: tasks must be None or ('bbox',), got "
                f"{tuple(self._tasks)}"
            )
        self._tasks = ("bbox",)

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Any]) -> None:
        """Take in one batch.

        Args:
            inputs: per image a dict with ``image_id``.
            outputs: per image a dict with ``instances``, see `instances_to_json`.
        """
        for image, output in zip(inputs, outputs, strict=True):
            if "instances" in output:
                instances = output["instances"].to(self._cpu_device)
                results = self.instances_to_json(instances, image["image_id"])
                self._predictions.append({"image_id": image["image_id"], "instances": results})

    def instances_to_json(self, instances: Instances, img_id: int | str) -> list[dict[str, Any]]:
        """Turn the detections of one image into dicts of COCO's result format.

        Args:
            instances: R detections with `pred_boxes` (`RotatedBoxes`, or `Boxes`), `scores` and
                `pred_classes`.
            img_id: goes into every dict.

        Returns:
            R dicts with ``image_id``, ``category_id`` (the contiguous class), ``bbox`` (XYWHA, or
            XYWH for upright boxes) and ``score``.
        """
        boxes = instances.pred_boxes.tensor
        if boxes.shape[1] == 4:
            upright = Instances(
                instances.image_size,
                pred_boxes=instances.pred_boxes,
                scores=instances.scores,
                pred_classes=instances.pred_classes,
            )
            return instances_to_coco_json(upright, img_id)
        rows = zip(
            boxes.tolist(),
            instances.scores.tolist(),
            instances.pred_classes.tolist(),
            strict=True,
        )
        return [
            {"image_id": img_id, "category_id": category, "bbox": box, "score": score}
            for box, score, category in rows
        ]

    def _ground_truth(self, path: str) -> Any:
        """Read an annotation file whose boxes may have five numbers."""
        with open(path, encoding="utf-8") as file:
            try:
                dataset = json.load(file)
                annotations = [_oriented(entry) for entry in dataset.get("annotations", ())]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{path} is not a COCO annotation file with boxes of four or five numbers: "
                    f"{type(error).__name__}: {error}"
                ) from error
        for entry in annotations:
            entry.pop("segmentation", None)  # else its area would be taken
            entry.setdefault("area", entry["obb"][2] * entry["obb"][3])
            entry.setdefault("iscrowd", 0)
        dataset["annotations"] = annotations
        if self._use_fast_impl:
            import hotcoco

            return hotcoco.COCO(dataset)
        from pycocotools.coco import COCO

        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO()
            coco.dataset = dataset
            coco.createIndex()
        return coco

    def _evaluate_task(
        self, task: str, results: list[dict[str, Any]], ids: list[int] | None
    ) -> Any:
        # a subclass's version may know of two arguments only
        subset = {} if ids is None else {"img_ids": ids}
        return self._evaluate_predictions_on_coco(self._coco_api, results, **subset)

    def _evaluate_predictions_on_coco(
        self,
        coco_gt: Any,
        coco_results: Sequence[Mapping[str, Any]],
        img_ids: Iterable[int] | None = None,
    ) -> Any:
        """Match results with the ground truth by rotated overlap; user classes override it.

        Args:
            coco_gt: ground truth, as `_ground_truth` reads it.
            coco_results: dicts of COCO's result format, boxes XYWH or XYWHA, with the dataset's
                own category ids.
            img_ids: evaluate these images only; None for all.

        Returns:
            The evaluation after ``evaluate``, ``accumulate`` and ``summarize``.
        """
        detections = _load_detections(coco_gt, [_oriented(r) for r in coco_results])
        if self._use_fast_impl:
            coco_eval: Any = COCOeval_opt(coco_gt, detections, "obb")
        else:
            from d2kit.evaluation.backend import RotatedCOCOeval

            coco_eval = RotatedCOCOeval(coco_gt, detections, "bbox")
        coco_eval.params.maxDets = _detection_limits(self._max_dets_per_image)
        if img_ids is not None:
            coco_eval.params.imgIds = list(img_ids)
        summary = io.StringIO()
        with contextlib.redirect_stdout(summary), warnings.catch_warnings():
            # no published tool does this; tests/evaluation/test_rotated_coco.py holds both backends
            # and a third program to the same numbers
            warnings.filterwarnings("ignore", message="hotcoco: ")
            coco_eval.evaluate()
            coco_eval.accumulate()
            coco_eval.summarize()
        logger.info("COCO summary for rotated boxes:\n%s", summary.getvalue().rstrip())
        return coco_eval
