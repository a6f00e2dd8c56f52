"""IoU and accuracy of semantic segmentation, and COCO's panoptic quality, by hotcoco.

Source: Long et al., "Fully Convolutional Networks for Semantic Segmentation", 2015, section 5
(pixel accuracy, mean accuracy, mean IoU, frequency weighted IoU); Kirillov et al., "Panoptic
Segmentation", 2019, section 4 (arXiv 1801.00868).
"""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from d2kit.data.catalog import DatasetCatalog, MetadataCatalog
from d2kit.data.detection_utils import read_label_map
from d2kit.evaluation.coco_results import encode_bitmasks
from d2kit.evaluation.evaluator import (
    DatasetEvaluator,
    gather_on_main,
    once_per_image,
    results_file,
)
from d2kit.utils.file_io import PathManager, load_json
from d2kit.utils.logger import create_small_table

__all__ = [
    "COCOPanopticEvaluator",
    "SemSegEvaluator",
    "id_to_rgb",
    "load_image_into_numpy_array",
]


BOUNDARY_RATIO = 0.02
"""Width of a boundary, relative to the diagonal of the image."""


def confusion(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Count pixels.

    Args:
        truth: (H, W) labels; pixels with other values than 0 ... classes - 1 are left out.
        predicted: (H, W) labels; other values are counted in the last column.
        classes: K.

    Returns:
        (K, K + 1) int64: pixels by true and predicted class.
    """
    truth, predicted = truth.ravel().astype(np.int64), predicted.ravel().astype(np.int64)
    known = (truth >= 0) & (truth < classes)
    truth, predicted = truth[known], predicted[known]
    predicted = np.where((predicted >= 0) & (predicted < classes), predicted, classes)
    counts = np.bincount(truth * (classes + 1) + predicted, minlength=classes * (classes + 1))
    return counts.reshape(classes, classes + 1)


def is_boundary(labels: np.ndarray, ratio_of_diagonal: float = BOUNDARY_RATIO) -> np.ndarray:
    """Mark the pixels that lie within the boundary of their own segment.

    Args:
        labels: (H, W) integers below 2**16.
        ratio_of_diagonal: d below, relative to the diagonal of the image.

    Returns:
        (H, W) bool: whether another label, or the border of the image, is within d pixels along
        both axes; d is rounded, and at least 1. For each class these are the
        pixels that d erosions of its mask by 3 x 3 remove.

    Source: Cheng et al., "Boundary IoU", 2021, section 4 (arXiv 2103.16562).
    """
    import cv2

    height, width = labels.shape
    reach = max(1, round(ratio_of_diagonal * float(np.hypot(height, width))))
    window = np.ones((2 * reach + 1, 2 * reach + 1), np.uint8)
    # 1 more than the labels, so that the 0 of the border differs from all of them
    padded = np.pad(labels.astype(np.int32) + 1, 1).astype(np.uint16)
    highest = cv2.dilate(padded, window, borderType=cv2.BORDER_REPLICATE)
    lowest = cv2.erode(padded, window, borderType=cv2.BORDER_REPLICATE)
    return np.asarray(highest != lowest)[1:-1, 1:-1]


def boundary_iou_counts(
    truth: np.ndarray,
    predicted: np.ndarray,
    classes: int,
    boundary: Callable[[np.ndarray], np.ndarray] = is_boundary,
) -> np.ndarray:
    """Count the pixels of boundaries.

    Args:
        truth: (H, W) labels, as for `confusion`.
        predicted: (H, W) labels.
        classes: K.
        boundary: (H, W) labels -> (H, W) bool.

    Returns:
        (2, K) int64: per class the pixels in both boundaries, and in one of them at least.
    """
    known = (truth >= 0) & (truth < classes)
    of_truth = np.where(boundary(truth), truth, classes)[known].astype(np.int64)
    of_predicted = np.where(boundary(predicted), predicted, classes)[known].astype(np.int64)
    of_predicted = of_predicted.clip(0, classes)
    shared = np.bincount(of_truth[of_truth == of_predicted], minlength=classes + 1)
    either = np.bincount(of_truth, minlength=classes + 1) + np.bincount(
        of_predicted, minlength=classes + 1
    )
    return np.stack([shared, either - shared])[:, :classes]


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Divide; nan where the whole is 0."""
    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    found: np.ndarray = np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)
    return found


def mean_of_defined(values: np.ndarray | Sequence[float]) -> float:
    """Mean of what is not nan; nan where all are."""
    values = np.asarray(values, dtype=np.float64)
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else float("nan")


def load_image_into_numpy_array(
    filename: str, copy: bool = False, dtype: npt.DTypeLike | None = None
) -> np.ndarray:
    """Read a label image.

    Args:
        filename: path, or any URI that `PathManager` knows.
        copy: whether the array may be written to.
        dtype: of the result; None: as `read_label_map` returns it.

    Returns:
        (H, W) labels.
    """
    labels = read_label_map(filename)
    if copy:
        return np.array(labels, dtype=dtype)
    return np.asarray(labels, dtype=dtype)


class SemSegEvaluator(DatasetEvaluator):
    """Computes mean IoU, frequency-weighted IoU, accuracies and Boundary IoU of label images.

    Args:
        dataset_name: a dataset whose records have `sem_seg_file_name` and whose metadata has
            `stuff_classes`.
        distributed: add up the counts of all processes on the main one; if False, every process
            evaluates what it has seen.
        output_dir: folder for ``sem_seg_predictions.json`` (run-length masks per class, in COCO's
            stuff format) and ``sem_seg_evaluation.pth``; None: nothing is written.
        sem_seg_loading_fn: file name -> (H, W) labels; called with ``dtype=int``.
        num_classes: outdated; the number of classes is that of `stuff_classes`.
        ignore_label: outdated; pixels with the metadata's `ignore_label` are left out.

    Raises:
        KeyError: the dataset is not registered.
        ValueError: it has no semantic labels, or no `stuff_classes`.
    """

    def __init__(
        self,
        dataset_name: str,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        sem_seg_loading_fn: Callable[..., np.ndarray] = load_image_into_numpy_array,
        num_classes: int | None = None,
        ignore_label: int | None = None,
    ) -> None:
        self._logger = logging.getLogger(__name__)
        self._dataset_name = dataset_name
        self._distributed = distributed
        self._output_dir = output_dir
        self._cpu_device = torch.device("cpu")
        self.sem_seg_loading_fn = sem_seg_loading_fn
        self.input_file_to_gt_file = self._label_files(dataset_name)
        metadata = MetadataCatalog.get(dataset_name)
        self._class_names: list[str] = list(metadata.get("stuff_classes") or ())
        self._num_classes = len(self._class_names)
        if not self._class_names or num_classes not in (None, self._num_classes):
            raise ValueError(
                f"dataset '{dataset_name}' has {self._num_classes} stuff_classes in its metadata, "
                f"expected {num_classes or 'at least one'}; set them by MetadataCatalog.get"
                f"('{dataset_name}').set(stuff_classes=[...])"
            )
        self._ignore_label = metadata.get("ignore_label") if ignore_label is None else ignore_label
        to_index = metadata.get("stuff_dataset_id_to_contiguous_id") or {}
        self._contiguous_id_to_dataset_id = {index: label for label, index in to_index.items()}
        self._compute_boundary_iou = True
        own = type(self)._mask_to_boundary is not SemSegEvaluator._mask_to_boundary
        self._is_boundary = self._boundary_by_class if own else is_boundary
        self.reset()

    @staticmethod
    def _label_files(dataset_name: str) -> dict[str, str]:
        records = DatasetCatalog.get(dataset_name)
        missing = next((r for r in records if not r.get("sem_seg_file_name")), None)
        if missing is not None:
            raise ValueError(
                f"dataset '{dataset_name}' has no semantic labels: the record of "
                f"{missing['file_name']} lacks 'sem_seg_file_name'"
            )
        return {record["file_name"]: record["sem_seg_file_name"] for record in records}

    def reset(self) -> None:
        """Forget all counts and predictions."""
        classes = self._num_classes
        self._conf_matrix = np.zeros((classes, classes + 1), dtype=np.int64)
        self._boundary_counts = np.zeros((2, classes), dtype=np.int64)
        self._predictions: list[dict[str, Any]] = []

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Any]) -> None:
        """Take in one batch.

        Args:
            inputs: per image a dict with ``file_name``.
            outputs: per image a dict with ``sem_seg``: (K, H, W) scores, or (H, W) labels.

        Raises:
            ValueError: an output is not of its label image's size.
        """
        for image, output in zip(inputs, outputs, strict=True):
            scores = output["sem_seg"]
            labels = scores.argmax(dim=0) if scores.dim() == 3 else scores
            predicted = labels.to(self._cpu_device).numpy().astype(np.int32)
            file = self.input_file_to_gt_file[image["file_name"]]
            truth = np.asarray(self.sem_seg_loading_fn(file, dtype=np.int32))
            if truth.shape != predicted.shape:
                raise ValueError(
                    f"{file}: labels are {truth.shape} (h, w), the prediction {predicted.shape}"
                )
            if self._ignore_label is not None:
                truth = np.where(truth == self._ignore_label, self._num_classes, truth)
            self._conf_matrix += confusion(truth, predicted, self._num_classes)
            if self._compute_boundary_iou:
                self._boundary_counts += boundary_iou_counts(
                    truth, predicted, self._num_classes, self._is_boundary
                )
            if self._output_dir:
                self._predictions += self.encode_json_sem_seg(predicted, image["file_name"])

    def _mask_to_boundary(
        self, mask: np.ndarray, dilation_ratio: float = BOUNDARY_RATIO
    ) -> np.ndarray:
        """Keep the boundary of a mask alone, for subclasses to replace.

        Args:
            mask: (H, W) uint8, 0 or 1: the pixels of one class.
            dilation_ratio: width of the boundary, relative to the diagonal of the image.

        Returns:
            (H, W) uint8: 1 on the boundary inside the mask.
        """
        found: np.ndarray = mask * is_boundary(mask, dilation_ratio).astype(mask.dtype)
        return found

    def _boundary_by_class(self, labels: np.ndarray) -> np.ndarray:
        """Join what `_mask_to_boundary` of a subclass makes of each class."""
        found = np.zeros(labels.shape, dtype=bool)
        for label in np.unique(labels):
            found |= self._mask_to_boundary((labels == label).astype(np.uint8)).astype(bool)
        return found

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Compute the figures.

        Returns:
            ``{"sem_seg": {...}}`` in percent: ``mIoU``, ``fwIoU``, ``mACC``, ``pACC``, and per
            class ``IoU-``, ``BoundaryIoU-``, ``min(IoU, B-Iou)-`` and ``ACC-<class>``; nan for
            classes that are not in the ground truth, which the means leave out. None on other
            processes than the main one.
        """
        part = (self._conf_matrix, self._boundary_counts, self._predictions)
        parts = gather_on_main([part], self._distributed)
        if parts is None:
            return None
        self._conf_matrix = np.sum([p[0] for p in parts], axis=0)
        self._boundary_counts = np.sum([p[1] for p in parts], axis=0)
        self._predictions = [entry for p in parts for entry in p[2]]
        results = self._figures()
        if self._output_dir:
            folder, name = self._output_dir, self._dataset_name
            with results_file(folder, "sem_seg_predictions.json", name) as file:
                file.write(json.dumps(self._predictions))
            with results_file(folder, "sem_seg_evaluation.pth", name, mode="wb") as file:
                torch.save(results, file)
        summary = {key: results[key] for key in ("mIoU", "fwIoU", "mACC", "pACC")}
        self._logger.info("Semantic segmentation:\n%s", create_small_table(summary))
        return OrderedDict(sem_seg=results)

    def _figures(self) -> dict[str, float]:
        matrix = self._conf_matrix
        hits = np.diagonal(matrix)
        of_truth, of_predicted = matrix.sum(axis=1), matrix[:, :-1].sum(axis=0)
        present = of_truth > 0
        accuracy = ratio(hits, of_truth)
        iou = np.where(present, ratio(hits, of_truth + of_predicted - hits), np.nan)
        boundary = np.where(present, ratio(*self._boundary_counts), np.nan)
        total = float(of_truth.sum())
        weights = of_truth / total if total else np.zeros(len(of_truth))
        figures = {
            "mIoU": mean_of_defined(iou),
            "fwIoU": float(np.sum(np.nan_to_num(iou) * weights)) if total else float("nan"),
        }
        for index, name in enumerate(self._class_names):
            figures[f"IoU-{name}"] = iou[index]
            if not self._compute_boundary_iou:
                continue
            figures[f"BoundaryIoU-{name}"] = boundary[index]
            figures[f"min(IoU, B-Iou)-{name}"] = np.minimum(iou[index], boundary[index])
        figures["mACC"] = mean_of_defined(accuracy)
        figures["pACC"] = float(hits.sum() / total) if total else float("nan")
        for index, name in enumerate(self._class_names):
            figures[f"ACC-{name}"] = accuracy[index]
        return {key: float(value) * 100 for key, value in figures.items()}

    def encode_json_sem_seg(
        self, sem_seg: np.ndarray, input_file_name: str | os.PathLike[str]
    ) -> list[dict[str, Any]]:
        """Turn a label image into COCO's stuff format.

        Args:
            sem_seg: (H, W) class indices.
            input_file_name: goes into every dict.

        Returns:
            One dict for each class that occurs: ``file_name``, ``category_id`` (of the dataset)
            and ``segmentation`` (run-length mask).

        Raises:
            ValueError: a class that the dataset does not have.
        """
        labels = np.unique(sem_seg)
        if len(labels) and not 0 <= labels[0] <= labels[-1] < self._num_classes:
            raise ValueError(
                f"{input_file_name}: predicted classes {labels[0]} to {labels[-1]}, but dataset "
                f"'{self._dataset_name}' has {self._num_classes}; set "
                "MODEL.SEM_SEG_HEAD.NUM_CLASSES to this"
            )
        masks = encode_bitmasks(sem_seg[None] == labels[:, None, None])
        to_label = self._contiguous_id_to_dataset_id
        return [
            {
                "file_name": str(input_file_name),
                "category_id": to_label.get(int(label), int(label)),
                "segmentation": mask,
            }
            for label, mask in zip(labels, masks, strict=True)
        ]


logger = logging.getLogger(__name__)

_GROUPS = {"": "All", "_th": "Things", "_st": "Stuff"}


def id_to_rgb(ids: np.ndarray) -> np.ndarray:
    """Write segment ids as colours.

    Args:
        ids: (H, W) integers in [0, 2**24).

    Returns:
        (H, W, 3) uint8: id = R + 256 G + 256**2 B.
    """
    ids = ids.astype(np.int64)
    return np.stack([ids & 255, (ids >> 8) & 255, (ids >> 16) & 255], axis=-1).astype(np.uint8)


class COCOPanopticEvaluator(DatasetEvaluator):
    """Computes PQ, SQ and RQ over all classes, things and stuff.

    Args:
        dataset_name: a dataset whose metadata has `panoptic_json`, `panoptic_root` and the maps
            from category ids to contiguous ones (see `register_coco_panoptic`).
        output_dir: folder for ``predictions.json``; None: nothing is kept.

    Raises:
        ValueError: the metadata lack one of these.
    """

    def __init__(self, dataset_name: str, output_dir: str | None = None) -> None:
        self._metadata = MetadataCatalog.get(dataset_name)
        needed = ("panoptic_json", "panoptic_root", "thing_dataset_id_to_contiguous_id")
        missing = [key for key in needed if self._metadata.get(key) is None]
        if missing:
            raise ValueError(
                f"dataset '{dataset_name}' has no {', '.join(missing)} in its metadata; "
                "COCOPanopticEvaluator needs a dataset of register_coco_panoptic"
            )
        things = self._metadata.thing_dataset_id_to_contiguous_id
        stuff = self._metadata.get("stuff_dataset_id_to_contiguous_id") or {}
        self._thing_contiguous_id_to_dataset_id = {v: k for k, v in things.items()}
        self._stuff_contiguous_id_to_dataset_id = {v: k for k, v in stuff.items()}
        self._output_dir = output_dir
        self.reset()

    def reset(self) -> None:
        """Forget all predictions."""
        self._predictions: list[dict[str, Any]] = []

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Any]) -> None:
        """Take in one batch.

        Args:
            inputs: per image a dict with ``file_name`` and ``image_id``.
            outputs: per image a dict with ``panoptic_seg``: (H, W) integer segment ids and their
                list of ``{"id", "category_id" (contiguous), "isthing"}``; 0 is no segment. In place
                of the list None: the ids are category * label_divisor + instance, and -1 is none.
        """
        for image, output in zip(inputs, outputs, strict=True):
            ids, segments = output["panoptic_seg"]
            array = np.asarray(ids.cpu())
            if segments is None:
                array, segments = self._segments_of_ids(array)
            self._predictions.append(
                {
                    "image_id": image["image_id"],
                    "file_name": f"{Path(image['file_name']).stem}.png",
                    "png_string": _png(id_to_rgb(array)),
                    "segments_info": [self._convert_category_id(s) for s in segments],
                }
            )

    def _segments_of_ids(self, ids: np.ndarray) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """List the segments of ids that hold their category; make 0 the id of no segment."""
        divisor = self._metadata.label_divisor
        things = set(self._thing_contiguous_id_to_dataset_id)
        segments = [
            {
                "id": int(label) + 1,
                "category_id": int(label // divisor),
                "isthing": int(label // divisor) in things,
            }
            for label in np.unique(ids)
            if label != -1
        ]
        return ids + 1, segments

    def _convert_category_id(self, segment: Mapping[str, Any]) -> dict[str, Any]:
        """Return a segment for JSON, with the category id of the dataset."""
        kind = "thing" if segment["isthing"] else "stuff"
        table = {
            "thing": self._thing_contiguous_id_to_dataset_id,
            "stuff": self._stuff_contiguous_id_to_dataset_id,
        }[kind]
        category = segment["category_id"]
        if category not in table:
            raise ValueError(
                f"predicted {kind} class {category}, but dataset '{self._metadata.name}' has "
                f"{len(table)} {kind} classes"
            )
        return {"id": int(segment["id"]), "category_id": int(table[category])}

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Compute the figures.

        Returns:
            ``{"panoptic_seg": {"PQ", "SQ", "RQ", "PQ_th", ..., "RQ_st"}}`` in percent; None on
            other processes than the main one.

        Raises:
            ValueError: an image of the ground truth was not processed.
        """
        gathered = gather_on_main(self._predictions)
        if gathered is None:
            return None
        predictions = once_per_image(gathered)
        folder = tempfile.mkdtemp(prefix="d2kit_panoptic_")
        try:
            result = self._quality(predictions, Path(folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        figures = {
            f"{metric.upper()}{suffix}": 100 * result[group][metric]
            for suffix, group in _GROUPS.items()
            for metric in ("pq", "sq", "rq")
        }
        _print_panoptic_results(result)
        return OrderedDict(panoptic_seg=figures)

    def _quality(self, predictions: Sequence[dict[str, Any]], folder: Path) -> dict[str, Any]:
        """Write the predictions as COCO's panoptic format and let hotcoco compare them."""
        from hotcoco.panoptic import PanopticEval

        truth = PathManager.get_local_path(self._metadata.panoptic_json)
        truth_folder = PathManager.get_local_path(self._metadata.panoptic_root)
        annotations = []
        for prediction in predictions:
            (folder / prediction["file_name"]).write_bytes(prediction["png_string"])
            annotations.append({k: v for k, v in prediction.items() if k != "png_string"})
        content = {"annotations": annotations}
        if self._output_dir:
            content = {**load_json(truth), **content}
        file = Path(self._output_dir or folder) / "predictions.json"
        with results_file(file.parent, file.name, self._metadata.name, truth) as stream:
            stream.write(json.dumps(content))
        try:
            evaluation = PanopticEval(
                truth, str(file), gt_folder=truth_folder, pred_folder=str(folder)
            )
            evaluation.evaluate()
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"{self._metadata.panoptic_json}: {error}") from error
        return evaluation.results()


def _png(rgb: np.ndarray) -> bytes:
    from PIL import Image

    with io.BytesIO() as stream:
        Image.fromarray(rgb).save(stream, format="PNG", compress_level=1)
        return stream.getvalue()


def _print_panoptic_results(pq_res: Mapping[str, Mapping[str, float]]) -> None:
    """Log a table of panoptic quality.

    Args:
        pq_res: group -> ``pq``, ``sq``, ``rq`` in [0, 1] and ``n``, the number of classes.
    """
    from tabulate import tabulate

    rows = [
        [name, *(pq_res[name][metric] * 100 for metric in ("pq", "sq", "rq")), pq_res[name]["n"]]
        for name in _GROUPS.values()
    ]
    table = tabulate(rows, ["", "PQ", "SQ", "RQ", "classes"], tablefmt="pipe", floatfmt=".3f")
    logger.info("Panoptic evaluation results:\n%s", table)
