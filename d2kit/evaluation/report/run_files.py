"""What lies in the folder of a run: config, metrics, stored results, and where its data are."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from d2kit.config import CfgNode, get_cfg
from d2kit.evaluation.coco_results import read_coco_results
from d2kit.utils.file_io import atomic_write, load_json
from d2kit.utils.text import file_name

__all__ = ["Dataset", "Run", "read_run", "record_run"]

RESULTS = "inference/coco_instances_results.json"
RECORD = "report.json"
"""In the folder of the run: data, digests and machine as they were when the training ended."""
PACKAGES = ("d2kit", "torch", "torchvision", "numpy", "hotcoco", "opencv-python")


@dataclass
class Dataset:
    """A dataset of a run, as far as it can be found.

    Attributes:
        name: under which it was registered.
        json_file: COCO annotations; empty where the dataset has none.
        image_root: folder that ``file_name`` is relative to.
        digest: SHA-256 of the annotation file; empty where there is no file.
        images: their number.
        instances: class -> number of annotations.
    """

    name: str
    json_file: str = ""
    image_root: str = ""
    digest: str = ""
    images: int = 0
    instances: dict[str, int] = field(default_factory=dict)


@dataclass
class Run:
    """A run as it lies in its folder.

    Attributes:
        folder: of the run.
        cfg: its config; None where the folder has none.
        rows: of ``metrics.json``, see `d2kit.visualization.plots.read_metrics`.
        train: datasets it was trained on.
        test: datasets it was evaluated on.
        results: COCO results; None where none are stored. Of several test sets, those of the first
            in DATASETS.TEST that has some.
        stored: the file of the results.
        others: test sets whose results are stored too.
        machine: name -> version or description.
    """

    folder: Path
    cfg: CfgNode | None
    rows: list[dict[str, Any]]
    train: list[Dataset]
    test: list[Dataset]
    results: list[dict[str, Any]] | None
    machine: dict[str, str]
    stored: Path | None = None
    others: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.folder.resolve().name


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Read the folder of a run.

    Raises:
        FileNotFoundError: there is no such folder, or it holds neither metrics nor results.
        ValueError: its config or its results cannot be read.
    """
    from d2kit.visualization.plots import read_metrics

    root = Path(folder)
    metrics = root / "metrics.json"
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder; give the OUTPUT_DIR of a training")
    cfg = None
    if (root / "config.yaml").exists():
        cfg = get_cfg()
        cfg.merge_from_file(str(root / "config.yaml"))
    names = [] if cfg is None else list(cfg.DATASETS.TEST)
    # each of several test sets has a folder of its own
    places = {name: root / "inference" / file_name(name) / Path(RESULTS).name for name in names}
    plain = {"": root / RESULTS}
    places = places | plain if len(names) > 1 else plain | places
    stored = {name: path for name, path in places.items() if path.exists()}
    if not (stored or metrics.exists()):
        raise FileNotFoundError(
            f"{root} holds neither metrics.json nor {RESULTS}; expected the OUTPUT_DIR of a "
            f"training, found {sorted(p.name for p in root.iterdir())[:8]}"
        )
    results = next(iter(stored.values()), None)
    record = load_json(root / RECORD) if (root / RECORD).exists() else {}
    if not isinstance(record, dict) or not isinstance(record.get("datasets", {}), dict):
        raise ValueError(f"{root / RECORD}: expected an object with 'datasets'; delete the file")
    sets = {part: _datasets(cfg, part, record, root) for part in ("TRAIN", "TEST")}
    shown = next(iter(stored), "")
    sets["TEST"].sort(key=lambda one: one.name != shown)
    return Run(
        folder=root,
        cfg=cfg,
        rows=read_metrics(metrics) if metrics.exists() else [],
        train=sets["TRAIN"],
        test=sets["TEST"],
        results=None if results is None else read_coco_results(results),
        machine=record.get("machine") or this_machine(),
        stored=results,
        others=[name for name in stored if name not in ("", shown)] if shown else [],
    )


def record_run(run: Run) -> None:
    """Write data, digests and machine to ``report.json``, for a report made later or elsewhere."""
    content = {
        "machine": run.machine,
        "datasets": {
            one.name: {
                "json_file": os.path.abspath(one.json_file),
                "image_root": os.path.abspath(one.image_root),
                "digest": one.digest,
                "images": one.images,
                "instances": one.instances,
            }
            for one in (*run.train, *run.test)
            if one.json_file
        },
    }
    with atomic_write(run.folder / RECORD, "w") as file:
        json.dump(content, file, indent=1)


def this_machine() -> dict[str, str]:
    """Describe the machine and the versions of the packages that decide results."""
    import torch

    found = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "system": platform.platform(),
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "Python": sys.version.split()[0],
    }
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            if package == "d2kit":
                from d2kit import __version__

                found[package] = __version__
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(t.split(":", 1)[1].strip() for t in lines if t.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _datasets(
    cfg: CfgNode | None, part: str, record: Mapping[str, Any], root: Path
) -> list[Dataset]:
    """Find the datasets of a config: as registered now, else as recorded when the run ended."""
    if cfg is None:
        return []
    from d2kit.data import DatasetCatalog, MetadataCatalog, register_datasets

    recorded = record.get("datasets", {})
    listed = [e for e in cfg.DATASETS.REGISTER_COCO if e[0] not in DatasetCatalog]
    register_datasets(listed)
    found = []
    for name in cfg.DATASETS[part]:
        old = recorded.get(name, {})
        known = MetadataCatalog.get(name) if name in DatasetCatalog else None
        path = known.get("json_file", "") if known else ""
        images = known.get("image_root", "") if known else ""
        if not path or not Path(path).exists():
            path, images = old.get("json_file", ""), old.get("image_root", "")
        converted = f"{name}_coco_format.json"
        for folder in (root / "inference", root / "inference" / file_name(name)):
            if not path and (folder / converted).exists():
                path = str(folder / converted)
        if path and Path(path).exists():
            found.append(_described(name, str(path), str(images or "")))
        else:
            kept = {k: old[k] for k in ("digest", "images", "instances") if k in old}
            found.append(Dataset(name, **kept))
    return found


def _described(name: str, path: str, image_root: str) -> Dataset:
    coco = load_json(path)
    try:
        names = {c["id"]: str(c["name"]) for c in coco.get("categories", ())}
        counts = Counter(names.get(a["category_id"], "?") for a in coco.get("annotations", ()))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a COCO JSON of dataset '{name}' ({error!r})") from error
    return Dataset(
        name,
        path,
        image_root,
        hashlib.sha256(Path(path).read_bytes()).hexdigest(),
        len(coco.get("images", ())),
        {n: counts.get(n, 0) for n in names.values()},
    )
