"""Other people's dialects and layouts: each is read to the same objects, or refused by name."""

import csv
import io
import json
from collections import Counter

import cv2
import numpy as np
import pytest

from d2kit.curate.conversion import READERS
from d2kit.curate.prepare import detect_format
from d2kit.data.datasets.validate import DatasetError

W, H = 40, 30
BOX = [4, 6, 20, 12]


def picture(path, value=90):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((H, W, 3), value, np.uint8))


def voc_xml(name="1.png", size=(W, H)):
    return (
        f"<annotation><filename>{name}</filename><size><width>{size[0]}</width>"
        f"<height>{size[1]}</height><depth>3</depth></size><object><name>cat</name><bndbox>"
        "<xmin>5</xmin><ymin>7</ymin><xmax>24</xmax><ymax>18</ymax></bndbox></object></annotation>"
    )


def coco_json(name="1.png"):
    return json.dumps(
        {
            "images": [{"id": 0, "file_name": name, "width": W, "height": H}],
            "annotations": [{"id": 1, "image_id": 0, "category_id": 1, "bbox": BOX, "area": 240}],
            "categories": [
                {"id": 0, "name": "pets", "supercategory": "none"},
                {"id": 1, "name": "cat", "supercategory": "pets"},
            ],
        }
    )


def labelme_json(image):
    x, y, w, h = BOX
    shape = {"label": "cat", "shape_type": "rectangle", "points": [[x, y], [x + w, y + h]]}
    return json.dumps(
        {
            "shapes": [shape],
            "imagePath": image,
            "imageWidth": W,
            "imageHeight": H,
            "imageData": None,
        }
    )


VIA_SHAPE = {"name": "rect", "x": 4, "y": 6, "width": 20, "height": 12}


def via_json(project=False, old=False):
    region = {"shape_attributes": VIA_SHAPE, "region_attributes": {"class": "cat"}}
    regions = {"0": region} if old else [region]
    data = {"1.png123": {"filename": "1.png", "size": 123, "regions": regions}}
    return json.dumps({"_via_img_metadata": data, "_via_settings": {}} if project else data)


def via_csv():
    text = io.StringIO()
    keys = ["filename", "file_size", "file_attributes", "region_count", "region_id"]
    writer = csv.writer(text)
    writer.writerow([*keys, "region_shape_attributes", "region_attributes"])
    row = ["1.png", "123", "{}", "1", "0", json.dumps(VIA_SHAPE), '{"type": {"cat": true}}']
    writer.writerow(row)
    return text.getvalue()


def label_studio(image="/data/upload/3/0a1b2c3d-1.png"):
    value = {"x": 10, "y": 20, "width": 50, "height": 40, "rotation": 0}
    value["rectanglelabels"] = ["cat"]
    result = [{"type": "rectanglelabels", "value": value}, {"type": "choices", "value": {}}]
    return json.dumps([{"id": 7, "data": {"image": image}, "annotations": [{"result": result}]}])


YOLO = "0 0.35 0.4 0.5 0.4\n"
CVAT = (
    '<annotations><image id="0" name="1.png" width="40" height="30">'
    '<tag label="day"/><box label="cat" xtl="4" ytl="6" xbr="24" ybr="18"/></image></annotations>'
)
LAYOUTS = {
    "voc upper": ("voc", {"Annotations/1.xml": voc_xml()}, "JPEGImages/1.png"),
    "voc lower": ("voc", {"annotations/1.xml": voc_xml()}, "images/1.png"),
    "voc beside": ("voc", {"train/1.xml": voc_xml()}, "train/1.png"),
    "voc renamed": ("voc", {"annotations/1.xml": voc_xml("IMG_77.JPG")}, "images/1.png"),
    "voc other machine": ("voc", {"xml/1.xml": voc_xml("C:\\me\\1.png")}, "pics/1.png"),
    "coco beside": ("coco", {"labels.json": coco_json()}, "1.png"),
    "coco roboflow": ("coco", {"train/_annotations.coco.json": coco_json()}, "train/1.png"),
    "coco foreign root": ("coco", {"a.json": coco_json("/home/you/set/1.png")}, "images/1.png"),
    "labelme beside": ("labelme", {"1.json": labelme_json("1.png")}, "1.png"),
    "labelme apart": (
        "labelme",
        {"labels/1.json": labelme_json("..\\images\\1.png")},
        "images/1.png",
    ),
    "cvat": ("cvat", {"annotations.xml": CVAT}, "images/1.png"),
    "yolo flat": ("yolo", {"1.txt": YOLO, "classes.txt": "cat\n"}, "1.png"),
    "yolo folders": ("yolo", {"labels/1.txt": YOLO, "data.yaml": "names: [cat]"}, "images/1.png"),
    "yolo roboflow": (
        "yolo",
        {"train/labels/1.txt": YOLO, "data.yaml": "train: ../train/images\nnames: [cat]"},
        "train/images/1.png",
    ),
    "yolo own yaml": ("yolo", {"labels/1.txt": YOLO, "my.yaml": "names: {0: cat}"}, "images/1.png"),
    "yolo cvat 1.1": (
        "yolo",
        {"obj_train_data/1.txt": YOLO, "obj.names": "cat\n", "train.txt": "obj_train_data/1.png\n"},
        "obj_train_data/1.png",
    ),
    "via": ("via", {"via.json": via_json()}, "1.png"),
    "via project": ("via", {"via.json": via_json(project=True)}, "images/1.png"),
    "via 1": ("via", {"via.json": via_json(old=True)}, "1.png"),
    "via csv": ("via", {"via.csv": via_csv()}, "1.png"),
    "csv": ("csv", {"a.csv": "1.png,4,6,24,18,cat\n"}, "1.png"),
    "csv titles": (
        "csv",
        {"a.csv": "class;xmin;ymin;xmax;ymax;filename\ncat;4;6;24;18;1.png\n"},
        "1.png",
    ),
    "csv tensorflow": (
        "csv",
        {"a.csv": "filename,width,height,class,xmin,ymin,xmax,ymax\n1.png,40,30,cat,4,6,24,18\n"},
        "1.png",
    ),
    "csv x1 x2": ("csv", {"a.csv": "image,x1,y1,x2,y2,label\n1.png,4,6,24,18,cat\n"}, "1.png"),
    "csv sizes": ("csv", {"a.csv": "image,x,y,w,h,label\n1.png,4,6,20,12,cat\n"}, "1.png"),
    "csv shares": ("csv", {"a.csv": "image,x1,y1,x2,y2,label\n1.png,.1,.2,.6,.6,cat\n"}, "1.png"),
    "label studio": ("labelstudio", {"project-1.json": label_studio()}, "images/1.png"),
    "label studio local": (
        "labelstudio",
        {"p.json": label_studio("/data/local-files/?d=images/1.png")},
        "images/1.png",
    ),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_layout_is_found_and_read(case, tmp_path):
    name, files, image = LAYOUTS[case]
    for file, text in files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    picture(tmp_path / image)
    found = detect_format(tmp_path)
    assert found.name == name
    lost = Counter()
    coco = READERS[name](found.path, tmp_path, lost)
    assert [i["file_name"] for i in coco["images"]] == [image]
    assert [c["name"] for c in coco["categories"]] == ["cat"]
    (only,) = coco["annotations"]
    assert only["bbox"] == pytest.approx(BOX)
    assert lost["shapes of type tag"] == (name == "cvat")
    assert lost["regions of type choices"] == (name == "labelstudio")


@pytest.mark.parametrize(
    ("files", "image"),
    [
        ({"PedMasks/a_mask.png": [1, 2]}, "PNGImages/a.png"),
        ({"masks/a.png": [1, 2]}, "images/a.png"),
        ({"train/masks/a.png": [1, 2]}, "train/images/a.png"),
    ],
)
def test_mask_folders(files, image, tmp_path):
    picture(tmp_path / image)
    for file in files:
        labels = np.zeros((H, W), np.uint8)
        labels[2:10, 3:9], labels[12:20, 20:30] = 1, 2
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / file), labels)
    found = detect_format(tmp_path)
    coco = READERS["masks"](found.path, tmp_path)
    assert found.name == "masks"
    assert [i["file_name"] for i in coco["images"]] == [image]
    assert [a["bbox"] for a in coco["annotations"]] == [[3, 2, 6, 8], [20, 12, 10, 8]]


def test_only_the_pictures_of_the_dataset_are_read(tmp_path):
    for name in ("train/images/a.png", "train/images/none.png", "runs/x/pred.png", "logo.png"):
        picture(tmp_path / name)
    (tmp_path / "train/labels").mkdir()
    (tmp_path / "train/labels/a.txt").write_text(YOLO)
    for text in ("names: [cat]", "train: train/images\nnames: [cat]"):
        (tmp_path / "data.yaml").write_text(text)
        lost = Counter()
        coco = READERS["yolo"](tmp_path, None, lost)
        names = [i["file_name"] for i in coco["images"]]
        assert names == ["train/images/a.png", "train/images/none.png"]
        assert lost["pictures outside of the dataset's folders"] == 2


def test_a_folder_per_class_is_asked_about(tmp_path):
    picture(tmp_path / "cat/1.png")
    picture(tmp_path / "dog/2.png")
    with pytest.raises(ValueError, match="--format folders"):
        detect_format(tmp_path)
    lost = Counter()
    coco = READERS["folders"](detect_format(tmp_path, "folders").path, None, lost)
    assert [a["bbox"] for a in coco["annotations"]] == [[0, 0, W, H]] * 2
    assert lost.total() == 2


def test_two_formats_are_one_question(tmp_path):
    picture(tmp_path / "1.png")
    (tmp_path / "1.xml").write_text(voc_xml())
    (tmp_path / "1.json").write_text(labelme_json("1.png"))
    with pytest.raises(ValueError, match=r"(?s)--format labelme.*--format voc"):
        detect_format(tmp_path)
    assert detect_format(tmp_path, "voc").name == "voc"


HUGE = "9" * 5000
REFUSED = {
    "yolo coordinate": (
        "yolo",
        {"1.txt": "0 .1 .1 1e9 .1 .5 .5\n", "classes.txt": "a"},
        "1.txt: line 1",
    ),
    "yolo digits": ("yolo", {"1.txt": f"0 {HUGE} .1 .1 .1\n", "classes.txt": "a"}, "1.txt: line 1"),
    "yolo bytes": ("yolo", {"1.txt": b"\xff\xfe0", "classes.txt": "a"}, "1.txt: not a text file"),
    "voc size": ("voc", {"1.xml": voc_xml(size=(10**9, 10**9))}, "size"),
    "labelme size": ("labelme", {"1.json": labelme_json("1.png").replace("40", HUGE)}, "1.json"),
    "labelme point": (
        "labelme",
        {"1.json": labelme_json("1.png").replace("24", "1e300")},
        "shape 0",
    ),
    "cvat size": ("cvat", {"annotations.xml": CVAT.replace('width="40"', 'width="1e18"')}, "width"),
    "cvat box": ("cvat", {"annotations.xml": CVAT.replace('"24"', '"1e12"')}, "box"),
    "cvat tags alone": (
        "cvat",
        {"annotations.xml": CVAT.replace("box", "tag")},
        "0 objects; left out: 2 shapes of type tag",
    ),
    "via number": ("via", {"v.json": via_json().replace("20", '"x"')}, "region 0"),
    "via far": ("via", {"v.json": via_json().replace("20", "1e9")}, "region 0"),
    "csv number": ("csv", {"a.csv": "1.png,4,6,24,18,cat\n1.png,4,nan,24,18,cat\n"}, "line 2"),
    "csv cells": ("csv", {"a.csv": "1.png,4,6,24,18,cat\n1.png,4\n"}, "line 2: expected 6 cells"),
    "csv columns": ("csv", {"a.csv": "a,b\n1,2\n"}, "line 1: expected titles"),
    "studio number": ("labelstudio", {"a.json": label_studio().replace("50", "null")}, "task 7"),
    "masks of no layout": ("masks", {}, "no layout"),
    "coco empty": (
        "coco",
        {"a.json": '{"images": [], "annotations": [], "categories": []}'},
        "a.json",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_values_are_refused_by_name(case, tmp_path):
    name, files, what = REFUSED[case]
    picture(tmp_path / "1.png")
    for file, text in files.items():
        (tmp_path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    path = (
        tmp_path / next(iter(files)) if name in ("csv", "via", "labelstudio", "coco") else tmp_path
    )
    with pytest.raises(DatasetError, match=what) as error:
        READERS[name](path, None)
    assert str(tmp_path) in str(error.value)
    assert len(str(error.value)) < 500
