"""The mapper that turns a dataset dict into what the models are fed."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from d2kit.config import CfgNode, configurable
from d2kit.data import detection_utils as utils
from d2kit.data import transforms as T  # noqa: N812
from d2kit.data.annotations import transform_annotations, transform_rotated_annotations
from d2kit.data.catalog import MetadataCatalog
from d2kit.data.detection_utils import create_keypoint_hflip_indices
from d2kit.structures import Boxes, BoxMode, Instances
from d2kit.structures.image_list import image_to_tensor

__all__ = ["DatasetMapper"]


class DatasetMapper:
    """Read an image, augment it with its annotations, and convert both to tensors.

    Users write their own mapper as any function from dataset dict to dict, or subclass this one.

    Args:
        is_train: whether annotations are kept.
        augmentations: augmentations or transforms, applied in order.
        image_format: see `detection_utils.read_image`.
        use_instance_mask: whether segmentations are kept.
        use_keypoint: whether keypoints are kept.
        instance_mask_format: "polygon" or "bitmask", see
            `detection_utils.annotations_to_instances`.
        keypoint_hflip_indices: see `detection_utils.create_keypoint_hflip_indices`.
        precomputed_proposal_topk: how many precomputed proposals are kept; None uses none.
        recompute_boxes: replace each box by the bounding box of its transformed mask, which is
            tighter after a crop.
        use_rotated_boxes: whether `gt_boxes` are `RotatedBoxes`; annotations have XYWHA_ABS boxes
            (upright ones get angle 0), and masks and keypoints are left out.

    Raises:
        ValueError: if boxes are to be recomputed without masks, or rotated with masks.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        augmentations: Sequence[T.Augmentation | T.Transform],
        image_format: str,
        use_instance_mask: bool = False,
        use_keypoint: bool = False,
        instance_mask_format: str = "polygon",
        keypoint_hflip_indices: np.ndarray | Sequence[int] | None = None,
        precomputed_proposal_topk: int | None = None,
        recompute_boxes: bool = False,
        use_rotated_boxes: bool = False,
    ) -> None:
        if use_rotated_boxes and (use_instance_mask or use_keypoint):
            raise ValueError("use_rotated_boxes excludes masks and keypoints (MODEL.MASK_ON)")
        if recompute_boxes and not use_instance_mask:
            raise ValueError("recompute_boxes needs use_instance_mask: boxes are taken from masks")
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.use_instance_mask = use_instance_mask
        self.instance_mask_format = instance_mask_format
        self.use_keypoint = use_keypoint
        self.keypoint_hflip_indices = keypoint_hflip_indices
        self.proposal_topk = precomputed_proposal_topk
        self.recompute_boxes = recompute_boxes
        self.use_rotated_boxes = use_rotated_boxes
        mode = "training" if is_train else "inference"
        logging.getLogger(__name__).info(f"Augmentations in {mode}: {list(augmentations)}")

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Return the constructor's arguments that `cfg` asks for.

        Args:
            cfg: config.
            is_train: training or test.
        """
        augmentations = utils.build_augmentation(cfg, is_train)
        crop = is_train and cfg.INPUT.CROP.ENABLED
        if crop:
            augmentations.insert(0, T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE))
        arguments = {
            "is_train": is_train,
            "augmentations": augmentations,
            "image_format": cfg.INPUT.FORMAT,
            "use_instance_mask": cfg.MODEL.MASK_ON,
            "instance_mask_format": cfg.INPUT.MASK_FORMAT,
            "use_keypoint": cfg.MODEL.KEYPOINT_ON,
            "recompute_boxes": (crop or bool(cfg.INPUT.ROTATION_ANGLES)) and cfg.MODEL.MASK_ON,
            "use_rotated_boxes": cfg.MODEL.PROPOSAL_GENERATOR.NAME == "RRPN",
        }
        if cfg.MODEL.KEYPOINT_ON and is_train:  # a test may name no training set
            arguments["keypoint_hflip_indices"] = build_keypoint_flips(cfg)
        if cfg.MODEL.LOAD_PROPOSALS:
            arguments["precomputed_proposal_topk"] = (
                cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN
                if is_train
                else cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST
            )
        return arguments

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Map one dataset dict.

        Args:
            dataset_dict: in the standard format; it is left as it is.

        Returns:
            A new dict with the given entries and "image": (C, H, W) tensor, uint8 unless the
            format or an augmentation makes it floating point. In training "instances" takes the
            place of "annotations"; "sem_seg": (H, W) int64 where the dataset has labels;
            "proposals" where they are used.

        Raises:
            FileNotFoundError, ValueError, OSError: naming the file, see `read_image`.
            SizeMismatchError: for an image of another size than stated.
        """
        result = dict(dataset_dict)
        image = utils.read_image(result["file_name"], format=self.image_format)
        utils.check_image_size(result, image)
        sem_seg_file = result.pop("sem_seg_file_name", None) if self.is_train else None
        sem_seg = utils.read_label_map(sem_seg_file) if sem_seg_file is not None else None
        if sem_seg is not None and sem_seg.shape != image.shape[:2]:
            raise utils.SizeMismatchError(
                f"{sem_seg_file}: labels are {sem_seg.shape} (h, w), the image {image.shape[:2]}"
            )
        aug_input = T.AugInput(image, sem_seg=sem_seg)
        transforms = self.augmentations(aug_input)
        result["image"] = image_to_tensor(aug_input.image)
        if aug_input.sem_seg is not None:
            labels = np.ascontiguousarray(aug_input.sem_seg, dtype=np.int64)
            result["sem_seg"] = torch.from_numpy(labels)

        image_shape = aug_input.image.shape[:2]
        if self.proposal_topk is not None:
            utils.transform_proposals(
                result, image_shape, transforms, proposal_topk=self.proposal_topk
            )
        if not self.is_train:
            result.pop("annotations", None)
            result.pop("sem_seg_file_name", None)
        elif "annotations" in result:
            self._transform_annotations(result, transforms, image_shape)
        return result

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: T.Transform, image_shape: tuple[int, int]
    ) -> None:
        """Replace "annotations" by "instances"; crowd regions are left out."""
        unused = {"segmentation": not self.use_instance_mask, "keypoints": not self.use_keypoint}
        annotations = [
            {key: value for key, value in annotation.items() if not unused.get(key)}
            for annotation in dataset_dict.pop("annotations")
            if annotation.get("iscrowd", 0) == 0
        ]
        try:
            if self.use_rotated_boxes:
                transform_rotated_annotations(annotations, transforms)
                instances = utils.annotations_to_instances_rotated(annotations, image_shape)
                dataset_dict["instances"] = instances[_in_sight(instances)]
                return
            transform_annotations(
                annotations,
                transforms,
                image_shape,
                keypoint_hflip_indices=self.keypoint_hflip_indices,
            )
            instances = utils.annotations_to_instances(
                annotations, image_shape, mask_format=self.instance_mask_format
            )
        except ValueError as error:
            raise ValueError(f"{dataset_dict['file_name']}: {error}") from error
        if self.recompute_boxes and instances.has("gt_masks"):
            instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
        dataset_dict["instances"] = utils.filter_empty_instances(instances)


def _in_sight(instances: Instances) -> torch.Tensor:
    """Tell which rotated boxes have a size, and a part inside the image, (R,) bool."""
    boxes = instances.gt_boxes
    bounds = BoxMode.convert(boxes.tensor, BoxMode.XYWHA_ABS, BoxMode.XYXY_ABS)
    seen = Boxes(bounds)
    seen.clip(instances.image_size)
    found: torch.Tensor = boxes.nonempty(threshold=1e-5) & seen.nonempty(threshold=1e-5)
    return found


logger = logging.getLogger(__name__)


def build_keypoint_flips(cfg: CfgNode) -> list[int] | None:
    """Return for each keypoint its place in a mirrored image; None where nothing is mirrored.

    Names and pairs are those of DATASETS.KEYPOINT_NAMES and KEYPOINT_FLIP_MAP, which become the
    datasets' metadata, else those of the metadata, else the names of the annotation file and the
    pairs that their words "left" and "right" tell.

    Args:
        cfg: config; the datasets of DATASETS.TRAIN are loaded.

    Raises:
        ValueError: names or pairs are missing, of another number, or contradict the metadata.
    """
    names = list(cfg.DATASETS.KEYPOINT_NAMES)
    count = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    for dataset in cfg.DATASETS.TRAIN:
        metadata = MetadataCatalog.get(dataset)
        if names:
            metadata.keypoint_names = names
        if cfg.DATASETS.KEYPOINT_FLIP_MAP:
            metadata.keypoint_flip_map = [tuple(p) for p in cfg.DATASETS.KEYPOINT_FLIP_MAP]
        known = metadata.get("keypoint_names")
        if known is not None and len(known) != count:
            raise ValueError(
                f"dataset '{dataset}' has {len(known)} keypoints ({', '.join(map(str, known))}), "
                f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {count}: they must be equal"
            )
    if cfg.INPUT.RANDOM_FLIP == "none":
        return None
    for dataset in cfg.DATASETS.TRAIN:
        metadata = MetadataCatalog.get(dataset)
        known = metadata.get("keypoint_names")
        if known is None:
            raise ValueError(
                f"dataset '{dataset}' has no keypoint_names, which mirrored images need: write "
                "DATASETS.KEYPOINT_NAMES [nose, left_eye, right_eye, ...] into the config (and "
                "DATASETS.KEYPOINT_FLIP_MAP), or INPUT.RANDOM_FLIP none"
            )
        if metadata.get("keypoint_flip_map") is None:
            metadata.keypoint_flip_map = _told_pairs(dataset, known)
    return create_keypoint_hflip_indices(list(cfg.DATASETS.TRAIN))


def _told_pairs(dataset: str, names: Sequence[str]) -> list[tuple[str, str]]:
    pairs = pairs_by_name(names)
    if not pairs:
        raise ValueError(
            f"dataset '{dataset}' has no keypoint_flip_map, and its keypoints {list(names)} are no "
            "left and right ones: write the pairs that change places in a mirrored image into "
            "DATASETS.KEYPOINT_FLIP_MAP, one keypoint twice ([[a, a]]) if none do, or "
            "INPUT.RANDOM_FLIP none"
        )
    logger.info("Keypoints of '%s' that change places in mirrored images: %s", dataset, pairs)
    return pairs


def pairs_by_name(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return pairs of names that differ in the word left or right (l or r) alone."""
    other = {"left": "right", "l": "r"}
    place = {name.lower(): name for name in names}
    pairs = []
    for name in names:
        parts = re.split(r"([_\W]+)", name.lower())
        for index, part in enumerate(parts):
            partner = "".join([*parts[:index], other.get(part, part), *parts[index + 1 :]])
            if part in other and partner in place:
                pairs.append((name, place[partner]))
                break
    return pairs
