"""AP of boxes and masks as LVIS defines it: federated annotation, classes by frequency.

Source: Gupta et al., "LVIS: A Dataset for Large Vocabulary Instance Segmentation", 2019, section 2
(arXiv 1908.03195). Computed by hotcoco.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from d2kit.config import CfgNode
from d2kit.evaluation.backend import _of_task, to_hotcoco
from d2kit.evaluation.coco_evaluation import COCOEvaluator
from d2kit.evaluation.coco_results import _evaluate_box_proposals, summary_table

if TYPE_CHECKING:
    from pycocotools.coco import COCO

__all__ = ["LVISEvaluator", "_evaluate_box_proposals", "_evaluate_predictions_on_lvis"]

logger = logging.getLogger(__name__)

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")
"""In the order of the table: r, c and f are rare, common and frequent classes."""

DEFAULT_MAX_DETS = 300


class LVISEvaluator(COCOEvaluator):
    """Computes LVIS's AP (boxes, masks) or the recall of box proposals.

    Args:
        dataset_name: a registered dataset whose metadata has `json_file`, with LVIS's fields:
            `neg_category_ids` and `not_exhaustive_category_ids` of images, `frequency` of classes.
        tasks: of ``bbox``, ``segm``; None: what the predictions hold.
        distributed: gather the predictions of all processes on the main one; if False, every
            process evaluates what it has seen.
        output_dir: folder for ``lvis_instances_results.json``, ``instances_predictions.pth`` and,
            for proposals, ``box_proposals.pkl``; None: nothing is written.
        max_dets_per_image: detections counted per image over all classes; default 300.

    Raises:
        KeyError: the dataset is not registered.
        ValueError: an unknown task, or a file without LVIS's fields.
        FileNotFoundError: there is no annotation file where the metadata says.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] | CfgNode | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        max_dets_per_image: int | None = None,
    ) -> None:
        super().__init__(
            dataset_name, tasks, distributed, output_dir, max_dets_per_image=max_dets_per_image
        )
        if "keypoints" in (self._tasks or ()):
            raise ValueError("Unknown task 'keypoints'; LVISEvaluator knows bbox, segm")
        if self._do_evaluation:
            _check_fields(self._coco_api, self._metadata.get("json_file") or dataset_name)

    @property
    def _lvis_api(self) -> COCO:
        """The ground truth; user classes read it."""
        return self._coco_api

    def _eval_predictions(
        self, predictions: Sequence[Mapping[str, Any]], img_ids: Iterable[int] | None = None
    ) -> None:
        """Evaluate the instances of all tasks; fill ``self._results``."""
        results = list(itertools.chain(*(p["instances"] for p in predictions)))
        tasks = [
            t for t in self._tasks or self._tasks_from_predictions(results) if t != "keypoints"
        ]
        results = self._with_dataset_ids(results)
        self._check_images(predictions, img_ids)
        if self._output_dir:
            with self._results_file("lvis_instances_results.json") as file:
                file.write(json.dumps(results))
        if not self._do_evaluation:
            self._logger.info("The annotation file has no annotations: nothing is evaluated")
            return
        for task in tasks:
            self._check_results_of(task, results)
            self._results[task] = _evaluate_predictions_on_lvis(
                self._coco_api,
                results,
                task,
                max_dets_per_image=self._max_dets_per_image,
                class_names=self._metadata.get("thing_classes"),
                img_ids=img_ids,
            )


def _check_fields(lvis_api: COCO, file: str) -> None:
    """Raise ValueError where what LVIS needs beyond COCO is missing."""
    fields = {field for image in lvis_api.loadImgs(lvis_api.getImgIds()) for field in image}
    missing = [] if "neg_category_ids" in fields else ["'neg_category_ids' of any image"]
    for category in lvis_api.loadCats(lvis_api.getCatIds()):
        if category.get("frequency") not in ("r", "c", "f"):
            missing.append(f"'frequency' (r, c or f) of category {category['id']}")
            break
    if missing:
        raise ValueError(
            f"{file}: no {', no '.join(missing)}: LVISEvaluator needs an annotation file of LVIS; "
            "for others use COCOEvaluator"
        )


def _evaluate_predictions_on_lvis(
    lvis_gt: COCO,
    lvis_results: Sequence[Mapping[str, Any]],
    iou_type: str,
    max_dets_per_image: int | None = None,
    class_names: Sequence[str] | None = None,
    *,
    img_ids: Iterable[int] | None = None,
) -> dict[str, float]:
    """Evaluate results of one task.

    Args:
        lvis_gt: ground truth, hotcoco's ``LVIS`` or anything with its ``dataset`` dict.
        lvis_results: dicts of COCO's result format with the dataset's own category ids.
        iou_type: ``bbox`` or ``segm``.
        max_dets_per_image: detections counted per image over all classes; default 300.
        class_names: not used; the figures are per group of classes.
        img_ids: evaluate these images only; None for all.

    Returns:
        `METRICS` in percent; nan where no ground truth defines the figure.
    """
    import hotcoco

    truth = to_hotcoco(lvis_gt)
    limit = DEFAULT_MAX_DETS if max_dets_per_image is None else max_dets_per_image
    found = hotcoco.LVISResults(truth, _of_task(lvis_results, iou_type), max_dets=limit)
    evaluation = hotcoco.LVISEval(truth, found, iou_type)
    if img_ids is not None:
        evaluation.params.img_ids = list(img_ids)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.run()
    figures = evaluation.get_results()
    results = {
        metric: figures[metric] * 100 if figures[metric] >= 0 else float("nan")
        for metric in METRICS
    }
    logger.info("Evaluation results for %s:\n%s", iou_type, summary_table(results))
    return results
