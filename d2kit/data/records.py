"""From dataset names to records: loading, filtering and checking before anything is trained."""

from __future__ import annotations

import itertools
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from os import PathLike, fspath
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch.utils import data as torchdata

from d2kit.config import CfgNode
from d2kit.data.catalog import DatasetCatalog, MetadataCatalog
from d2kit.data.datasets.coco import prefer_class_order
from d2kit.data.datasets.validate import MAX_LISTED, DatasetError, read_json
from d2kit.data.detection_utils import check_metadata_consistency
from d2kit.data.samplers import RepeatFactorTrainingSampler
from d2kit.structures import BoxMode
from d2kit.utils.file_io import PathManager, load_json
from d2kit.utils.safe_pickle import load_pickle


def read_coco(path: str | PathLike[str]) -> dict[str, Any]:
    """Read a COCO JSON file without a look at its annotations.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: there is no such file.
        DatasetError: it is not JSON, or "images", "annotations" or "categories" is missing.
    """
    found = read_json(fspath(path), fspath(path))
    for key in ("images", "annotations", "categories"):
        if not isinstance(found.get(key), list):
            raise DatasetError(
                f"{path}: expected a list '{key}', got {type(found.get(key)).__name__}"
            )
    return found


def group_images(coco: Mapping[str, Any], key: str = "video") -> dict[str, list[int]]:
    """Sort the images of a COCO dictionary into groups.

    Args:
        coco: with "images" and, perhaps, "videos".
        key: ``video`` (the image's ``video_id``, by name where "videos" names it, else its
            ``video``, else its folder), ``folder`` (of ``file_name``), or any field of the images.

    Returns:
        Group -> image ids, in the order of the file.

    Raises:
        ValueError: if an image has no such field.
    """
    names = {v["id"]: str(v.get("name", v["id"])) for v in coco.get("videos", [])}
    groups: dict[str, list[int]] = {}
    for image in coco["images"]:
        groups.setdefault(_group_of(image, key, names), []).append(image["id"])
    return groups


def _group_of(image: Mapping[str, Any], key: str, names: Mapping[Any, str]) -> str:
    folder = str(PurePosixPath(image["file_name"]).parent)
    if key == "folder":
        return folder
    if key == "video":
        if "video_id" in image:
            return names.get(image["video_id"], str(image["video_id"]))
        return str(image.get("video", folder))
    if key not in image:
        raise ValueError(
            f"image {image['id']} ('{image['file_name']}') has no field '{key}' to group by; it "
            f"has {sorted(image)}; 'folder' groups by the folder of file_name"
        )
    return str(image[key])


LARGEST = 1e7  # pixels
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
    row_of = {str(image_id): row for row, image_id in enumerate(np.asarray(ids, object).tolist())}
    mode = _mode(table.get("bbox_mode", BoxMode.XYXY_ABS), proposal_file)
    for record in dataset_dicts:
        row = row_of.get(str(record["image_id"]))
        if row is None:
            raise ValueError(f"{proposal_file}: has no proposals for image {record['image_id']}")
        where = f"{proposal_file}: image {record['image_id']}"
        score = _numbers(scores[row], f"{where}: objectness_logits").reshape(-1)
        box = _numbers(boxes[row], f"{where}: boxes")
        if box.size % 4 or np.abs(box).max(initial=0) > LARGEST:
            raise ValueError(
                f"{where}: boxes: expected 4 numbers of at most {LARGEST:g} pixels each, got an "
                f"array of shape {box.shape}, the largest {np.abs(box).max():g}"
            )
        box = box.reshape(-1, 4)
        if len(score) != len(box):
            raise ValueError(f"{where} has {len(box)} boxes and {len(score)} scores")
        order = np.argsort(-score, kind="stable")
        record["proposal_boxes"] = box[order]
        record["proposal_objectness_logits"] = score[order]
        record["proposal_bbox_mode"] = mode
    return dataset_dicts


def _mode(value: Any, where: str) -> BoxMode:
    try:
        return BoxMode(int(value))
    except (TypeError, ValueError, OverflowError):
        known = ", ".join(f"{m.value} ({m.name})" for m in BoxMode)
        raise ValueError(f"{where}: bbox_mode: expected {known}, got {value!r:.60}") from None


def _numbers(values: object, where: str) -> np.ndarray:
    """Return finite numbers as float32."""
    try:
        found = np.asarray(values, dtype=np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where}: expected numbers ({error})") from None
    if not np.isfinite(found).all():
        raise ValueError(f"{where}: expected finite numbers")
    return found


def _column(table: dict[str, Any], key: str, where: str) -> Any:
    for name in ALIASES.get(key, (key,)):
        if name in table:
            if isinstance(table[name], list) or getattr(table[name], "ndim", 0) > 0:
                return table[name]
            got = type(table[name]).__name__
            raise ValueError(f"{where}: {name}: expected a list, one entry an image, got {got}")
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
        table = load_json(path, proposal_file)
    else:
        table = load_pickle(path)
    if not isinstance(table, dict):
        raise ValueError(f"{proposal_file}: expected a dictionary, got {type(table).__name__}")
    return table


logger = logging.getLogger(__name__)

Record = dict[str, Any]

LIST_FOLDER_FROM = 64
"""From so many images in a folder on, one listing of it is cheaper than a look-up of each."""


def filter_images_with_only_crowd_annotations(dataset_dicts: list[Record]) -> list[Record]:
    """Keep the images that have an instance which is not a crowd.

    Args:
        dataset_dicts: records in the standard format.

    Returns:
        The records that can be trained on.
    """
    kept = [
        d
        for d in dataset_dicts
        if any(annotation.get("iscrowd", 0) == 0 for annotation in d["annotations"])
    ]
    logger.info(
        "Left out %d images without usable annotations; %d remain.",
        len(dataset_dicts) - len(kept),
        len(kept),
    )
    return kept


def filter_images_with_few_keypoints(
    dataset_dicts: list[Record], min_keypoints_per_image: int
) -> list[Record]:
    """Keep the images with enough labelled keypoints.

    Args:
        dataset_dicts: records in the standard format.
        min_keypoints_per_image: labelled keypoints (visibility > 0), over all instances.

    Returns:
        The records that have them.
    """
    kept = []
    for d in dataset_dicts:
        marks = itertools.chain.from_iterable(
            annotation["keypoints"][2::3]
            for annotation in d["annotations"]
            if annotation.get("keypoints") is not None
        )
        if sum(visible > 0 for visible in marks) >= min_keypoints_per_image:
            kept.append(d)
    logger.info(
        "Left out %d images with fewer than %d keypoints; %d remain.",
        len(dataset_dicts) - len(kept),
        min_keypoints_per_image,
        len(kept),
    )
    return kept


def print_instances_class_histogram(
    dataset_dicts: Sequence[Record], class_names: Sequence[str]
) -> None:
    """Log how many instances of each class there are, crowds left out.

    Args:
        dataset_dicts: records in the standard format.
        class_names: name of each contiguous class index.

    Raises:
        ValueError: an annotation has a class outside the names.
    """
    counts: Counter[int] = Counter()
    for d in dataset_dicts:
        for annotation in d["annotations"]:
            if not annotation.get("iscrowd", 0):
                counts[annotation["category_id"]] += 1
    wrong = [c for c in counts if not isinstance(c, Integral) or not 0 <= c < len(class_names)]
    if wrong:
        raise ValueError(
            f"annotations have category_id {wrong[:5]}, but the dataset has {len(class_names)} "
            f"classes: expected integers in [0, {len(class_names)})"
        )
    from tabulate import tabulate  # heavy for an import

    columns = max(1, min(3, len(class_names)))
    cells = [(name[:24], counts[i]) for i, name in enumerate(class_names)]
    rows = [
        list(itertools.chain.from_iterable(cells[i : i + columns]))
        for i in range(0, len(cells), columns)
    ]
    table = tabulate(rows, headers=["class", "instances"] * columns, tablefmt="simple")
    logger.info("%d instances of %d classes:\n%s", sum(counts.values()), len(class_names), table)


def check_image_files(dataset_name: str, dataset_dicts: Sequence[Record]) -> None:
    """Check that the image files of a dataset exist, with one listing per large folder.

    Names of other stores ("s3://...") are left alone, and so are relative names in datasets that
    were not registered with an image folder: their mapper may know what they mean.

    Args:
        dataset_name: for the message.
        dataset_dicts: records with `file_name`.

    Raises:
        DatasetError: files are missing; the message lists the first ones.
    """
    has_folder = MetadataCatalog.get(dataset_name).get("image_root") is not None
    folders: dict[str, set[str]] = defaultdict(set)
    for d in dataset_dicts:
        path = d.get("file_name")
        if isinstance(path, str) and "://" not in path and (has_folder or os.path.isabs(path)):
            folder, name = os.path.split(path)
            folders[folder].add(name)
    missing: list[str] = []
    for folder, names in folders.items():
        absent = _absent(folder, names)
        missing.extend(os.path.join(folder, name) for name in absent)
    if missing:
        total = sum(map(len, folders.values()))
        lines = [f"{path}: image file does not exist" for path in sorted(missing)[:MAX_LISTED]]
        raise DatasetError(
            f"dataset '{dataset_name}': {len(missing)} of {total} image files are missing; "
            "check the image folder with which the dataset was registered",
            lines,
            len(missing),
        )


def _absent(folder: str, names: set[str]) -> set[str]:
    """Return the `names` that are not in `folder`."""
    if len(names) < LIST_FOLDER_FROM:
        return {name for name in names if not os.path.exists(os.path.join(folder, name))}
    try:
        with os.scandir(folder or ".") as entries:
            return names - {entry.name for entry in entries}
    except (FileNotFoundError, NotADirectoryError):
        return names


def check_dataset_matches(num_classes: int, dataset_names: Iterable[str]) -> None:
    """Check that a configured number of classes is that of the datasets.

    Args:
        num_classes: MODEL.ROI_HEADS.NUM_CLASSES or the like.
        dataset_names: registered datasets; one that names no classes is not checked.

    Raises:
        KeyError: there is no such dataset.
        ValueError: a dataset has another number of classes.
    """
    for name in dataset_names:
        metadata = MetadataCatalog.get(name)
        if metadata.get("thing_classes") is None:
            DatasetCatalog.get(name)  # loading COCO JSON fills the metadata
        classes = metadata.get("thing_classes")
        if classes is not None and len(classes) != num_classes:
            shown = ", ".join(map(str, classes[:5])) + (", ..." if len(classes) > 5 else "")
            raise ValueError(
                f"the model is configured for {num_classes} classes, but dataset '{name}' has "
                f"{len(classes)} ({shown}); set MODEL.ROI_HEADS.NUM_CLASSES (with "
                f"RETINANET or FCOS: theirs) to {len(classes)}, or register the right dataset"
            )


def get_detection_dataset_dicts(
    names: str | Sequence[str],
    filter_empty: bool = True,
    min_keypoints: int = 0,
    proposal_files: Sequence[str] | None = None,
    check_consistency: bool = True,
) -> Any:
    """Load and join datasets, and leave out images that cannot be trained on.

    Args:
        names: one or several registered datasets.
        filter_empty: leave out images without an instance that is not a crowd.
        min_keypoints: leave out images with fewer labelled keypoints.
        proposal_files: one file of precomputed proposals per dataset.
        check_consistency: check that image files exist, that the datasets have the same classes,
            and that every annotation has one of them; log the class histogram.

    Returns:
        list of records, or a `torch.utils.data.Dataset` where the datasets are of that kind.

    Raises:
        KeyError: unknown dataset.
        ValueError: no names, an empty dataset, missing images, nothing left to train on.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise ValueError("no dataset is named: set DATASETS.TRAIN (or DATASETS.TEST) in the config")
    loaded = [DatasetCatalog.get(names[0])]
    classes = MetadataCatalog.get(names[0]).get("thing_classes")
    for name in names[1:]:
        if classes is not None:
            prefer_class_order(name, classes)
        loaded.append(DatasetCatalog.get(name))
    if isinstance(loaded[0], torchdata.Dataset):
        return _join_torch_datasets(names, loaded)
    for name, records in zip(names, loaded, strict=True):
        if not records:
            raise ValueError(f"dataset '{name}' is empty: it holds no image")
        if check_consistency:
            check_image_files(name, records)
    if proposal_files:
        if len(proposal_files) != len(names):
            raise ValueError(
                f"expected one proposal file for each of {names}, got {list(proposal_files)}"
            )
        pairs = zip(loaded, proposal_files, strict=True)
        loaded = [load_proposals_into_dataset(records, path) for records, path in pairs]
    joined: list[Record] = list(itertools.chain.from_iterable(loaded))
    if "annotations" in joined[0]:
        joined = _usable(joined, names, filter_empty, min_keypoints)
        if check_consistency and MetadataCatalog.get(names[0]).get("thing_classes") is not None:
            check_metadata_consistency("thing_classes", names)
            print_instances_class_histogram(joined, MetadataCatalog.get(names[0]).thing_classes)
    return joined


def _join_torch_datasets(names: Sequence[str], loaded: Sequence[Any]) -> Any:
    """Return one dataset for several of the user's own `torch.utils.data.Dataset`s."""
    if len(loaded) == 1:
        return loaded[0]
    if any(isinstance(d, torchdata.IterableDataset) for d in loaded):
        raise ValueError(f"only one iterable dataset can be used at a time, got {list(names)}")
    return torchdata.ConcatDataset(loaded)


def _usable(
    records: list[Record], names: Sequence[str], filter_empty: bool, min_keypoints: int
) -> list[Record]:
    """Apply the filters; raise where nothing is left."""
    before = len(records)
    if filter_empty:
        records = filter_images_with_only_crowd_annotations(records)
    if min_keypoints > 0:
        records = filter_images_with_few_keypoints(records, min_keypoints)
    if not records:
        what = f"at least {min_keypoints} keypoints" if min_keypoints else "an annotation"
        raise ValueError(
            f"no image of {', '.join(names)} can be trained on: of {before} images none has {what} "
            "that is not a crowd"
        )
    return records


def _build_weighted_sampler(
    cfg: CfgNode, enable_category_balance: bool = False, seed: int | None = None
) -> RepeatFactorTrainingSampler:
    """Build a sampler that repeats the images of each training set by a factor.

    Args:
        cfg: ``DATASETS.TRAIN_REPEAT_FACTOR`` holds pairs (dataset, factor); a dataset that is not
            among them has 1.
        enable_category_balance: multiply by the repeat factors that ``DATALOADER.REPEAT_THRESHOLD``
            and ``REPEAT_SQRT`` give each image within its dataset, scaled so that the least is 1.
        seed: of rounding and order; None draws one that the processes share.

    Returns:
        The sampler, over the images of all DATASETS.TRAIN in their order.

    Raises:
        ValueError: a factor is for a dataset that is not in DATASETS.TRAIN.
    """
    names = list(cfg.DATASETS.TRAIN)
    given = {name: float(factor) for name, factor in cfg.DATASETS.get("TRAIN_REPEAT_FACTOR", ())}
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise ValueError(
            f"DATASETS.TRAIN_REPEAT_FACTOR names {', '.join(unknown)}, but DATASETS.TRAIN is "
            f"{', '.join(names)}"
        )
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    factors = []
    for name in names:
        records = get_detection_dataset_dicts(
            name,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=keypoints,
            check_consistency=False,
        )
        factor = torch.full((len(records),), given.get(name, 1.0))
        if enable_category_balance:
            factor *= RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
                records, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
            )
        factors.append(factor)
    joined = torch.cat(factors)
    if enable_category_balance:
        joined = joined / joined[joined > 0].min()
    return RepeatFactorTrainingSampler(joined, seed=seed)
