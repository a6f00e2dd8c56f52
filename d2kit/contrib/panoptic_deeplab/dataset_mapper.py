"""From a panoptic dataset dict to what Panoptic-DeepLab is trained on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch

from d2kit.config import CfgNode, configurable
from d2kit.data import MetadataCatalog
from d2kit.data import detection_utils as utils
from d2kit.data import transforms as T  # noqa: N812
from d2kit.structures.image_list import image_to_tensor

__all__ = [
    "PanopticDeepLabTargetGenerator",
    "PanopticDeeplabDatasetMapper",
]


class PanopticDeepLabTargetGenerator:
    """Make the semantic map, the heat map of centres, the offsets, and the weights of each loss.

    Args:
        ignore_label: class of pixels without one.
        thing_ids: contiguous classes of things.
        sigma: deviation of the Gaussian of a centre, in pixels.
        ignore_stuff_in_offset: whether offsets have no loss in stuff.
        small_instance_area: instances of a smaller area are small, in pixels.
        small_instance_weight: weight of their pixels in the semantic loss.
        ignore_crowd_in_semantic: whether crowds have no class.

    Raises:
        ValueError: `sigma` is not positive.

    Source: Cheng et al., Panoptic-DeepLab (2020), section 3.
    """

    def __init__(
        self,
        ignore_label: int,
        thing_ids: Collection[int],
        sigma: float = 8,
        ignore_stuff_in_offset: bool = False,
        small_instance_area: int = 0,
        small_instance_weight: float = 1,
        ignore_crowd_in_semantic: bool = False,
    ) -> None:
        if sigma <= 0:
            raise ValueError(f"INPUT.GAUSSIAN_SIGMA must be positive, got {sigma}")
        self.ignore_label = ignore_label
        self.thing_ids = set(thing_ids)
        self.sigma = sigma
        self.ignore_stuff_in_offset = ignore_stuff_in_offset
        self.small_instance_area = small_instance_area
        self.small_instance_weight = small_instance_weight
        self.ignore_crowd_in_semantic = ignore_crowd_in_semantic

    def __call__(
        self, panoptic: np.ndarray, segments_info: Sequence[dict[str, Any]]
    ) -> dict[str, Any]:
        """Make the targets of one image.

        Args:
            panoptic: integers (H, W), the segment of each pixel.
            segments_info: per segment `id`, the contiguous `category_id`, and `iscrowd`, by default
                0. Pixels of other segments have no class. Segments without pixels are left out.

        Returns:
            A dict with

            * `sem_seg`: int64 (H, W), the class.
            * `center`: float32 (H, W), the largest Gaussian around any instance, in 0..1.
            * `center_points`: list of (y, x), the centre of mass of each instance, in pixels.
            * `offset`: float32 (2, H, W), (y, x) from a pixel to the centre of its instance.
            * `sem_seg_weights`, `center_weights`, `offset_weights`: float32 (H, W).

            A crowd has neither a centre nor offsets, and their losses leave it out.
        """
        shape = panoptic.shape
        semantic = np.full(shape, self.ignore_label, dtype=np.int64)
        center = np.zeros(shape, dtype=np.float32)
        offset = np.zeros((2, *shape), dtype=np.float32)
        semantic_weights = np.ones(shape, dtype=np.float32)
        center_weights = np.zeros(shape, dtype=np.float32)
        offset_weights = np.zeros(shape, dtype=np.float32)
        center_points = []
        pixels = _pixels_of_segments(panoptic)
        for segment in segments_info:
            if segment["id"] not in pixels:
                continue
            ys, xs = pixels[segment["id"]]
            crowd = bool(segment.get("iscrowd", 0))
            thing = segment["category_id"] in self.thing_ids
            if not (crowd and self.ignore_crowd_in_semantic):
                semantic[ys, xs] = segment["category_id"]
            if crowd:
                continue
            center_weights[ys, xs] = 1
            if thing or not self.ignore_stuff_in_offset:
                offset_weights[ys, xs] = 1
            if thing:
                if len(ys) < self.small_instance_area:
                    semantic_weights[ys, xs] = self.small_instance_weight
                y, x = float(ys.mean()), float(xs.mean())
                center_points.append((y, x))
                _draw_gaussian(center, round(y), round(x), self.sigma)
                offset[0, ys, xs] = y - ys
                offset[1, ys, xs] = x - xs
        return {
            "sem_seg": torch.from_numpy(semantic),
            "center": torch.from_numpy(center),
            "center_points": center_points,
            "offset": torch.from_numpy(offset),
            "sem_seg_weights": torch.from_numpy(semantic_weights),
            "center_weights": torch.from_numpy(center_weights),
            "offset_weights": torch.from_numpy(offset_weights),
        }


def _pixels_of_segments(panoptic: np.ndarray) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Return segment -> the rows and the columns of its pixels, by one sort of the image."""
    ids = np.unique(panoptic)
    places = np.searchsorted(ids, panoptic.ravel())
    # numpy sorts 16-bit integers in linear time
    order = np.argsort(places.astype(np.min_scalar_type(len(ids))), kind="stable")
    parts = np.split(order, np.cumsum(np.bincount(places))[:-1])
    width = panoptic.shape[1]
    return {int(i): np.divmod(part, width) for i, part in zip(ids, parts, strict=True)}


def _draw_gaussian(heat: np.ndarray, y: int, x: int, sigma: float) -> None:
    """Raise `heat` (H, W), in place, to a Gaussian of peak 1 within 3 `sigma` + 1 of a pixel."""
    radius = int(3 * sigma) + 1
    top, left = max(y - radius, 0), max(x - radius, 0)
    window = heat[top : y + radius + 1, left : x + radius + 1]
    rows = np.exp(-((np.arange(window.shape[0]) + top - y) ** 2) / (2 * sigma**2))
    columns = np.exp(-((np.arange(window.shape[1]) + left - x) ** 2) / (2 * sigma**2))
    np.maximum(window, np.outer(rows, columns), out=window, casting="same_kind")


class PanopticDeeplabDatasetMapper:
    """Read an image and its segments, augment both, and make the targets.

    Args:
        augmentations: augmentations or transforms, applied in order.
        image_format: see `d2kit.data.detection_utils.read_image`.
        panoptic_target_generator: maps segments (H, W) and `segments_info` to a dict of targets,
            as `PanopticDeepLabTargetGenerator` does.
    """

    @configurable
    def __init__(
        self,
        *,
        augmentations: Sequence[T.Augmentation | T.Transform],
        image_format: str,
        panoptic_target_generator: Callable[[np.ndarray, Sequence[dict[str, Any]]], dict[str, Any]],
    ) -> None:
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.panoptic_target_generator = panoptic_target_generator

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Return the constructor's arguments that `cfg` asks for, for its first training set.

        Args:
            cfg: config with the keys of `add_panoptic_deeplab_config`.

        Raises:
            ValueError: keys are missing, there is no training set, or a thing and a stuff of it
                share a class.
        """
        if "GAUSSIAN_SIGMA" not in cfg.INPUT:
            raise ValueError(
                "PanopticDeeplabDatasetMapper needs keys that this config lacks: call "
                "d2kit.contrib.panoptic_deeplab.add_panoptic_deeplab_config(cfg) before the file "
                "is merged"
            )
        if not cfg.DATASETS.TRAIN:
            raise ValueError(
                "PanopticDeeplabDatasetMapper needs a dataset in DATASETS.TRAIN, whose metadata "
                "say which classes are things; got none"
            )
        augmentations = utils.build_augmentation(cfg, is_train=True)
        if cfg.INPUT.CROP.ENABLED:  # of the resized image: crops have one size
            augmentations.insert(1, T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE))
        generator = PanopticDeepLabTargetGenerator(
            **_classes(cfg.DATASETS.TRAIN[0]),
            sigma=cfg.INPUT.GAUSSIAN_SIGMA,
            ignore_stuff_in_offset=cfg.INPUT.IGNORE_STUFF_IN_OFFSET,
            small_instance_area=cfg.INPUT.SMALL_INSTANCE_AREA,
            small_instance_weight=cfg.INPUT.SMALL_INSTANCE_WEIGHT,
            ignore_crowd_in_semantic=cfg.INPUT.IGNORE_CROWD_IN_SEMANTIC,
        )
        return {
            "augmentations": augmentations,
            "image_format": cfg.INPUT.FORMAT,
            "panoptic_target_generator": generator,
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Map one dataset dict.

        Args:
            dataset_dict: with `file_name`, `pan_seg_file_name` and `segments_info`; it is left as
                it is.

        Returns:
            A new dict with the given entries, "image": (C, H, W) tensor, and the targets.

        Raises:
            FileNotFoundError, ValueError, OSError: naming the file, see `read_image`.
            SizeMismatchError: segments or image of another size than stated.
        """
        result = dict(dataset_dict)
        image = utils.read_image(result["file_name"], format=self.image_format)
        utils.check_image_size(result, image)
        file_name = result.pop("pan_seg_file_name")
        colours = utils.read_image(file_name, "RGB")
        if colours.shape[:2] != image.shape[:2]:
            raise utils.SizeMismatchError(
                f"{file_name}: segments are {colours.shape[:2]} (h, w), the image {image.shape[:2]}"
            )
        # COCO's panoptic format: the id is the colour, red lowest
        segments = colours.astype(np.int32) @ np.array([1, 256, 256**2], dtype=np.int32)
        aug_input = T.AugInput(image, sem_seg=segments)
        self.augmentations(aug_input)
        assert aug_input.sem_seg is not None
        result["image"] = image_to_tensor(aug_input.image)
        targets = self.panoptic_target_generator(aug_input.sem_seg, result["segments_info"])
        return {**result, **targets}


def _classes(dataset: str) -> dict[str, Any]:
    """Return the ignored label and the classes of things of a dataset.

    Raises:
        ValueError: a thing and a stuff have the same contiguous class.
    """
    metadata = MetadataCatalog.get(dataset)
    things = dict(metadata.thing_dataset_id_to_contiguous_id)
    stuff = dict(metadata.get("stuff_dataset_id_to_contiguous_id") or {})
    for original, contiguous in stuff.items():
        if contiguous in set(things.values()) and things.get(original) != contiguous:
            raise ValueError(
                f"dataset '{dataset}': class {contiguous} is both a thing and stuff; "
                "Panoptic-DeepLab needs one numbering of both, as of coco_2017_train_panoptic"
            )
    return {"ignore_label": metadata.ignore_label, "thing_ids": sorted(things.values())}
