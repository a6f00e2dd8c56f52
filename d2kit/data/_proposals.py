"""Precomputed proposals: files of boxes and scores per image."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from d2kit.structures import BoxMode
from d2kit.utils.file_io import PathManager
from d2kit.utils.safe_pickle import load_pickle

__all__ = ["load_proposals_into_dataset"]

ALIASES = {"ids": ("ids", "indexes"), "objectness_logits": ("objectness_logits", "scores")}


def load_proposals_into_dataset(
    dataset_dicts: list[dict[str, Any]], proposal_file: str
) -> list[dict[str, Any]]:
    """Add `proposal_boxes`, `proposal_objectness_logits` and `proposal_bbox_mode` to records.

    Args:
        dataset_dicts: records in the standard format; changed in place.
        proposal_file: `.npz`, `.json` or `.pkl` (read by an allow-list) with `ids` (N image ids),
            `boxes` (N arrays (R, 4)), `objectness_logits` (N arrays (R,)) and, where boxes are not
            XYXY, `bbox_mode`. The older names `indexes` and `scores` are known too.

    Returns:
        The same records; their proposals are sorted by score, best first.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is refused or damaged, or lacks an image of the dataset.
    """
    logging.getLogger(__name__).info("Loading proposals from %s", proposal_file)
    table = _read(proposal_file)
    columns = [_column(table, key, proposal_file) for key in ("ids", "boxes", "objectness_logits")]
    ids, boxes, scores = columns
    if not len(ids) == len(boxes) == len(scores):
        raise ValueError(
            f"{proposal_file}: expected as many boxes and scores as ids, got {len(ids)} ids, "
            f"{len(boxes)} boxes, {len(scores)} scores"
        )
    row_of = {str(image_id): row for row, image_id in enumerate(np.asarray(ids).tolist())}
    mode = BoxMode(int(table.get("bbox_mode", BoxMode.XYXY_ABS)))
    for record in dataset_dicts:
        row = row_of.get(str(record["image_id"]))
        if row is None:
            raise ValueError(f"{proposal_file}: has no proposals for image {record['image_id']}")
        score = np.asarray(scores[row], dtype=np.float32).reshape(-1)
        box = np.asarray(boxes[row], dtype=np.float32).reshape(-1, 4)
        if len(score) != len(box):
            raise ValueError(
                f"{proposal_file}: image {record['image_id']} has {len(box)} boxes and "
                f"{len(score)} scores"
            )
        order = np.argsort(-score, kind="stable")
        record["proposal_boxes"] = box[order]
        record["proposal_objectness_logits"] = score[order]
        record["proposal_bbox_mode"] = mode
    return dataset_dicts


def _column(table: dict[str, Any], key: str, where: str) -> Any:
    for name in ALIASES.get(key, (key,)):
        if name in table:
            return table[name]
    raise ValueError(f"{where}: has no '{key}'; it holds {sorted(map(str, table))}")


def _read(proposal_file: str) -> dict[str, Any]:
    """Read a table of proposals by a reader that cannot run code."""
    path = PathManager.get_local_path(proposal_file)
    suffix = Path(proposal_file).suffix
    if suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except FileNotFoundError:
            raise
        except Exception as error:  # a damaged archive raises nearly anything
            raise ValueError(f"{proposal_file}: not a readable .npz file ({error})") from error
    if suffix == ".json":
        try:
            with open(path, encoding="utf-8") as file:
                table = json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{proposal_file}: not a readable .json file ({error})") from error
    else:
        table = load_pickle(path)
    if not isinstance(table, dict):
        raise ValueError(f"{proposal_file}: expected a dictionary, got {type(table).__name__}")
    return table
