"""Draws predictions and annotations on an image, and on frames of a video in colours that stay."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from d2kit.structures import Boxes, BoxMode, Instances, Keypoints
from d2kit.utils.file_io import PathManager
from d2kit.visualization.drawing import Color, ColorLike, VisImage, palette
from d2kit.visualization.instances import (
    ColorMode,
    GenericMask,
    InstanceDrawing,
    create_text_labels,
)

__all__ = [
    "_OFF_WHITE",
    "BoxMode",
    "Boxes",
    "ColorMode",
    "GenericMask",
    "Instances",
    "Keypoints",
    "VideoVisualizer",
    "VisImage",
    "Visualizer",
    "_DetectedInstance",
    "_PanopticPrediction",
    "_create_text_labels",
    "create_text_labels",
    "random_color",
    "random_colors",
]

_create_text_labels = create_text_labels  # its name in Detectron2's utils.visualizer

_OFF_WHITE: Color = (1.0, 1.0, 240.0 / 255)
_COUNT = 80
_LIGHTNESS = (0.45, 0.92)  # of OKLab: neither near black nor near white
_draws = np.random.default_rng(0)  # our own: pictures must not move anybody's random numbers


def _oklab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return OKLab coordinates, in which distance is about what the eye sees.

    Args:
        rgb: (N, 3) sRGB in [0, 1].

    Returns:
        (N, 3) lightness, green-red, blue-yellow.

    Source: B. Ottosson, "A perceptual color space for image processing", 2020.
    """
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_cones = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    found: NDArray[np.float64] = np.cbrt(linear @ to_cones.T) @ to_lab.T
    return found


@functools.cache
def _palette() -> NDArray[np.float32]:
    """Return (80, 3) RGB colours in [0, 1]; each is the one farthest from all before it."""
    steps = np.linspace(0, 1, 16)
    rgb = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _oklab(rgb)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    usable = (lab[:, 0] > _LIGHTNESS[0]) & (lab[:, 0] < _LIGHTNESS[1]) & (chroma > 0.06)
    rgb, lab = rgb[usable], lab[usable]
    chosen = [int(np.hypot(lab[:, 1], lab[:, 2]).argmax())]
    distance = np.full(len(lab), np.inf)
    while len(chosen) < _COUNT:
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
        chosen.append(int(distance.argmax()))
    return rgb[chosen].astype(np.float32)


def colormap(rgb: bool = False, maximum: int = 255) -> NDArray[np.float32]:
    """Return the whole palette.

    Args:
        rgb: order of the channels: RGB or, by default, BGR.
        maximum: 255 or 1, the value of a full channel.

    Returns:
        (80, 3) float32 in [0, maximum]; the first ones differ most.

    Raises:
        ValueError: if `maximum` is another number.
    """
    if maximum not in (255, 1):
        raise ValueError(f"colormap: maximum must be 255 or 1, got {maximum}")
    colours = _palette() * np.float32(maximum)
    return colours if rgb else np.ascontiguousarray(colours[:, ::-1])


def random_color(rgb: bool = False, maximum: int = 255) -> NDArray[np.float32]:
    """Return a colour of the palette; the sequence of calls is the same in every process.

    Args:
        rgb: order of the channels: RGB or, by default, BGR.
        maximum: 255 or 1, the value of a full channel.

    Returns:
        (3,) float32 in [0, maximum].
    """
    found: NDArray[np.float32] = colormap(rgb, maximum)[int(_draws.integers(_COUNT))]
    return found


def random_colors(
    N: int,  # noqa: N803 the documented name
    rgb: bool = False,
    maximum: int = 255,
) -> list[NDArray[np.float32]]:
    """Return `N` different colours of the palette, repeated where it has fewer.

    Args:
        N: how many.
        rgb: order of the channels: RGB or, by default, BGR.
        maximum: 255 or 1, the value of a full channel.

    Returns:
        `N` arrays (3,) float32 in [0, maximum].
    """
    colours = colormap(rgb, maximum)
    order = _draws.permutation(_COUNT)
    return [colours[order[i % _COUNT]] for i in range(N)]


class _PanopticPrediction:
    """The segments of a panoptic prediction, stuff and things apart.

    Args:
        panoptic_seg: (H, W) integer tensor of segment ids.
        segments_info: per segment a dict with ``id``, ``isthing``, ``category_id``; None: ids are
            class * `metadata.label_divisor` + instance, negative ids are void.
        metadata: needed where `segments_info` is None.
    """

    def __init__(
        self,
        panoptic_seg: torch.Tensor | np.ndarray,
        segments_info: Sequence[dict[str, Any]] | None,
        metadata: object = None,
    ) -> None:
        self._seg = np.asarray(
            panoptic_seg.cpu() if isinstance(panoptic_seg, torch.Tensor) else panoptic_seg
        )
        ids, areas = np.unique(self._seg, return_counts=True)
        self._areas = {int(i): int(a) for i, a in zip(ids, areas, strict=True)}
        if segments_info is None:
            segments_info = self._infos_from_ids(metadata)
        self._infos = {int(info["id"]): info for info in segments_info}
        # large ones first, so that small ones are drawn on top
        order = sorted(self._areas, key=lambda i: -self._areas[i])
        self._ids = [i for i in order if i in self._infos]

    def _infos_from_ids(self, metadata: Any) -> list[dict[str, Any]]:
        divisor = None if metadata is None else metadata.get("label_divisor")
        if not divisor:
            raise ValueError("Without segments_info, the metadata must have label_divisor")
        things = set((metadata.get("thing_dataset_id_to_contiguous_id") or {}).values())
        return [
            {"id": i, "category_id": i // divisor, "isthing": i // divisor in things}
            for i in self._areas
            if i >= 0 and i // divisor != metadata.get("ignore_label", -1)
        ]

    def non_empty_mask(self) -> np.ndarray:
        """Return (H, W) bool: pixels that belong to a segment."""
        return np.isin(self._seg, list(self._ids))

    def semantic_masks(self) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        """Yield mask (H, W) bool and info of each stuff segment, large ones first."""
        yield from self._masks(things=False)

    def instance_masks(self) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        """Yield mask (H, W) bool and info of each thing, large ones first."""
        yield from self._masks(things=True)

    def _masks(self, things: bool) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        for index in self._ids:
            if bool(self._infos[index]["isthing"]) == things:
                yield self._seg == index, self._infos[index]


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
        fields = predictions.get_fields()
        classes, labels, masks = self._prediction_parts(fields)
        colors = self._class_colors(classes, jittering)
        alpha = 0.5 if colors is None else 0.8
        return self._overlay_predictions(fields, masks, labels, colors, alpha)

    def draw_sem_seg(
        self,
        sem_seg: object,
        area_threshold: float | None = None,
        alpha: float = 0.8,
        draw_text: bool = True,
        edge_color: ColorLike = _OFF_WHITE,
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
        panoptic_seg: torch.Tensor | np.ndarray,
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
            return np.array(Image.open(file, formats=["PNG", "BMP", "GIF", "TIFF"]))


def _is_given(value: Any) -> bool:
    """Tell whether a list, dict or array is there and not empty."""
    return value is not None and len(value) > 0


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

    def __init__(self, metadata: object, instance_mode: ColorMode = ColorMode.IMAGE) -> None:
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
        self, frame: np.ndarray, sem_seg: object, area_threshold: float | None = None
    ) -> VisImage:
        """Draw a semantic segmentation on one frame; see `Visualizer.draw_sem_seg`."""
        visualizer = Visualizer(frame, self.metadata)
        return visualizer.draw_sem_seg(sem_seg, area_threshold=area_threshold)

    def draw_panoptic_seg_predictions(
        self,
        frame: np.ndarray,
        panoptic_seg: torch.Tensor | np.ndarray,
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

    def _new_color(self) -> ColorLike:
        color = palette(self._next_color)
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
