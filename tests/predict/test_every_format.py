"""Every still format x {predict, track, visualize, check} x {plain, turned, grey, alpha, ...}.

All pictures lie in one folder, 40 x 30 pixels upright with a bright left half, and each command
sees it once: the right picture comes out, or one line names the file.
"""

import contextlib
import io
import json
import logging

import av
import cv2
import numpy as np
import pytest
from PIL import Image, features

from d2kit.cli.data import check_main
from d2kit.cli.predict import predict_main, track_main
from d2kit.cli.visualize import visualize_main
from d2kit.data import DatasetCatalog, MetadataCatalog

WIDTH, HEIGHT = 40, 30
FORMATS = ("jpg", "png", "bmp", "dib", "gif", "tiff", "ppm", "pgm", "pbm", "webp", "jp2", "avif")
KINDS = ("plain", "turned", "grey", "palette", "alpha", "deep", "deep_colours", "cmyk", "bits")
MODES = {"grey": "L", "palette": "P", "alpha": "RGBA", "cmyk": "CMYK", "bits": "1"}
USES = ("predict", "track", "visualize", "check")
USES_OF_TESTS = [pytest.param(u, marks=[pytest.mark.slow] * (u in USES[:2])) for u in USES]
LACKING = "phone.heic"
"""A format that is not read: each command names the file and does the rest."""


def encode(suffix, kind):
    """Return a file with a bright left half; None where the format has no such kind."""
    grey = np.full((HEIGHT, WIDTH), 20, np.uint8)
    grey[:, : WIDTH // 2] = 230
    if kind.startswith("deep"):
        pixels = grey.astype(np.uint16) * 257
        if kind == "deep_colours":
            pixels = np.repeat(pixels[..., None], 3, axis=2)
        if suffix not in ("png", "tiff", "jp2", "pgm" if kind == "deep" else "ppm"):
            return None
        done, data = cv2.imencode(f".{suffix}", pixels)
        return data.tobytes() if done else None
    image = Image.fromarray(grey).convert("RGB").convert(MODES.get(kind, "RGB"))
    settings = {}
    if kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6  # shown a quarter turn clockwise
        settings["exif"] = exif.tobytes()
        image = image.transpose(Image.Transpose.ROTATE_90)
    if kind == "alpha":
        image.putalpha(250)  # webp leaves a channel out that hides nothing
    file = io.BytesIO()
    name = {"jp2": "jpeg2000", "jpg": "jpeg", "pgm": "ppm", "pbm": "ppm"}.get(suffix, suffix)
    try:
        image.save(file, name, **settings)
    except (OSError, KeyError, ValueError, TypeError):
        return None
    with Image.open(io.BytesIO(file.getvalue())) as written:  # some lose mode or tag in writing
        kept = written.getexif().get(0x0112) == 6 if kind == "turned" else True
        same = kind not in MODES or written.mode == image.mode
    return file.getvalue() if kept and same else None


def halves(picture):
    """Say what is wrong with a picture in which the left half must be bright; "" for nothing."""
    height, width = picture.shape[:2]
    if round(width / height * 3) != 4:
        return f"{width} x {height} pixels"
    left, right = picture[:, : width // 2 - 2].mean(), picture[:, width // 2 + 2 :].mean()
    return "" if left > right + 60 else f"left {left:.0f}, right {right:.0f}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("formats") / "pictures"
    place.mkdir()
    for suffix in FORMATS:
        for kind in KINDS:
            data = encode(suffix, kind)
            if data is not None:
                (place / f"{suffix}_{kind}.{suffix}").write_bytes(data)
    (place / LACKING).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99))
    return place


@pytest.fixture(scope="module")
def truth(folder):
    """COCO file that names all files, with a box in the dark half."""
    names = sorted(path.name for path in folder.iterdir())
    images = [
        {"id": i, "file_name": name, "width": WIDTH, "height": HEIGHT}
        for i, name in enumerate(names, 1)
    ]
    box = {"category_id": 1, "bbox": [24, 6, 10, 12], "area": 120, "iscrowd": 0}
    annotations = [{**box, "id": i["id"], "image_id": i["id"]} for i in images]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
    path = folder.parent / "truth.json"
    path.write_text(json.dumps(content))
    return path


def said_by(call, *argv):
    """Run a command; return (exit code, what it says)."""
    text = io.StringIO()
    handler, logger = logging.StreamHandler(text), logging.getLogger("d2kit")
    logger.addHandler(handler)
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            code = call([str(word) for word in argv]) or 0
        except SystemExit as end:
            code = end.code
        finally:
            logger.removeHandler(handler)
    return code, text.getvalue()


@pytest.fixture(scope="module")
def results(folder, truth, detector):
    """Use -> (exit code, what it says, name -> what is wrong with its picture)."""
    cache = {}

    def of(use):
        if use not in cache:
            cache[use] = RUNS[use](folder, truth, folder.parent / use, detector)
        return cache[use]

    return of


def run_predict(folder, truth, out, detector):
    config, weights = detector
    code, text = said_by(
        predict_main,
        *("--config-file", config, "--input", folder, "--output", out, "MODEL.WEIGHTS", weights),
    )
    rows = json.loads((out / "predictions.json").read_text())["images"]
    wrong = {}
    for row in rows:
        [path] = (out / "overlays").glob(f"{row['id']:05d}_*")
        size = (row["width"], row["height"])
        name = row["file_name"].rpartition("/")[2]
        wrong[name] = halves(cv2.imread(str(path))) if size == (WIDTH, HEIGHT) else f"{size}"
    return code, text, wrong


def run_track(folder, truth, out, detector):
    config, weights = detector
    code, text = said_by(
        track_main,
        *("--config-file", config, "--input", folder, "--output", out, "MODEL.WEIGHTS", weights),
    )
    with av.open(str(out / "annotated.mp4")) as file:
        frames = [frame.to_ndarray(format="bgr24") for frame in file.decode(video=0)]
    names = sorted(path.name for path in folder.iterdir() if path.name != LACKING)
    assert len(frames) == len(names)
    return code, text, {n: halves(f) for n, f in zip(names, frames, strict=True)}


def run_visualize(folder, truth, out, detector):
    code, text = said_by(
        visualize_main,
        *("--json", truth, "--images", folder, "--output-dir", out, "--count", 999),
    )
    DatasetCatalog.remove(str(truth))
    MetadataCatalog.remove(str(truth))
    wrong = {}
    for path in folder.iterdir():
        found = out / f"{path.stem}.jpg"
        if found.exists():
            picture = cv2.imread(str(found))
            drawn = np.ptp(picture[10:38, 46:70].astype(int), axis=2).max() > 30
            wrong[path.name] = halves(picture) or ("" if drawn else "no box is drawn")
    return code, text, wrong


def run_check(folder, truth, out, detector):
    code, text = said_by(check_main, truth, "--images", folder)
    wrong = {}
    ids = {i["id"]: i["file_name"] for i in json.loads(truth.read_text())["images"]}
    for number, name in ids.items():
        told = [t for t in text.splitlines() if f"image {number}:" in t and "note" not in t[:5]]
        if not told:
            wrong[name] = ""
        elif name != LACKING:
            wrong[name] = told[0]
    return code, text, wrong


RUNS = {use: globals()[f"run_{use}"] for use in USES}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("use", USES_OF_TESTS)
def test_each_kind_comes_out_right(results, folder, use, suffix):
    part = {"jp2": "jpg_2000"}.get(suffix, suffix)
    if part in features.features | features.modules | features.codecs and not features.check(part):
        pytest.skip(f"Pillow without {part}")
    _, _, wrong = results(use)
    names = sorted(path.name for path in folder.glob(f"*.{suffix}"))
    assert names
    assert {name: wrong.get(name, "no result") for name in names} == dict.fromkeys(names, "")


@pytest.mark.parametrize("use", USES_OF_TESTS)
def test_what_is_not_read_is_named_in_one_line(results, use):
    code, text, wrong = results(use)
    assert LACKING not in wrong
    assert sum(LACKING in line for line in text.splitlines()) == 1, text
    assert "Traceback" not in text
    assert code == (0 if use in ("predict", "track") else 1)  # there a folder may hold other files


def test_the_formats_hold_what_they_should(folder):
    """The table has no holes that an encoder made."""
    held = {s: {k for k in KINDS if (folder / f"{s}_{k}.{s}").exists()} for s in FORMATS}
    assert held["jpg"] == {"plain", "turned", "grey", "cmyk"}
    assert held["png"] >= {"plain", "turned", "grey", "palette", "alpha", "deep", "bits"}
    assert held["tiff"] >= {"plain", "turned", "grey", "alpha", "deep", "deep_colours", "cmyk"}
    assert held["webp"] >= {"plain", "turned", "alpha"}
    assert sum(map(len, held.values())) >= 45
