"""The results page: what it says, that it never harms, and how it looks in a browser."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from d2kit.config import get_cfg
from d2kit.engine.hooks.evaluation import ReportHook
from d2kit.evaluation.report import compare_runs, write_report
from d2kit.evaluation.report.figures import best_threshold, evaluate_results
from tests.support import browser as chromium

EVIL = "<script>throw 1</script>&\"'|`"


def make_run(folder, data, shift=0.0, name="report_test"):
    """Write a run of two videos of four images, two objects each; every fourth is mistaken."""
    images, annotations, results = [], [], []
    (data / "a").mkdir(parents=True, exist_ok=True)
    (data / "b").mkdir(exist_ok=True)
    for i in range(8):
        file = f"{'ab'[i // 4]}/{i}.png"
        Image.fromarray(np.full((90, 120, 3), 20 * i, np.uint8)).save(data / file)
        images.append({"id": i, "file_name": file, "width": 120, "height": 90})
        for k in (1, 2):
            box = [5.0 + 50 * (k - 1), 10.0, 40.0, 30.0]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": k,
                    "bbox": box,
                    "area": 1200.0,
                    "iscrowd": 0,
                }
            )
            found = 3 - k if i % 4 == 3 else k
            moved = [box[0] + shift, *box[1:]]
            results.append(
                {"image_id": i, "category_id": found, "bbox": moved, "score": 0.9 - 0.05 * i}
            )
    coco = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": EVIL}, {"id": 2, "name": "cat"}],
    }
    (data / "test.json").write_text(json.dumps(coco))
    (folder / "inference").mkdir(parents=True)
    (folder / "inference/coco_instances_results.json").write_text(json.dumps(results))
    rows = [{"iteration": i, "total_loss": 3 / (i + 1), "loss_cls": 1.0} for i in range(5)]
    (folder / "metrics.json").write_text("\n".join(map(json.dumps, rows)))
    cfg = get_cfg()
    cfg.DATASETS.REGISTER_COCO = [[name, str(data / "test.json"), str(data)]]
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
    cfg.OUTPUT_DIR = str(folder)
    (folder / "config.yaml").write_text(cfg.dump())
    return results


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    make_run(root / "run", root / "data")
    return root


@pytest.fixture(scope="module")
def page(run):
    return write_report(run / "run")


def test_figures(run):
    results = json.loads((run / "run/inference/coco_instances_results.json").read_text())
    found = evaluate_results(str(run / "data/test.json"), results)
    assert found.confusion.tolist() == [[6, 1, 1], [1, 6, 1], [0, 0, 0]]
    assert found.tide["bbox"]["counts"]["Cls"] == 4
    assert {i for i, (_, wrong, missed) in found.errors.items() if wrong or missed} <= {3, 7}
    assert {e["image_id"] for e in found.label_errors} <= {3, 7}
    assert found.over == "videos"
    low, high = found.intervals["bbox"]
    assert low <= found.ap["bbox"]["AP"] <= high


@pytest.mark.parametrize(
    ("scores", "right", "truths", "expected"),
    [
        ([0.9, 0.8, 0.7], [True, True, False], 2, 0.8),
        ([0.9, 0.5, 0.5], [True, True, False], 2, 0.5),  # a tie is kept as a whole
        ([], [], 2, None),
        ([0.9], [False], 0, None),
    ],
)
def test_best_threshold(scores, right, truths, expected):
    found = best_threshold(np.array(scores), np.array(right, bool), truths)
    assert np.isnan(found.score) if expected is None else found.score == expected


def test_page_needs_nothing_and_escapes(run, page):
    text = page.read_text()
    assert "<script" not in text
    assert "&lt;script&gt;throw 1" in text
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", text)
    assert text.count("data:image/jpeg") >= 8
    card = (run / "run/README.md").read_text()
    assert "<script" not in card
    assert (
        json.loads((run / "run/report.json").read_text())["datasets"]["report_test"]["digest"]
        in card
    )


def test_files_of_others_stay(run, page, tmp_path):
    theirs = tmp_path / "mine.html"
    theirs.write_text("<p>mine")
    with pytest.raises(ValueError, match="not written by"):
        write_report(run / "run", theirs)
    assert theirs.read_text() == "<p>mine"


def test_without_results_says_why(run, tmp_path):
    make_run(tmp_path / "bare", tmp_path / "data", name="report_bare")
    (tmp_path / "bare/inference/coco_instances_results.json").unlink()
    text = write_report(tmp_path / "bare").read_text()
    assert "No COCO results are stored" in text
    assert "Loss" in text


def test_compare(run, tmp_path):
    make_run(tmp_path / "worse", run / "data", shift=12.0)
    found = compare_runs(run / "run", tmp_path / "worse", samples=50)
    ap = found.metrics["bbox"]["AP"]
    assert ap["b"] < ap["a"]
    assert ap["high"] < 0
    assert "run is better" in found.text()
    assert "<script" not in found.page()


def test_a_failure_never_ends_a_training(tmp_path, caplog):
    hook = ReportHook(str(tmp_path / "nowhere"))
    hook.trainer = type("Trainer", (), {"iter": 3, "max_iter": 3})()
    hook.after_train()
    assert "d2kit report" in caplog.text


@pytest.mark.slow
@pytest.mark.skipif(not chromium.is_there(), reason="no chromium with chromedriver")
def test_in_a_browser(page, tmp_path):
    with chromium.browser(tmp_path / "profile") as shown:
        for width in (390, 1400):
            for dark in (False, True):
                shown.open(page.as_uri(), width, dark=dark)
                assert shown.console() == []
                assert shown.run("return document.documentElement.scrollWidth") <= width
                ink = shown.run("return getComputedStyle(document.body).backgroundColor")
                assert (ink == "rgb(18, 22, 28)") == dark
                broken = "return [...document.images].filter(i => !i.naturalWidth).length"
                assert shown.run(broken) == 0
                assert (
                    shown.run(
                        "return Math.min(...[...document.querySelectorAll('svg text')].map("
                        "t => t.getBoundingClientRect().height))"
                    )
                    >= 7
                )
