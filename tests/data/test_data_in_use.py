"""Annotations as other programs write them, and what users do to them."""

import base64
import copy
import json
from collections import Counter

import cv2
import numpy as np
import pytest

from d2kit.curate.checking import check_dataset, repair_coco, survey_images
from d2kit.curate.conversion import READERS
from d2kit.data import DatasetError
from d2kit.evaluation.groups import ground_truth_ap

H, W = 48, 64


def draw(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((H, W, 3), 90, np.uint8))
    return path


def read(name, path, images=None):
    lost = Counter()
    return READERS[name](path, images, lost), lost


def objects(coco):
    names = {c["id"]: c["name"] for c in coco["categories"]}
    return [(names[a["category_id"]], a["bbox"]) for a in coco["annotations"]]


def roboflow():
    """Return an export of Roboflow: a class 0 that is none, years and licences as text."""
    images = [
        {"id": i, "license": "1", "file_name": f"{i}_jpg.rf.ab.jpg", "height": H, "width": W}
        for i in range(3)
    ]
    annotation = {"area": 210, "segmentation": [], "iscrowd": 0, "category_id": 1}
    return {
        "info": {"year": "2024", "version": 1.0},
        "licenses": [{"id": "1", "url": None}],
        "categories": [
            {"id": 0, "name": "parts", "supercategory": "none"},
            {"id": 1, "name": "nut", "supercategory": "parts"},
        ],
        "images": images,
        "annotations": [
            {**annotation, "id": 0, "image_id": 0, "bbox": [3, 4, 20, 10.5]},
            {**annotation, "id": 1, "image_id": 1, "bbox": [30, 4, 20, 10.5]},
        ],
    }


def test_roboflow_coco(tmp_path):
    file = tmp_path / "_annotations.coco.json"
    file.write_text(json.dumps(roboflow()), encoding="utf-8-sig")
    lines = [str(f) for f in check_dataset(file)]
    assert any("category 0: annotations: 'parts' has 0 instances; it is" in line for line in lines)
    assert ground_truth_ap(file) == pytest.approx({"bbox": 100})
    fixed, done = repair_coco(roboflow(), str(file))
    assert [c["name"] for c in fixed["categories"]] == ["nut"]
    assert [d.where for d in done] == ["category 0"]


def test_classes_without_objects_are_kept_where_they_are_no_root():
    data = roboflow()
    data["categories"] = [
        {"id": 0, "name": "person", "supercategory": "person"},
        {"id": 1, "name": "nut"},
    ]
    assert len(repair_coco(data, "d.json")[0]["categories"]) == 2


NAMES = {
    "absolute": lambda name: f"/data/me/train/{name}",
    "Windows": lambda name: f"C:\\train\\{name}",
    "capitals": lambda name: name.replace(".jpg", ".JPG"),
    "a folder too many": lambda name: f"images/{name}",
}


@pytest.mark.parametrize("case", NAMES)
def test_names_of_another_machine_are_found(case, tmp_path):
    data = roboflow()
    for image in data["images"]:
        draw(tmp_path / "sub" / image["file_name"])
        image["file_name"] = NAMES[case](image["file_name"])
    data["images"][2]["width"] = 5  # sizes of files found are compared too
    survey = survey_images(data["images"], tmp_path)
    fixed, _ = repair_coco(copy.deepcopy(data), "d.json", survey, tmp_path)
    assert [im["file_name"] for im in fixed["images"]] == [
        f"sub/{i}_jpg.rf.ab.jpg" for i in range(3)
    ]
    assert [im["width"] for im in fixed["images"]] == [W] * 3
    assert len(fixed["annotations"]) == 2
    draw(tmp_path / "other" / "0_jpg.rf.ab.jpg")  # now image 0 could be either
    fixed, _ = repair_coco(data, "d.json", survey, tmp_path)
    assert [im["id"] for im in fixed["images"]] == [1, 2]


def test_empty_polygons_of_a_dataset_of_boxes_and_true_as_crowd():
    data = roboflow()
    for a in data["annotations"]:
        a["segmentation"] = [[]]
    fixed, _ = repair_coco(data, "d.json")
    assert [a["segmentation"] for a in fixed["annotations"]] == [[], []]
    data["annotations"][0]["iscrowd"] = True
    assert repair_coco(data, "d.json")[0]["annotations"][0]["iscrowd"] == 1


def test_a_folder_is_no_json(tmp_path):
    with pytest.raises(DatasetError, match="is a folder"):
        check_dataset(tmp_path)


TRIANGLE = {"label": "cat", "points": [[1.5, 2], [20, 2], [20, 30]], "shape_type": "polygon"}


def test_labelme_with_points_lines_and_the_picture_inside(tmp_path):
    raw = base64.b64encode(draw(tmp_path / "sub/A.JPG").read_bytes()).decode()
    shapes = [
        TRIANGLE,
        {"label": "eye", "points": [[4, 4]], "shape_type": "point"},
        {"label": "edge", "points": [[4, 4], [9, 9]], "shape_type": "line"},
        {"label": "tail", "points": [[4, 4], [9, 9], [12, 3]], "shape_type": "linestrip"},
        {"label": "box", "points": [[50, 40], [40, 30]], "shape_type": "rectangle"},
        {"label": "box", "points": [[9, 9], [20, 9], [20, 20], [9, 20]], "shape_type": "rectangle"},
    ]
    data = {"version": "3.16.7", "shapes": shapes, "imagePath": "..\\sub\\A.JPG", "imageData": raw}
    (tmp_path / "sub/A.JSON").write_text(json.dumps(data), encoding="utf-8-sig")
    coco, lost = read("labelme", tmp_path)
    assert coco["images"] == [{"id": 1, "file_name": "sub/A.JPG", "width": W, "height": H}]
    expected = [("cat", [1.5, 2, 18.5, 28]), ("box", [40, 30, 10, 10]), ("box", [9, 9, 11, 11])]
    assert objects(coco) == expected
    assert lost == {f"shapes of type {kind}": 1 for kind in ("point", "line", "linestrip")}


CVAT = """<annotations><meta><job><labels><label><name>car</name></label><label><name>man
</name></label></labels></job></meta>
<image id="0" name="cam 1/ä.JPG" width="64" height="48" subset="train">
<box label="car" source="manual" occluded="1" xtl="3.10" ytl="4.00" xbr="20.50" ybr="10.00"
 z_order="2"><attribute name="parked">true</attribute></box>
<box label="car" xtl="20" ytl="20" xbr="40" ybr="30" rotation="90.0"/>
<polygon label="man" points="1.00,2.00;10.00,2.00;10.00,20.00" group_id="0"/>
<polygon label="man" points="31.00,2.00;40.00,2.00;40.00,20.00" group_id="0"/>
<ellipse label="man" cx="30" cy="20" rx="8" ry="4" rotation="90"/><tag label="night"/>
<polyline label="man" points="1,2;3,4"/></image></annotations>"""


def test_cvat_with_what_it_can_hold(tmp_path):
    (tmp_path / "a.xml").write_text(CVAT)
    coco, lost = read("cvat", tmp_path / "a.xml")
    found = objects(coco)
    assert [name for name, _ in found] == ["car", "car", "man", "man", "man"]
    boxes = [[3.1, 4, 17.4, 6], [25, 15, 10, 20], [1, 2, 9, 18], [31, 2, 9, 18], [26, 12, 8, 16]]
    np.testing.assert_allclose([box for _, box in found], boxes, atol=1e-9)
    assert coco["annotations"][0]["attributes"] == {"parked": "true", "occluded": "1"}
    assert lost == {"shapes of type tag": 1, "shapes of type polyline": 1}


@pytest.fixture
def yolo(tmp_path):
    """Draw the folders of Roboflow: train and valid, with images and labels in each."""
    for part in ("train", "valid"):
        draw(tmp_path / part / "images/a.jpg")
        draw(tmp_path / part / "images/b.PNG")
        (tmp_path / part / "labels").mkdir()
        text = "10 0.5 0.5 0.25 0.5\r\n0 0.25 0.25 0.5 0.25 0.5 0.5\r\n"
        (tmp_path / part / "labels/a.txt").write_text(text, encoding="utf-8-sig")
    names = "".join(f"  {i}: c{i}\n" for i in range(11))
    (tmp_path / "data.yaml").write_text(
        f"train: ../train/images\nval: ../valid/images\nnc: 11\nnames:\n{names}"
    )
    (tmp_path / "README.roboflow.txt").write_text("hello")
    return tmp_path


@pytest.mark.parametrize(
    ("path", "images", "files"),
    [
        (
            ".",
            None,
            [
                "train/images/a.jpg",
                "train/images/b.PNG",
                "valid/images/a.jpg",
                "valid/images/b.PNG",
            ],
        ),
        ("train", None, ["a.jpg", "b.PNG"]),
        ("data.yaml", "valid/images", ["a.jpg", "b.PNG"]),
    ],
)
def test_yolo_folders(path, images, files, yolo):
    coco, _ = read("yolo", yolo / path, images and yolo / images)
    assert [im["file_name"] for im in coco["images"]] == files
    expected = [("c10", [24, 12, 16, 24]), ("c0", [16, 12, 16, 12])]
    assert objects(coco) == expected * (len(files) // 2)
    assert coco["annotations"][1]["segmentation"] == [[16, 12, 32, 12, 32, 24]]


def test_yolo_labels_that_fit_no_image_and_images_without_any(yolo):
    (yolo / "train/labels/zz.txt").write_text("0 .5 .5 .1 .1")
    (yolo / "train/labels/classes.txt").write_text("a")
    with pytest.raises(DatasetError, match=r"zz\.txt: image: no image") as error:
        read("yolo", yolo)
    assert "classes.txt" not in str(error.value)
    draw(yolo / "else/1.jpg")
    with pytest.raises(FileNotFoundError, match="no text files for its 1 images"):
        read("yolo", yolo / "data.yaml", yolo / "else")
    draw(yolo / "train/images/a.png")
    with pytest.raises(ValueError, match=r"'a\.jpg' and 'a\.png' differ in the ending only"):
        read("yolo", yolo / "train")


VOC = """<annotation><folder>f</folder><filename>1.png</filename><path>C:\\1.png</path>
<size><width>64</width><height>48</height><depth>3</depth></size><object><name>dog</name>
<truncated>1</truncated><difficult>0</difficult><bndbox><xmin>0</xmin><ymin>3.5</ymin><xmax>20.25
</xmax><ymax>48.0</ymax></bndbox></object><object><name>cat</name><difficult>1</difficult><bndbox>
<xmin>11</xmin><ymin>4</ymin><xmax>20</xmax><ymax>9</ymax></bndbox></object></annotation>"""


def test_voc_with_fractions_difficult_objects_and_a_renamed_image(tmp_path):
    draw(tmp_path / "JPEGImages/x 1.JPG")
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations/x 1.XML").write_text(VOC)
    coco, _ = read("voc", tmp_path)
    assert coco["images"][0]["file_name"] == "x 1.JPG"
    assert objects(coco) == [("dog", [0, 2.5, 20.25, 45.5]), ("cat", [10, 3, 10, 6])]
    assert [a.get("difficult", 0) for a in coco["annotations"]] == [0, 1]
