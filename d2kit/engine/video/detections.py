"""The detections of a frame, as they are stored, and the detector that makes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from d2kit.config import CfgNode
from d2kit.engine._classes import build_class_names
from d2kit.engine._predictor import DefaultPredictor
from d2kit.structures import Boxes, Instances

__all__ = ["BatchDetector", "FrameDetections", "build_detector"]


@dataclasses.dataclass(frozen=True)
class FrameDetections:
    """What was found in one frame.

    Numbers are rounded when it is made, so that a run that reads them from a file sees what the
    run that wrote them saw.

    Attributes:
        index: number of the frame in its video, from 0.
        time: its time stamp, seconds.
        boxes: (R, 4) float32 XYXY, pixels, rounded to 0.01.
        scores: (R,) float32 in [0, 1], rounded to 0.0001.
        classes: (R,) int64 contiguous classes.
        masks: R compressed run-length masks (``counts`` of COCO) of the frame's size, or None.
    """

    index: int
    time: float
    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    masks: list[str] | None = None

    def __post_init__(self) -> None:
        boxes = np.asarray(self.boxes, np.float64).reshape(-1, 4).round(2).astype(np.float32)
        scores = np.asarray(self.scores, np.float64).reshape(-1).round(4).astype(np.float32)
        classes = np.asarray(self.classes, np.int64).reshape(-1)
        sizes = {len(boxes), len(scores), len(classes)}
        sizes |= {len(self.masks)} if self.masks is not None else set()
        if len(sizes) != 1 or not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise ValueError(
                f"detections of frame {self.index}: expected as many finite boxes, scores, classes "
                f"and masks, got {len(boxes)}, {len(scores)}, {len(classes)} and "
                f"{'none' if self.masks is None else len(self.masks)}"
            )
        object.__setattr__(self, "boxes", boxes)
        object.__setattr__(self, "scores", scores)
        object.__setattr__(self, "classes", classes)
        object.__setattr__(self, "time", round(float(self.time), 6))

    def __len__(self) -> int:
        return len(self.scores)

    def chosen(self, least_score: float) -> FrameDetections:
        """Return those with at least a score, in an order that is their own: best first."""
        keys = [*self.boxes.T[::-1], self.classes, -self.scores]
        order = np.lexsort(keys)
        order = order[self.scores[order] >= np.float32(least_score)]
        masks = None if self.masks is None else [self.masks[i] for i in order]
        return FrameDetections(
            self.index, self.time, self.boxes[order], self.scores[order], self.classes[order], masks
        )

    def instances(self, size: tuple[int, int]) -> Instances:
        """Return them as `Instances` of an image of `size` (height, width)."""
        fields: dict[str, Any] = {
            "pred_boxes": Boxes(torch.from_numpy(self.boxes)),
            "scores": torch.from_numpy(self.scores),
            "pred_classes": torch.from_numpy(self.classes),
        }
        if self.masks is not None:
            fields["pred_masks"] = [{"size": list(size), "counts": c} for c in self.masks]
        return Instances(size, **fields)


class BatchDetector:
    """Runs a model on some frames at a time.

    Args:
        predictor: `DefaultPredictor`, whose model, resizing and colour format are used.
    """

    def __init__(self, predictor: Any) -> None:
        self._predictor = predictor

    def __call__(
        self, indices: Sequence[int], times: Sequence[float], images: Sequence[np.ndarray]
    ) -> list[FrameDetections]:
        """Detect in a batch.

        Args:
            indices: N numbers of frames.
            times: N time stamps, seconds.
            images: N frames (H, W, 3) uint8 BGR.

        Returns:
            N results.

        Raises:
            ValueError: if the model does not find instances.
        """
        with torch.inference_mode():
            outputs = self._predictor.model([self._input(image) for image in images])
        return [_record(*row) for row in zip(indices, times, outputs, strict=True)]

    def _input(self, image: np.ndarray) -> dict[str, Any]:
        height, width = image.shape[:2]
        if self._predictor.input_format == "RGB":
            image = image[:, :, ::-1]
        resized = self._predictor.aug.get_transform(image).apply_image(image)
        tensor = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))
        return {"image": tensor, "height": height, "width": width}


def _record(index: int, time: float, output: dict[str, Any]) -> FrameDetections:
    from d2kit.evaluation.coco_evaluation import instances_to_coco_json

    if "instances" not in output:
        raise ValueError(
            f"the model does not find instances, but {sorted(output)}: tracking needs a detector"
        )
    found = output["instances"].to("cpu")
    masks = None
    if found.has("pred_masks"):
        masks = [row["segmentation"]["counts"] for row in instances_to_coco_json(found, 0)]
    boxes = found.pred_boxes.tensor.numpy()
    return FrameDetections(
        index, time, boxes, found.scores.numpy(), found.pred_classes.numpy(), masks
    )


def build_detector(cfg: CfgNode) -> tuple[BatchDetector, list[str]]:
    """Build the detector of a config.

    Args:
        cfg: the config; ``MODEL.WEIGHTS`` is loaded.

    Returns:
        The detector and the names of its classes.
    """
    return BatchDetector(DefaultPredictor(cfg)), build_class_names(cfg)
