"""FAULTS 25: what is wrong with the data is said in one message, before the model is built.

Fails without: `check_image_files`, the checks for nothing in `get_detection_dataset_dicts`, or
`check_classes` before `build_model` in `DefaultTrainer`.
"""

import pytest

from d2kit.data import DatasetCatalog
from tests.support import tiny_run as tiny


def gone(records):
    return [{**r, "file_name": r["file_name"].replace("3.png", "gone.png")} for r in records]


def crowds(records):
    return [{**r, "annotations": [{**r["annotations"][0], "iscrowd": 1}]} for r in records]


CASES = {
    "missing images": (gone, (), r"1 of 7 image files are missing.*\n.*gone\.png"),
    "empty": (lambda records: [], (), r"^dataset '.*' is empty: it holds no image$"),
    "only crowds": (crowds, (), r"^no image of .* can be trained on: of 7 images none .*crowd$"),
    "other classes": (list, ("MODEL.ROI_HEADS.NUM_CLASSES", 80), r"^the model.*80 .*has 1 .*$"),
}


@pytest.mark.faults(25, fast=True)
@pytest.mark.parametrize("case", CASES)
def test_one_message_before_the_model(folder, monkeypatch, case):
    change, options, message = CASES[case]
    found = change(tiny.records(folder / "images"))
    DatasetCatalog.remove(tiny.NAME)
    DatasetCatalog.register(tiny.NAME, lambda: found)
    monkeypatch.setattr(tiny.TinyTrainer, "build_model", lambda *_: pytest.fail("model was built"))
    with pytest.raises(ValueError, match=message):
        tiny.TinyTrainer(tiny.tiny_cfg(folder / "run", *options))
