"""Names of keypoints and their places in a mirrored image, from a config alone."""

import logging
import re
from collections.abc import Sequence
from typing import Any

from d2kit.data.catalog import MetadataCatalog
from d2kit.data.detection_utils import create_keypoint_hflip_indices

__all__ = ["build_keypoint_flips", "pairs_by_name"]

logger = logging.getLogger(__name__)


def build_keypoint_flips(cfg: Any) -> list[int] | None:
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
