"""The page of thumbnails: complete, escaped, bounded."""

import base64
import json
import re
import sys

import cv2
import numpy as np
import pytest

from d2kit.cli.visualize import make_page
from tests.tools.test_scripts import _script


def images_of(text):
    found = re.findall(r"data:image/jpeg;base64,([^\"]+)", text)
    raw = [np.frombuffer(base64.b64decode(t), np.uint8) for t in found]
    return [cv2.imdecode(r, cv2.IMREAD_COLOR) for r in raw]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_pictures_are_inside(count):
    picture = np.full((400, 720, 3), (200, 30, 10), np.uint8)  # RGB
    text = make_page([(f"{i}", picture) for i in range(count)], [("cat", 5, 2)])
    assert [im.shape for im in images_of(text)] == [(200, 360, 3)] * count
    assert all(abs(im[0, 0].astype(int) - [10, 30, 200]).max() < 6 for im in images_of(text))
    assert "<td>cat</td><td>5</td><td>2</td>" in text
    assert "http" not in text.lower().replace("http-equiv", "")


def test_names_are_escaped():
    name = '<script>alert("x")</script>'
    text = make_page([(name, np.zeros((8, 8, 3), np.uint8))], [(name, 1, 1)], name)
    assert "<script" not in text
    assert text.count("&lt;script&gt;") == 5  # title, heading, class, alt, caption


def test_size_is_bounded(monkeypatch):
    monkeypatch.setattr("d2kit.cli.visualize.MAX_BYTES", 100)
    text = make_page([(f"{i}", np.zeros((8, 8, 3), np.uint8)) for i in range(4)])
    assert len(images_of(text)) == 1
    assert "3 more pictures left out" in text


def test_tool_from_json(tmp_path, monkeypatch):
    cv2.imwrite(str(tmp_path / "a ü.png"), np.full((40, 60, 3), 120, np.uint8))
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 20], "area": 400}
    coco = {
        "images": [{"id": 1, "file_name": "a ü.png", "width": 60, "height": 40}],
        "annotations": [{**box, "iscrowd": 0}],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (tmp_path / "d.json").write_text(json.dumps(coco))
    out = tmp_path / "look.html"
    args = ["--json", str(tmp_path / "d.json"), "--images", str(tmp_path), "--html", str(out)]
    monkeypatch.setattr(sys, "argv", ["visualize_data.py", *args])
    _script("visualize_data").main()
    (picture,) = images_of(out.read_text())
    assert (np.ptp(picture, axis=2) > 40).any()  # something coloured was drawn on grey
    text = out.read_text()
    assert re.search(
        r'<td><i style="background:#[0-9a-f]{6}"></i>cat</td><td>1</td><td>1</td>', text
    )
    assert (
        "<figcaption>a ü.png</figcaption>" in text
    )  # the name in the JSON, not a path or a number
    assert "1 images, 1 instances" in text


def test_pictures_are_spread_over_the_dataset_in_one_colour_per_class(tmp_path, monkeypatch):
    images, annotations = [], []
    for i in range(9):
        cv2.imwrite(str(tmp_path / f"{i}.png"), np.full((60, 80, 3), 120, np.uint8))
        images.append({"id": i, "file_name": f"{i}.png", "width": 80, "height": 60})
        box = {"bbox": [10, 10, 60, 45], "area": 2700, "iscrowd": 0, "category_id": 1 + (i == 4)}
        corners = [10, 10, 70, 10, 70, 55, 10, 55]
        annotations.append({"id": i, "image_id": i, "segmentation": [corners], **box})
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "d.json").write_text(json.dumps(coco))
    out = tmp_path / "look.html"
    args = ["--json", tmp_path / "d.json", "--images", tmp_path, "--html", out, "--count", 3]
    monkeypatch.setattr(sys, "argv", ["visualize_data.py", *map(str, args)])
    _script("visualize_data").main()
    text = out.read_text()
    assert re.findall(r"<figcaption>(.*?)</figcaption>", text) == ["0.png", "4.png", "8.png"]
    first, other, last = (im[80, 100].astype(int) for im in images_of(text))
    assert abs(first - last).max() < 60 < abs(first - other).max()
