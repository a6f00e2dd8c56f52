"""The folder trees and files that docs/formats shows are read as the pages say."""

import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from d2kit.curate.conversion import READERS
from d2kit.curate.prepare import detect_format, prepare

PAGES = sorted((Path(__file__).parents[2] / "docs/formats").glob("*.md"))
LAYOUTS = [
    (page.stem, part.partition("\n")[0], part)
    for page in PAGES
    for part in re.split(r"(?m)^## (?=.)", page.read_text())
    if "─ " in part
]


def paths_of(tree):
    """Return the files of a drawn tree, relative to its first line."""
    found, parents = [], []
    for line in tree.strip().splitlines()[1:]:
        mark = line.index("─ ")
        depth, name = (mark - 2) // 4, line[mark + 2 :].strip()
        parents = [*parents[:depth], name.rstrip("/")]
        if not name.endswith("/"):
            found.append("/".join(parents))
    return found


def build(part, folder):
    """Write the files of a page's section; one that is not shown is like file 1 of its kind."""
    (tree,) = re.findall(r"```text\n(\w+/\n.*?)```", part, re.S)
    shown = dict(re.findall(r"`([^`\n]+)`:\n\n```\w+\n(.*?)```", part, re.S))
    paths = paths_of(tree)
    assert shown.keys() <= set(paths)
    for name in paths:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if any("mask" in parent.name.lower() for parent in path.relative_to(folder).parents):
            mask = np.zeros((480, 640), np.uint8)
            mask[80:230, 100:300] = 1
            cv2.imwrite(str(path), mask)
        elif path.suffix in (".jpg", ".png"):
            rng = np.random.default_rng(len(name))
            cv2.imwrite(str(path), rng.integers(0, 255, (480, 640, 3)).astype(np.uint8))
        else:
            like = re.sub(r"\d(?=\.\w+$)", "1", name)
            path.write_text(shown.get(name) or shown[like].replace("1.jpg", f"{path.stem}.jpg"))


def test_every_format_has_a_page():
    assert {page.stem for page in PAGES} == set(READERS)


@pytest.mark.parametrize(("name", "title", "part"), LAYOUTS, ids=lambda text: text[:24])
def test_layout(name, title, part, tmp_path):
    folder = tmp_path / "photos"
    build(part, folder)
    if name == "folders":
        with pytest.raises(ValueError, match="--format folders"):
            detect_format(folder)
    else:
        assert detect_format(folder).name == name
    made = prepare(folder, tmp_path / "out", format="folders" if name == "folders" else "")
    classes = {c["name"] for part in made.data.values() for c in part["categories"]}
    expected = {"folders": {"cat", "dog"}, "A folder per class": {"cat", "dog"}}
    expected |= {"One class": {"object"}, "Penn-Fudan": {"Ped"}}
    assert classes == expected.get(title, expected.get(name, {"cat"}))
    assert set(made.data) >= {"train"}
    counts = [(len(p["images"]), len(p["annotations"])) for p in made.data.values()]
    assert all(images == objects > 0 for images, objects in counts)
    own = "split: the dataset's own" in made.report
    assert own == (title in ("Roboflow's export", "Ultralytics"))
