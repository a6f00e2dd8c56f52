"""memory, colormap, collect_env, serialize, testing, tracing, analysis and the doors."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from d2kit.utils.collect_env import collect_env_info, collect_torch_env, get_env_module
from d2kit.utils.devices import _ignore_torch_cuda_oom, is_fx_tracing, retry_if_cuda_oom
from d2kit.utils.safe_pickle import PicklableWrapper
from d2kit.utils.testing import assert_instances_allclose
from d2kit.visualization.visualizer import colormap, random_color, random_colors


class OnCuda:
    device = torch.device("cuda")

    def to(self, device):
        moved = OnCuda()
        moved.device = torch.device(device)
        return moved


@pytest.mark.parametrize(
    ("failures", "device", "calls"), [(0, "cuda", 1), (1, "cuda", 2), (2, "cpu", 3)]
)
def test_retry_if_cuda_oom(failures, device, calls):
    seen = []

    @retry_if_cuda_oom
    def work(x, scale, *, y=None):
        seen.append((x.device.type, y.device.type, scale))
        if len(seen) <= failures:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return x.device.type

    assert work(OnCuda(), 3, y=OnCuda()) == device
    assert seen[-1] == (device, device, 3)
    assert len(seen) == calls


def test_other_errors_are_passed_on():
    @retry_if_cuda_oom
    def work():
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        work()
    with _ignore_torch_cuda_oom():
        raise RuntimeError("CUDA out of memory. Tried to allocate")


def test_palette():
    colours = colormap(rgb=True, maximum=1)
    assert colours.shape == (80, 3)
    assert colours.dtype == np.float32
    assert colours.min() >= 0
    assert colours.max() <= 1
    assert len(np.unique(colours, axis=0)) == 80
    np.testing.assert_allclose(colormap(), colours[:, ::-1] * 255)
    distances = np.linalg.norm(colours[:10, None] - colours[None, :10], axis=-1)
    assert distances[~np.eye(10, dtype=bool)].min() > 0.3
    with pytest.raises(ValueError, match="maximum"):
        colormap(maximum=2)


def test_palette_cannot_be_spoilt():
    colormap(rgb=True, maximum=1)[:] = 0
    assert colormap(rgb=True, maximum=1).max() == 1


def test_random_colours_leave_the_global_generator_alone():
    state = np.random.get_state()[1].copy()
    colours = random_colors(100, rgb=True, maximum=1)
    assert len(colours) == 100
    assert len({tuple(c) for c in colours}) == 80
    assert tuple(random_color(rgb=True)) in {tuple(c) for c in colormap(rgb=True)}
    assert (np.random.get_state()[1] == state).all()


def test_random_colours_are_the_same_in_every_process():
    code = "from d2kit.visualization.visualizer import random_color; print(random_color().tolist())"
    runs = [subprocess.check_output([sys.executable, "-c", code]) for _ in range(2)]
    assert runs[0] == runs[1]


def test_collect_env(monkeypatch):
    monkeypatch.setenv("D2KIT_ENV_MODULE", "mine")
    assert get_env_module() == ("D2KIT_ENV_MODULE", "mine")
    text = collect_env_info()
    assert torch.__version__ in text
    assert "mine" in text
    assert "hotcoco" in text
    assert collect_torch_env() in text


def test_picklable_wrapper():
    pytest.importorskip("cloudpickle")
    offset = 3
    wrapped = PicklableWrapper(PicklableWrapper(lambda x: x + offset))
    assert wrapped(1) == 4
    received = pickle.loads(pickle.dumps(wrapped))
    assert received(2) == 5
    assert not isinstance(received, PicklableWrapper)
    assert PicklableWrapper([1, 2]).index(2) == 1


def test_picklable_wrapper_without_cloudpickle(monkeypatch):
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    assert pickle.loads(pickle.dumps(PicklableWrapper([1, 2]))) == [1, 2]


class FakeBoxes:
    def __init__(self, tensor):
        self.tensor = tensor


class FakeInstances:
    def __init__(self, image_size=(4, 5), **fields):
        self.image_size = image_size
        self.fields = fields

    def get_fields(self):
        return self.fields


BOXES = torch.tensor([[0.0, 1.0, 2.0, 1000.0]])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (FakeInstances(boxes=FakeBoxes(BOXES + 0.001), names=["a"]), ""),
        (FakeInstances(boxes=FakeBoxes(BOXES + 0.1), names=["a"]), "note field 'boxes' differs by"),
        (FakeInstances(boxes=FakeBoxes(BOXES[:0]), names=["a"]), "shape"),
        (FakeInstances(boxes=FakeBoxes(BOXES * torch.nan), names=["a"]), "differs by nan"),
        (FakeInstances(boxes=FakeBoxes(BOXES), names=["b"]), "'names' differs"),
        (FakeInstances(boxes=FakeBoxes(BOXES)), "fields differ"),
        (FakeInstances((4, 6), boxes=FakeBoxes(BOXES), names=["a"]), "image sizes differ"),
    ],
)
def test_assert_instances_allclose(other, message):
    ours = FakeInstances(boxes=FakeBoxes(BOXES), names=["a"])
    if not message:
        assert_instances_allclose(ours, other, msg="note")
        return
    with pytest.raises(AssertionError, match=message):
        assert_instances_allclose(ours, other, msg="note")


def test_instances_allclose_of_traced_sizes_and_empty_fields():
    ours = FakeInstances(torch.tensor([4, 5]), scores=torch.zeros(0))
    assert_instances_allclose(ours, FakeInstances(scores=torch.zeros(0)), size_as_tensor=True)


def test_is_fx_tracing():
    seen = []

    class Model(nn.Module):
        def forward(self, x):
            seen.append(is_fx_tracing())
            return x

    Model()(1)
    torch.fx.symbolic_trace(Model())
    assert seen == [False, True]


class Detector(nn.Module):
    """Takes list[dict] and returns instances, like the real ones."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)

    def forward(self, batch):
        images = torch.stack([sample["image"].float() for sample in batch])
        scores = self.conv(images)
        return [{"instances": FakeInstances(scores=s, boxes=FakeBoxes(s))} for s in scores]


@pytest.mark.filterwarnings("ignore")
def test_analysis():
    from d2kit.utils import analysis

    batch = [{"image": torch.zeros(3, 8, 10), "height": 8}] * 2
    multiply_adds, activations = 2 * 4 * 80 * 27, 2 * 4 * 80
    assert analysis.FlopCountAnalysis(Detector(), (batch,)).total() == multiply_adds
    assert analysis.flop_count_operators(Detector(), batch) == {"conv": multiply_adds / 1e9}
    counts = analysis.activation_count_operators(Detector(), batch)
    assert counts == {"conv": pytest.approx(activations / 1e6)}
    plain = nn.Linear(5, 7)
    assert analysis.FlopCountAnalysis(plain, torch.zeros(2, 5)).total() == 70
    assert analysis.flop_count_operators(plain, [torch.zeros(2, 5)]) == {"linear": 7e-8}
    assert analysis.parameter_count(plain)[""] == 42
    assert "weight" in analysis.parameter_count_table(plain)


def test_doors_open_to_the_visualizers():
    from d2kit.utils import video_visualizer, visualizer
    from d2kit.visualization.visualizer import VideoVisualizer, Visualizer

    assert visualizer.Visualizer is Visualizer
    assert video_visualizer.VideoVisualizer is VideoVisualizer
    for door in (visualizer, video_visualizer):
        assert all(hasattr(door, name) for name in door.__all__)
