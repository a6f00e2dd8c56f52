"""Names of a model's classes: from its config, its datasets, and into the config of its run."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from d2kit.config import CfgNode
from d2kit.config._yaml import load_yaml
from d2kit.engine._preflight import check_dataset_names, default_num_classes
from d2kit.utils import comm
from d2kit.utils.file_io import atomic_write

if TYPE_CHECKING:
    from d2kit.data import Metadata

__all__ = ["build_class_names", "build_metadata", "build_named_cfg", "default_check_datasets"]


def default_check_datasets(cfg: CfgNode, names: Iterable[str]) -> None:
    """Register the datasets that a config lists, and make sure that `names` are registered.

    Raises:
        KeyError: if one is not; the nearest names are listed.
        ValueError: if DATASETS.REGISTER_COCO is wrong.
    """
    from d2kit.data import register_datasets

    register_datasets(cfg.DATASETS.REGISTER_COCO)
    check_dataset_names(names)


def build_metadata(cfg: CfgNode) -> "Metadata":
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
    annotations, if they are there; else they are numbers, "0", "1", ...
    """
    from d2kit.data import DatasetCatalog

    metadata = build_metadata(cfg)
    names, dataset = metadata.get("thing_classes"), metadata.name
    if (
        names is None
        and os.path.isfile(metadata.get("json_file") or "")
        and (dataset in DatasetCatalog)
    ):
        DatasetCatalog.get(dataset)  # a dataset of one's own tells its classes when it is read
        names = metadata.get("thing_classes")
    count = default_num_classes(cfg) or cfg.MODEL.ROI_HEADS.NUM_CLASSES
    return list(names or map(str, range(count)))


def build_named_cfg(cfg: CfgNode) -> CfgNode:
    """Return a copy of a training's config with the names of its classes in MODEL.CLASS_NAMES.

    Call it after the training sets were loaded. Rank 0 writes the names into ``config.yaml`` in
    OUTPUT_DIR too, if `default_setup` has written that.

    Raises:
        ValueError: if the config has other names.
    """
    from d2kit.data import MetadataCatalog

    metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0] if cfg.DATASETS.TRAIN else "__unused")
    names = list(map(str, metadata.get("thing_classes") or ()))
    given = list(cfg.MODEL.CLASS_NAMES)
    if not names or given == names:
        return cfg
    if given:
        raise ValueError(
            f"MODEL.CLASS_NAMES is {_some(given)}, but the classes of dataset '{metadata.name}' "
            f'are {_some(names)}; remove the key, or set it to "[]", to train with these'
        )
    frozen = cfg.is_frozen()
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.CLASS_NAMES = names
    if frozen:
        cfg.freeze()
    if comm.is_main_process():
        _write_names(Path(cfg.OUTPUT_DIR) / "config.yaml", names)
    return cfg


def _write_names(file: Path, names: list[str]) -> None:
    if not file.is_file():
        return
    values = load_yaml(file).values
    values.setdefault("MODEL", {})["CLASS_NAMES"] = names
    with atomic_write(file, "w") as stream:
        stream.write(CfgNode(values).dump())


def _some(names: list[str]) -> str:
    return f"[{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}] ({len(names)})"
