"""Round trips of 200 random annotations through every format; hostile and damaged input."""

import json
import sys

import cv2
import numpy as np
import pytest
from hotcoco import COCO

from d2kit.data import DatasetError
from d2kit.data.conversion import READERS, WRITERS
from d2kit.data.conversion._common import decode_mask, encode_mask
from tests.tools.test_scripts import _script

H, W, IMAGES, COUNT = 120, 160, 8, 200
NAMES = ["red cat", "öl & <fass>", "狗"]


def star(rng, x, y, w, h):
    """Return a polygon around the middle of a box, its points in the order of their angles."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, 9)) + np.arange(9) * 1e-3
    radius = rng.uniform(0.6, 1, (9, 1)) * [w / 2, h / 2]
    points = np.stack([np.cos(angles), np.sin(angles)], 1) * radius + [x + w / 2, y + h / 2]
    return np.round(points, 2).ravel().tolist()


def extent(polygons):
    points = np.array([v for p in polygons for v in p]).reshape(-1, 2)
    return [*points.min(0).tolist(), *np.ptp(points, 0).tolist()]


def random_dataset(kinds):
    rng = np.random.default_rng(5)
    images = [
        {"id": i + 3, "file_name": f"földer {i % 2}/a b{i}.png", "height": H, "width": W}
        for i in range(IMAGES)
    ]
    annotations = []
    for n in range(COUNT):
        w, h = rng.uniform(12, 60, 2)
        x, y = rng.uniform(0, W - w), rng.uniform(0, H - h)
        box = np.round([x, y, w, h], 2).tolist()
        kind = kinds[n % len(kinds)]
        a = {"id": n + 1, "image_id": 3 + n % IMAGES, "category_id": 2 * int(rng.integers(3)) + 1}
        a |= {"iscrowd": 0, "bbox": box}
        if kind == "polygon":
            a["segmentation"] = [star(rng, *box)]
        elif kind == "parts":
            a["segmentation"] = [star(rng, x, y, w / 2, h), star(rng, x + w / 2, y, w / 2, h)]
        elif kind in ("rle", "crowd"):
            mask = np.zeros((H, W), np.uint8)
            cv2.ellipse(mask, ((x + w / 2, y + h / 2), (w, h), 0), 1, -1)
            cv2.ellipse(mask, ((x + w / 2, y + h / 2), (w / 3, h / 3), 0), 0, -1)  # a hole
            a |= {"segmentation": encode_mask(mask), "iscrowd": int(kind == "crowd")}
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            corner = [int(columns[0]), int(rows[0])]
            a["bbox"] = [*corner, int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1]
        if kind in ("polygon", "parts"):
            a["bbox"] = extent(a["segmentation"])
        a["area"] = a["bbox"][2] * a["bbox"][3]
        annotations.append(a)
    categories = [{"id": 2 * i + 1, "name": name} for i, name in enumerate(NAMES)]
    return {"images": images, "annotations": annotations, "categories": categories}


def by_image(coco):
    names = {c["id"]: c["name"] for c in coco["categories"]}
    table = {im["id"]: [] for im in coco["images"]}
    for a in coco["annotations"]:
        table[a["image_id"]].append((names[a["category_id"]], a))
    return {im["file_name"]: table[im["id"]] for im in coco["images"]}


def within_a_pixel(first, second):
    """Whether each mask lies within the other one, grown by a pixel.

    One pixel may stand alone: the tip of a spike, where 0.0001 pixels decide what is painted.
    """
    grown = [cv2.dilate(m.astype(np.uint8), np.ones((3, 3), np.uint8)) for m in (first, second)]
    return (first & (grown[1] == 0)).sum() + (second & (grown[0] == 0)).sum() <= 1


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for i in range(IMAGES):
        (root / f"földer {i % 2}").mkdir(exist_ok=True)
        cv2.imwrite(str(root / f"földer {i % 2}/a b{i}.png"), np.zeros((H, W, 3), np.uint8))
    return root


TRIPS = [
    ("voc", ["box"]),
    ("yolo", ["box", "polygon", "parts", "rle"]),
    ("labelme", ["box", "polygon", "parts", "rle", "crowd"]),
    ("cvat", ["box", "polygon", "parts", "rle", "crowd"]),
    ("masks", ["polygon", "parts", "rle", "crowd"]),
    ("coco", ["box", "polygon", "parts", "rle", "crowd"]),
]


@pytest.mark.parametrize(("name", "kinds"), TRIPS)
def test_round_trip(name, kinds, tmp_path, images):
    coco = random_dataset(kinds)
    target = tmp_path / ("out.json" if name == "coco" else "out")
    lost = WRITERS[name](coco, target)
    assert set(lost) <= {"run-length masks (written as polygons)"}
    back = READERS[name](target, images)
    there, here = by_image(coco), by_image(back)
    assert set(there) == set(here)
    assert len(back["annotations"]) == COUNT
    assert [c["name"] for c in back["categories"]] == NAMES or name == "labelme"
    for file, expected in there.items():
        for (label, a), (label_back, b) in zip(expected, here[file], strict=True):
            assert label_back == label
            assert b["iscrowd"] == a["iscrowd"]
            if name == "masks":  # exact, the box being that of the pixels
                assert encode_mask(decode_mask(a["segmentation"], H, W)) == b["segmentation"]
                continue
            corners = [np.array([x, y, x + w, y + h]) for x, y, w, h in (a["bbox"], b["bbox"])]
            assert np.abs(corners[0] - corners[1]).max() <= 1
            assert bool(b.get("segmentation")) == bool(a.get("segmentation"))
            if a.get("segmentation"):
                masks = [decode_mask(x["segmentation"], H, W) for x in (a, b)]
                assert within_a_pixel(*masks)
                limit = 0.05 if name == "yolo" else 0.02  # seams leave a few pixels
                limit = 0.08 if name == "yolo" and isinstance(a["segmentation"], dict) else limit
                assert np.abs(masks[0].sum() / masks[1].sum() - 1) < limit


def test_what_voc_and_masks_cannot_hold_is_counted(tmp_path):
    coco = random_dataset(["box", "polygon", "crowd", "polygon"])
    assert WRITERS["voc"](coco, tmp_path / "voc") == {
        "masks (VOC holds boxes)": 150,
        "crowds (written as difficult)": 50,
    }
    assert WRITERS["masks"](coco, tmp_path / "masks") == {"boxes without a mask": 50}
    assert WRITERS["yolo"](coco, tmp_path / "yolo") == {"crowds": 50}


@pytest.mark.parametrize("name", ["voc", "cvat"])
def test_hotcoco_reads_our_files_as_we_do(name, tmp_path):
    coco = random_dataset(["box"] if name == "voc" else ["box", "polygon"])
    for image in coco["images"]:
        image["file_name"] = image["file_name"].split("/")[1]  # it reads flat folders only
    for category in coco["categories"]:
        category["name"] = category["name"].replace("& <fass>", "fass")  # it keeps "&amp;"
    WRITERS[name](coco, tmp_path / "out")
    ours = READERS[name](tmp_path / "out", None)
    path = tmp_path / "out" / ("annotations.xml" if name == "cvat" else "")
    theirs = getattr(COCO, f"from_{name}")(str(path)).dataset
    boxes = [
        sorted((f, n, *np.round(a["bbox"], 1)) for f, many in by_image(d).items() for n, a in many)
        for d in (ours, theirs)
    ]
    assert boxes[0] == boxes[1]


def test_class_folders_of_masks(tmp_path):
    for name, value in (("cat", 255), ("dog", 1)):
        (tmp_path / name).mkdir()
        mask = np.zeros((H, W), np.uint8)
        mask[10:30, 20:50] = value
        mask[50:70, 20:50] = 2 if name == "dog" else 0
        cv2.imwrite(str(tmp_path / name / "1.png"), mask)
    coco = READERS["masks"](tmp_path, None)
    assert [a["category_id"] for a in coco["annotations"]] == [1, 2, 2]
    assert coco["annotations"][0]["bbox"] == [20, 10, 30, 20]
    assert coco["annotations"][0]["area"] == 600
    assert coco["images"] == [{"id": 1, "file_name": "1.png", "width": W, "height": H}]


def test_labelme_circle_and_group(tmp_path):
    shapes = [
        {"label": "disc", "shape_type": "circle", "points": [[50, 50], [70, 50]]},
        {"label": "two", "points": [[0, 0], [9, 0], [9, 9]], "group_id": 4},
        {"label": "two", "points": [[20, 0], [29, 0], [29, 9]], "group_id": 4},
    ]
    data = {"shapes": shapes, "imagePath": "x.png", "imageHeight": H, "imageWidth": W}
    (tmp_path / "x.json").write_text(json.dumps(data))
    disc, two = READERS["labelme"](tmp_path, None)["annotations"]
    assert disc["area"] == pytest.approx(np.pi * 400, rel=0.02)
    assert two["bbox"] == [0, 0, 29, 9]
    assert len(two["segmentation"]) == 2


BOMB = """<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x "ha"><!ENTITY y "&x;&x;">]>
<annotations><image id="1" name="&y;" width="4" height="4"/></annotations>"""
EXTERNAL = """<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>
<annotations><image id="1" name="&x;" width="4" height="4"/></annotations>"""


@pytest.mark.parametrize("text", [BOMB, EXTERNAL])
@pytest.mark.parametrize(("name", "file"), [("cvat", "annotations.xml"), ("voc", "1.xml")])
def test_hostile_xml_is_refused(name, file, text, tmp_path):
    (tmp_path / file).write_text(text)
    with pytest.raises(DatasetError, match="document type: refused"):
        READERS[name](tmp_path, None)


def labelme(**changes):
    data = {"shapes": [], "imagePath": "x.png", "imageHeight": 9, "imageWidth": 9, **changes}
    return {"x.json": json.dumps(data)}


def cvat(shape, name="x.png"):
    image = f'<image id="0" name="{name}" width="9" height="9">{shape}</image>'
    return {"annotations.xml": f"<annotations>{image}</annotations>"}


DAMAGED = {
    "labelme outside": ("labelme", labelme(imagePath="../../etc/x.png"), "outside"),
    "labelme no size": ("labelme", labelme(imageWidth=None), "imageWidth"),
    "labelme line": (
        "labelme",
        labelme(shapes=[{"label": "a", "shape_type": "line", "points": [[1, 1], [2, 2]]}]),
        "shape 0: shape_type",
    ),
    "labelme mask": (
        "labelme",
        labelme(
            shapes=[{"label": "a", "shape_type": "mask", "points": [[1, 1], [2, 2]], "mask": "?"}]
        ),
        "shape 0: mask",
    ),
    "cvat outside": ("cvat", cvat("", "/etc/x.png"), "outside"),
    "cvat text": ("cvat", cvat('<box label="a" xtl="a" ytl="1" xbr="2" ybr="3"/>'), "box"),
    "cvat mask": (
        "cvat",
        cvat('<mask label="a" rle="1,2" left="0" top="0" width="3" height="3"/>'),
        "rle",
    ),
    "cvat points": ("cvat", cvat('<points label="a" points="1,2"/>'), "expected box, polygon"),
    "yolo class": ("yolo", {"x.txt": "7 .5 .5 .1 .1", "data.yaml": "names: [a]"}, "line 1: class"),
    "yolo numbers": ("yolo", {"x.txt": "0 .5 nan .1 .1", "data.yaml": "names: [a]"}, "finite"),
    "yolo count": ("yolo", {"x.txt": "0 .5 .5 .1", "data.yaml": "names: [a]"}, "3 numbers"),
    "yolo object": ("yolo", {"data.yaml": "!!python/object:os.x {}"}, "not YAML"),
    "masks outside": (
        "masks",
        {
            "instances.json": json.dumps(
                {
                    "images": [
                        {"file_name": "x.png", "width": 9, "height": 9, "masks": ["../m.png"]}
                        | {"instances": []}
                    ]
                }
            )
        },
        "outside",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_input_is_named(case, tmp_path):
    name, files, what = DAMAGED[case]
    (tmp_path / "in").mkdir()
    for file, text in files.items():
        (tmp_path / "in" / file).write_text(text)
    cv2.imwrite(str(tmp_path / "x.png"), np.zeros((9, 9, 3), np.uint8))
    with pytest.raises(DatasetError, match=what) as error:
        READERS[name](tmp_path / "in", tmp_path)
    assert str(tmp_path / "in") in str(error.value)


def test_names_that_differ_in_the_ending_only_are_refused(tmp_path):
    coco = random_dataset(["box"])
    coco["images"][1]["file_name"] = coco["images"][0]["file_name"].replace(".png", ".jpg")
    with pytest.raises(ValueError, match="rename one"):
        WRITERS["voc"](coco, tmp_path)


def test_tool(tmp_path, images, monkeypatch, capsys):
    source = tmp_path / "in.json"
    source.write_text(json.dumps(random_dataset(["polygon", "rle"])))
    tool = _script("convert_data")
    for way in (
        ["coco", "yolo", str(source), str(tmp_path / "yolo")],
        ["yolo", "coco", str(tmp_path / "yolo"), str(tmp_path / "b.json"), "--images", str(images)],
    ):
        monkeypatch.setattr(sys, "argv", ["convert_data.py", "--from", way[0], "--to", *way[1:]])
        tool.main()
    shown = capsys.readouterr().out
    assert "8 images, 200 annotations, 3 categories" in shown
    assert "not kept: 100 run-length masks (written as polygons)" in shown
    assert len(json.loads((tmp_path / "b.json").read_text())["annotations"]) == COUNT
