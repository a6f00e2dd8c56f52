"""What the datasets of a run hold, counted on a bounded sample."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from d2kit.config import CfgNode
from d2kit.engine.preflight.records import check_same_classes

MAX_CLASSES = 20
BAR = 30


class DatasetCounts(NamedTuple):
    """Contents of a dataset.

    Args:
        images: number of all.
        looked_at: number of those that the other figures are about.
        empty: images without an object that is not a crowd.
        objects: annotations that are not crowds.
        crowds: annotations that are.
        classes: contiguous class index -> objects.
    """

    images: int
    looked_at: int
    empty: int
    objects: int
    crowds: int
    classes: Mapping[int, int]


def pick_evenly(total: int, limit: int) -> list[int]:
    """Return at most `limit` indices of `total`, evenly spread; all where `limit` is 0."""
    if limit <= 0 or total <= limit:
        return list(range(total))
    return [index * total // limit for index in range(limit)]


def count_records(records: Sequence[Any], limit: int = 0) -> DatasetCounts:
    """Count images, objects and classes.

    Args:
        records: in the standard format; those without annotations count as images only.
        limit: most records to look at, evenly spread; 0: all.
    """
    chosen = pick_evenly(len(records), limit)
    classes: Counter[int] = Counter()
    empty = crowds = 0
    for index in chosen:
        found = records[index].get("annotations", ())
        real = [a["category_id"] for a in found if not a.get("iscrowd", 0)]
        classes.update(real)
        crowds += len(found) - len(real)
        empty += not real
    return DatasetCounts(
        len(records), len(chosen), empty, sum(classes.values()), crowds, dict(classes)
    )


def number_of_images(loader: object) -> int | None:
    """Return how many images one pass over a training set has; None where that is unknown."""
    dataset: Any = getattr(loader, "dataset", None)
    return len(dataset) if hasattr(dataset, "__len__") else None


class _Records(Sequence[Any]):
    """The records below the mapper of a training set."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        return self._dataset.record(index)


def records_of(loader: object) -> Sequence[Any] | None:
    """Return the records of a training loader; None where its set is not one of records."""
    dataset = loader
    while not hasattr(dataset, "record"):  # seeded, sharded, ... around what maps the records
        dataset = getattr(dataset, "dataset", None)
        if dataset is None:
            return None
    if not number_of_images(loader):
        return None
    first = dataset.record(0)
    return _Records(dataset) if isinstance(first, dict) and "annotations" in first else None


def uses_default_mapper(loader: object) -> bool:
    """Whether a training set's records go through d2kit's own mapper, whose rules are known."""
    from d2kit.data import DatasetMapper

    dataset = loader
    while dataset is not None and not hasattr(dataset, "record"):
        dataset = getattr(dataset, "dataset", None)
    return type(getattr(dataset, "_map_func", None)) is DatasetMapper


def table_of_datasets(counts: Mapping[tuple[str, str], DatasetCounts | None]) -> str:
    """Lay out what the datasets hold.

    Args:
        counts: ("train" or "test", name) -> counts, None where they are not known.

    Returns:
        One line per dataset.
    """
    from tabulate import tabulate

    rows = []
    for (use, name), found in counts.items():
        if found is None:
            rows.append([use, name, *["?"] * 5])
            continue
        sample = "all" if found.looked_at == found.images else f"{found.looked_at:,}"
        numbers = (found.empty, found.objects, found.crowds)
        rows.append([use, name, f"{found.images:,}", sample, *(f"{n:,}" for n in numbers)])
    heads = ["use", "dataset", "images", "counted", "without objects", "objects", "crowds"]
    right = ("left", "left", *["right"] * 5)
    return tabulate(rows, headers=heads, colalign=right, disable_numparse=True)


def table_of_classes(classes: Mapping[int, int], names: Sequence[str]) -> str:
    """Draw a histogram of classes, the frequent ones first.

    Args:
        classes: class index -> objects.
        names: of the classes; the indices where there are none.

    Returns:
        One line per class; of more than 20 the most and the least frequent; a line that names
        classes without objects.
    """
    known = range(max(len(names), max(classes, default=-1) + 1))
    label = {c: names[c] if c < len(names) else f"class {c}" for c in known}
    order = sorted((c for c in known if classes.get(c, 0)), key=lambda c: (-classes[c], c))
    if not order:
        return "no objects"
    shown = [*order]
    if len(order) > MAX_CLASSES:
        half = MAX_CLASSES // 2
        shown = [*order[:half], -1, *order[-half:]]
    most, total = classes[order[0]], sum(classes.values())
    width = min(24, max(len(label[c]) for c in order))
    lines = []
    for c in shown:
        if c < 0:
            lines.append(f"... {len(order) - MAX_CLASSES} classes between ...")
            continue
        bar = "#" * max(1, round(BAR * classes[c] / most))
        share = 100 * classes[c] / total
        lines.append(f"{label[c][:width]:<{width}} {classes[c]:>9,} {share:>5.1f} % {bar}")
    absent = [label[c] for c in known if not classes.get(c, 0)]
    if absent:
        more = f" and {len(absent) - 8} more" if len(absent) > 8 else ""
        lines.append(f"without objects: {', '.join(absent[:8])}{more}")
    return "\n".join(lines)


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

    Args:
        name: MODEL.WEIGHTS: a file, or the folder of an export.

    Raises:
        FileNotFoundError: if it does not.
    """
    from d2kit.export.backends import is_exported

    if is_exported(name):
        return
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
    from d2kit.utils.names import nearest_names

    known = DatasetCatalog.list()
    for name in names:
        if name not in known:
            raise KeyError(
                f"dataset '{name}' (DATASETS in the config) is not registered; nearest: "
                f"{nearest_names(name, known)}; register it in the config, DATASETS.REGISTER_COCO: "
                f"[[{name}, annotations.json, image/folder]], or in Python, with "
                "d2kit.register_dataset"
            )


def number_of_classes(cfg: CfgNode) -> int | None:
    """Return how many classes a config's model detects; None for models we do not know."""
    from d2kit.modeling.facts import build_facts

    return build_facts(cfg).detected_classes


def check_classes(
    num_classes: int | None,
    train: Iterable[str],
    test: Iterable[str],
    look: Callable[[str, list[Any]], None] | None = None,
) -> dict[str, DatasetCounts | None]:
    """Load the test sets once, and compare the classes of all datasets with those of the model.

    Call it after the training sets were loaded, which tells their classes.

    Args:
        num_classes: of the model; None: not compared.
        train: names of registered datasets.
        test: names of registered datasets.
        look: is called with the name and the records of each test set.

    Returns:
        Test set -> what it holds; None for one that is no list of records.

    Raises:
        ValueError: if a dataset is damaged, empty, lacks image files, or has another number of
            classes or other names of them than the first training set.
    """
    from d2kit.data import DatasetCatalog, MetadataCatalog
    from d2kit.data.build import check_dataset_matches
    from d2kit.data.datasets.coco import prefer_class_order
    from d2kit.data.records import check_image_files

    counts: dict[str, DatasetCounts | None] = {}
    train, test = list(train), list(test)
    names = MetadataCatalog.get(train[0]).get("thing_classes") if train else None
    for name in test:  # damage must not come to light after the training
        if names is not None:
            prefer_class_order(name, names)
        records = DatasetCatalog.get(name)
        known = isinstance(records, list)
        if known and not records:
            raise ValueError(f"dataset '{name}' (DATASETS.TEST) is empty: it holds no image")
        if known:
            check_image_files(name, records)
        counts[name] = count_records(records) if known else None
        if known and look is not None:
            look(name, records)
    if num_classes is not None:
        check_dataset_matches(num_classes, (*train, *test))
        for name in test:
            found = MetadataCatalog.get(name).get("thing_classes") or ()
            check_same_classes(name, found, f"training set '{(*train, '')[0]}'", names or ())
    return counts
