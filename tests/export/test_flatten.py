"""Nested objects as tuples of tensors, and traced detectors."""

import warnings

import pytest
import torch
from torch import nn

from d2kit.config import get_cfg
from d2kit.export import TracingAdapter, add_export_config, dump_torchscript_IR, flatten_to_tuple
from d2kit.modeling import build_model
from d2kit.structures import BitMasks, Boxes, ImageList, Instances, RotatedBoxes
from tests.support.tiny_model import tiny_config


def instances():
    return Instances(
        (30, 40),
        pred_boxes=Boxes(torch.rand(3, 4)),
        pred_masks=BitMasks(torch.rand(3, 30, 40) > 0.5),
        scores=torch.rand(3),
    )


def alike(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            alike(x, y)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        alike(list(a.values()), list(b.values()))
    elif isinstance(a, Instances):
        assert a.image_size == b.image_size
        alike(a.get_fields(), b.get_fields())
    elif isinstance(a, ImageList):
        assert a.image_sizes == b.image_sizes
        alike(a.tensor, b.tensor)
    elif hasattr(a, "tensor"):
        alike(a.tensor, b.tensor)
    else:
        assert a == b


@pytest.mark.parametrize(
    ("make", "leaves"),
    [
        (lambda: torch.rand(2), 1),
        (lambda: [], 0),
        (lambda: (torch.rand(1), [torch.rand(2), {"a": torch.rand(3), "b": ()}]), 3),
        (lambda: {"name": "x", "n": 3, "none": None, "t": torch.rand(1)}, 1),
        (instances, 4),
        (lambda: [{"instances": instances()}, {"instances": instances()[:0]}], 8),
        (lambda: RotatedBoxes(torch.rand(2, 5)), 1),
        (lambda: ImageList(torch.rand(2, 3, 8, 8), [(8, 8), (6, 7)]), 2),
    ],
)
def test_round_trip(make, leaves):
    obj = make()
    flat, schema = flatten_to_tuple(obj)
    assert len(flat) == leaves
    assert all(isinstance(leaf, torch.Tensor) for leaf in flat)
    alike(schema(flat), obj)
    with pytest.raises(ValueError, match="fewer"):
        schema((*flat, torch.rand(1)))
    if flat:
        with pytest.raises(ValueError, match="more than"):
            schema(flat[:-1])


def test_foreign_types_are_refused():
    with pytest.raises(ValueError, match="type set"):
        flatten_to_tuple([{1, 2}])


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return build_model(tiny_config()).eval()


def test_traced_detector_gives_what_the_model_gives(detector, tmp_path):
    first, second = (torch.randint(0, 255, (3, 64, 96)).float() for _ in range(2))
    adapter = TracingAdapter(detector, [{"image": first}])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
    [found] = adapter.outputs_schema(traced(second))
    with torch.no_grad():
        [expected] = detector.inference([{"image": second}], do_postprocess=False)
    alike(found, expected)
    dump_torchscript_IR(traced, str(tmp_path / "ir"))
    assert "conv" in (tmp_path / "ir/model_ts_IR_inlined.txt").read_text()
    assert {p.name for p in (tmp_path / "ir").iterdir()} == {
        "model.txt",
        "model_ts_IR.txt",
        "model_ts_IR_inlined.txt",
        "model_ts_code.txt",
    }


def test_own_inference_function_and_constants():
    class Scale(nn.Module):
        def forward(self, x, by):
            return {"y": x * by, "note": "done"}

    with pytest.raises(ValueError, match="inputs hold 2"):
        TracingAdapter(Scale(), (torch.ones(2), 2))
    adapter = TracingAdapter(Scale(), (torch.ones(2), 2), allow_non_tensor=True)
    flat = adapter(*adapter.flattened_inputs)
    alike(adapter.outputs_schema(flat), {"y": torch.full((2,), 2.0), "note": "done"})
    with pytest.raises(ValueError, match="outputs hold 'done'"):
        TracingAdapter(Scale(), (torch.ones(2), torch.ones(2)))(torch.ones(2), torch.ones(2))
    doubled = TracingAdapter(Scale(), torch.ones(2), lambda model, x: model(x, 2)["y"])
    torch.testing.assert_close(doubled(torch.ones(2))[0], torch.full((2,), 2.0))
    with pytest.raises(ValueError, match="hold no tensor"):
        TracingAdapter(Scale(), [])


def test_export_keys_are_added():
    cfg = get_cfg()
    cfg.freeze()
    cfg = add_export_config(cfg)
    assert cfg.EXPORT_CAFFE2.USE_HEATMAP_MAX_KEYPOINT is False
    assert cfg.is_frozen()
