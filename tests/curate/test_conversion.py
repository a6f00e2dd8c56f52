"""Round trips of 200 random annotations through every format; hostile and damaged input."""

import json
import sys

import cv2
import numpy as np
import pytest
from hotcoco import COCO
from PIL import Image

from d2kit.curate.conversion import READERS, WRITERS
from d2kit.curate.conversion.common import decode_mask, encode_mask
from d2kit.curate.conversion.text_formats import one_line
from d2kit.data import DatasetError
from tests.tools.test_scripts import _script

H, W, COUNT = 120, 160, 200
SIZES = [(120, 160), (121, 157), (333, 17), (7, 5), (3, 90), (48, 64)]
NAMES = ["red cat", "öl & <fass>", "狗"]


def image_name(i):
    return f"földer {i % 2}/{'in/' * (i % 3)}a b{i}.png"


def star(rng, x, y, w, h):
    """Return a polygon around the middle of a box, its points in the order of their angles."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, 9)) + np.arange(9) * 1e-3
    radius = rng.uniform(0.6, 1, (9, 1)) * [w / 2, h / 2]
    points = np.stack([np.cos(angles), np.sin(angles)], 1) * radius + [x + w / 2, y + h / 2]
    return points.ravel().tolist()


def extent(polygons):
    points = np.array([v for p in polygons for v in p]).reshape(-1, 2)
    return [*points.min(0).tolist(), *np.ptp(points, 0).tolist()]


def ring(height, width, x, y, w, h):
    """Return a mask with a hole where there is room, of one pixel at least."""
    mask = np.zeros((height, width), np.uint8)
    cv2.ellipse(mask, ((x + w / 2, y + h / 2), (w, h), 0), 1, -1)
    if min(w, h) > 9:
        cv2.ellipse(mask, ((x + w / 2, y + h / 2), (w / 3, h / 3), 0), 0, -1)
    mask[int(y), int(x)] = 1
    return mask


def random_dataset(kinds):
    """Make 200 annotations from half a pixel to the whole image, some at the border."""
    rng = np.random.default_rng(5)
    images = [
        {"id": i + 3, "file_name": image_name(i), "height": h, "width": w}
        for i, (h, w) in enumerate(SIZES)
    ]
    annotations = []
    for n in range(COUNT):
        image = images[n % len(images)]
        sides = np.array([image["width"], image["height"]])
        w, h = np.maximum(0.5, sides ** rng.uniform(0, 1, 2) * rng.uniform(0.5, 1, 2)).tolist()
        place = rng.choice([0, 0.5, 1], 2, p=[0.2, 0.6, 0.2])
        place = np.where(place == 0.5, rng.random(2), place) * (sides - [w, h])
        x, y = (float(v) for v in place)
        kind = kinds[n // len(images) % len(kinds)]
        a = {"id": n + 1, "image_id": image["id"], "category_id": 2 * int(rng.integers(3)) + 1}
        a |= {"iscrowd": 0, "bbox": [x, y, w, h]}
        if kind == "polygon":
            a["segmentation"] = [star(rng, x, y, w, h)]
        elif kind == "parts":  # every other one with parts that overlap
            part = w / (2, 1.4)[n % 2]
            a["segmentation"] = [star(rng, x + k * (w - part), y, part, h) for k in (0, 1)]
        elif kind in ("rle", "crowd"):
            mask = ring(image["height"], image["width"], x, y, w, h)
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


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for i, size in enumerate(SIZES):
        path = root / image_name(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.zeros((*size, 3), np.uint8))
    return root


def corners(box):
    x, y, w, h = box
    return np.array([x, y, x + w, y + h])


# Format, kinds, by how many pixels corners of boxes and points of polygons may move.
TRIPS = [
    ("voc", ["box"], 1, 0),
    ("yolo", ["box", "polygon", "parts", "rle"], 2e-4, 1e-4),
    ("labelme", ["box", "polygon", "parts", "rle", "crowd"], 1e-4, 0),
    ("cvat", ["box", "polygon", "parts", "rle", "crowd"], 1e-4, 0),
    ("masks", ["polygon", "parts", "rle", "crowd"], 0, 0),
    ("coco", ["box", "polygon", "parts", "rle", "crowd"], 0, 0),
]


@pytest.mark.parametrize(("name", "kinds", "of_box", "of_points"), TRIPS)
def test_round_trip(name, kinds, of_box, of_points, tmp_path, images):
    coco = random_dataset(kinds)
    target = tmp_path / ("out.json" if name == "coco" else "out")
    lost = WRITERS[name](coco, target)
    sizes = {im["id"]: (im["height"], im["width"]) for im in coco["images"]}
    if name == "masks":  # a polygon between the middles of pixels has none
        there = [
            a
            for a in coco["annotations"]
            if decode_mask(a["segmentation"], *sizes[a["image_id"]]).any()
        ]
        assert lost == {"masks without a pixel": COUNT - len(there)}
        assert len(there) > 0.8 * COUNT
        coco["annotations"] = there
    else:
        assert set(lost) <= {"run-length masks (written as polygons)"}
    back = READERS[name](target, images)
    there, here = by_image(coco), by_image(back)
    assert set(there) == set(here)
    assert len(back["annotations"]) == len(coco["annotations"])
    assert [c["name"] for c in back["categories"]] == NAMES or name == "labelme"
    for file, expected in there.items():
        for (label, a), (label_back, b) in zip(expected, here[file], strict=True):
            assert label_back == label
            assert b["iscrowd"] == a["iscrowd"]
            moved = np.abs(corners(a["bbox"]) - corners(b["bbox"])).max()
            assert bool(b.get("segmentation")) == bool(a.get("segmentation"))
            if not a.get("segmentation"):
                assert moved <= of_box
                continue
            size = sizes[a["image_id"]]
            masks = [decode_mask(x["segmentation"], *size) for x in (a, b)]
            parts = isinstance(a["segmentation"], list) and len(a["segmentation"]) > 1
            assert moved <= (1 if name == "yolo" and parts else of_box)
            polygons = isinstance(a["segmentation"], list) and name != "masks"
            if polygons and not (name == "yolo" and parts):
                for one, other in zip(a["segmentation"], b["segmentation"], strict=True):
                    np.testing.assert_allclose(other, one, rtol=0, atol=of_points)
            assert on_the_outline(masks) if of_points and polygons else (masks[0] == masks[1]).all()


def on_the_outline(masks):
    """Whether masks differ in a single pixel at most, and there by less than a pixel of outline."""
    kernel = np.ones((3, 3), np.uint8)
    low, high = (f(masks[0].astype(np.uint8), kernel) for f in (cv2.erode, cv2.dilate))
    return (masks[1] >= low).all() and (masks[1] <= high).all() and (masks[0] ^ masks[1]).sum() <= 1


def test_outline_of_any_mask_gives_it_back():
    rng = np.random.default_rng(0)
    for _ in range(200):
        h, w = (int(v) for v in rng.integers(1, 24, 2))
        mask = rng.random((h, w)) < rng.random()  # pixels that touch at corners, holes in holes
        line = one_line(encode_mask(mask), h, w)
        assert (decode_mask([line], h, w) == mask).all() if mask.any() else line == []
        points = np.array(line, int).reshape(-1, 2)
        filled = np.zeros((h, w), np.uint8)
        if mask.any():  # the line runs between pixels: OpenCV's, through their middles, is bigger
            cv2.fillPoly(filled, [points], 1)
            assert (filled[:h, :w] >= mask).all()


def test_what_a_format_cannot_hold_is_counted(tmp_path):
    coco = random_dataset(["box", "polygon", "crowd", "polygon"])
    count = {True: 0, False: 0}
    for a in coco["annotations"]:
        count[bool(a["iscrowd"])] += bool(a.get("segmentation"))
    boxes = COUNT - sum(count.values())
    voc = WRITERS["voc"](coco, tmp_path / "voc")
    assert voc == {
        "masks (VOC holds boxes)": COUNT - boxes,
        "crowds (written as difficult)": count[True],
    }
    assert WRITERS["masks"](coco, tmp_path / "masks")["boxes without a mask"] == boxes
    assert WRITERS["yolo"](coco, tmp_path / "yolo") == {"crowds": count[True]}
    empty = encode_mask(np.zeros(SIZES[0], bool))
    coco["annotations"] = [
        {**coco["annotations"][0], "segmentation": empty},
        {**coco["annotations"][1], "keypoints": [1, 1, 2]},
    ]
    for name in ("labelme", "cvat", "yolo"):
        lost = WRITERS[name](coco, tmp_path / name)
        assert lost == {"masks without a pixel": 1, "keypoints (objects that have some)": 1}
    coco["annotations"][1]["bbox"] = [5, 5, 3, 2, 30]
    with pytest.raises(ValueError, match="only COCO JSON holds rotated boxes"):
        WRITERS["yolo"](coco, tmp_path / "yolo")


@pytest.mark.parametrize("name", ["voc", "cvat"])
def test_hotcoco_reads_our_files_as_we_do(name, tmp_path):
    coco = random_dataset(["box"] if name == "voc" else ["box", "polygon"])
    for image in coco["images"]:
        image["file_name"] = image["file_name"].split("/")[-1]  # it reads flat folders only
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
    "labelme outside": ("labelme", labelme(imagePath="../../etc/y.png"), "outside"),
    "labelme no size": ("labelme", labelme(imageWidth=None), "imageWidth"),
    "labelme mask": (
        "labelme",
        labelme(
            shapes=[{"label": "a", "shape_type": "mask", "points": [[1, 1], [2, 2]], "mask": "?"}]
        ),
        "shape 0: mask",
    ),
    "cvat outside": ("cvat", cvat("", "/etc/y.png"), "outside"),
    "cvat text": ("cvat", cvat('<box label="a" xtl="a" ytl="1" xbr="2" ybr="3"/>'), "box"),
    "cvat mask": (
        "cvat",
        cvat('<mask label="a" rle="1,2" left="0" top="0" width="3" height="3"/>'),
        "rle",
    ),
    "cvat for video": (
        "cvat",
        {"annotations.xml": '<annotations><track id="0" label="a"/></annotations>'},
        "expected 'CVAT for images 1.1', got tracks",
    ),
    "cvat of VOC": ("cvat", {"annotations.xml": "<annotation/>"}, "got <annotation> without"),
    "yolo class": ("yolo", {"x.txt": "7 .5 .5 .1 .1", "data.yaml": "names: [a]"}, "line 1: class"),
    "yolo numbers": ("yolo", {"x.txt": "0 .5 nan .1 .1", "data.yaml": "names: [a]"}, "finite"),
    "yolo count": ("yolo", {"x.txt": "0 .5 .5 .1", "data.yaml": "names: [a]"}, "3 numbers"),
    "yolo object": ("yolo", {"x.txt": "", "data.yaml": "!!python/object:os.x {}"}, "not YAML"),
    "yolo pose": ("yolo", {"x.txt": "", "data.yaml": "kpt_shape: [5, 3]\nnames: [a]"}, "kpt_shape"),
    "yolo gap": ("yolo", {"x.txt": "", "data.yaml": "names: {0: a, 2: b}"}, "without gaps"),
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
    assert "6 images, 200 annotations, 3 categories" in shown
    assert "not kept: 98 run-length masks (written as polygons)" in shown
    assert len(json.loads((tmp_path / "b.json").read_text())["annotations"]) == COUNT


@pytest.mark.parametrize(
    "name", ["line1\nline2", "\x1b[31mred", "a\\nb", '<b>&"', "half \x00", "猫"]
)
@pytest.mark.parametrize("kind", ["voc", "cvat", "yolo", "labelme"])
def test_any_class_name_is_read_back(tmp_path, kind, name):
    from d2kit.curate.conversion import READERS, WRITERS

    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "images/1.png")
    content = {
        "images": [{"id": 1, "file_name": "1.png", "width": 40, "height": 30}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 4, 10, 10], "area": 100}
            | {"iscrowd": 0, "segmentation": [[4, 4, 14, 4, 14, 14, 4, 14]]}
        ],
        "categories": [{"id": 1, "name": name}],
    }
    WRITERS[kind](content, tmp_path)
    found = READERS[kind](tmp_path / "annotations.xml" if kind == "cvat" else tmp_path, None, None)
    assert [c["name"] for c in found["categories"]] == [name]
    assert len(found["annotations"]) == 1
