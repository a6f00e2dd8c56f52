"""Readers of text of others under random damage: an error of ours, or a result; never a traceback.

`pytest -m fuzz` takes about a minute. ``D2KIT_FUZZ_SEED`` sets the first seed (a new one each day
without it) and ``D2KIT_FUZZ_COUNT`` the mutations of each reader; a failure names its seed.
"""

import json
import os
import random
import shutil
import time
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from d2kit.config import get_cfg
from d2kit.curate.checking import check_dataset, repair_coco
from d2kit.curate.conversion import READERS, WRITERS
from d2kit.data.datasets import load_coco_json
from d2kit.data.datasets.validate import read_json
from d2kit.data.records import load_proposals_into_dataset
from d2kit.evaluation.track_evaluation import evaluate_tracks, read_mot_text
from d2kit.utils.archives import extract_zip
from d2kit.utils.event_storage import JSONWriter

pytestmark = pytest.mark.fuzz

SEED = int(os.environ.get("D2KIT_FUZZ_SEED", time.strftime("%Y%j")))
COUNT = int(os.environ.get("D2KIT_FUZZ_COUNT", "150"))
SLOW = 20.0  # seconds for one file
MISTAKES = (ValueError, KeyError, OSError)
TOKENS = [
    *(b"0", b"-1", b"1e999", b"-1e300", b"nan", b"inf", b"9" * 5000, b"1.5", b"null", b"true"),
    *(b"\xff\xfe", b"\x00", b"\x1b[31m", b"\n", b"\r\n", b"\t", b",", b";", b'"', b"'", b"\\"),
    *(b"[", b"]", b"{", b"}", b"<", b">", b"</", b"&x;", b"<!DOCTYPE a>", b"../", b"[" * 3000),
    *("é\u202e\u2028".encode(), b"=cmd", b"!!python/object:os.system", b"&a [*a]", b"${oc.env:X}"),
]


def damage(data: bytes, rng: random.Random) -> bytes:
    """Return bytes with one to four places changed, cut, doubled or replaced."""
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(data) + 1)
        end = min(len(data), place + rng.choice((0, 1, 1, 2, 5, 30)))
        kind = rng.randrange(6)
        if kind == 0:
            data = data[:place]
        elif kind == 1:
            data = data[:place] + data[end:]
        elif kind == 2:
            data = data[:place] + data[place:end] * rng.choice((2, 50)) + data[end:]
        elif kind == 3:
            data = data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]
        else:
            data = data[:place] + rng.choice(TOKENS) + data[end:]
    return data


def content():
    outline = [[4, 4, 24, 4, 24, 20, 4, 20]]
    entry = {"image_id": 1, "category_id": 1, "bbox": [4, 4, 20, 16], "area": 320, "iscrowd": 0}
    return {
        "images": [{"id": 1, "file_name": "1.png", "width": 40, "height": 30}],
        "annotations": [{"id": i, **entry, "segmentation": outline} for i in (1, 2)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


def pictures(folder: Path) -> None:
    (folder / "images").mkdir(exist_ok=True)
    for place in (folder, folder / "images"):
        Image.new("RGB", (40, 30)).save(place / "1.png")


def made_by(kind):
    """Return what writes the good files of a format of annotations."""

    def make(folder: Path) -> None:
        target = {"cvat": folder / "annotations.xml", "coco": folder / "train.json"}
        WRITERS[kind](content(), target.get(kind, folder))

    return make


def via(folder: Path) -> None:
    shape = {"name": "polygon", "all_points_x": [4, 24, 24], "all_points_y": [4, 4, 20]}
    region = {"shape_attributes": shape, "region_attributes": {"class": "cat"}}
    (folder / "via.json").write_text(json.dumps({"1": {"filename": "1.png", "regions": [region]}}))


def table(folder: Path) -> None:
    row = "1.png,40,30,cat,4,4,24,20\n"
    (folder / "a.csv").write_text("filename,width,height,class,xmin,ymin,xmax,ymax\n" + 2 * row)


def text(name, body):
    return lambda folder: (folder / name).write_text(body)


def archive(folder: Path) -> None:
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as bundle:
        bundle.writestr("a/b.txt", b"hello " * 50)
        bundle.writestr("c.txt", b"x")


def fix(folder: Path) -> None:
    path = str(folder / "train.json")
    repair_coco(read_json(path, path), path, None, folder)


MOT = "1,1,10,10,20,20,1,1,1\n1,2,50,10,20,20,1,1,1\n2,1,12,10,20,20,1,1,1\n"
TRACKS = {
    "videos": [{"name": "a.mp4", "stride": 1, "first_frame": 0, "last_frame": 3}],
    "categories": [{"id": 1, "name": "cat"}],
    "annotations": [
        {"id": i, "frame": i, "track_id": 1, "bbox": [1, 2, 30, 40], "score": 0.9, "category_id": 1}
        for i in range(3)
    ],
}
PROPOSALS = {"ids": [1], "boxes": [[[0, 0, 9, 9], [1, 1, 5, 5]]], "objectness_logits": [[1, 2]]}
YAML = "MODEL:\n  MASK_ON: true\n  PIXEL_MEAN: [1.0, 2.0, 3.0]\nSOLVER: &s\n  STEPS: (1, 2)\n"
LINES = "".join(json.dumps({"iteration": i, "total_loss": 0.5}) + "\n" for i in range(3))
FORMATS = ("voc", "yolo", "labelme", "cvat", "coco")
KINDS = {
    **{kind: (made_by(kind), lambda f, k=kind: READERS[k](f, None, None)) for kind in FORMATS},
    "via": (via, lambda f: READERS["via"](f, None, None)),
    "csv": (table, lambda f: READERS["csv"](f, None, None)),
    "COCO JSON": (made_by("coco"), lambda f: load_coco_json(f / "train.json", f)),
    "check": (made_by("coco"), lambda f: check_dataset(f / "train.json")),
    "fix": (made_by("coco"), fix),
    "MOT text": (text("a.txt", MOT), lambda f: read_mot_text(f / "a.txt")),
    "tracks": (
        text("a.json", json.dumps(TRACKS)),
        lambda f: evaluate_tracks(f / "a.json", f / "a.json", classes=["cat"]),
    ),
    "proposals": (
        text("a.json", json.dumps(PROPOSALS)),
        lambda f: load_proposals_into_dataset([{"image_id": 1}], str(f / "a.json")),
    ),
    "YAML": (text("a.yaml", YAML), lambda f: get_cfg().merge_from_file(str(f / "a.yaml"))),
    "metrics.json": (
        text("metrics.json", LINES),
        lambda f: JSONWriter(str(f / "metrics.json")).continue_from(2),
    ),
    "archive": (archive, lambda f: extract_zip(f / "a.zip", f / "out")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_an_error_of_ours_or_a_result(kind, tmp_path):
    make, read = KINDS[kind]
    print(f"{kind}: seeds {SEED} to {SEED + COUNT - 1}")
    good = tmp_path / "good"
    good.mkdir()
    pictures(good)
    make(good)
    read(good)  # what is damaged is sound
    files = sorted(p.relative_to(good) for p in good.rglob("*") if p.suffix not in (".png", ""))
    texts = [p for p in files if "out" not in p.parts]
    wrong = []
    for seed in range(SEED, SEED + COUNT):
        rng = random.Random(f"{kind} {seed}")
        work = tmp_path / "work"
        shutil.copytree(good, work)
        file = work / rng.choice(texts)
        file.write_bytes(damage(file.read_bytes(), rng))
        start = time.monotonic()
        try:
            read(work)
        except MISTAKES as error:
            if type(error).__module__ == "numpy" or isinstance(error, UnicodeError):
                wrong.append(f"seed {seed}, {file.name}: {error!r:.200}")
        except Exception as error:  # noqa: BLE001 it is what is looked for
            wrong.append(f"seed {seed}, {file.name}: {error!r:.200}")
        if time.monotonic() - start > SLOW:
            wrong.append(f"seed {seed}, {file.name}: took {time.monotonic() - start:.0f} s")
        shutil.rmtree(work)
    assert not wrong, "\n".join([f"D2KIT_FUZZ_SEED={SEED}", *wrong[:20]])
