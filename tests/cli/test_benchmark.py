"""The tables of `d2kit benchmark`, at sizes that say nothing about speed."""

import json
from pathlib import Path

import pytest
import torch

from d2kit.cli import benchmark
from d2kit.cli.benchmark import benchmark_main, coco_truth, pycocotools_way, rectangles
from d2kit.data import DatasetCatalog, MetadataCatalog
from d2kit.evaluation import COCOEvaluator

pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="Linux only")
TASKS = {
    "data": ["Pillow, pycocotools", "torchvision", "d2kit"],
    "evaluate": 3 * ["pycocotools", "d2kit"],
    "train": ["torchvision", "d2kit"],
    "inference": ["torchvision", "d2kit plain", "d2kit"],
    "inference, bfloat16": ["torchvision", "d2kit plain", "d2kit", "d2kit, bfloat16"],
    "import": ["nothing", "d2kit"],
}


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_every_row_is_measured(task, tmp_path, capsys, monkeypatch):
    rows_expected, native = TASKS[task], "bfloat16" in task
    monkeypatch.setattr(benchmark, "computes_bfloat16", lambda _: native)
    task = task.partition(",")[0]
    monkeypatch.delitem(benchmark.MODELS, "Mask R-CNN" if task == "inference" else "Faster R-CNN")
    for heavy in ("torch, torchvision", "and d2kit.engine"):
        monkeypatch.delitem(benchmark.IMPORTS, heavy)
    before = torch.get_num_threads()
    tiny = ["--size", "64", "96", "--images", "2", "--repeats", "1", "--threads", "1"]
    file = tmp_path / "figures.json"
    try:
        benchmark_main(["--task", task, *tiny, "--json", str(file)])
    finally:
        torch.set_num_threads(before)
    rows = json.loads(file.read_text())
    assert [row["library"] for row in rows] == rows_expected
    assert all(float(row["times as fast"]) > 0 for row in rows)
    out = capsys.readouterr().out
    assert "G multiply-adds / s" in out
    if task == "inference":
        assert all(row["found"] == 100 for row in rows)


@pytest.mark.parametrize("masks", ["bool", "28 x 28"])
def test_both_ways_score_alike(masks, tmp_path, capsys):
    """What `--task evaluate` times gives the same AP on both sides."""
    random = torch.Generator().manual_seed(0)
    truth = rectangles(20, (60, 80), random)
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(coco_truth([truth])))
    found = benchmark.detections(truth, masks, random)
    outputs = [({"image_id": 0}, {"instances": found})]
    pycocotools_way(path, outputs, ("bbox", "segm"))
    theirs = [line for line in capsys.readouterr().out.splitlines() if "area=   all" in line]
    DatasetCatalog.register("benchmark_test", list)
    try:
        MetadataCatalog.get("benchmark_test").set(
            json_file=str(path),
            thing_classes=[str(i) for i in range(80)],
            thing_dataset_id_to_contiguous_id={i: i for i in range(80)},
        )
        evaluator = COCOEvaluator("benchmark_test", distributed=False)
        evaluator.reset()
        evaluator.process(*([part] for part in outputs[0]))
        results = evaluator.evaluate()
    finally:
        DatasetCatalog.remove("benchmark_test")
        MetadataCatalog.remove("benchmark_test")
    for task, line in (("bbox", theirs[0]), ("segm", theirs[6])):
        assert results[task]["AP"] / 100 == pytest.approx(float(line.split("=")[-1]), abs=6e-4)
