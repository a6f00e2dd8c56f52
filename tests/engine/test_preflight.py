"""What is said before a training: counts, anchors, parameters, rates, memory; the forecast."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from d2kit.config import get_cfg
from d2kit.data import DatasetCatalog, MetadataCatalog
from d2kit.engine.hooks.checkpoint import WeightAveraging
from d2kit.engine.hooks.progress import TimeForecast
from d2kit.engine.preflight import report as _preflight_report
from d2kit.engine.preflight.data import (
    DatasetCounts,
    check_classes,
    count_records,
    pick_evenly,
    table_of_classes,
    table_of_datasets,
)
from d2kit.engine.preflight.model import (
    ModuleParameters,
    ResizedBoxes,
    best_anchor_iou,
    estimate_memory,
    learning_rates,
    measure_anchor_fit,
    parameters_by_module,
    resized_boxes,
    spark_line,
)
from d2kit.engine.preflight.report import preflight_report
from d2kit.modeling.anchor_generator import DefaultAnchorGenerator
from d2kit.solver import build_lr_scheduler
from d2kit.structures import Boxes, BoxMode, pairwise_iou
from tests.support import tiny_run as tiny


def box(category, xywh=(0, 0, 10, 10), **more):
    return {"bbox": list(xywh), "bbox_mode": BoxMode.XYWH_ABS, "category_id": category, **more}


def record(*annotations, height=100, width=200):
    return {"height": height, "width": width, "annotations": list(annotations)}


# ---- data


@pytest.mark.parametrize(
    ("total", "limit", "chosen"),
    [(0, 5, []), (3, 0, [0, 1, 2]), (3, 3, [0, 1, 2]), (10, 4, [0, 2, 5, 7]), (9, 1, [0])],
)
def test_a_sample_is_evenly_spread(total, limit, chosen):
    assert pick_evenly(total, limit) == chosen


RECORDS = [record(box(0), box(2), box(2, iscrowd=1)), record(), record(box(1, iscrowd=1))]
RECORDS += [record(box(2))]


def test_records_are_counted():
    assert count_records([]) == DatasetCounts(0, 0, 0, 0, 0, {})
    assert count_records(RECORDS) == DatasetCounts(4, 4, 2, 3, 2, {0: 1, 2: 2})
    assert count_records(RECORDS, limit=2) == DatasetCounts(4, 2, 1, 2, 2, {0: 1, 2: 1})


def test_datasets_are_tabled():
    text = table_of_datasets({("train", "a"): count_records(RECORDS, 2), ("test", "b"): None})
    rows = [line.split() for line in text.splitlines()]
    assert rows[2] == ["train", "a", "4", "2", "1", "2", "2"]
    assert rows[3] == ["test", "b", "?", "?", "?", "?", "?"]


def test_classes_are_drawn():
    lines = table_of_classes({0: 1, 2: 3}, ["cat", "dog", "cow", "ape"]).splitlines()
    assert [line.split() for line in lines[:2]] == [
        ["cow", "3", "75.0", "%", "#" * 30],
        ["cat", "1", "25.0", "%", "#" * 10],
    ]
    assert lines[2:] == ["without objects: dog, ape"]
    assert table_of_classes({}, ["cat"]) == "no objects"
    assert table_of_classes({1: 2}, []).splitlines()[-1] == "without objects: class 0"


def test_of_many_classes_the_most_and_the_least_frequent_are_drawn():
    lines = table_of_classes({c: 100 - c for c in range(30)}, []).splitlines()
    assert len(lines) == 21
    assert lines[10] == "... 10 classes between ..."
    assert (lines[9].split()[1], lines[11].split()[1]) == ("9", "20")


# ---- anchors


def test_boxes_are_resized_like_their_images():
    rotated = {"bbox": [5, 5, 4, 4, 30], "bbox_mode": BoxMode.XYWHA_ABS, "category_id": 0}
    records = [record(box(0, (10, 20, 30, 40)), box(0, iscrowd=1), rotated), {"annotations": []}]
    found = resized_boxes(records, lambda h, w: (h * 2, w * 3))
    assert found.boxes.tolist() == [[30.0, 40.0, 120.0, 120.0]]
    assert found.sizes.tolist() == [[600.0, 200.0]]
    assert resized_boxes([], lambda h, w: (h, w)).boxes.shape == (0, 4)


@pytest.mark.parametrize("kind", [np.array, np.float64, np.float32])
def test_boxes_of_numpy_are_compared_like_others(kind):
    """As in datasets whose boxes come from ``np.min`` of a polygon."""
    corners = box(0, (10, 20, 30, 40))
    corners["bbox"] = kind([10, 20, 30, 40]) if kind is np.array else [*map(kind, corners["bbox"])]
    found = resized_boxes([record(corners)] * 3, lambda h, w: (h * 2, w * 3))
    assert found.boxes.tolist() == [[30.0, 40.0, 120.0, 120.0]] * 3
    anchors = generator([[32], [64]], [8, 16])
    measure_anchor_fit(found, list(anchors.cell_anchors), anchors.strides, 0.0)


def generator(sizes, strides, offset=0.0):
    return DefaultAnchorGenerator(
        sizes=sizes, aspect_ratios=[0.5, 1.0, 2.0], strides=strides, offset=offset
    )


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_best_iou_is_that_with_all_anchors(offset):
    torch.manual_seed(0)
    width, height, strides = 100, 72, [4, 16]
    anchors = generator([[12], [40]], strides, offset)
    corner = torch.rand(200, 2) * torch.tensor([width - 8.0, height - 8.0])
    boxes = torch.cat([corner, corner + 1 + torch.rand(200, 2) * 50], dim=1)
    boxes[:, 2].clamp_(max=width)
    boxes[:, 3].clamp_(max=height)
    maps = [torch.zeros(1, 1, -(-height // s), -(-width // s)) for s in strides]
    expected = pairwise_iou(Boxes(boxes), Boxes.cat(anchors(maps))).amax(dim=1)
    found = ResizedBoxes(boxes, torch.tensor([[width, height]]).float().expand(200, 2))
    got = best_anchor_iou(found, list(anchors.cell_anchors), strides, offset)
    assert torch.allclose(got, expected, atol=1e-6)


def fit_of(side, count, anchors):
    """Squares around a cell's centre, so that only their size matters."""
    boxes = torch.tensor([[128.0 - side / 2, 128.0 - side / 2, 128.0 + side / 2, 128.0 + side / 2]])
    found = ResizedBoxes(boxes.expand(count, 4), torch.full((count, 2), 256.0))
    return measure_anchor_fit(found, list(anchors.cell_anchors), anchors.strides, 0.0)


def test_anchors_that_fit_get_no_hint():
    fit = fit_of(32, 4, generator([[32], [64]], [8, 16]))
    assert (fit.boxes, fit.poor, fit.hint) == (4, 0.0, None)
    assert fit.by_size == {"small": (0, 0.0), "medium": (4, 0.0), "large": (0, 0.0)}


def test_anchors_that_are_too_large_get_a_hint():
    fit = fit_of(10, 4, generator([[32], [64]], [8, 16]))  # IoU (10 / 32)^2 < 0.5
    assert (fit.poor, fit.by_size["small"]) == (1.0, (4, 1.0))
    sizes, share = fit.hint
    assert share == 0.0
    again = fit_of(10, 4, generator(sizes, [8, 16]))
    assert (again.poor, again.hint) == (0.0, None)


# ---- model


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(3))
        self.body = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 4), nn.ReLU())
        self.head = nn.Linear(4, 1)
        self.same = self.head
        self.register_buffer("mean", torch.zeros(5))
        for parameter in self.body[0].parameters():
            parameter.requires_grad_(False)


def test_parameters_are_listed_down_to_what_is_frozen():
    rows = [("(own)", 3, 0), ("body.0", 0, 12), ("body.1", 20, 0), ("head", 5, 0)]
    assert parameters_by_module(Parts()) == [ModuleParameters(*row) for row in rows]
    assert parameters_by_module(nn.ReLU()) == []


@pytest.mark.parametrize(
    ("make", "copies"),
    [
        (lambda p: torch.optim.SGD(p, 0.1), 0),
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), 1),
        (lambda p: torch.optim.AdamW(p, 0.1), 2),
        (lambda p: torch.optim.Adam(p, 0.1, amsgrad=True), 3),
    ],
)
def test_memory_is_that_of_a_step(make, copies):
    model = Parts()
    optimizer = make(model.parameters())
    memory = estimate_memory(model, optimizer)
    assert memory == (4 * (3 + 12 + 20 + 5 + 5), 4 * 28, 4 * 28 * copies, 0, 0, 0)
    (model.head(model.body(torch.ones(1, 2))) + model.scale.sum()).sum().backward()
    optimizer.step()
    state = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    assert sum(v.numel() * 4 for v in state if v.dim()) == memory.optimizer


def test_memory_of_average_and_mixed_precision_is_what_they_hold():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
    model[2].bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    memory = estimate_memory(model, optimizer, average=True, autocast=True, processes=2)
    hook = WeightAveraging(model, 0.9)
    hook.before_train()
    assert memory.average == sum(x.numel() * x.element_size() for x in hook._average.values())
    assert memory.buckets == memory.gradients
    halves = {}

    def count(tensor):
        if tensor.dtype == torch.bfloat16 and sorted(tensor.shape) in ([5, 6], [4, 5]):
            halves[tensor.data_ptr()] = tensor.numel() * 2
        return tensor

    images = torch.ones(3, 6, requires_grad=True)
    saving = torch.autograd.graph.saved_tensors_hooks(count, lambda x: x)
    with saving, torch.autocast("cpu", dtype=torch.bfloat16):
        weights = model[0](images) + model[2](torch.ones(3, 5, requires_grad=True))[:, :1]
    weights.sum().backward()
    saved = sum(halves.values())
    assert saved == 2 * (5 * 6 + 4 * 5)  # the two matrices; the rest are vectors
    assert memory.autocast == saved + 2 * (5 + 5 + 5)
    assert memory.total() == sum(memory)


def test_memory_is_told_with_the_switches(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    folder = tmp_path / "images"
    folder.mkdir()
    tiny.register(folder)
    options = ("SOLVER.EMA.ENABLED", True, "SOLVER.ACCUMULATE_STEPS", 2, "SOLVER.AMP.ENABLED", True)
    texts = []
    for more in ((), (*options, "SOLVER.AMP.PRECISION", "bfloat16")):
        trainer = tiny.TinyTrainer(tiny.tiny_cfg(tmp_path / "run", *more))
        texts.append(preflight_report(trainer.cfg, trainer, {}))
    assert "activations of 2 images at a time" in texts[0]
    assert "average" not in texts[0]
    assert "half precision" not in texts[0]
    assert "activations of 1 image at a time" in texts[1]
    assert "average of the weights" in texts[1]
    assert "copies in half precision" in texts[1]


def test_memory_of_an_unknown_optimizer_is_not_guessed():
    model = Parts()
    assert estimate_memory(model, torch.optim.RMSprop(model.parameters())).optimizer is None


def test_rates_are_those_that_the_schedule_gives():
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.MAX_ITER", 10, "SOLVER.STEPS", (6, 8), "SOLVER.WARMUP_ITERS", 3])
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.2)
    scheduler = build_lr_scheduler(cfg, optimizer)
    shown = learning_rates(scheduler, range(10))
    used = []
    for _ in range(10):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert shown == pytest.approx(used, rel=1e-12)
    other = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    assert learning_rates(other, [0]) is None


def test_spark_line():
    assert spark_line([0.0, 1.0, 0.5]) == "▁█▅"
    assert spark_line([0.0, 0.0]) == "▁▁"
    assert spark_line([]) == ""


# ---- forecast


def test_forecast_comes_once_after_twenty_steps(caplog, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    hook = TimeForecast()
    hook.trainer = SimpleNamespace(iter=0, start_iter=100, max_iter=523)
    said = {}
    with caplog.at_level(logging.INFO):
        for iteration in range(100, 200):
            hook.trainer.iter = iteration
            hook.before_step()
            clock[0] += 100.0 if iteration < 103 else 2.0
            hook.after_step()
            clock[0] += 50.0  # an evaluation
            said[iteration] = len(caplog.records)
    assert (said[121], said[122], said[199]) == (0, 1, 1)
    assert "After 20 iterations (median 2.000 s each): 0:13:20 for the other 400" in caplog.text


def test_a_short_training_gets_no_forecast(caplog):
    hook = TimeForecast(steps=2, warmup=0)
    hook.trainer = SimpleNamespace(iter=0, start_iter=0, max_iter=2)
    with caplog.at_level(logging.INFO):
        for hook.trainer.iter in range(2):
            hook.before_step()
            hook.after_step()
    assert not caplog.records


# ---- the whole


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    tiny.register(folder)
    return folder


def test_report_comes_before_the_first_step(tmp_path, images, caplog):
    with caplog.at_level(logging.INFO):  # from the start: a silent logger is set up by the trainer
        tiny.TinyTrainer(tiny.tiny_cfg(tmp_path, "DATASETS.TEST", (tiny.NAME,))).preflight()
    text = caplog.records[-1].getMessage()
    rows = [line.split() for line in text.splitlines()]
    assert ["train", tiny.NAME, "7", "all", "0", "7", "0"] in rows
    assert ["test", tiny.NAME, "7", "all", "0", "7", "0"] in rows
    assert ["thing", "7", "100.0", "%", "#" * 30] in rows
    assert ["all", "130", "0"] in rows
    assert ["4:", "0.1"] in rows  # the end of the warm-up
    assert ["8:", "0.01"] in rows  # the step
    assert "12 iterations = 3.4 epochs over 7 images" in text
    assert "this model has no upright anchors" in text


def test_a_part_that_fails_lets_the_training_begin(tmp_path, images, caplog, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("unheard of")

    monkeypatch.setattr(_preflight_report, "estimate_memory", fail)
    with caplog.at_level(logging.INFO):
        tiny.TinyTrainer(tiny.tiny_cfg(tmp_path)).preflight()
    text = caplog.records[-1].getMessage()
    assert "Memory of each process\n  not known (RuntimeError: unheard of)" in text
    assert ["all", "130", "0"] in [line.split() for line in text.splitlines()]


def test_report_can_be_turned_off(tmp_path, images, caplog):
    with caplog.at_level(logging.INFO):
        tiny.TinyTrainer(tiny.tiny_cfg(tmp_path, "PREFLIGHT.ENABLED", False)).preflight()
    assert caplog.records[-1].getMessage().startswith("12 iterations = 3.4 epochs")


def test_missing_images_and_empty_sets_of_the_test_come_to_light(images):
    name = "engine_tests_preflight"
    try:
        DatasetCatalog.register(name, lambda: [{"file_name": str(images / "gone.png")}])
        with pytest.raises(ValueError, match=r"1 of 1 image files are missing[\s\S]*gone\.png"):
            check_classes(None, (), (name,))
        DatasetCatalog.remove(name)
        DatasetCatalog.register(name, list)
        with pytest.raises(ValueError, match=f"'{name}' .*is empty"):
            check_classes(None, (), (name,))
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)
