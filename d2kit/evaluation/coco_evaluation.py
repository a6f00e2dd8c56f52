"""AP of boxes (rotated too), masks and keypoints, recall of proposals, as COCO defines them."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import itertools
import json
import logging
import math
import pickle
import shutil
import tempfile
import warnings
import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from d2kit.config import CfgNode
from d2kit.data.catalog import MetadataCatalog
from d2kit.data.datasets.coco import plain_id
from d2kit.evaluation.backend import (
    COCOeval_opt,
    _detection_limits,
    _evaluate_predictions_on_coco,
    _load_detections,
    load_ground_truth,
)
from d2kit.evaluation.coco_results import (
    HeldResults,
    _evaluate_box_proposals,
    derive_results,
    instances_from_coco_json,
    instances_to_coco_json,
    per_class_table,
    summary_table,
)
from d2kit.evaluation.evaluator import (
    DatasetEvaluator,
    gather_on_main,
    once_per_image,
    results_file,
)
from d2kit.structures import BoxMode, Instances
from d2kit.utils.env import paused_gc
from d2kit.utils.file_io import PathManager, load_json

if TYPE_CHECKING:
    from pycocotools.coco import COCO

__all__ = [
    "COCOEvaluator",
    "COCOevalMaxDets",  # noqa: F822 - by __getattr__
    "RotatedCOCOEvaluator",
    "RotatedCOCOeval",  # noqa: F822
    "_evaluate_box_proposals",
    "_evaluate_predictions_on_coco",
    "instances_from_coco_json",
    "instances_to_coco_json",
]


_TASKS = ("bbox", "segm", "keypoints")
_TASK_OF_FIELD = {"pred_boxes": "bbox", "pred_masks": "segm", "pred_keypoints": "keypoints"}
_TASK_OF_KEY = {"bbox": "bbox", "segmentation": "segm", "keypoints": "keypoints"}
_PROPOSAL_LIMITS = (100, 1000)
_PROPOSAL_AREAS = {"all": "", "small": "s", "medium": "m", "large": "l"}


def __getattr__(name: str) -> Any:
    """Load pycocotools' evaluation only when it is asked for."""
    if name in ("COCOevalMaxDets", "RotatedCOCOeval"):
        return getattr(importlib.import_module("d2kit.evaluation.backend"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def read_oks_sigmas(cfg: CfgNode) -> list[float]:
    """Read ``TEST.KEYPOINT_OKS_SIGMAS``."""
    return list(cfg.TEST.KEYPOINT_OKS_SIGMAS)


class COCOEvaluator(DatasetEvaluator):
    """Computes COCO's AP (boxes, masks, keypoints) or the recall of box proposals.

    Args:
        dataset_name: a registered dataset. Its metadata names the annotation file (`json_file`);
            where it does not, one is written from the dataset's dicts.
        tasks: of ``bbox``, ``segm``, ``keypoints``; None: what the predictions hold.
        distributed: gather the predictions of all processes on the main one; if False, every
            process evaluates what it has seen.
        output_dir: folder for ``coco_instances_results.json``, ``instances_predictions.pth`` and,
            for proposals, ``box_proposals.pkl``; None: nothing is written.
        max_dets_per_image: detections counted per image and class, highest scores first; default
            100.
        use_fast_impl: hotcoco (Rust); False for pycocotools, which gives the same numbers slowly.
        kpt_oks_sigmas: one per keypoint; empty for COCO's 17 person keypoints.
        allow_cached_coco: whether an annotation file converted earlier may be used again.

    Raises:
        KeyError: the dataset is not registered.
        ValueError: an unknown task.
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
        use_fast_impl: bool = True,
        kpt_oks_sigmas: Sequence[float] = (),
        allow_cached_coco: bool = True,
    ) -> None:
        self._logger = logging.getLogger(__name__)
        if isinstance(tasks, CfgNode):
            self._logger.warning(
                "COCOEvaluator(dataset, cfg) is outdated: give `tasks` (or nothing) instead of cfg"
            )
            kpt_oks_sigmas = kpt_oks_sigmas or read_oks_sigmas(tasks)
            tasks = None
        if isinstance(tasks, str):
            tasks = (tasks,)
        for task in tasks or ():
            if task not in _TASKS:
                raise ValueError(f"Unknown task {task!r}; COCOEvaluator knows {', '.join(_TASKS)}")
        self._tasks = tasks
        self._distributed = distributed
        self._output_dir = output_dir
        self._max_dets_per_image = max_dets_per_image
        self._use_fast_impl = use_fast_impl
        self._kpt_oks_sigmas = list(kpt_oks_sigmas)
        self._cpu_device = torch.device("cpu")
        self._metadata = MetadataCatalog.get(dataset_name)
        self._truth = self._annotation_file(dataset_name, allow_cached_coco)
        self._coco_api = self._ground_truth(self._truth)
        self._do_evaluation = bool(self._coco_api.getAnnIds())
        self._warn_of_crowded_images(dataset_name)
        self.reset()

    def _warn_of_crowded_images(self, dataset_name: str) -> None:
        """Warn where a perfect model could not reach AP 100 for the limit of detections."""
        given = self._max_dets_per_image
        limit = 100 if given is None else given if isinstance(given, int) else max(given)
        api = self._coco_api
        crowded = [i for i in api.getImgIds() if len(api.getAnnIds(imgIds=[i])) > limit]
        classes = [
            (max(Counter(a["category_id"] for a in api.loadAnns(api.getAnnIds([i]))).values()), i)
            for i in crowded
        ]
        over = [entry for entry in classes if entry[0] > limit]
        if over:
            most, image = max(over)
            self._logger.warning(
                "Dataset '%s': %d images have more than %d objects of one class (image %s: %d), "
                "and the evaluation counts the best %d detections of an image and class: no model "
                "reaches AP 100; COCOEvaluator(max_dets_per_image=%d) counts more",
                *(dataset_name, len(over), limit, image, most, limit, most),
            )

    def _ground_truth(self, path: str) -> COCO:
        """Read an annotation file."""
        return load_ground_truth(path, self._use_fast_impl)

    def _annotation_file(self, dataset_name: str, allow_cached: bool) -> str:
        """Return the dataset's COCO JSON on this machine, after converting it where needed."""
        json_file = self._metadata.get("json_file")
        if json_file:
            return str(PathManager.get_local_path(json_file))
        from d2kit.data.datasets.coco import convert_to_coco_json

        folder = self._output_dir
        if not folder:  # the file is read at once, and goes with the evaluator
            folder = tempfile.mkdtemp(prefix="d2kit_coco_")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        PathManager.mkdirs(folder)
        path = str(Path(folder) / f"{dataset_name}_coco_format.json")
        self._logger.info("Dataset %r has no json_file: converting it to %s", dataset_name, path)
        convert_to_coco_json(dataset_name, path, allow_cached=allow_cached)
        return path

    @property
    def accepts_roi_masks(self) -> bool:
        """True, unless a subclass has its own `process`, which may count on full-size masks."""
        return type(self).process is COCOEvaluator.process

    def reset(self) -> None:
        """Forget all predictions."""
        self._predictions: list[dict[str, Any]] = []
        self._seen_tasks: set[str] = set()

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Any]) -> None:
        """Take in one batch.

        Args:
            inputs: per image a dict with ``image_id``.
            outputs: per image a dict with ``instances`` (see `instances_to_coco_json`) and/or
                ``proposals``.
        """
        kinds = ("instances", "proposals")
        for image, output in zip(inputs, outputs, strict=True):
            held: dict[str, Any] = {k: output[k].to(self._cpu_device) for k in kinds if k in output}
            if not held:
                continue
            held["image_id"] = image_id = plain_id(image["image_id"])
            if "instances" in held:
                held["instances"] = self._rows_of(held["instances"], image_id)
            self._predictions.append(held)

    def _rows_of(self, detected: Instances, image_id: int | str) -> Sequence[dict[str, Any]]:
        """Turn the instances of an image into results, and note which tasks they serve."""
        fields = detected.get_fields()
        self._seen_tasks |= {task for field, task in _TASK_OF_FIELD.items() if field in fields}
        return HeldResults(detected, image_id)

    def evaluate(self, img_ids: Iterable[int] | None = None) -> dict[str, dict[str, float]]:
        """Compute the figures.

        Args:
            img_ids: evaluate these images only; None for all images of the annotation file.

        Returns:
            ``{"bbox": {"AP": percent, ...}, "segm": ...}``; ``AP-<class>`` where there is more
            than one class; nan where no ground truth defines a figure, 0 where there is some and
            nothing was found. Empty on other processes than the main one and where no image was
            processed.
        """
        predictions = self._gather()
        if predictions is None:
            return {}
        self._results: OrderedDict[str, dict[str, float]] = OrderedDict()
        if not predictions:
            self._logger.warning("COCOEvaluator was given no prediction for any image")
            return {}
        if self._output_dir:
            with self._results_file("instances_predictions.pth", "wb") as file:
                torch.save(predictions, file)
        if "proposals" in predictions[0]:
            self._eval_box_proposals(predictions)
        if "instances" in predictions[0]:
            with paused_gc():  # 100,000 results hold no cycles
                self._eval_predictions(predictions, img_ids=img_ids)
        return copy.deepcopy(self._results)

    def _results_file(self, name: str, mode: str = "w") -> AbstractContextManager[IO[Any]]:
        """Open a file in the output folder, see `results_file`."""
        folder = str(self._output_dir)
        return results_file(folder, name, self._metadata.name, self._truth, mode)

    def _gather(self) -> list[dict[str, Any]] | None:
        """Return the predictions of all processes, each image once; None but on the main one."""
        parts = gather_on_main([(self._seen_tasks, self._predictions)], self._distributed)
        if parts is None:
            return None
        self._seen_tasks = set().union(*(tasks for tasks, _ in parts))
        predictions = once_per_image(list(itertools.chain(*(found for _, found in parts))))
        with paused_gc():
            for prediction in predictions:  # in place: subclasses look at them afterwards
                if isinstance(prediction.get("instances"), HeldResults):
                    prediction["instances"] = list(prediction["instances"])
        return predictions

    def _tasks_from_predictions(self, predictions: Sequence[Mapping[str, Any]]) -> list[str]:
        """Find the tasks in the result dicts and in the fields that `process` has seen."""
        found = {task for p in predictions for key, task in _TASK_OF_KEY.items() if key in p}
        return [task for task in _TASKS if task in found | self._seen_tasks | {"bbox"}]

    def _eval_predictions(
        self, predictions: Sequence[Mapping[str, Any]], img_ids: Iterable[int] | None = None
    ) -> None:
        """Evaluate the instances of all tasks; fill ``self._results``."""
        coco_results = list(itertools.chain(*(p["instances"] for p in predictions)))
        tasks = list(self._tasks or self._tasks_from_predictions(coco_results))
        coco_results = self._with_dataset_ids(coco_results)
        self._check_images(predictions, img_ids)
        if self._output_dir:
            with self._results_file("coco_instances_results.json") as file:
                file.write(json.dumps(coco_results))
            self._logger.info("Wrote %d results to %s", len(coco_results), self._output_dir)
        if not self._do_evaluation:
            self._logger.info("The annotation file has no annotations: nothing is evaluated")
            return
        ids = None if img_ids is None else list(img_ids)
        if not coco_results:
            self._logger.warning("The model found no instance in any image")
        for task in tasks:
            self._check_results_of(task, coco_results)
            coco_eval = self._evaluate_task(task, coco_results, ids)
            self._results[task] = self._derive_coco_results(
                coco_eval, task, class_names=self._class_names()
            )

    def _evaluate_task(
        self, task: str, results: list[dict[str, Any]], ids: list[int] | None
    ) -> dict[str, float]:
        """Match results of one task with the ground truth; see `_evaluate_predictions_on_coco`."""
        found: dict[str, float] = _evaluate_predictions_on_coco(
            self._coco_api,
            results,
            task,
            kpt_oks_sigmas=self._kpt_oks_sigmas,
            use_fast_impl=self._use_fast_impl,
            img_ids=ids,
            max_dets_per_image=self._max_dets_per_image,
        )
        return found

    def _check_results_of(self, task: str, results: Sequence[Mapping[str, Any]]) -> None:
        """Raise ValueError where a task was asked for that the predictions do not hold."""
        key = {task: key for key, task in _TASK_OF_KEY.items()}[task]
        if results and key not in results[0]:
            raise ValueError(
                f"Task {task!r} was asked for, but the predictions have no {key!r}; give "
                f"COCOEvaluator other `tasks` (now {self._tasks}) or a model that predicts it"
            )

    def _with_dataset_ids(self, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Map contiguous classes back to the category ids of the annotation file."""
        to_class = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if to_class is None:
            to_class = {int(c): c for c in self._coco_api.getCatIds()}
        to_category = {int(v): int(k) for k, v in to_class.items()}
        unknown = {r["category_id"] for r in results} - set(to_category)
        if unknown:
            raise ValueError(
                f"Predicted class {min(unknown)}, but dataset {self._metadata.get('name')!r} has "
                f"{len(to_category)} classes; MODEL.ROI_HEADS.NUM_CLASSES (or RETINANET's) must "
                f"be {len(to_category)}"
            )
        return [{**r, "category_id": to_category[r["category_id"]]} for r in results]

    def _check_images(
        self, predictions: Sequence[Mapping[str, Any]], img_ids: Iterable[int] | None
    ) -> None:
        """Raise where an image is unknown; warn where some were not processed."""
        known = set(self._coco_api.getImgIds())
        seen = {p["image_id"] for p in predictions}
        if not seen <= known:
            raise ValueError(
                f"Image id {next(iter(seen - known))!r} is not in the annotation file of dataset "
                f"{self._metadata.get('name')!r}: was the loader built for another dataset?"
            )
        missing = len(known - seen)
        if img_ids is None and missing:
            self._logger.warning(
                "%d of %d images were not processed and count as images without detections; "
                "evaluate(img_ids=...) restricts the figures to a subset",
                missing,
                len(known),
            )

    def _class_names(self) -> list[str] | None:
        """Class names in the order of the evaluation's category axis (rising category id)."""
        names: list[str] | None = self._metadata.get("thing_classes")
        to_class = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if names is None or to_class is None:
            return names
        categories = sorted(self._coco_api.getCatIds())
        if not set(categories) <= set(to_class):
            return names
        return [names[to_class[category]] for category in categories]

    def _derive_coco_results(
        self, coco_eval: object, iou_type: str, class_names: Sequence[str] | None = None
    ) -> dict[str, float]:
        """Turn one accumulated evaluation into the result dict and log it as tables."""
        results = derive_results(coco_eval, iou_type, class_names)
        self._logger.info("Evaluation results for %s:\n%s", iou_type, summary_table(results))
        table = per_class_table(results)
        if table:
            self._logger.info("Per-category %s AP:\n%s", iou_type, table)
        return results

    def _eval_box_proposals(self, predictions: Sequence[Mapping[str, Any]]) -> None:
        """Measure the recall of proposals; fill ``self._results["box_proposals"]``."""
        if self._output_dir:
            proposals = [p["proposals"] for p in predictions]
            data = {
                "boxes": [p.proposal_boxes.tensor.numpy() for p in proposals],
                "objectness_logits": [p.objectness_logits.numpy() for p in proposals],
                "ids": [p["image_id"] for p in predictions],
                "bbox_mode": BoxMode.XYXY_ABS.value,
            }
            with self._results_file("box_proposals.pkl", "wb") as file:
                pickle.dump(data, file)
        if not self._do_evaluation:
            return
        results = {}
        for limit, (area, suffix) in itertools.product(_PROPOSAL_LIMITS, _PROPOSAL_AREAS.items()):
            stats = _evaluate_box_proposals(
                list(map(dict, predictions)), self._coco_api, area=area, limit=limit
            )
            results[f"AR{suffix}@{limit}"] = float(stats["ar"]) * 100
        self._logger.info("Proposal recall:\n%s", summary_table(results))
        self._results["box_proposals"] = results


logger = logging.getLogger(__name__)


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
        tasks: Sequence[str] | None = None,
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

    def _ground_truth(self, path: str) -> COCO:
        """Read an annotation file whose boxes may have five numbers."""
        dataset = load_json(path)
        try:
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
    ) -> dict[str, float]:
        # a subclass's version may know of two arguments only
        subset = {} if ids is None else {"img_ids": ids}
        found: dict[str, float] = self._evaluate_predictions_on_coco(
            self._coco_api, results, **subset
        )
        return found

    def _evaluate_predictions_on_coco(
        self,
        coco_gt: COCO,
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
