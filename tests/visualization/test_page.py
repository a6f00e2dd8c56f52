"""The page of thumbnails: complete, escaped, bounded."""

import base64
import json
import re
import sys

import cv2
import numpy as np
import pytest

from d2kit.visualization import page
from tests.tools.test_scripts import _script


def images_of(text):
    found = re.findall(r"data:image/jpeg;base64,([^\"]+)", text)
    raw = [np.frombuffer(base64.b64decode(t), np.uint8) for t in found]
    return [cv2.imdecode(r, cv2.IMREAD_COLOR) for r in raw]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_pictures_are_inside(count):
    picture = np.full((400, 720, 3), (200, 30, 10), np.uint8)  # RGB
    text = page.make_page([(f"{i}", picture) for i in range(count)], [("cat", 5, 2)])
    assert [im.shape for im in images_of(text)] == [(200, 360, 3)] * count
    assert all(abs(im[0, 0].astype(int) - [10, 30, 200]).max() < 6 for im in images_of(text))
    assert "<td>cat</td><td>5</td><td>2</td>" in text
    assert "http" not in text.lower().replace("http-equiv", "")


def test_names_are_escaped():
    name = '<script>alert("x")</script>'
    text = page.make_page([(name, np.zeros((8, 8, 3), np.uint8))], [(name, 1, 1)], name)
    assert "<script" not in text
    assert text.count("&lt;script&gt;") == 5  # title, heading, class, alt, caption


def test_size_is_bounded(monkeypatch):
    monkeypatch.setattr(page, "MAX_BYTES", 100)
    text = page.make_page([(f"{i}", np.zeros((8, 8, 3), np.uint8)) for i in range(4)])
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
    assert "<td>cat</td><td>1</td><td>1</td>" in out.read_text()
