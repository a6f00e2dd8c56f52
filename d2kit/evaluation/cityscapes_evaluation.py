"""Evaluation of instances and label images by Cityscapes' rules (see `_cityscapes_metrics`)."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from d2kit.data.catalog import MetadataCatalog
from d2kit.data.datasets.cityscapes import ground_truth_file
from d2kit.data.detection_utils import read_label_map
from d2kit.evaluation import _cityscapes_metrics as metrics
from d2kit.evaluation._gather import gather_on_main
from d2kit.evaluation.evaluator import DatasetEvaluator
from d2kit.utils.logger import create_small_table

__all__ = ["CityscapesEvaluator", "CityscapesInstanceEvaluator", "CityscapesSemSegEvaluator"]

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
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self._images: dict[str, Any] = {}

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
        unknown = set(names) - set(metrics.THING_IDS)
        if unknown:
            raise ValueError(
                f"'{self._metadata.name}': Cityscapes does not evaluate instances of "
                f"{', '.join(sorted(unknown))}; it does of {', '.join(metrics.THING_IDS)}"
            )
        for image, output in zip(inputs, outputs, strict=True):
            file_name = os.fspath(image["file_name"])
            truth = self._read(file_name, "instanceIds")
            instances = output["instances"].to("cpu")
            masks = np.asarray(getattr(instances.pred_masks, "tensor", instances.pred_masks)) != 0
            self._check_size(file_name, truth, masks.shape[1:] if len(masks) else truth.shape)
            labels = [metrics.THING_IDS[names[c]] for c in instances.pred_classes.tolist()]
            self._images[file_name] = metrics.overlaps_of_image(
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
        table = metrics.average_precisions(images) * 100
        per_class = dict(zip(metrics.THING_IDS, table.mean(axis=1).tolist(), strict=True))
        logger.info("AP per class:\n%s", create_small_table(per_class))
        results = {
            "AP": metrics.mean_of_defined(table),
            "AP50": metrics.mean_of_defined(table[:, 0]),
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
        classes = len(metrics.LABEL_IDS)
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
            self._images[file_name] = metrics.count_labels(predicted, truth, instances)

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Compute the figures.

        Returns:
            ``{"sem_seg": {"IoU", "iIoU", "IoU_sup", "iIoU_sup"}}`` in percent, over the classes
            and over the categories (``sup``); None on other processes than the main one.
        """
        images = self._gather()
        if images is None:
            return None
        counts = sum(images, start=metrics.SemanticCounts.empty())
        results = {k: v * 100 for k, v in metrics.semantic_scores(counts).items()}
        logger.info("Evaluation results for sem_seg:\n%s", create_small_table(results))
        return OrderedDict(sem_seg=results)
