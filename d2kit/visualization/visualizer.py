"""Draws predictions and annotations on one image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from d2kit.structures import BoxMode, Instances
from d2kit.utils.file_io import PathManager
from d2kit.visualization.drawing import VisImage
from d2kit.visualization.instances import ColorMode, GenericMask, InstanceDrawing
from d2kit.visualization.labels import _OFF_WHITE, _PanopticPrediction, create_text_labels

__all__ = [
    "_OFF_WHITE",
    "ColorMode",
    "GenericMask",
    "VisImage",
    "Visualizer",
    "_PanopticPrediction",
    "create_text_labels",
]


class Visualizer(InstanceDrawing):
    """Draws boxes, masks, keypoints, labels and segmentations on an image.

    Coordinates are those of the image given, whatever the scale. Colours are the same in every
    run.

    Args:
        img_rgb: (H, W, 3) RGB, (H, W, 4) RGBA, whose opacity is dropped, or (H, W) grey, in
            [0, 255].
        metadata: names and colours of the dataset (`MetadataCatalog.get(name)`, or a dict with
            `thing_classes`, `thing_colors`, `stuff_classes`, ...).
        scale: size of the output relative to the image.
        instance_mode: see `ColorMode`.
        font_size_scale: factor on the size of the text.
    """

    cpu_device = torch.device("cpu")

    # ------------------------------------------------------ what a model gives
    def draw_instance_predictions(self, predictions: Instances, jittering: bool = True) -> VisImage:
        """Draw the detections of the image.

        Args:
            predictions: with any of `pred_boxes`, `scores`, `pred_classes`, `pred_masks`
                (R, H, W), `pred_keypoints` (R, K, 3).
            jittering: in `ColorMode.SEGMENTATION`, vary the class colour from instance to
                instance.
        """
        predictions = predictions.to(self.cpu_device)
        fields = predictions.get_fields()
        classes, labels, masks = self._prediction_parts(fields)
        colors = self._class_colors(classes, jittering)
        alpha = 0.5 if colors is None else 0.8
        return self._overlay_predictions(fields, masks, labels, colors, alpha)

    def draw_sem_seg(
        self,
        sem_seg: Any,
        area_threshold: float | None = None,
        alpha: float = 0.8,
        draw_text: bool = True,
        edge_color: Any = _OFF_WHITE,
    ) -> VisImage:
        """Draw a semantic segmentation.

        Args:
            sem_seg: (H, W) integers; values outside [0, number of stuff_classes) are not drawn.
            area_threshold: connected parts of fewer pixels are not drawn.
            alpha: opacity in [0, 1].
            draw_text: whether to write the class names.
            edge_color: of the outlines.
        """
        seg = np.asarray(sem_seg.cpu() if isinstance(sem_seg, torch.Tensor) else sem_seg)
        names = self.metadata.get("stuff_classes", None)
        labels, areas = np.unique(seg, return_counts=True)
        for label in labels[np.argsort(-areas, kind="stable")].tolist():
            if label < 0 or (names is not None and label >= len(names)):
                continue
            self.draw_binary_mask(
                seg == label,
                color=self._stuff_color(int(label)),
                edge_color=edge_color,
                text=str(names[label] if names is not None else label) if draw_text else None,
                alpha=alpha,
                area_threshold=area_threshold,
            )
        return self.output

    def draw_panoptic_seg(
        self,
        panoptic_seg: Any,
        segments_info: Sequence[dict[str, Any]] | None,
        area_threshold: float | None = None,
        alpha: float = 0.7,
    ) -> VisImage:
        """Draw a panoptic segmentation.

        Args:
            panoptic_seg: (H, W) segment ids.
            segments_info: per segment ``id``, ``isthing``, ``category_id``, perhaps ``score``;
                None: see `_PanopticPrediction`.
            area_threshold: connected parts of stuff of fewer pixels are not drawn.
            alpha: opacity in [0, 1].
        """
        prediction = _PanopticPrediction(panoptic_seg, segments_info, self.metadata)
        if self._instance_mode == ColorMode.IMAGE_BW:
            self.output.reset_image(self._create_grayscale_image(prediction.non_empty_mask()))
        stuff = self.metadata.get("stuff_classes", None) or ()
        for mask, info in prediction.semantic_masks():
            category = int(info["category_id"])
            self.draw_binary_mask(
                mask,
                color=self._stuff_color(category),
                edge_color=_OFF_WHITE,
                text=stuff[category] if category < len(stuff) else str(category),
                alpha=alpha,
                area_threshold=area_threshold,
            )
        things = list(prediction.instance_masks())
        if things:
            infos = [info for _, info in things]
            classes = [int(info["category_id"]) for info in infos]
            scores = [i["score"] for i in infos] if all("score" in i for i in infos) else None
            crowd = [info.get("iscrowd", 0) for info in infos]
            names = self.metadata.get("thing_classes", None)
            self.overlay_instances(
                masks=[mask for mask, _ in things],
                labels=create_text_labels(classes, scores, names, crowd),
                assigned_colors=self._class_colors(classes, True, always=True),
                alpha=alpha,
            )
        return self.output

    draw_panoptic_seg_predictions = draw_panoptic_seg

    # -------------------------------------------------------- what a dataset gives
    def draw_dataset_dict(self, dic: dict[str, Any]) -> VisImage:
        """Draw the annotations of a dataset dict in the standard format.

        Args:
            dic: ``annotations`` (boxes, masks, keypoints), ``sem_seg`` or ``sem_seg_file_name``,
                ``pan_seg_file_name`` with ``segments_info``.
        """
        annotations = dic.get("annotations") or []
        if annotations:
            self._draw_annotations(annotations)
        sem_seg = dic.get("sem_seg")
        if sem_seg is None and "sem_seg_file_name" in dic:
            sem_seg = self._read(dic["sem_seg_file_name"])
        if sem_seg is not None:
            self.draw_sem_seg(sem_seg, area_threshold=0, alpha=0.5)
        pan_seg = dic.get("pan_seg")
        if pan_seg is None and "pan_seg_file_name" in dic:
            rgb = self._read(dic["pan_seg_file_name"]).astype(np.int64)
            pan_seg = rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]
        if pan_seg is not None:
            self.draw_panoptic_seg(pan_seg, dic["segments_info"], area_threshold=0, alpha=0.5)
        return self.output

    def _draw_annotations(self, annotations: Sequence[dict[str, Any]]) -> None:
        """Draw the instances of a dataset dict."""
        masks = None
        if any(_is_given(a.get("segmentation")) for a in annotations):
            masks = [a.get("segmentation") for a in annotations]
        keypoints = None
        given = [a["keypoints"] for a in annotations if _is_given(a.get("keypoints"))]
        if given:
            unseen = np.zeros(np.size(given[0]))  # of an object that has none
            rows: list[Any] = [a.get("keypoints") for a in annotations]
            flat = [np.reshape(k, -1) if _is_given(k) else unseen for k in rows]
            keypoints = np.array(flat, dtype=np.float64).reshape(len(annotations), -1, 3)
        boxes: Any = [
            BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS)
            if len(a["bbox"]) == 4
            else a["bbox"]
            for a in annotations
            if "bbox" in a
        ]
        classes = [int(a["category_id"]) for a in annotations]
        labels = create_text_labels(
            classes,
            None,
            self.metadata.get("thing_classes", None),
            [a.get("iscrowd", 0) for a in annotations],
        )
        self.overlay_instances(
            labels=labels,
            boxes=boxes if len(boxes) == len(annotations) else None,
            masks=masks,
            keypoints=keypoints,
            assigned_colors=self._class_colors(classes, True),
        )

    @staticmethod
    def _read(path: str) -> np.ndarray:
        """Read a label image as stored: (H, W) or (H, W, 3)."""
        from PIL import Image

        with PathManager.open(path, "rb") as file:
            return np.array(Image.open(file))


def _is_given(value: Any) -> bool:
    """Tell whether a list, dict or array is there and not empty."""
    return value is not None and len(value) > 0
