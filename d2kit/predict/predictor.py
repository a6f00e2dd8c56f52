"""Inference in a few lines: `Predictor`, and MMDetection's two calls on top of it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from d2kit.checkpoint import DetectionCheckpointer
from d2kit.config import CfgNode, get_cfg
from d2kit.engine.resolve import build_class_names, build_metadata
from d2kit.layers import nms
from d2kit.modeling import build_model, optimize_for_inference
from d2kit.modeling.postprocessing import roi_masks_kept
from d2kit.predict.tiles import merge_tiles, tile_boxes
from d2kit.structures import Instances

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Predictor", "find_images", "inference_detector", "init_detector", "show_result"]

ColorOrder = Literal["RGB", "BGR"]
Image = np.ndarray | str | os.PathLike
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}


def find_images(inputs: Sequence[str | os.PathLike]) -> list[Path]:
    """Return the image files named by `inputs`, folders searched recursively, in sorted order.

    Raises:
        FileNotFoundError: if one of them does not exist, or there is no image in any.
    """
    found: list[Path] = []
    for entry in map(Path, inputs):
        if entry.is_dir():
            found += sorted(p for p in entry.rglob("*") if p.suffix.lower() in SUFFIXES)
        elif entry.is_file():
            found.append(entry)
        else:
            raise FileNotFoundError(f"{entry}: no such file or folder")
    if not found:
        names = ", ".join(str(entry) for entry in inputs)
        raise FileNotFoundError(f"no image ({', '.join(sorted(SUFFIXES))}) in {names}")
    return found


class Predictor:
    """Detects in images: one, a list, a folder, or a stream of any length.

    An image is an (H, W, 3) uint8 array or a path. Images are batched only with neighbours that
    the network sees at the same size, so that a result does not depend on the batch.

    Args:
        config: a config, a YAML file, or a name of the model zoo.
        weights: file, URL or zoo name; None: ``MODEL.WEIGHTS`` of the config, or the published
            weights of a name of the model zoo.
        device: "cpu", "cuda:0", ...; None: ``MODEL.DEVICE``, the CPU where there is no CUDA device.
        confidence: detections with a lower score are left out; None: the config's threshold.
        batch_size: images (or tiles) that go through the network at once.
        color: order of the channels of arrays; files are read rightly whatever it is.
        agnostic_nms: IoU in [0, 1] above which the better of two detections stays alone whatever
            their classes; None: only detections of one class compete.
        tile: side in pixels of the overlapping tiles that larger images are cut into, each seen at
            the config's test size; None: images are seen whole.
        tile_overlap: share of a tile's side that neighbours have in common, in [0, 1).
        optimize: fold fixed batch normalisation into convolutions (equal outputs, faster).

    Raises:
        ValueError: for an option out of its range.
        FileNotFoundError: if config or weights cannot be found.

    Example:
        >>> predictor = Predictor("run/config.yaml", "run/model_final.pth")  # doctest: +SKIP
        >>> found = predictor("image.jpg")  # doctest: +SKIP
        >>> found.pred_boxes, found.pred_masks, found.scores  # doctest: +SKIP
    """

    def __init__(
        self,
        config: CfgNode | str | os.PathLike,
        weights: str | os.PathLike | None = None,
        *,
        device: str | None = None,
        confidence: float | None = None,
        batch_size: int = 4,
        color: ColorOrder = "BGR",
        agnostic_nms: float | None = None,
        tile: int | None = None,
        tile_overlap: float = 0.2,
        optimize: bool = True,
    ) -> None:
        from d2kit.data.detection_utils import build_augmentation

        _check(color=color, batch_size=batch_size, tile=tile, tile_overlap=tile_overlap)
        self.cfg = build_inference_cfg(config, weights, device, confidence)
        self.settings = build_settings(self.cfg)
        self.color, self.batch_size, self.agnostic_nms = color, batch_size, agnostic_nms
        self.tile, self.tile_overlap = tile, tile_overlap
        model = build_model(self.cfg).eval()
        DetectionCheckpointer(model).load(self.settings.weights)
        self.model = optimize_for_inference(model) if optimize else model
        self.metadata = build_metadata(self.cfg)
        self._resize = build_augmentation(self.cfg, is_train=False)[0]

    @property
    def class_names(self) -> list[str]:
        """Names of the classes in the order of their ids; "0", "1", ... where they are unknown."""
        return build_class_names(self.cfg)

    CLASSES = class_names  # MMDetection's name

    def __call__(self, images: Image | Iterable[Image]) -> Any:
        """Detect in one image, or in each of a list or folder.

        Args:
            images: an image (array or path), a list or generator of images, or the path of a
                folder, whose images are taken in sorted order.

        Returns:
            `Instances` on the CPU with `pred_boxes` (pixels of the image), `scores`,
            `pred_classes` and, by the model, `pred_masks` (R, H, W) bool and `pred_keypoints`; a
            list of them for a list or folder.
        """
        if isinstance(images, (str, os.PathLike)) and Path(images).is_dir():
            return [found for _, found in self.stream(find_images([images]))]
        if isinstance(images, (np.ndarray, str, os.PathLike)):
            return next(self.stream([images]))[1]
        return [found for _, found in self.stream(images)]

    def stream(self, images: Iterable[Image]) -> Iterator[tuple[Image, Instances]]:
        """Detect in images one batch after the other, so that memory does not grow.

        Args:
            images: any iterable of arrays and paths, e.g. a generator of video frames.

        Yields:
            Each image as it was given, and its detections.
        """
        if self.tile is not None:
            for image in images:
                yield image, self._tiled(self._read(image))
            return
        waiting: list[tuple[Image, dict[str, Any]]] = []
        for image in images:
            item = self._prepare(self._read(image))
            full = len(waiting) == self.batch_size
            if waiting and (full or waiting[0][1]["image"].shape != item["image"].shape):
                yield from self._detect_waiting(waiting)
                waiting = []
            waiting.append((image, item))
        if waiting:
            yield from self._detect_waiting(waiting)

    def _detect_waiting(
        self, waiting: list[tuple[Image, dict[str, Any]]]
    ) -> Iterator[tuple[Image, Instances]]:
        found = self._run([item for _, item in waiting])
        for (image, _), instances in zip(waiting, found, strict=True):
            yield image, self._finish(instances)

    def _run(self, items: list[dict[str, Any]]) -> list[Instances]:
        with torch.inference_mode():
            results = self.model(items)
        if "instances" not in results[0]:
            raise ValueError(
                f"Predictor is for models that detect instances; this one gives {list(results[0])}:"
                " use DefaultPredictor, which returns what the model returns"
            )
        return [result["instances"].to("cpu") for result in results]

    def _finish(self, found: Instances) -> Instances:
        if self.agnostic_nms is None:
            return found
        return found[nms(found.pred_boxes.tensor, found.scores, self.agnostic_nms)]

    def _tiled(self, image: np.ndarray) -> Instances:
        size = (image.shape[0], image.shape[1])
        tiles = tile_boxes(*size, int(self.tile or 0), self.tile_overlap)
        items = [self._prepare(image[y0:y1, x0:x1]) for x0, y0, x1, y1 in tiles]
        parts: list[Instances] = []
        with roi_masks_kept():
            for i in range(0, len(items), self.batch_size):
                parts += self._run(items[i : i + self.batch_size])
        merged = merge_tiles(
            parts,
            tiles,
            size,
            nms_threshold=self.settings.nms_threshold,
            most=self.settings.most,
        )
        return self._finish(merged)

    def _read(self, image: Image) -> np.ndarray:
        """Return (H, W, 3) uint8 in the order that the model was trained with."""
        from d2kit.data.detection_utils import read_image

        wanted = self.settings.input_format
        if isinstance(image, (str, os.PathLike)):
            return read_image(os.fspath(image), wanted)
        if image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"Predictor: expected an image (H, W, 3), got shape {image.shape}")
        return image if wanted == self.color else image[:, :, ::-1]

    def _prepare(self, image: np.ndarray) -> dict[str, Any]:
        """Return the model's input for one image."""
        resized = self._resize.get_transform(image).apply_image(image)
        tensor = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1), np.float32))
        return {"image": tensor, "height": image.shape[0], "width": image.shape[1]}


def _check(
    *, color: str, batch_size: int = 1, tile: int | None = None, tile_overlap: float = 0.0
) -> None:
    if color not in ("RGB", "BGR"):
        raise ValueError(f"color: expected 'RGB' or 'BGR', got {color!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if tile is not None and tile < 16:
        raise ValueError(f"tile: expected a side of at least 16 pixels, got {tile}")
    if not 0 <= tile_overlap < 1:
        raise ValueError(f"tile_overlap: expected a share in [0, 1), got {tile_overlap}")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a predictor takes from its config, beside the model."""

    weights: str
    input_format: str
    nms_threshold: float
    most: int


def build_settings(cfg: CfgNode) -> Settings:
    """Return what a predictor needs to know of a config."""
    heads = cfg.MODEL.RETINANET if cfg.MODEL.META_ARCHITECTURE == "RetinaNet" else None
    return Settings(
        weights=cfg.MODEL.WEIGHTS,
        input_format=cfg.INPUT.FORMAT,
        nms_threshold=(heads or cfg.MODEL.ROI_HEADS).NMS_THRESH_TEST,
        most=cfg.TEST.DETECTIONS_PER_IMAGE,
    )


def build_inference_cfg(
    config: CfgNode | str | os.PathLike,
    weights: str | os.PathLike | None,
    device: str | None,
    confidence: float | None,
) -> CfgNode:
    """Return an own, changeable config of a node, a file, or a name of the zoo."""
    if isinstance(config, CfgNode):
        cfg = config.clone()
    else:
        from d2kit import model_zoo

        path = os.fspath(config)
        cfg = get_cfg()
        if os.path.isfile(path):
            cfg.merge_from_file(path)
        else:
            cfg.merge_from_file(model_zoo.get_config_file(path))
            weights = weights or model_zoo.get_checkpoint_url(path)
    cfg.defrost()
    if device is not None:
        cfg.MODEL.DEVICE = device
    if weights is not None:
        cfg.MODEL.WEIGHTS = os.fspath(weights)
    if confidence is not None:
        cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = float(confidence)
        cfg.MODEL.RETINANET.SCORE_THRESH_TEST = float(confidence)
    return cfg


def init_detector(
    config: CfgNode | str | os.PathLike,
    checkpoint: str | os.PathLike | None = None,
    device: str | None = None,
    cfg_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Predictor:
    """Build a detector and load its weights; MMDetection's first call, with its arguments.

    Args:
        config: a config, a YAML file, or a name of the model zoo.
        checkpoint: file, URL or zoo name; Detectron2's, torchvision's and MMDetection's are read.
        device: "cpu", "cuda:0", ...; None: ``MODEL.DEVICE`` of the config.
        cfg_options: config keys that differ, e.g. ``{"INPUT.MIN_SIZE_TEST": 480}``.
        **options: of `Predictor`.

    Raises:
        KeyError: if there is no such config key.
    """
    if cfg_options:
        config = build_inference_cfg(config, checkpoint, device, None)
        config.merge_from_list([x for pair in cfg_options.items() for x in pair])
    return Predictor(config, checkpoint, device=device, **options)


def inference_detector(model: Predictor, imgs: Image | Iterable[Image]) -> Any:
    """Detect in one image or a list of images; MMDetection's second call.

    Args:
        model: of `init_detector`.
        imgs: one or a list or generator of arrays (H, W, 3), BGR unless the detector was made with
            ``color="RGB"``, or paths; or a folder.

    Returns:
        `Instances` for one image, else a list of them; see `Predictor.__call__`.
    """
    return model(imgs)


def show_result(
    img: Image,
    result: Instances,
    class_names: Sequence[str] | None = None,
    score_thr: float = 0.3,
    *,
    color: ColorOrder = "BGR",
    out_file: str | os.PathLike | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw detections over their image with matplotlib, one colour per instance.

    The names of the first four arguments and of `out_file` are MMDetection's.

    Args:
        img: array (H, W, 3) uint8 or path.
        result: its detections.
        class_names: names in the order of class ids; `Predictor.class_names`.
        score_thr: detections with a lower score are left out.
        color: order of the channels where `img` is an array.
        out_file: picture to write, by suffix; None: none.
        ax: axes to draw into; None: a new figure of the image's shape.

    Returns:
        The axes; ``plt.show()`` shows them, a notebook does so by itself.

    Raises:
        ValueError: if `result` is not of one image, or `color` is neither of the two.
    """
    from d2kit.data.detection_utils import read_image
    from d2kit.visualization import Visualizer
    from d2kit.visualization.plots import show_image

    _check(color=color)
    if not isinstance(result, Instances):
        raise ValueError(
            f"show_result: expected the detections of one image, got {type(result).__name__}; "
            "call it for each image of a list"
        )
    if isinstance(img, (str, os.PathLike)):
        rgb = read_image(os.fspath(img), "RGB")
    else:
        rgb = img if color == "RGB" else img[:, :, ::-1]
    metadata = {"thing_classes": list(class_names)} if class_names is not None else {}
    kept = result[result.scores >= score_thr]
    drawn = Visualizer(rgb, metadata).draw_instance_predictions(kept)
    if out_file is not None:
        drawn.save(os.fspath(out_file))
    return show_image(drawn.get_image(), ax)
