"""Inference in a few lines: `Predictor`, `DefaultPredictor` and MMDetection's two calls."""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from d2kit.checkpoint import DetectionCheckpointer
from d2kit.config import CfgNode, get_cfg
from d2kit.data.detection_utils import build_augmentation, convert_PIL_to_numpy, read_image
from d2kit.export.backends import build_exported, is_exported, read_config
from d2kit.layers import nms
from d2kit.modeling import build_model, computing_in, optimize_for_inference
from d2kit.modeling.facts import build_facts, build_with_thresholds
from d2kit.modeling.postprocessing import roi_masks_kept
from d2kit.predict.tiles import merge_tiles, tile_boxes
from d2kit.structures import Instances
from d2kit.structures.image_list import image_to_tensor
from d2kit.utils.devices import choose_device, choose_inference_dtype
from d2kit.utils.file_io import IMAGE_SUFFIXES, find_image_files

if TYPE_CHECKING:
    from d2kit.data import Metadata

__all__ = [
    "DefaultPredictor",
    "Predictor",
    "build_class_names",
    "build_metadata",
    "find_images",
    "inference_detector",
    "init_detector",
]


def build_metadata(cfg: CfgNode) -> Metadata:
    """Return what is known of a model's classes without reading a dataset.

    It is the metadata of the first test set (without one: training set). Where these do not have
    the names of MODEL.CLASS_NAMES it is a copy that has them: the model knows its classes on a
    machine without its datasets.
    """
    from d2kit.data import Metadata, MetadataCatalog, register_datasets

    register_datasets(cfg.DATASETS.REGISTER_COCO)
    datasets = (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN)
    metadata = MetadataCatalog.get(datasets[0] if datasets else "__unused")
    names = list(cfg.MODEL.CLASS_NAMES)
    if not names or names == metadata.get("thing_classes"):
        return metadata
    return Metadata(**{**metadata.as_dict(), "thing_classes": names})


def build_class_names(cfg: CfgNode) -> list[str]:
    """Return the names of a model's classes in the order of their ids.

    They come from MODEL.CLASS_NAMES, the metadata of the first test (or training) set, or its
    annotations, if they are there, or torchvision's list where the weights are torchvision's; else
    they are numbers, "0", "1", ...
    """
    from d2kit.data import DatasetCatalog
    from d2kit.modeling.facts import build_facts

    metadata = build_metadata(cfg)
    names, dataset = metadata.get("thing_classes"), metadata.name
    if (
        names is None
        and os.path.isfile(metadata.get("json_file") or "")
        and (dataset in DatasetCatalog)
    ):
        DatasetCatalog.get(dataset)  # a dataset of one's own tells its classes when it is read
        names = metadata.get("thing_classes")
    count = build_facts(cfg).num_classes or cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if names is None and cfg.MODEL.WEIGHTS.startswith("torchvision://"):
        from torchvision.models import detection, get_model_weights, list_models

        model = cfg.MODEL.WEIGHTS.removeprefix("torchvision://")
        if model in list_models(detection):
            [weights, *_] = get_model_weights(model)
            listed = weights.meta["categories"]
            # the first is the background, which only RetinaNet has as a class
            names = listed[-count:] if len(listed) - count in (0, 1) else None
    return list(names or map(str, range(count)))


ColorOrder = Literal["RGB", "BGR"]
Image = Any
"""An array (H, W, 3), a path, or a `PIL.Image.Image`."""

_EXPECTED = "expected an image: an array (H, W, 3) uint8 of 0..255, a path or a PIL image"


def check_color(color: str) -> None:
    """Make sure that an order of channels is one of the two."""
    if color not in ("RGB", "BGR"):
        raise ValueError(f"color: expected 'RGB' or 'BGR', got {color!r}")


def to_array(image: Image, *, color: str, wanted: str) -> np.ndarray:
    """Return an image as the model wants it, whatever it was given as.

    Args:
        image: array (H, W, 3): uint8, or another type with values of 0..255; a path; a PIL image,
            which is RGB by itself.
        color: "RGB" or "BGR", the order of the channels of an array.
        wanted: the order of the result.

    Returns:
        (H, W, 3) uint8; a float array stays one.

    Raises:
        ValueError: if it is no image, is empty, or has values of another range.
        OSError: if a file is damaged.
    """
    if isinstance(image, (str, os.PathLike)):
        return read_image(image, wanted)
    if type(image).__module__.partition(".")[0] == "PIL" and hasattr(image, "convert"):
        if 0 in image.size:
            raise ValueError(f"{_EXPECTED}, got an empty one of {image.size} pixels")
        return convert_PIL_to_numpy(image, wanted)
    array = _checked(image)
    return array if wanted == color else array[:, :, ::-1]


def _checked(image: object) -> np.ndarray:
    hints: dict[type, str] = {
        type(None): "None: cv2.imread returns it for a file that it cannot read",
        bytes: "bytes: decode them first, cv2.imdecode(np.frombuffer(data, np.uint8), 1)",
        torch.Tensor: "a torch tensor: give its array (H, W, 3), tensor.cpu().numpy()",
    }
    for kind, text in hints.items():
        if isinstance(image, kind):
            shape = f" of shape {tuple(image.shape)}" if isinstance(image, torch.Tensor) else ""
            raise ValueError(f"{_EXPECTED}, got {text}{shape}")
    if not isinstance(image, np.ndarray):
        raise ValueError(f"{_EXPECTED}, got {type(image).__name__}")
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"{_EXPECTED}, got shape {image.shape}; read_image makes three channels")
    if 0 in image.shape:
        raise ValueError(f"{_EXPECTED}, got an empty one of shape {image.shape}")
    return image if image.dtype == np.uint8 else _of_other_type(image)


def _of_other_type(image: np.ndarray) -> np.ndarray:
    """Return an array of another type than uint8 that nevertheless holds values of 0..255."""
    kind = image.dtype.kind
    if kind not in "iuf" or image.dtype == np.uint16:
        advice = {"b": "image.astype(np.uint8) * 255", "u": "(image // 257).astype(np.uint8)"}
        more = f": {advice[kind]}" if kind in advice else ""
        raise ValueError(f"{_EXPECTED}, got {image.dtype}{more}")
    low, high = float(image.min()), float(image.max())
    if not (low >= 0 and high <= 255):  # also where one is NaN
        raise ValueError(f"{_EXPECTED}, got {image.dtype} of {low:g}..{high:g}")
    if kind in "iu":
        return image.astype(np.uint8)
    if 0 < high <= 1:
        raise ValueError(
            f"{_EXPECTED}, got {image.dtype} of {low:g}..{high:g}: (image * 255).astype(np.uint8)"
        )
    return image


def model_input(image: np.ndarray, resize: Any) -> dict[str, Any]:
    """Return the model's input for one image.

    Args:
        image: (H, W, 3) in the order that the model was trained with.
        resize: an `Augmentation` or `Transform`, of `build_augmentation`.

    Returns:
        ``image`` (3, h, w), resized, and ``height`` and ``width`` before that, in pixels.
    """
    resized = resize.get_transform(image).apply_image(image)
    height, width = image.shape[:2]
    if resized.dtype != np.uint8:
        resized = resized.astype(np.float32)
    return {"image": image_to_tensor(resized), "height": height, "width": width}


def find_images(inputs: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Return the image files named by `inputs`, folders searched recursively, in sorted order.

    Raises:
        FileNotFoundError: if one of them does not exist, or there is no image in any.
    """
    found = find_image_files(inputs)
    if found.bad:
        raise FileNotFoundError("; ".join(f"{path}: {reason}" for path, reason in found.bad))
    if not found.files:
        names = ", ".join(str(entry) for entry in inputs)
        raise FileNotFoundError(f"no image ({', '.join(sorted(IMAGE_SUFFIXES))}) in {names}")
    return found.files


def _is_collection(images: object) -> bool:
    """Tell whether it is several images: anything that can be gone through, and is none itself."""
    single = (str, bytes, os.PathLike, np.ndarray, torch.Tensor)
    return isinstance(images, Iterable) and not isinstance(images, single)


def _whole(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")
    return int(value)


def _share(name: str, value: object) -> float:
    number = float(value) if isinstance(value, numbers.Real) else math.nan
    if not 0 <= number <= 1:  # also where it is NaN
        raise ValueError(f"{name}: expected a number in [0, 1], got {value!r}")
    return number


def build_loaded_model(cfg: CfgNode) -> Any:
    """Return the model of a config with the weights of MODEL.WEIGHTS, for inference.

    Where MODEL.WEIGHTS is the folder of an export, it is that one.
    """
    if is_exported(cfg.MODEL.WEIGHTS):
        return build_exported(cfg)
    model: Any = build_model(cfg).eval()
    checkpointer = DetectionCheckpointer(model)
    checkpointer.load(cfg.MODEL.WEIGHTS)
    model.not_loaded = checkpointer.not_loaded
    return model


def build_dtype(cfg: CfgNode) -> torch.dtype:
    """Return the type that the model of a config computes in; an export's is its own."""
    if is_exported(cfg.MODEL.WEIGHTS):
        return torch.float32
    return choose_inference_dtype(cfg.TEST.DTYPE, choose_device(cfg.MODEL.DEVICE))


def check_loaded(model: object, weights: str) -> None:
    """Refuse a model of `build_loaded_model` that is only partly that of its file.

    Args:
        model: of any kind.
        weights: the file, MODEL.WEIGHTS.

    Raises:
        ValueError: the file lacks weights of the model, as one of a backbone alone does.
    """
    lacking = getattr(model, "not_loaded", None)
    if lacking:
        raise ValueError(
            f"MODEL.WEIGHTS {weights}: {len(lacking)} weights of the model are not in it "
            f"({', '.join(lacking[:3])}{', ...' * (len(lacking) > 3)}), and would be random. Give "
            "the file that the training wrote (model_best.pth, model_final.pth), or its folder as "
            "--config-file"
        )


class Predictor:
    """Detects in images: one, a list, a folder, or a stream of any length.

    An image is an (H, W, 3) uint8 array, a path or a PIL image. Images are batched only with
    neighbours that the network sees at the same size: a result does not depend on the batch.

    Args:
        config: a config, a YAML file, a name of the model zoo, or the folder of an export
            (``d2kit export``), whose model is then run.
        weights: file, URL or zoo name; None: ``MODEL.WEIGHTS`` of the config, or the published
            weights of a name of the model zoo.
        device: "cpu", "cuda:0", 0, "auto", ...; None: ``MODEL.DEVICE``; the CPU, with a warning,
            where there is no CUDA device.
        confidence: in [0, 1]; detections with a lower score are left out; None: the config's
            threshold, wherever the model's family keeps it.
        batch_size: images (or tiles) that go through the network at once.
        color: order of the channels of arrays; files are read rightly whatever it is.
        agnostic_nms: IoU in [0, 1] above which the better of two detections stays alone whatever
            their classes; None: only detections of one class compete.
        tile: side in pixels of the overlapping tiles that larger images are cut into, each seen at
            the config's test size; None: images are seen whole.
        tile_overlap: share of a tile's side that neighbours have in common, in [0, 1).
        optimize: fold fixed batch normalisation into convolutions (equal outputs, faster).

    Raises:
        ValueError: for an option out of its range, or one that is inside an exported model.
        FileNotFoundError: if config or weights cannot be found.
        ImportError: if the package that runs an export is not installed.

    Example:
        >>> predictor = Predictor("run/config.yaml", "run/model_final.pth")  # doctest: +SKIP
        >>> found = predictor("image.jpg")  # doctest: +SKIP
        >>> found.pred_boxes, found.pred_masks, found.scores  # doctest: +SKIP
    """

    def __init__(
        self,
        config: CfgNode | str | os.PathLike[str],
        weights: str | os.PathLike[str] | None = None,
        *,
        device: str | int | torch.device | None = None,
        confidence: float | None = None,
        batch_size: int = 4,
        color: ColorOrder = "BGR",
        agnostic_nms: float | None = None,
        tile: int | None = None,
        tile_overlap: float = 0.2,
        optimize: bool = True,
    ) -> None:
        check_color(color)
        self.batch_size = _whole("batch_size", batch_size, 1)
        self.tile = None if tile is None else _whole("tile", tile, 16)
        self.tile_overlap = _share("tile_overlap", tile_overlap)
        if self.tile_overlap == 1:
            raise ValueError("tile_overlap: expected a share in [0, 1), got 1")
        self.agnostic_nms = None if agnostic_nms is None else _share("agnostic_nms", agnostic_nms)
        least = None if confidence is None else _share("confidence", confidence)
        self.color = color
        self.cfg = build_inference_cfg(config, weights, device, least)
        self.settings = build_settings(self.cfg)
        self.facts = build_facts(self.cfg)
        if self.facts.rotated and (self.tile is not None or self.agnostic_nms is not None):
            raise ValueError(
                "tile and agnostic_nms are for upright boxes; this model's are rotated: leave them"
            )
        # a model that we do not know has no threshold that we could set
        self._least = least if self.facts.score_key is None else None
        model = build_loaded_model(self.cfg)
        folded = optimize and isinstance(model, nn.Module)  # an export is folded already
        self.model = optimize_for_inference(model) if folded else model
        self._dtype = build_dtype(self.cfg)
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
        if isinstance(images, (str, os.PathLike)) and os.path.isdir(images):
            return [found for _, found in self.stream(find_images([images]))]
        if not _is_collection(images):
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

    def outputs(self, images: Sequence[Image]) -> list[dict[str, Any]]:
        """Run the model on some images in one batch, and return what it returns.

        Args:
            images: as of `stream`; of one size where the result must not depend on the batch.

        Returns:
            One dict per image, on the model's device, such as ``{"instances": Instances}``.
        """
        return self._outputs([self._prepare(self._read(image)) for image in images])

    def _outputs(self, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        with torch.inference_mode(), computing_in(self.model, self._dtype):
            results: list[dict[str, Any]] = self.model(items)
        return results

    def _run(self, items: list[dict[str, Any]]) -> list[Instances]:
        results = self._outputs(items)
        if "instances" not in results[0]:
            raise ValueError(
                f"Predictor is for models that detect instances; this one gives {list(results[0])}:"
                " use DefaultPredictor, which returns what the model returns"
            )
        return [result["instances"].to("cpu") for result in results]

    def _finish(self, found: Instances) -> Instances:
        if self._least is not None:
            found = found[found.scores >= self._least]
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
        """Return (H, W, 3) in the order that the model was trained with."""
        return to_array(image, color=self.color, wanted=self.settings.input_format)

    def _prepare(self, image: np.ndarray) -> dict[str, Any]:
        return model_input(image, self._resize)


class DefaultPredictor:
    """Runs the model of a config on single images: Detectron2's call, a thin view of `Predictor`.

    Loads MODEL.WEIGHTS, takes BGR images whatever INPUT.FORMAT is, and resizes by
    INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST. The model keeps its norms, so that its state dict is
    complete; `Predictor` folds them and takes several images at a time.

    Args:
        cfg: the config; copied.

    Attributes:
        cfg: the config.
        model: the model, in evaluation mode.
        metadata: of the first test set, with the names of MODEL.CLASS_NAMES; None without either.
        aug: resizes an image to the size that the network sees.
        input_format: INPUT.FORMAT.

    Raises:
        ValueError: if INPUT.FORMAT is neither BGR nor RGB.
        FileNotFoundError: if the weights cannot be found.

    Example:
        >>> predictor = DefaultPredictor(cfg)  # doctest: +SKIP
        >>> instances = predictor(cv2.imread("image.jpg"))["instances"]  # doctest: +SKIP
    """

    _dtype = torch.float32  # of subclasses with a constructor of their own

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg.clone()
        self.input_format = cfg.INPUT.FORMAT
        if self.input_format not in ("RGB", "BGR"):
            raise ValueError(
                f"DefaultPredictor: INPUT.FORMAT must be BGR or RGB, got '{self.input_format}'"
            )
        known = len(cfg.DATASETS.TEST) + len(cfg.MODEL.CLASS_NAMES)
        self.metadata = build_metadata(cfg) if known else None
        self.model = build_loaded_model(self.cfg)
        self._dtype = build_dtype(self.cfg)
        self.aug = build_augmentation(cfg, is_train=False)[0]

    def __call__(self, original_image: Image) -> dict[str, Any]:
        """Detect in one image.

        Args:
            original_image: (H, W, 3) uint8, BGR, as OpenCV reads it; or a path or PIL image.

        Returns:
            What the model returns for the image, e.g. ``{"instances": Instances}`` with boxes in
            pixels of `original_image`.

        Raises:
            ValueError: if it is no image of 8 bits and three channels.
        """
        image = to_array(original_image, color="BGR", wanted=self.input_format)
        with torch.no_grad(), computing_in(self.model, self._dtype):
            result: dict[str, Any] = self.model([model_input(image, self.aug)])[0]
        return result


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a predictor takes from its config, beside the model."""

    weights: str
    input_format: str
    nms_threshold: float
    most: int


def build_settings(cfg: CfgNode) -> Settings:
    """Return what a predictor needs to know of a config."""
    threshold = build_facts(cfg).nms_threshold
    return Settings(
        weights=cfg.MODEL.WEIGHTS,
        input_format=cfg.INPUT.FORMAT,
        nms_threshold=cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST if threshold is None else threshold,
        most=cfg.TEST.DETECTIONS_PER_IMAGE,
    )


def build_inference_cfg(
    config: CfgNode | str | os.PathLike[str],
    weights: str | os.PathLike[str] | None,
    device: str | int | torch.device | None,
    confidence: float | None,
) -> CfgNode:
    """Return an own, changeable config of a node, a file, a folder, or a name of the zoo."""
    if isinstance(config, CfgNode):
        cfg: CfgNode = config.clone()
    else:
        from d2kit import model_zoo

        path = os.fspath(config)
        if os.path.isdir(path) and weights is not None:
            raise ValueError(f"{path} holds a model: leave out weights ({weights}), or the folder")
        if os.path.exists(path):
            cfg = read_config(path)
        else:
            cfg = get_cfg()
            cfg.merge_from_file(model_zoo.get_config_file(path))
            weights = weights or model_zoo.get_checkpoint_url(path)
    cfg.defrost()
    cfg.MODEL.DEVICE = str(choose_device(cfg.MODEL.DEVICE if device is None else device))
    if weights is not None:
        cfg.MODEL.WEIGHTS = os.fspath(weights)
    if confidence is not None and build_facts(cfg).score_key is not None:
        cfg = build_with_thresholds(cfg, score=confidence)
    return cfg


def init_detector(
    config: CfgNode | str | os.PathLike[str],
    checkpoint: str | os.PathLike[str] | None = None,
    device: str | int | torch.device | None = None,
    cfg_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Predictor:
    """Build a detector and load its weights; MMDetection's first call, with its arguments.

    Args:
        config: a config, a YAML file, a name of the model zoo, or the folder of an export.
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
