"""The mapper that turns a panoptic dataset dict into what Panoptic-DeepLab is trained on."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from d2kit.config import CfgNode, configurable
from d2kit.contrib.panoptic_deeplab.target_generator import PanopticDeepLabTargetGenerator
from d2kit.data import MetadataCatalog
from d2kit.data import detection_utils as utils
from d2kit.data import transforms as T  # noqa: N812
from d2kit.structures.image_list import image_to_tensor

__all__ = ["PanopticDeeplabDatasetMapper"]


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
