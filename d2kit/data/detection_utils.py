"""Functions to write one's own dataset mapper with: reading, transforming, converting."""

import logging  # noqa: F401  (user code imports it from here)
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from d2kit.data import transforms as T  # noqa: N812
from d2kit.data.annotations import (
    annotations_to_instances,
    annotations_to_instances_rotated,
    filter_empty_instances,
    get_bbox,
    transform_instance_annotations,
    transform_keypoint_annotations,
)
from d2kit.data.image_io import (
    _M_RGB2YUV,
    _M_YUV2RGB,
    MAX_IMAGE_PIXELS,
    _apply_exif_orientation,
    convert_image_to_rgb,
    convert_PIL_to_numpy,
    read_image,
    read_label_map,
)
from d2kit.structures import Boxes, BoxMode, Instances
from d2kit.utils.class_frequency import provides_class_weights

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


def _shorten(value: Any, limit: int = 200) -> str:
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


def build_augmentation(cfg: Any, is_train: bool) -> list[T.Augmentation | T.Transform]:
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


def _build_resize(cfg: Any, is_train: bool) -> T.Augmentation:
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
