"""From a folder of pictures and labels to checked COCO files of a training and a test set."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import islice
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from d2kit.curate.checking import check_dataset, repair_coco, survey_images
from d2kit.curate.conversion import (
    IMAGE_FOLDERS,
    READERS,
    SPLITS,
    coco_files,
    image_files,
    is_label_studio,
    is_table,
    is_via,
    read_text,
    split_of,
)
from d2kit.curate.splitting import split_coco
from d2kit.data.datasets.validate import DatasetError, read_json
from d2kit.utils.file_io import atomic_write

__all__ = ["SPLIT_METHODS", "Prepared", "prepare"]


LOOKED_AT = 40
"""Files of a kind that are opened to tell what they are."""


class FoundFormat(NamedTuple):
    """A format that a folder holds.

    Args:
        name: key of `d2kit.curate.conversion.READERS`.
        path: what its reader takes: the folder, or one file.
        evidence: what was seen, for messages.
    """

    name: str
    path: Path
    evidence: str


def detect_format(data: str | PathLike[str], chosen: str = "") -> FoundFormat:
    """Return the format of a folder (or annotation file).

    Args:
        data: folder of pictures and annotations, or an annotation file.
        chosen: format that the user names; it decides where several are there.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: an unknown `chosen`; none or several formats: the message has the option that
            answers.
    """
    path = Path(data)
    if not path.exists():
        raise FileNotFoundError(
            f"'{path}' does not exist; expected a folder of pictures and labels"
        )
    if chosen and chosen not in READERS:
        raise ValueError(f"format: expected one of {', '.join(READERS)}, got '{chosen}'")
    found = [f for name, look in LOOKS.items() if (f := _seen(name, look, path))]
    if chosen:
        own = [f for f in found if f.name == chosen]
        return own[0] if own else FoundFormat(chosen, path, "named by the user")
    if len(found) > 1:
        lines = "".join(f"\n  --format {f.name}: {f.evidence}" for f in found)
        raise ValueError(f"'{path}' holds annotations in {len(found)} formats; which?{lines}")
    if found:
        return found[0]
    if path.is_dir() and (classes := _class_folders(path)):
        raise ValueError(
            f"'{path}' has a folder per class ({', '.join(classes[:5])}) and no annotations: it "
            "says what is on a picture, not where. A detector needs boxes (draw them with labelme, "
            "CVAT or Label Studio); --format folders trains with each whole image as one box"
        )
    pictures = len(image_files(path)) if path.is_dir() else 0
    raise DatasetError(
        f"'{path}': {pictures} pictures and no annotations in a known format ("
        f"{', '.join(READERS)}; docs/own_data.md has the layouts); --format says which it is"
    )


def _seen(
    name: str, look: Callable[[Path], tuple[Path, str] | None], path: Path
) -> FoundFormat | None:
    found = look(path)
    return FoundFormat(name, *found) if found else None


def _some(path: Path, suffix: str) -> list[Path]:
    """Return some files with an ending: the file itself, or those below the folder."""
    if path.is_file():
        return [path] if path.suffix.lower() == suffix else []
    files = (p for p in sorted(path.rglob(f"*{suffix}")) if not p.name.startswith("."))
    return list(islice(files, LOOKED_AT))


def _coco(path: Path) -> tuple[Path, str] | None:
    files = [path] if path.is_file() and path.suffix == ".json" else []
    files = coco_files(path) if path.is_dir() else [f for f in files if _has(f, "images")]
    if not files:
        return None
    files = sorted(files, key=lambda f: not split_of(f.name))  # train and test first
    return path, f"COCO JSON, {', '.join(f.name for f in files[:3])}{', ...' * (len(files) > 3)}"


def _has(file: Path, *keys: str) -> bool:
    try:
        return all(key in read_json(str(file), str(file)) for key in keys)
    except (ValueError, OSError):
        return False


def _labelme(path: Path) -> tuple[Path, str] | None:
    files = [f for f in _some(path, ".json") if _has(f, "shapes", "imagePath")]
    return (path, f"labelme, {files[0].name}, ...") if files else None


def _xml(path: Path, marks: tuple[str, ...]) -> Path | None:
    for file in _some(path, ".xml"):
        with open(file, "rb") as stream:
            start = stream.read(2**16)
        if all(mark.encode() in start for mark in marks):
            return file
    return None


def _voc(path: Path) -> tuple[Path, str] | None:
    file = _xml(path, ("<annotation", "<size", "<width")) if path.is_dir() else None
    if file is None or _xml(file, ("<annotations",)):
        return None
    return path, f"Pascal VOC, {file.name}, ..."


def _cvat(path: Path) -> tuple[Path, str] | None:
    file = _xml(path, ("<annotations", "<image "))
    return (file, f"CVAT for images, {file.name}") if file else None


def _yolo(path: Path) -> tuple[Path, str] | None:
    if path.is_file():
        return (path, "YOLO") if path.suffix in (".yaml", ".yml") else None
    for file in _some(path, ".txt"):
        lines = [line.split() for line in read_text(file).splitlines()[:3] if line.strip()]
        if lines and all(len(line) >= 5 and all(map(_is_number, line)) for line in lines):
            lists = ("*.yaml", "*.yml", "*.names", "classes.txt", "*.labels", "labels/classes.txt")
            return (
                (path, f"YOLO, {file.name}, ...")
                if any(any(path.glob(p)) or any(path.glob(f"*/{p}")) for p in lists)
                else None
            )
    return None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _one_of(
    path: Path, check: Callable[[Path], bool], suffixes: tuple[str, ...], title: str
) -> tuple[Path, str] | None:
    files = [f for suffix in suffixes for f in _some(path, suffix) if check(f)]
    if len(files) > 1:
        raise ValueError(
            f"'{path}' has {len(files)} files of {title} ({', '.join(f.name for f in files[:4])}): "
            "which? --data FILE names one"
        )
    return (files[0], f"{title}, {files[0].name}") if files else None


def _masks(path: Path) -> tuple[Path, str] | None:
    if not path.is_dir():
        return None
    if (path / "instances.json").is_file():
        return path, "mask PNGs, instances.json"
    for folder in sorted(p for p in path.rglob("*") if p.is_dir()):
        if "mask" in folder.name.lower() and any(folder.rglob("*.png")):
            return path, f"mask PNGs, {folder.name}/"
    return None


def _is_text_table(file: Path) -> bool:
    try:
        return is_table(file) and not is_via(file)
    except csv.Error:
        return False


LOOKS: dict[str, Callable[[Path], tuple[Path, str] | None]] = {
    "coco": _coco,
    "labelme": _labelme,
    "voc": _voc,
    "cvat": _cvat,
    "yolo": _yolo,
    "via": lambda path: _one_of(path, is_via, (".json", ".csv"), "VIA"),
    "labelstudio": lambda path: _one_of(path, is_label_studio, (".json",), "Label Studio"),
    "csv": lambda path: _one_of(path, _is_text_table, (".csv",), "CSV"),
    "masks": _masks,
}
"""Format -> function that returns what its reader takes and what was seen; None: not there."""


def _class_folders(path: Path) -> list[str]:
    """Return the folders of pictures that are named as no folder of images is."""
    names = {f.parent.name for f in image_files(path) if f.parent != path}
    return sorted(n for n in names if n.lower() not in (*IMAGE_FOLDERS, *SPLITS))


SPLIT_METHODS = ("auto", "random", "video", "last")
GROUPS = 4
"""Least number of videos that can be told by names before a split keeps them whole."""
FRAMES = 5
"""Least median of their frames."""
FEW_WITHOUT_MASK = 0.05
"""Share of objects without a mask up to which they are left out, and not the others' masks."""


class Prepared(NamedTuple):
    """What a training needs.

    Args:
        images: folder that file names are relative to.
        parts: train, val and test as far as there are -> COCO JSON file.
        data: the same -> its content.
        report: lines of what was found, left out, repaired and split.
    """

    images: Path
    parts: dict[str, Path]
    data: dict[str, dict[str, Any]]
    report: list[str]


def prepare(
    data: str | PathLike[str],
    output: Path,
    *,
    format: str = "",
    test: float = 0.2,
    split: str = "auto",
    seed: int = 0,
) -> Prepared:
    """Find the format, convert, check, repair what has a witness, and split.

    Args:
        data: folder, or an annotation file in it.
        output: folder of the JSON files; made if need be.
        format: of the annotations; empty: it is found out.
        test: share of the images to test on, or, from 1 on, their number.
        split: auto (the dataset's own, else by video where names tell, else stratified by class),
            random, video, or last (those whose names come last).
        seed: of the split.

    Raises:
        ValueError: the format is ambiguous, or something is wrong that no repair mends.
    """
    if split not in SPLIT_METHODS or test <= 0:
        expected = f"one of {', '.join(SPLIT_METHODS)} and a positive share or number"
        raise ValueError(f"split and test: expected {expected}, got '{split}' and {test}")
    path = Path(data)
    found = detect_format(path, format)
    root = path if path.is_dir() else path.parent
    lost: Counter[str] = Counter()
    try:
        coco = READERS[found.name](found.path, root, lost)
    except DatasetError as error:
        if found.name != "coco":
            raise
        coco = _repaired(found.path, root, lost, error)
    counts = ", ".join(f"{len(coco[k])} {k}" for k in ("images", "annotations", "categories"))
    report = [f"{path}: {found.evidence}: {counts}"]
    report += [f"left out: {n} {what}" for what, n in sorted((+lost).items())]
    if not coco["images"]:
        raise _no_image(path, report)
    output.mkdir(parents=True, exist_ok=True)
    _one_kind(coco, report)
    coco = _checked(coco, root, output / "all.json", report)
    parts = _parts(coco, test, split, seed, report)
    files = {}
    for name, part in parts.items():
        files[name] = output / f"{name}.json"
        _write(part, files[name])
    return Prepared(root, files, parts, report)


def _no_image(path: Path, report: list[str]) -> DatasetError:
    return DatasetError(
        f"{path}: none of the images can be used. They are looked for in this folder and below: "
        "give the one that holds annotations and images",
        report,
    )


def _one_kind(coco: dict[str, Any], report: list[str]) -> None:
    """Take the masks from a dataset in which too many objects have none.

    Objects that are left out are taught to be background, which costs more than masks.
    """
    objects = [a for a in coco["annotations"] if not a.get("iscrowd")]
    bare = sum(not a.get("segmentation") for a in objects)
    if FEW_WITHOUT_MASK * len(objects) < bare < len(objects):
        report.append(
            f"masks: {bare} of {len(objects)} objects have none: boxes are learned of all"
        )
        for a in objects:
            a["segmentation"] = []


def _write(coco: Mapping[str, Any], path: Path) -> None:
    with atomic_write(path, "w") as file:
        json.dump(coco, file, allow_nan=False)


def _repaired(path: Path, root: Path, lost: Counter[str], error: DatasetError) -> dict[str, Any]:
    """Return the only COCO file of a folder, repaired; what was done is counted.

    Args:
        path: the file or folder.
        root: folder of the images.
        lost: counts.
        error: what reading it said.

    Raises:
        DatasetError: there are several files: each is repaired by itself first (`d2kit check`).
    """
    files = [path] if path.is_file() else coco_files(path)
    if len(files) != 1:
        bad = [file for file in files if not _sound(file)]
        if not bad:
            raise error  # they do not go together
        names = ", ".join(str(file.relative_to(path)) for file in bad[:3])
        raise DatasetError(
            f"{path}: {len(bad)} of its {len(files)} COCO files have errors: {names}"
            f"{', ...' * (len(bad) > 3)}. Look with `d2kit check {bad[0]} --images {root}`, repair "
            "with `--fix OUT.json`, take away what is not wanted, or name one file as --data"
        )
    data = read_json(str(files[0]), str(files[0]))
    coco, done = repair_coco(data, str(files[0]), survey_images(data["images"], root), root)
    lost["entries that were repaired or left out"] += len(done)
    return coco


def _sound(file: Path) -> bool:
    try:
        READERS["coco"](file, None, Counter())
    except DatasetError:
        return False
    return True


def _checked(coco: dict[str, Any], root: Path, path: Path, report: list[str]) -> dict[str, Any]:
    """Return the dataset, repaired where it has errors.

    Raises:
        DatasetError: errors are left.
    """
    _write(coco, path)
    survey = survey_images(coco["images"], root)
    errors = [f for f in check_dataset(path, root, survey=survey) if f.level == "error"]
    if not errors:
        return coco
    coco, done = repair_coco(coco, str(path), survey, root)
    kinds = Counter(f"{f.field}: {f.what.partition(':')[0]:.80}" for f in done)
    report += [f"repaired: {n} x {what}" for what, n in kinds.most_common(10)]
    if not coco["images"]:
        raise _no_image(root, report)
    _write(coco, path)
    left = [f for f in check_dataset(path, root, survey=survey) if f.level == "error"]
    if left or not coco["annotations"]:
        lines = [str(f) for f in left[:20]]
        raise DatasetError(f"{path}: {len(left)} errors that no repair mends", lines, len(left))
    return coco


def _parts(
    coco: dict[str, Any], test: float, split: str, seed: int, report: list[str]
) -> dict[str, dict[str, Any]]:
    own = _own_split(coco) if split == "auto" else {}
    if own:
        parts = own
        report.append("split: the dataset's own")
    elif split == "last":
        parts = _last(coco, test)
        report.append(f"split: the last {len(parts['test']['images'])} names are the test set")
    else:
        share = test if test < 1 else test / len(coco["images"])
        share = min(max(share, 1 / len(coco["images"])), 0.9)
        videos = _videos(coco)
        by_video = split == "video" or (split == "auto" and videos is not None)
        if by_video and videos is None:
            raise ValueError("split video: the names of the images tell no videos; give 'random'")
        if by_video and videos is not None:
            images = [{**i, "video": videos[i["id"]]} for i in coco["images"]]
            coco = {**coco, "images": images}
            report.append(f"split: by the {len(set(videos.values()))} videos that names tell")
        else:
            report.append("split: at random, each class in its share")
        method = "group" if by_video else "stratified"
        shares = {"train": 1 - share, "test": share}
        parts = split_coco(coco, shares, method=method, seed=seed)
    report += [f"{name}: {len(part['images'])} images" for name, part in parts.items()]
    for name in ("train", "test" if "test" in parts and "val" not in parts else "val"):
        if not parts[name]["annotations"]:
            raise DatasetError(
                f"the {name} set has {len(parts[name]['images'])} images and no object"
            )
    return parts


def _subset(coco: Mapping[str, Any], ids: set[int]) -> dict[str, Any]:
    images = [i for i in coco["images"] if i["id"] in ids]
    annotations = [a for a in coco["annotations"] if a["image_id"] in ids]
    return {**coco, "images": images, "annotations": annotations}


def _own_split(coco: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the parts that images say they belong to, or nothing."""
    ids: dict[str, set[int]] = {}
    for image in coco["images"]:
        folders = PurePosixPath(image["file_name"]).parent.as_posix()
        ids.setdefault(image.get("split") or split_of(folders), set()).add(image["id"])
    if "train" not in ids or not ids.keys() & {"val", "test"} or "" in ids:
        return {}
    return {name: _subset(coco, ids[name]) for name in ("train", "val", "test") if name in ids}


def _last(coco: Mapping[str, Any], test: float) -> dict[str, dict[str, Any]]:
    ordered = [i["id"] for i in sorted(coco["images"], key=lambda i: i["file_name"])]
    count = round(test if test >= 1 else test * len(ordered))
    count = min(max(count, 1), len(ordered) - 1)
    first, last = set(ordered[:-count]), set(ordered[-count:])
    return {"train": _subset(coco, first), "test": _subset(coco, last)}


def _videos(coco: Mapping[str, Any]) -> dict[int, str] | None:
    """Return image id -> video, where names have enough of them; else None."""
    for of_name in (
        lambda path: path.parent.as_posix(),
        lambda path: re.sub(r"(?i)[-_. ]*(frame|f)?[-_. ]*\d+$", "", path.stem),
    ):
        table = {i["id"]: of_name(PurePosixPath(i["file_name"])) for i in coco["images"]}
        counts = sorted(Counter(table.values()).values())
        if len(counts) >= GROUPS and counts[len(counts) // 2] >= FRAMES:
            return table
    return None
