"""200 mutations of a good COCO file: --dry-run and training agree, and what --fix mends trains.

The seed of each mutation is its number; a failure names it, with the field and the value.
"""

import copy
import json
import random

import pytest

from d2kit.curate.checking import check_dataset, repair_coco, survey_images
from d2kit.data.datasets import register_coco_instances
from d2kit.engine.safety.run_lock import release_output_dir
from tests.support.rcnn_data import (
    KEYPOINT_META,
    NAME,
    Trainer,
    forget,
    training_config,
    write_dataset,
)

MISTAKES = (ValueError, KeyError, OSError)  # what `user_errors` prints as one message
PARTS, EACH = 10, 20
EVERY_IMAGE = ("SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 1)
HEADS = ("MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 3)
HEADS += ("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (8,), "INPUT.MASK_FORMAT", "bitmask")
VALUES = [
    *(None, True, False, 0, 1, -1, 2, 99, 1.5, 0.0, -0.5, 1e300, 10**30, 2**63, 2**31),
    *(float("nan"), float("inf"), "", "1", "abc", "a\nb", "../x.png", "0.png", "/etc/passwd"),
    *([], {}, [[]], [1], [1, 2, 3, 4], [1, 2, 3, 4, 5], [[1, 2, 3]], [[1, 2, 3, 4, 5, 6]]),
    *([[1, 1, 20, 1, 20, 20, 1, 20]], {"size": [1, 1], "counts": [1]}, [0, 0, 0, 0]),
    *([10, 10, -5, -5], ["1", "2", "3", "4"], [None] * 4, [1e9, 1e9, 5, 5], [-50, -50, 9, 9]),
    *([5, 5, 2, 6, 6, 1, 7, 7, 0], [5, 5, 2, 6, 6, 1], [0] * 9, {"a": 1}),
]


def mutate(data, number):
    """Change one to three places of a file; return it, and what was done."""
    rng, data, told = random.Random(number), copy.deepcopy(data), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        section = rng.choice(("images", "annotations", "annotations", "annotations", "categories"))
        table = data.get(section)
        kind = rng.choice(("value", "value", "value", "value", "drop", "twice", "gone", "part"))
        if rng.random() < 0.03:
            data[section] = rng.choice(VALUES)
            told.append(f"{section} = {data[section]!r:.40}")
            continue
        if not isinstance(table, list) or not table:
            continue
        place = rng.randrange(len(table))
        entry = table[place]
        where = f"{section}[{place}]"
        if kind == "gone":
            del table[place]
        elif kind == "twice":
            table.append(copy.deepcopy(entry))
        elif not isinstance(entry, dict) or not entry:
            continue
        else:
            key = rng.choice(sorted(entry))
            where += f".{key}"
            if kind == "drop":
                del entry[key]
            elif kind == "part" and isinstance(entry[key], list) and entry[key]:
                inner = rng.randrange(len(entry[key]))
                entry[key][inner] = rng.choice(VALUES)
                where += f"[{inner}] = {entry[key][inner]!r:.40}"
            else:
                entry[key] = rng.choice(VALUES)
                where += f" = {entry[key]!r:.40}"
        told.append(f"{kind} {where}")
    return data, f"mutation {number}: {', '.join(told)}"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Folder and content of a file that trains."""
    folder = tmp_path_factory.mktemp("good")
    return folder, json.loads(write_dataset(folder).read_text())


def make_trainer(folder, data, output):
    """Register a file, and do what train_net.py does before the first iteration."""
    path = output.with_suffix(".json")
    path.write_text(json.dumps(data))
    forget()
    register_coco_instances(NAME, KEYPOINT_META, str(path), str(folder))
    trainer = Trainer(training_config(output, *EVERY_IMAGE, *HEADS))
    trainer.resume_or_load(resume=False)
    trainer.preflight()
    return trainer


def outcome(folder, data, output, *, train):
    """Return the first error of a dry run, or of a training with its evaluation; None for none."""
    try:
        trainer = make_trainer(folder, data, output)
        if train:
            trainer.train()
    except Exception as error:  # noqa: BLE001 it is what is judged
        return error
    finally:
        release_output_dir(str(output))
        forget()
    return None


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_what_passes_the_dry_run_trains_and_is_evaluated(good, tmp_path, part):
    folder, data = good
    wrong = []
    for number in range(part * EACH, (part + 1) * EACH):
        broken, told = mutate(data, number)
        dry = outcome(folder, broken, tmp_path / f"dry{number}", train=False)
        if dry is not None and not isinstance(dry, MISTAKES):
            wrong.append(f"{told}: --dry-run ends with {type(dry).__name__}: {dry!s:.200}")
        if dry is None:
            error = outcome(folder, broken, tmp_path / f"run{number}", train=True)
            if error is not None:
                wrong.append(f"{told}: --dry-run passes, training: {error!r:.300}")
    assert not wrong, "\n".join(wrong)


def overlap(a, b):
    across = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    down = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    common = max(across, 0) * max(down, 0)
    return common / (a[2] * a[3] + b[2] * b[3] - common)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_what_is_called_repaired_trains_and_lies_on_its_objects(good, tmp_path, part):
    folder, data = good
    names = {i["id"]: i["file_name"] for i in data["images"]}
    truth = [(names[a["image_id"]], a["bbox"]) for a in data["annotations"]]
    wrong, boxes, astray = [], 0, []
    for number in range(part * EACH, (part + 1) * EACH):
        broken, told = mutate(data, number)
        try:
            table = broken.get("images")
            survey = survey_images(table, folder) if isinstance(table, list) else None
            fixed, _ = repair_coco(broken, "broken.json", survey, folder)
        except Exception as error:  # noqa: BLE001
            wrong.append(f"{told}: --fix: {error!r:.200}")
            continue
        if not fixed["annotations"]:
            continue  # nothing is left, and each loss was told
        path = tmp_path / "fixed.json"
        path.write_text(json.dumps(fixed, allow_nan=False))
        left = [f for f in check_dataset(path, folder) if f.level == "error"]
        error = outcome(folder, fixed, tmp_path / f"run{number}", train=True)
        if left or (error is not None and not allowed(error)):
            wrong.append(f"{told}: repaired, then {left[:1]} {error!r:.300}")
        names = {i["id"]: i["file_name"] for i in fixed["images"]}
        for a in fixed["annotations"]:
            boxes += 1
            name = names[a["image_id"]]
            if not any(n == name and overlap(a["bbox"], b) > 0.7 for n, b in truth):
                astray.append(f"{told}: {name} {a['bbox']}")
    assert not wrong, "\n".join(wrong)
    assert len(astray) <= 0.02 * boxes, astray


def allowed(error):
    """Classes and keypoints are the config's: fewer of them are refused, and named."""
    text = str(error)
    return isinstance(error, ValueError) and ("classes" in text or "keypoints" in text)
