"""Functions to write one's own dataset mapper with: reading, transforming, converting."""

from __future__ import annotations

import io
import logging  # noqa: F401  (user code imports it from here)
import math
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from d2kit.config import CfgNode
from d2kit.data import transforms as T  # noqa: N812
from d2kit.data.annotations import (
    annotations_to_instances,
    annotations_to_instances_rotated,
    filter_empty_instances,
    get_bbox,
    transform_instance_annotations,
    transform_keypoint_annotations,
)
from d2kit.data.deep_pictures import _check_pixels, _decode_deep, _open_tiff, _scaled
from d2kit.structures import Boxes, BoxMode, Instances
from d2kit.utils.file_io import MAX_IMAGE_PIXELS, PathManager
from d2kit.utils.registry import provides_class_weights

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "MAX_IMAGE_PIXELS",
    "SizeMismatchError",
    "_M_RGB2YUV",
    "_M_YUV2RGB",
    "_apply_exif_orientation",
    "annotations_to_instances",
    "annotations_to_instances_rotated",
    "build_augmentation",
    "build_transform_gen",
    "check_image_size",
    "check_metadata_consistency",
    "convert_PIL_to_numpy",
    "convert_image_to_rgb",
    "create_keypoint_hflip_indices",
    "filter_empty_instances",
    "gen_crop_transform_with_instance",
    "get_bbox",
    "get_fed_loss_cls_weights",
    "read_image",
    "read_label_map",
    "transform_instance_annotations",
    "transform_keypoint_annotations",
    "transform_proposals",
]


# ITU-R BT.601, analogue form: Y in 0..1, U in +-0.436, V in +-0.615
_M_RGB2YUV = [[0.299, 0.587, 0.114], [-0.14713, -0.28886, 0.436], [0.615, -0.51499, -0.10001]]
_M_YUV2RGB = [[1.0, 0.0, 1.13983], [1.0, -0.39465, -0.58060], [1.0, 2.03211, 0.0]]

MAX_FILE_BYTES = 2**29

# Other formats are not even tried: Pillow would start Ghostscript for EPS.
_COMMON_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM")
_RARE_FORMATS = ("TIFF", "WEBP", "JPEG2000", "AVIF", "DIB")

_EXIF_ORIENTATION = 0x0112
# EXIF orientation -> name of Pillow's transposition that sets the image upright
_UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def read_image(file_name: str | os.PathLike[str], format: str | None = None) -> np.ndarray:
    """Read an image, set upright by its EXIF orientation; of an animation the first frame.

    Three-channel JPEGs are decoded by OpenCV, all else by Pillow. Both use libjpeg-turbo with the
    same settings and give equal pixels (`tests/data/test_detection_utils.py`); OpenCV is
    faster by a quarter (1.24 against 1.70 ms at 640x480) and gives BGR at once. Whatever is not
    8-bit RGB (deeper pixels, palettes, transparency, CMYK) is converted; alpha is dropped.

    Deeper pixels are divided by their white: 1 of floats, 255 of floats and 32-bit integers, 4095
    (12 bits) or 65535, the first that no value of the picture exceeds. What is below 0 or not
    finite is black. The log says which white was taken, once for each kind.

    Args:
        file_name: path, or any URI that `PathManager` knows.
        format: "BGR", "RGB", "L", "YUV-BT.601", another mode of Pillow, or None for the file's
            own mode, unchanged.

    Returns:
        (H, W, C) uint8 in 0..255, with C = 1 for "L"; float64 for "YUV-BT.601". Writable and
        contiguous whatever the file's format, so that it can be drawn on in place.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: for an empty file, one that is not an image, one that is too large, or an
            unknown format.
        OSError: for an image that is truncated or damaged.
    """
    data = read_image_bytes(file_name)
    header = open_image(data, file_name)
    if format in ("BGR", "RGB") and _is_plain_jpeg(header, data):
        pixels = _decode_by_opencv(data, header.size, format)
        if pixels is not None:
            return pixels
    tiles = getattr(header, "tile", ())  # Pillow keeps the upper 8 of 16 bits of colours
    halved = header.mode in ("RGB", "RGBA") and any(";16" in str(tile[3]) for tile in tiles)
    turned = _exif_orientation(header) if halved and header.format == "PNG" else 1
    image = load_upright(header, file_name)
    if halved and format is not None and np.asarray(image)[..., :3].max(initial=0) < 16:
        deep = _decode_deep(data, file_name)  # of 12 bits nothing but black would be left
        image = image if deep is None else _apply_exif_orientation(deep, turned)
    return _to_array(image, format, file_name)


def read_label_map(file_name: str | os.PathLike[str]) -> np.ndarray:
    """Read an image whose pixels are labels, never scaled or mapped through colours.

    Args:
        file_name: path, or any URI that `PathManager` knows.

    Returns:
        (H, W) uint8 of 8-bit grey or palette images (the indices), int32 of 16-bit images.

    Raises:
        FileNotFoundError, ValueError, OSError: as `read_image`; also ValueError for colour images.
    """
    image = load_upright(open_image(read_image_bytes(file_name), file_name), file_name)
    if image.mode == "1":
        image = image.convert("L")
    labels = np.array(image)
    if labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{file_name}: a label map must be a grey or palette image with one integer per pixel, "
            f"got mode {image.mode!r}"
        )
    return labels if labels.dtype == np.uint8 else labels.astype(np.int32)


def convert_PIL_to_numpy(image: Image.Image, format: str | None) -> np.ndarray:  # noqa: N802
    """Convert a Pillow image to an array of the wanted colour format.

    Args:
        image: `PIL.Image.Image`.
        format: as in `read_image`.

    Returns:
        (H, W, C), as described at `read_image`; (H, W) where `format` is None or another
        one-channel mode. Writable and contiguous, never a view of Pillow's memory.

    Raises:
        ValueError: for a format that is unknown.
    """
    return _to_array(image, format, "a picture")


def _to_array(image: Image.Image, format: str | None, name: str | os.PathLike[str]) -> np.ndarray:
    if format is None:
        return np.array(image)
    if format in ("BGR", "RGB", "YUV-BT.601"):
        rgb = np.array(_eight_bit(image, name).convert("RGB"))
        if format == "RGB":
            return rgb
        if format == "BGR":
            return np.ascontiguousarray(rgb[:, :, ::-1])
        found: np.ndarray = rgb / 255.0 @ np.array(_M_RGB2YUV).T
        return found
    if format == "L":
        return np.array(_eight_bit(image, name).convert("L"))[:, :, None]
    try:
        return np.array(image.convert(format))
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"unknown image format {format!r}: expected 'BGR', 'RGB', 'L', 'YUV-BT.601', or a mode "
            f"that Pillow converts {image.mode!r} to ({error})"
        ) from error


def convert_image_to_rgb(image: np.ndarray | torch.Tensor, format: str | None) -> np.ndarray:
    """Convert an image of any format of `read_image` to RGB.

    Args:
        image: (H, W, C) or (H, W).
        format: the format that `image` has.

    Returns:
        (H, W, 3) uint8, R G B, 0..255.
    """
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu().numpy()
    if format == "BGR":
        return _to_uint8(image[:, :, [2, 1, 0]])
    if format == "YUV-BT.601":
        return _to_uint8(image @ np.array(_M_YUV2RGB).T * 255.0)
    if format in (None, "RGB") and image.ndim == 3 and image.shape[2] == 3:
        return _to_uint8(image)
    from PIL import Image

    plane = image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image
    if format in (None, "L"):
        return np.repeat(_to_uint8(plane)[:, :, None], 3, axis=2)
    return np.array(Image.frombytes(format, plane.shape[1::-1], plane.tobytes()).convert("RGB"))


def _to_uint8(image: np.ndarray) -> np.ndarray:
    return image if image.dtype == np.uint8 else image.clip(0, 255).astype(np.uint8)


def _apply_exif_orientation(image: Image.Image, orientation: int | None = None) -> Image.Image:
    """Set a Pillow image upright by its EXIF orientation; a damaged EXIF block counts as none."""
    from PIL import Image

    orientation = _exif_orientation(image) if orientation is None else orientation
    if orientation not in _UPRIGHT:
        return image
    return image.transpose(Image.Transpose[_UPRIGHT[orientation]])


def _exif_orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # Pillow's EXIF parser raises many types at damaged blocks
        return 1


def read_image_bytes(file_name: str | os.PathLike[str]) -> bytes:
    """Return what an image file holds; refuse an empty one and one over `MAX_FILE_BYTES`."""
    with PathManager.open(os.fspath(file_name), "rb") as file:
        data: bytes = file.read(MAX_FILE_BYTES + 1)
    if len(data) == 0:
        raise ValueError(f"{file_name}: the file is empty (0 bytes), expected an image")
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"{file_name}: larger than the limit of {MAX_FILE_BYTES} bytes per image")
    return data


def _readable_formats() -> Iterator[list[str]]:
    """Yield the formats to try, the usual ones first; Pillow knows others with worse parsers."""
    from PIL import Image

    for formats in (_COMMON_FORMATS, _RARE_FORMATS):
        # Matplotlib loads the PNG plugin alone: what is registered already is not all there is.
        Image.init() if formats is _RARE_FORMATS else Image.preinit()
        yield [name for name in formats if name in Image.OPEN] or list(formats)


def open_image(data: bytes, file_name: str | os.PathLike[str]) -> Image.Image:
    """Parse the header and check the size; no pixel is decoded."""
    from PIL import Image

    image = None
    for known in _readable_formats():
        try:
            image = Image.open(io.BytesIO(data), formats=known)
            break
        except Image.UnidentifiedImageError:
            continue
        except Image.DecompressionBombError as error:
            raise ValueError(f"{file_name}: refused as too large: {error}") from error
        except Exception as error:  # the plugins raise many types at damaged headers
            raise OSError(f"{file_name}: damaged image header: {error}") from error
    if image is None and data[:4] in (b"II*\0", b"MM\0*"):
        return _open_tiff(data, file_name)
    if image is None:
        raise ValueError(
            f"{file_name}: not an image ({len(data)} bytes, beginning with {data[:16]!r}); "
            f"expected one of {', '.join(_COMMON_FORMATS + _RARE_FORMATS)}"
        )
    _check_pixels(*image.size, file_name)
    return image


def upright_size(file_name: str | os.PathLike[str]) -> tuple[int, int]:
    """Return (width, height) of a file as `read_image` reads it, by its header alone.

    Raises:
        FileNotFoundError, ValueError, OSError: as `read_image`, but for damage behind the header.
    """
    from PIL import Image

    for known in _readable_formats():
        try:
            with Image.open(file_name, formats=known) as image:
                turned = _exif_orientation(image) in (5, 6, 7, 8)
                width, height = image.size
                if image.format == "TIFF":  # some versions of Pillow turn its size already here
                    width, height = image.tag_v2[256], image.tag_v2[257]
            return (height, width) if turned else (width, height)
        except Image.UnidentifiedImageError:
            continue
    return open_image(read_image_bytes(file_name), file_name).size  # none, or colours in floats


def load_upright(image: Image.Image, file_name: str | os.PathLike[str]) -> Image.Image:
    """Decode the pixels, then orient (Pillow itself orients TIFF while decoding)."""
    try:
        image.load()
    except Exception as error:  # the decoders raise many types at damaged data
        raise OSError(
            f"{file_name}: truncated or damaged {image.format} image of {image.width}x"
            f"{image.height} pixels: {error}"
        ) from error
    return _apply_exif_orientation(image)


def _is_plain_jpeg(header: Image.Image, data: bytes) -> bool:
    """Tell whether OpenCV's result is sure to equal Pillow's.

    OpenCV would fill truncated images up with grey and say nothing: only files that end with the
    end-of-image marker (and padding) go there.
    """
    return (
        header.format == "JPEG"
        and header.mode in ("RGB", "L")
        and data[-64:].rstrip(b"\0").endswith(b"\xff\xd9")
        and _exif_orientation(header) == 1
    )


def _decode_by_opencv(data: bytes, size: tuple[int, int], format: str) -> np.ndarray | None:
    """Decode a JPEG; None if OpenCV cannot, or finds another size than `size` (w, h)."""
    import cv2

    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), flags)
    if pixels is None or pixels.shape[1::-1] != size:
        return None
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB) if format == "RGB" else pixels


def _eight_bit(image: Image.Image, name: str | os.PathLike[str]) -> Image.Image:
    """Return a Pillow image of at most 8 bits per channel, without palette transparency."""
    from PIL import Image

    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        return Image.fromarray(_scaled(np.asarray(image), name))
    if image.mode in ("P", "PA") and (image.mode == "PA" or "transparency" in image.info):
        return image.convert("RGBA")
    return image


class SizeMismatchError(ValueError):
    """An image has another size than its dataset says."""


def check_image_size(dataset_dict: dict[str, Any], image: np.ndarray) -> None:
    """Compare an image with the size that its dataset dict states, and add the size if absent.

    Args:
        dataset_dict: in the standard format; "height" and "width" are set where missing.
        image: (H, W) or (H, W, C).

    Raises:
        SizeMismatchError: naming the file, the expected and the found size.
    """
    height, width = image.shape[:2]
    expected = (dataset_dict.get("width", width), dataset_dict.get("height", height))
    if expected != (width, height):
        name = dataset_dict.get("file_name", f"image {dataset_dict.get('image_id', '?')}")
        raise SizeMismatchError(
            f"{name}: the image is {width}x{height} pixels (width x height, set upright by EXIF), "
            f"its dataset says {expected[0]}x{expected[1]}; correct width and height in the "
            "annotations, or replace the image"
        )
    dataset_dict.setdefault("width", width)
    dataset_dict.setdefault("height", height)


def transform_proposals(
    dataset_dict: dict[str, Any],
    image_shape: tuple[int, int],
    transforms: T.Transform,
    *,
    proposal_topk: int,
    min_box_size: float = 0,
) -> None:
    """Replace the precomputed proposals of a dataset dict by transformed `Instances`, in place.

    Args:
        dataset_dict: with "proposal_boxes" (R, 4), "proposal_bbox_mode" and
            "proposal_objectness_logits" (R,), which are removed; "proposals" is added. Nothing
            happens where there are none.
        image_shape: (h, w) after the transforms; boxes are clipped to it.
        transforms: what was applied to the image.
        proposal_topk: at most so many are kept, the first ones.
        min_box_size: those whose width or height is at most this many pixels are dropped.
    """
    if "proposal_boxes" not in dataset_dict:
        return
    given = np.asarray(dataset_dict.pop("proposal_boxes"), dtype=np.float64).reshape(-1, 4)
    mode = BoxMode(dataset_dict.pop("proposal_bbox_mode"))
    given = np.asarray(BoxMode.convert(given, mode, BoxMode.XYXY_ABS))
    logits = np.asarray(dataset_dict.pop("proposal_objectness_logits"), dtype=np.float32)
    boxes = Boxes(torch.from_numpy(transforms.apply_box(given).astype(np.float32)))
    boxes.clip(image_shape)
    keep = boxes.nonempty(threshold=min_box_size).nonzero()[:proposal_topk, 0]
    proposals = Instances(image_shape)
    proposals.proposal_boxes = boxes[keep]
    proposals.objectness_logits = torch.from_numpy(logits)[keep]
    dataset_dict["proposals"] = proposals


def gen_crop_transform_with_instance(
    crop_size: Sequence[int], image_size: tuple[int, int], instance: dict[str, Any]
) -> T.CropTransform:
    """Draw a crop that holds the centre of a given object.

    Args:
        crop_size: (h, w), pixels.
        image_size: (h, w), pixels.
        instance: annotation with "bbox" and "bbox_mode".

    Returns:
        The crop.

    Raises:
        ValueError: where the crop is larger than the image, or the centre lies outside.
    """
    box = get_bbox(instance)
    middle_x, middle_y = (float(v) for v in (box[:2] + box[2:]) / 2)
    top = _start_of_window(crop_size[0], image_size[0], middle_y, "height")
    left = _start_of_window(crop_size[1], image_size[1], middle_x, "width")
    return T.CropTransform(left, top, int(crop_size[1]), int(crop_size[0]))


def _start_of_window(length: int, whole: int, middle: float, side: str) -> int:
    """Draw where a window of `length` pixels begins that holds `middle` and stays in the image."""
    if not 0 <= middle <= whole:
        raise ValueError(f"the box's centre, at {middle}, lies outside the image's {side} {whole}")
    if length > whole:
        raise ValueError(f"a crop of {side} {length} is larger than the image, {whole}")
    earliest, latest = max(math.ceil(middle) - length, 0), min(math.floor(middle), whole - length)
    return int(np.random.randint(earliest, latest + 1))


def check_metadata_consistency(key: str, dataset_names: Sequence[str]) -> None:
    """Check that several datasets have the same metadata under `key`.

    Args:
        key: name of the metadata attribute, e.g. "thing_classes".
        dataset_names: names of registered datasets.

    Raises:
        ValueError: naming the datasets that differ, or where there are none.
    """
    from d2kit.data.catalog import MetadataCatalog

    if len(dataset_names) == 0:
        raise ValueError(f"metadata {key!r}: no dataset named")
    values = [getattr(MetadataCatalog.get(name), key) for name in dataset_names]
    for name, value in zip(dataset_names, values, strict=True):
        if value != values[0]:
            raise ValueError(
                f"datasets {dataset_names[0]!r} and {name!r} have different metadata {key!r}: "
                f"{_shorten(values[0])} and {_shorten(value)}; datasets used together must agree"
            )


def _shorten(value: object, limit: int = 200) -> str:
    text = str(value)
    return text if len(text) <= limit else text[:limit] + "..."


def create_keypoint_hflip_indices(dataset_names: str | Sequence[str]) -> list[int]:
    """Return, for each keypoint, the index of the one that it becomes in a mirrored image.

    Args:
        dataset_names: one or several registered datasets, whose metadata `keypoint_names` and
            `keypoint_flip_map` (pairs of names) must agree.

    Returns:
        As many indices as there are keypoints.

    Raises:
        ValueError: for datasets that disagree, or a flip map with an unknown name.
    """
    from d2kit.data.catalog import MetadataCatalog

    if isinstance(dataset_names, str):
        dataset_names = [dataset_names]
    check_metadata_consistency("keypoint_names", dataset_names)
    check_metadata_consistency("keypoint_flip_map", dataset_names)
    metadata = MetadataCatalog.get(dataset_names[0])
    place = {name: i for i, name in enumerate(metadata.keypoint_names)}
    pairs = [tuple(pair) for pair in metadata.keypoint_flip_map]
    unknown = sorted({name for pair in pairs for name in pair if name not in place})
    if unknown:
        raise ValueError(
            f"keypoint_flip_map of {dataset_names[0]!r} names {unknown}, not in keypoint_names "
            f"{list(place)}"
        )
    order = list(place.values())
    for left, right in pairs:
        order[place[left]], order[place[right]] = place[right], place[left]
    return order


@provides_class_weights
def get_fed_loss_cls_weights(
    dataset_names: str | Sequence[str], freq_weight_power: float = 1.0
) -> torch.Tensor:
    """Return the weights by which the federated loss samples its negative classes.

    Args:
        dataset_names: one or several registered datasets with metadata `class_image_count`
            (list of {"id": 1-based class id, "image_count": number}).
        freq_weight_power: the number of images of a class is raised to this power.

    Returns:
        (K,) float32, in the order of the class ids.

    Source: Zhou et al., Probabilistic two-stage detection, 2021, section 5 (federated loss).
    """
    from d2kit.data.catalog import MetadataCatalog

    if isinstance(dataset_names, str):
        dataset_names = [dataset_names]
    check_metadata_consistency("class_image_count", dataset_names)
    counts = MetadataCatalog.get(dataset_names[0]).class_image_count
    images = {entry["id"]: entry["image_count"] for entry in counts}
    by_class = torch.tensor([images[k] for k in sorted(images)], dtype=torch.float32)
    return by_class**freq_weight_power


def build_augmentation(cfg: CfgNode, is_train: bool) -> list[T.Augmentation | T.Transform]:
    """Return the resizing, flipping, rotating and colouring that a config asks for.

    Args:
        cfg: config; keys INPUT.MIN_SIZE_*, MAX_SIZE_*, MIN_SIZE_TRAIN_SAMPLING, RESIZE,
            FIXED_SIZE, RANDOM_FLIP, ROTATION_ANGLES; COLOR_AUG_SSD where there is one.
        is_train: training or test.

    Returns:
        Augmentations, to be applied in order; the first one resizes.

    Raises:
        ValueError: for a flip that is not "none", "horizontal" or "vertical", an unknown RESIZE,
            or a size or range of angles that is not a pair.
    """
    resize = _build_resize(cfg, is_train)
    if not is_train:
        return [resize]
    flip = cfg.INPUT.RANDOM_FLIP
    if flip not in ("none", "horizontal", "vertical"):
        raise ValueError(
            f"INPUT.RANDOM_FLIP must be 'none', 'horizontal' or 'vertical', got {flip!r}"
        )
    augmentations: list[T.Augmentation | T.Transform] = [resize]
    if flip != "none":
        augmentations.append(
            T.RandomFlip(horizontal=flip == "horizontal", vertical=flip == "vertical")
        )
    angles = list(cfg.INPUT.ROTATION_ANGLES)
    if angles:
        if len(angles) != 2 or angles[0] > angles[1]:
            raise ValueError(f"INPUT.ROTATION_ANGLES: expected [least, largest], got {angles}")
        augmentations.append(T.RandomRotation(angles, expand=False))
    if cfg.INPUT.get("COLOR_AUG_SSD", False):  # a key of add_pointrend_config
        augmentations.append(T.ColorAugSSDTransform(cfg.INPUT.FORMAT))
    return augmentations


def _build_resize(cfg: CfgNode, is_train: bool) -> T.Augmentation:
    """Return the augmentation that brings images to the size of a config."""
    fixed = list(cfg.INPUT.FIXED_SIZE)
    if fixed:
        if len(fixed) != 2:
            raise ValueError(f"INPUT.FIXED_SIZE: expected [height, width], got {fixed}")
        return T.Resize((fixed[0], fixed[1]))
    resizers = {"pillow": T.ResizeShortestEdge, "torchvision": T.TorchvisionResize}
    if cfg.INPUT.RESIZE not in resizers:
        raise ValueError(f"INPUT.RESIZE must be one of {list(resizers)}, got {cfg.INPUT.RESIZE!r}")
    kind = resizers[cfg.INPUT.RESIZE]
    if not is_train:
        return kind(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, "choice")
    sampling = cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
    return kind(cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, sampling)


build_transform_gen = build_augmentation
