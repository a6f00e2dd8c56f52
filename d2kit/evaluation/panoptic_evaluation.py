"""Panoptic quality as COCO defines it, computed by hotcoco.

Source: Kirillov et al., "Panoptic Segmentation", 2019, section 4 (arXiv 1801.00868).
"""

from __future__ import annotations

import io
import json
import logging
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from d2kit.data.catalog import MetadataCatalog
from d2kit.evaluation.evaluator import (
    DatasetEvaluator,
    gather_on_main,
    once_per_image,
    results_file,
)
from d2kit.utils.file_io import PathManager, load_json

__all__ = ["COCOPanopticEvaluator", "id_to_rgb"]

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
