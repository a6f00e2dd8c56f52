"""Checks of a run that cost little and come before the model is built."""

import os
from collections.abc import Iterable
from pathlib import Path

from d2kit.config import CfgNode
from d2kit.engine._preflight_data import DatasetCounts, count_records

__all__ = [
    "check_classes",
    "check_dataset_names",
    "check_output_dir",
    "check_weights",
    "default_num_classes",
]

# Meta-architecture -> config key with its number of classes; of others we do not know.
CLASS_KEYS = {
    "GeneralizedRCNN": "ROI_HEADS",
    "PanopticFPN": "ROI_HEADS",
    "RetinaNet": "RETINANET",
    "FCOS": "FCOS",
}


def check_output_dir(path: str) -> None:
    """Make the output folder, and make sure that a file can be written there.

    Raises:
        OSError: if it cannot.
    """
    # random, because processes on several machines may share the folder and have the same pid
    trial = Path(path) / f".write-test-{os.urandom(8).hex()}"
    try:
        trial.parent.mkdir(parents=True, exist_ok=True)
        trial.write_bytes(b"")
        trial.unlink()
    except OSError as error:
        raise OSError(
            error.errno,
            f"OUTPUT_DIR '{path}' cannot be written to ({error.strerror}); choose another folder",
        ) from error


def check_weights(name: str) -> None:
    """Make sure that a local file of weights exists; names and URLs are checked when loaded.

    Raises:
        FileNotFoundError: if it does not.
    """
    if name and "://" not in name and not os.path.isfile(name.partition("?")[0]):
        raise FileNotFoundError(
            f"MODEL.WEIGHTS '{name}' not found; give the path of a .pth, .pkl or .safetensors "
            "file, a URL, detectron2://... or torchvision://..., or '' to start from scratch"
        )


def check_dataset_names(names: Iterable[str]) -> None:
    """Make sure that datasets are registered.

    Raises:
        KeyError: if one is not; the message lists the nearest names.
    """
    from d2kit.data import DatasetCatalog
    from d2kit.utils.registry import nearest_names

    known = DatasetCatalog.list()
    for name in names:
        if name not in known:
            raise KeyError(
                f"dataset '{name}' (DATASETS in the config) is not registered; nearest: "
                f"{nearest_names(name, known)}; register it in the config, DATASETS.REGISTER_COCO: "
                f"[[{name}, annotations.json, image/folder]], or in Python, with "
                "d2kit.register_dataset"
            )


def default_num_classes(cfg: CfgNode) -> int | None:
    """Return how many classes a config's model detects; None for models we do not know."""
    section = CLASS_KEYS.get(cfg.MODEL.META_ARCHITECTURE)
    return cfg.MODEL[section].NUM_CLASSES if section else None


def check_classes(
    num_classes: int | None, train: Iterable[str], test: Iterable[str]
) -> dict[str, DatasetCounts | None]:
    """Load the test sets once, and compare the classes of all datasets with those of the model.

    Call it after the training sets were loaded, which tells their classes.

    Args:
        num_classes: of the model; None: not compared.
        train: names of registered datasets.
        test: names of registered datasets.

    Returns:
        Test set -> what it holds; None for one that is no list of records.

    Raises:
        ValueError: if a dataset is damaged, empty, lacks image files or has another number of
            classes.
    """
    from d2kit.data import DatasetCatalog
    from d2kit.data._records import check_image_files
    from d2kit.data.build import check_dataset_matches

    counts: dict[str, DatasetCounts | None] = {}
    test = list(test)
    for name in test:  # damage must not come to light after the training
        records = DatasetCatalog.get(name)
        known = isinstance(records, list)
        if known and not records:
            raise ValueError(f"dataset '{name}' (DATASETS.TEST) is empty: it holds no image")
        if known:
            check_image_files(name, records)
        counts[name] = count_records(records) if known else None
    if num_classes is not None:
        check_dataset_matches(num_classes, (*train, *test))
    return counts
