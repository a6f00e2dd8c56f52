"""Draws predictions on the frames of a video, with colours that stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from d2kit.structures import Instances
from d2kit.visualization import labels as _colors
from d2kit.visualization.drawing import VisImage
from d2kit.visualization.instances import GenericMask
from d2kit.visualization.labels import _PanopticPrediction, create_text_labels
from d2kit.visualization.visualizer import ColorMode, Visualizer

_MASK_IOU, _BOX_IOU = 0.5, 0.6  # two detections that overlap more are one object
_FRAMES_KEPT = 8  # an object unseen for longer loses its colour


@dataclass(slots=True, eq=False)
class _DetectedInstance:
    """An object of an earlier frame.

    Args:
        label: class index.
        bbox: x0, y0, x1, y1, or None.
        mask_rle: mask as RLE, or None.
        color: its colour.
        ttl: number of frames that it may still be missing.
    """

    label: int
    bbox: Any
    mask_rle: Any
    color: Any
    ttl: int


class VideoVisualizer:
    """Draws frame after frame; an object keeps its colour.

    An object is recognised by the field `ID` of the predictions, where they have it, else by its
    overlap with the objects of the last frames.

    Args:
        metadata: see `Visualizer`.
        instance_mode: see `ColorMode`.
    """

    def __init__(self, metadata: Any, instance_mode: ColorMode = ColorMode.IMAGE) -> None:
        self.metadata: Any = {} if metadata is None else metadata
        self._instance_mode = instance_mode
        self._old_instances: list[_DetectedInstance] = []
        self._assigned_colors: dict[int, Any] = {}
        self._max_num_instances = 74  # colours of Detectron2's list; ours has no end
        self._next_color = 0

    def draw_instance_predictions(self, frame: np.ndarray, predictions: Instances) -> VisImage:
        """Draw the detections of one frame.

        Args:
            frame: (H, W, 3) RGB in [0, 255].
            predictions: see `Visualizer.draw_instance_predictions`; `ID` (R,) where tracked.
        """
        visualizer = Visualizer(frame, self.metadata, instance_mode=self._instance_mode)
        predictions = predictions.to(torch.device("cpu"))
        fields = predictions.get_fields()
        count = len(predictions)
        if count == 0:
            self._assign_colors([])
            return visualizer.get_output()
        classes, labels, masks = visualizer._prediction_parts(fields)
        colors = visualizer._class_colors(classes, jittering=False)
        if colors is None and "ID" in fields:
            ids = _identities(predictions)
            colors = self._assign_colors_by_id(predictions)
            labels = [f"#{i} {label}" for i, label in zip(ids, labels or [""] * count, strict=True)]
        elif colors is None:
            boxes = fields.get("pred_boxes")
            rows: Any = [None] * count if boxes is None else visualizer._convert_boxes(boxes)
            rles: list[Any] = [None] * count if masks is None else _to_rle(masks)
            kinds = classes or [0] * count
            detected = [
                _DetectedInstance(k, b, r, None, _FRAMES_KEPT)
                for k, b, r in zip(kinds, rows, rles, strict=True)
            ]
            colors = self._assign_colors(detected)
        return visualizer._overlay_predictions(fields, masks, labels, colors, alpha=0.5)

    def draw_sem_seg(
        self, frame: np.ndarray, sem_seg: Any, area_threshold: float | None = None
    ) -> VisImage:
        """Draw a semantic segmentation on one frame; see `Visualizer.draw_sem_seg`."""
        visualizer = Visualizer(frame, self.metadata)
        return visualizer.draw_sem_seg(sem_seg, area_threshold=area_threshold)

    def draw_panoptic_seg_predictions(
        self,
        frame: np.ndarray,
        panoptic_seg: Any,
        segments_info: Sequence[dict[str, Any]] | None,
        area_threshold: float | None = None,
        alpha: float = 0.5,
    ) -> VisImage:
        """Draw a panoptic segmentation on one frame; see `Visualizer.draw_panoptic_seg`."""
        frame = np.asarray(frame)
        prediction = _PanopticPrediction(panoptic_seg, segments_info, self.metadata)
        visualizer = Visualizer(frame, self.metadata, instance_mode=self._instance_mode)
        stuff = [info for _, info in prediction.semantic_masks()]
        visualizer.draw_panoptic_seg(panoptic_seg, stuff, area_threshold, alpha)
        things = list(prediction.instance_masks())
        classes = [int(info["category_id"]) for _, info in things]
        masks = [GenericMask(mask, *frame.shape[:2]) for mask, _ in things]
        detected = [
            _DetectedInstance(k, None, r, None, _FRAMES_KEPT)
            for k, r in zip(classes, _to_rle(masks), strict=True)
        ]
        colors = self._assign_colors(detected)
        labels = create_text_labels(classes, None, self.metadata.get("thing_classes", None))
        visualizer.overlay_instances(
            masks=masks, labels=labels, assigned_colors=colors, alpha=alpha
        )
        return visualizer.get_output()

    def _new_color(self) -> Any:
        color = _colors.palette(self._next_color)
        self._next_color += 1
        return color

    def _assign_colors_by_id(self, instances: Instances) -> list[Any]:
        """Return the colour of each identity, `ID`; an identity never changes its colour."""
        ids = _identities(instances)
        for identity in ids:
            if identity not in self._assigned_colors:
                self._assigned_colors[identity] = self._new_color()
        return [self._assigned_colors[identity] for identity in ids]

    def _assign_colors(self, instances: list[_DetectedInstance]) -> list[Any]:
        """Give each instance the colour of the old one of its class that it overlaps most.

        Args:
            instances: those of this frame; their `color` is set. They become the old ones, beside
                the unmatched old ones that may still come back.

        Returns:
            The colours.
        """
        iou = self._overlaps(instances)
        matched: set[int] = set()
        for _ in range(min(iou.shape) if iou.size else 0):
            new, old = np.unravel_index(int(iou.argmax()), iou.shape)
            if iou[new, old] <= 0:
                break
            instances[int(new)].color = self._old_instances[int(old)].color
            matched.add(int(old))
            iou[new, :] = -1
            iou[:, old] = -1
        for instance in instances:
            if instance.color is None:
                instance.color = self._new_color()
        waiting = [o for i, o in enumerate(self._old_instances) if i not in matched]
        for old_instance in waiting:
            old_instance.ttl -= 1
        self._old_instances = instances + [o for o in waiting if o.ttl > 0]
        return [instance.color for instance in instances]

    def _overlaps(self, instances: list[_DetectedInstance]) -> np.ndarray:
        """Return the IoU (new, old); 0 where the class differs or the overlap is too small."""
        from pycocotools import mask as mask_util

        old = self._old_instances
        if not instances or not old:
            return np.zeros((len(instances), len(old)))
        everything = instances + old
        if all(i.mask_rle is not None for i in everything):
            iou = mask_util.iou(
                [i.mask_rle for i in instances], [o.mask_rle for o in old], [0] * len(old)
            )
            least = _MASK_IOU
        elif all(i.bbox is not None for i in everything):
            iou = mask_util.iou(_xywh(instances), _xywh(old), [0] * len(old))
            least = _BOX_IOU
        else:
            return np.zeros((len(instances), len(old)))
        same = np.array([[i.label == o.label for o in old] for i in instances])
        return np.where(same & (iou > least), iou, 0.0)


def _xywh(instances: Sequence[_DetectedInstance]) -> np.ndarray:
    boxes = np.stack([np.asarray(i.bbox, dtype=np.float64) for i in instances])
    boxes[:, 2:] -= boxes[:, :2]
    return boxes


def _to_rle(masks: Sequence[GenericMask]) -> list[Any]:
    from pycocotools import mask as mask_util

    return [mask_util.encode(np.asfortranarray(mask.mask)) for mask in masks]


def _identities(instances: Instances) -> list[int]:
    return [int(identity) for identity in instances.ID]
