"""Looks through all records for what mapper, model or evaluator would refuse, before step 0.

No image is decoded. What stops the training or its first evaluation is an error, what only makes
its figures worse a warning.
"""

import logging
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import isfinite
from numbers import Integral
from typing import Any

from d2kit.config import CfgNode

__all__ = ["DefaultRecordCheck", "learned_parts", "check_same_classes", "evaluator_kind"]

Record = Mapping[str, Any]

logger = logging.getLogger(__name__)

SECONDS = 5.0
"""Longest time for which headers of files are read; some 50,000 from a local disk."""

SHOWN = 5
"""Images that a line names."""


def evaluator_kind(metadata: Mapping[str, Any] | Any) -> str | None:
    """Return what evaluates a dataset: `evaluator_type`, else by what the metadata hold.

    Returns:
        "pascal_voc" for the folders of Pascal VOC, "coco" where there are class names, else None.
    """
    kind = metadata.get("evaluator_type")
    voc = metadata.get("dirname") and metadata.get("year") and not metadata.get("json_file")
    if kind is None and voc:
        return "pascal_voc"
    return "coco" if kind is None and metadata.get("thing_classes") is not None else kind


def learned_parts(cfg: CfgNode) -> frozenset[str]:
    """Return what of an annotation a config's model learns from.

    Returns:
        Of "boxes", "rotated boxes", "masks" and "keypoints"; none for a model that we do not know.
    """
    from d2kit.modeling.facts import build_facts

    facts = build_facts(cfg)
    parts = set(facts.learns_from) - {"segmentation"}
    if facts.rotated and "boxes" in parts:
        parts = parts - {"boxes"} | {"rotated boxes"}
    return frozenset(parts)


@dataclass
class DefaultRecordCheck:
    """Collects errors and warnings about the datasets of a run.

    Args:
        cfg: the config of the run.
        errors: one line each.
        warnings: one line each.
    """

    cfg: CfgNode
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def raise_if_any(self) -> None:
        """Raise a DatasetError (a ValueError) with the errors, if there are any."""
        from d2kit.data import DatasetError

        if self.errors:
            title = "" if len(self.errors) == 1 else "the training or its evaluation would fail"
            raise DatasetError(title, self.errors)

    # ---- training

    def look_at_training(self, name: str, records: Iterable[Any], num_classes: int | None) -> None:
        """Check the records that the default mapper will map.

        Args:
            name: of the datasets, for messages.
            records: in the standard format.
            num_classes: of the model; None: not compared.
        """
        learns = learned_parts(self.cfg)
        bad: dict[str, list[str]] = {}
        files: Counter[str] = Counter()
        objects, largest = 0, 0.0
        for record in records:
            shown = _name_of(record)
            files[shown] += 1
            real = [a for a in record.get("annotations", ()) if not a.get("iscrowd", 0)]
            objects += len(real)
            for annotation in real:
                if _finite(annotation.get("bbox"), (4, 5)):
                    largest = max(largest, *map(float, annotation["bbox"]))
                for what in self._refused(annotation, record, learns, num_classes):
                    bad.setdefault(what, []).append(shown)
        for what, images in bad.items():
            self.errors.append(_line(name, what, images, objects))
        if 0 < largest <= 1:
            self.warnings.append(
                f"dataset {name}: all boxes lie within 1 x 1 pixel; are they shares of the image "
                "size? Records have pixels"
            )
        self._warn_of_files(name, files)

    def look_at_files(self, name: str, records: Iterable[Any]) -> None:
        """Compare the sizes of records with the headers of their files, for at most `SECONDS`.

        Args:
            name: of the dataset.
            records: that the default mapper will map.
        """
        wanted = {
            str(r["file_name"]): (r["width"], r["height"])
            for r in records
            if None not in (r.get("file_name"), r.get("width"), r.get("height"))
        }
        files = [file for file in wanted if "://" not in file]
        random.Random(0).shuffle(files)  # where time ends, all parts were looked at
        end, seen, wrong = time.monotonic() + SECONDS, 0, []
        with ThreadPoolExecutor(8) as pool:
            while files[seen:] and time.monotonic() < end:
                some = files[seen : seen + 256]
                seen += len(some)
                wrong += [
                    line for line in pool.map(_wrong_file, some, map(wanted.get, some)) if line
                ]
        if seen < len(files):
            logger.info("%s: sizes of %d of %d files compared", name, seen, len(files))
        skipped = self.cfg.DATALOADER.MAX_SKIPPED_IMAGES
        if wrong:
            into = self.errors if len(wrong) > skipped else self.warnings
            into.append(f"dataset {name}: {len(wrong)} files: {'; '.join(sorted(wrong)[:SHOWN])}")

    def _refused(
        self, a: Record, record: Record, learns: frozenset[str], num_classes: int | None
    ) -> Iterator[str]:
        """Say what mapper or model will refuse of an annotation."""
        numbers = (4, 5) if "rotated boxes" in learns else (4,)
        if "bbox_mode" not in a or not _finite(a.get("bbox"), numbers):
            if _finite(a.get("bbox"), (5,)) and "bbox_mode" in a:
                yield "have a rotated box, which only MODEL.PROPOSAL_GENERATOR.NAME RRPN trains"
            else:
                yield "have no 'bbox' of 4 finite numbers with its 'bbox_mode'"
        category = a.get("category_id")
        if not isinstance(category, Integral):
            yield "have a category_id that is no integer"
        elif num_classes is not None and not 0 <= int(category) < num_classes:
            yield f"have a category_id outside of [0, {num_classes}), the classes of the model"
        if "masks" in learns:
            problem = _mask_problem(a.get("segmentation"), record)
            if problem:
                yield (
                    f"{problem}, and MODEL.MASK_ON is true: give them masks, leave them out "
                    "(d2kit check --fix), or set MODEL.MASK_ON False to train boxes"
                )
        if "keypoints" in learns:
            wanted = self.cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
            if not _finite(a.get("keypoints"), (3 * wanted,)):
                yield (
                    f"do not have {wanted} keypoints (3 numbers each), as "
                    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS and MODEL.KEYPOINT_ON ask for"
                )

    def _warn_of_files(self, name: str, files: Mapping[str, int]) -> None:
        double = [file for file, count in files.items() if count > 1]
        if double:
            self.warnings.append(
                f"dataset {name}: {len(double)} files are those of several images: "
                f"{_some(double)}; each has its own objects: were frames of several videos joined?"
            )

    # ---- evaluation

    def look_at_test(self, name: str, records: Sequence[Any]) -> None:
        """Check the records of a test set, which a COCO evaluator will compare with."""
        from d2kit.data import MetadataCatalog

        metadata = MetadataCatalog.get(name)
        kind = evaluator_kind(metadata)
        if kind is None:
            self.errors.append(
                f"dataset {name} (DATASETS.TEST) has no class names, so that no evaluator can be "
                f"chosen: MetadataCatalog.get('{name}').set(thing_classes=[...])"
            )
        if kind != "coco":
            return
        if "annotations" not in records[0] and not metadata.get("json_file"):
            return
        self._check_ids(name, records)
        self._check_test_objects(name, records, metadata.get("json_file") is None)
        self._warn_of_files(name, Counter(_name_of(record) for record in records))

    def _check_ids(self, name: str, records: Sequence[Record]) -> None:
        ids = [record.get("image_id") for record in records]
        wrong = [i for i in ids if not isinstance(i, Integral) or isinstance(i, bool) or i < 0]
        if wrong:
            self.errors.append(
                f"dataset {name}: {len(wrong)} of {len(ids)} records have an image_id that is no "
                f"integer >= 0 ({_some([repr(i) for i in wrong])}): the evaluation compares by it"
            )
            return
        double = [i for i, count in Counter(ids).items() if count > 1]
        if double:
            self.errors.append(
                f"dataset {name}: image_id {_some(double)} is that of several records: the "
                "evaluation would take them for one image; number them"
            )

    def _check_test_objects(self, name: str, records: Sequence[Record], converted: bool) -> None:
        """Compare the objects with what the evaluator counts and looks at."""
        learns, cfg = learned_parts(self.cfg), self.cfg
        most, at, masks, objects = 0, "", 0, 0
        no_box: list[str] = []
        keypoints: Counter[int] = Counter()
        for record in records:
            found = [a for a in record.get("annotations", ()) if not a.get("iscrowd", 0)]
            objects += len(found)
            if len(found) > most:
                most, at = len(found), _name_of(record)
            masks += sum(_has_mask(a) for a in found)
            keypoints.update(len(a["keypoints"]) // 3 for a in found if a.get("keypoints"))
            no_box += [_name_of(record) for a in found if not _finite(a.get("bbox"), (4, 5))]
        if no_box and converted:
            self.errors.append(_line(name, "have no 'bbox' of finite numbers", no_box, objects))
        if most > cfg.TEST.DETECTIONS_PER_IMAGE:
            self.warnings.append(
                f"dataset {name}: {at} has {most} objects, TEST.DETECTIONS_PER_IMAGE is "
                f"{cfg.TEST.DETECTIONS_PER_IMAGE}: the rest cannot be found"
            )
        if "masks" in learns and objects and masks < objects:
            self.warnings.append(
                f"dataset {name}: {objects - masks} of {objects} objects have no mask, while "
                "MODEL.MASK_ON is true: the AP of masks counts them as never found"
            )
        if "keypoints" in learns:
            self._check_sigmas(name, keypoints)

    def _check_sigmas(self, name: str, annotated: Mapping[int, int]) -> None:
        given = len(self.cfg.TEST.KEYPOINT_OKS_SIGMAS) or 17
        wanted = self.cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
        if given != wanted:
            self.errors.append(
                f"TEST.KEYPOINT_OKS_SIGMAS has {given} values (COCO's 17 where it is empty), but "
                f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {wanted}: give one per keypoint"
            )
        other = [count for count in annotated if count != wanted]
        if other:
            self.errors.append(
                f"dataset {name}: objects have {_some(other)} keypoints, but "
                f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {wanted}"
            )


def check_same_classes(name: str, found: Sequence[str], of: str, wanted: Sequence[str]) -> None:
    """Compare the class names of a dataset with those of the model.

    Args:
        name: of the dataset.
        found: its names by class index.
        of: where the model's come from.
        wanted: the model's names by class index.

    Raises:
        ValueError: the names differ, or their order does.
    """
    found, wanted = [str(n) for n in found], [str(n) for n in wanted]
    if found == wanted or not found or not wanted:
        return
    if sorted(found) == sorted(wanted):
        raise ValueError(
            f"dataset '{name}' has the classes {_some(found)}, {of} has them in the order "
            f"{_some(wanted)}: a class index would mean two things. A COCO dataset that is first "
            "loaded by the training is mapped by name; register others with the same order"
        )
    ours = [n for n in found if n not in wanted]
    theirs = [n for n in wanted if n not in found]
    raise ValueError(
        f"dataset '{name}' has other classes than {of}: only here {_some(ours)}, only there "
        f"{_some(theirs)}; name the classes alike, or register the right dataset"
    )


def _wrong_file(file: str, size: tuple[int, int] | None) -> str:
    """Say why a file is not one of a record's (width, height); "" where it is."""
    from d2kit.data.detection_utils import upright_size

    try:
        found = upright_size(file)
    except Exception as error:  # Pillow raises many types at damaged headers
        text = str(error)
        return text if file in text else f"{file}: {text}"
    if size == found:
        return ""
    return (
        f"{file} is {found[0]}x{found[1]} pixels (width x height, set upright by EXIF), its "
        f"dataset says {size}: d2kit check --images FOLDER --fix mends or leaves out"
    )


def _name_of(record: Record) -> str:
    return str(record.get("file_name", f"image {record.get('image_id', '?')}"))


def _some(values: Sequence[Any]) -> str:
    more = f", ... ({len(values)})" if len(values) > SHOWN else ""
    return f"[{', '.join(map(str, values[:SHOWN]))}{more}]"


def _line(name: str, what: str, images: Sequence[str], objects: int) -> str:
    unique = [*dict.fromkeys(images)]
    return f"dataset {name}: {len(images)} of {objects} objects {what}; in {_some(unique)}"


def _finite(values: Any, lengths: Sequence[int]) -> bool:
    """Whether values are so many finite numbers."""
    try:
        return len(values) in lengths and isfinite(sum(values))
    except (TypeError, ValueError):
        return False


def _has_mask(a: Record) -> bool:
    masks = a.get("segmentation")
    return masks is not None and len(masks) > 0


def _mask_problem(masks: object, record: Record) -> str | None:
    """Say why an annotation gives no mask to learn from."""
    if masks is None or (hasattr(masks, "__len__") and len(masks) == 0):
        return "have no mask"
    if isinstance(masks, (list, tuple)):
        for polygon in masks:
            if not hasattr(polygon, "__len__") or len(polygon) < 6 or len(polygon) % 2:
                return "have a polygon of no even number, at least 6, of coordinates"
        return None
    size = masks.get("size") if isinstance(masks, Mapping) else getattr(masks, "shape", None)
    if size is None:
        return "have a mask that is no list of polygons, run-length mask or array"
    known = (record.get("height"), record.get("width"))
    if None not in known and tuple(size) != known:
        return "have a mask of another size than their image"
    return None
