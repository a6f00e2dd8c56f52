"""MMDetection does not install beside today's torch: stand-ins follow its documented interface."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from d2kit.layers import ShapeSpec
from d2kit.modeling import FPN, MMDetBackbone, MMDetDetector
from d2kit.structures import Boxes
from tests.support.tiny_model import tiny_input

SHAPES = [ShapeSpec(channels=4, stride=4), ShapeSpec(channels=6, stride=8)]


class Maps(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(3, 4, 4, stride=4)
        self.two = nn.Conv2d(4, 6, 2, stride=2)
        self.initialised = 0

    def init_weights(self):
        self.initialised += 1

    def forward(self, x):
        one = self.one(x)
        return one, self.two(one)


class Neck(nn.Module):
    def forward(self, maps):
        return [2 * m for m in maps]


@pytest.mark.parametrize("neck", [None, Neck()])
@pytest.mark.parametrize("names", [None, ["res2", "res3"]])
def test_backbone(neck, names):
    network = Maps()
    backbone = MMDetBackbone(network, neck, output_shapes=SHAPES, output_names=names)
    assert network.initialised == 1
    x = torch.randn(1, 3, 32, 48)
    out = backbone(x)
    expected = dict(zip(names or ["out0", "out1"], network(x), strict=True))
    assert backbone.output_shape() == dict(zip(expected, SHAPES, strict=True))
    for name, value in expected.items():
        torch.testing.assert_close(out[name], value * (1 if neck is None else 2))


def test_a_pyramid_on_top():
    backbone = MMDetBackbone(Maps(), output_shapes=SHAPES)
    out = FPN(backbone, ["out0", "out1"], 8)(torch.randn(1, 3, 32, 32))
    assert {k: v.shape[2] for k, v in out.items()} == {"p2": 8, "p3": 4}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"output_shapes": SHAPES, "output_names": ["a"]}, "output_names"),
        ({"output_shapes": SHAPES[:1]}, "out0"),
    ],
)
def test_other_numbers_of_maps_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MMDetBackbone(Maps(), **kwargs)(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    "make",
    [
        lambda: MMDetBackbone({"type": "ResNet"}, output_shapes=SHAPES),
        lambda: MMDetDetector({"type": "MaskRCNN"}, pixel_mean=[0] * 3, pixel_std=[1] * 3),
        lambda: detector().eval()([tiny_input(0)]),
    ],
)
def test_without_mmdetection_the_message_says_so(make, monkeypatch):
    for name in ("mmdet", "mmdet.registry", "mmdet.structures"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="install mmdet"):
        make()


class Detector(nn.Module):
    """Finds one box, the image; its loss is the sum of the true boxes' areas."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def loss(self, images, samples):
        assert images.shape[2] % 32 == images.shape[3] % 32 == 0
        areas = [Boxes(s.gt_instances.bboxes).area().sum() * self.weight for s in samples]
        masks = [float(s.gt_instances.masks.masks.sum()) * self.weight for s in samples]
        return {"loss_box": areas, "loss_mask": sum(masks), "acc": torch.tensor([50.0])}

    def predict(self, images, samples, rescale):
        assert rescale
        for s in samples:
            (h, w), (fx, fy) = s.img_shape, s.scale_factor
            box = torch.tensor([[0.0, 0.0, w / fx, h / fy]])
            s.pred_instances = SimpleNamespace(
                bboxes=box,
                scores=torch.tensor([0.5]),
                labels=torch.tensor([1]),
                masks=torch.ones(1, *s.ori_shape, dtype=torch.uint8),
            )
        return samples


class Sample(SimpleNamespace):
    def __init__(self, metainfo):
        super().__init__(**metainfo)


class Bitmaps:
    def __init__(self, masks, height, width):
        assert masks.shape[1:] == (height, width)
        self.masks = masks


def detector():
    return MMDetDetector(Detector(), pixel_mean=[100.0] * 3, pixel_std=[50.0] * 3)


@pytest.fixture
def stand_in(monkeypatch):
    modules = {
        "mmdet": {},
        "mmdet.structures": {"DetDataSample": Sample},
        "mmdet.structures.mask": {"BitmapMasks": Bitmaps},
        "mmengine": {},
        "mmengine.structures": {"InstanceData": SimpleNamespace},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("stand_in")
def test_detector():
    model = detector()
    items = [tiny_input(0), tiny_input(1, objects=1, size=(48, 64))]
    losses = model.train()(items)
    assert set(losses) == {"loss_box", "loss_mask"}
    areas = sum(float(item["instances"].gt_boxes.area().sum()) for item in items)
    # each part is a mean over its own elements, parts are summed
    assert float(losses["loss_box"].detach()) == pytest.approx(areas, rel=1e-5)
    assert float(losses["loss_mask"].detach()) == pytest.approx(areas, rel=0.2)
    sum(losses.values()).backward()
    assert model.detector.weight.grad is not None
    found = model.eval()([{**items[0], "height": 128, "width": 160}])[0]["instances"]
    assert found.image_size == (128, 160)
    assert found.pred_boxes.tensor.tolist() == [[0, 0, 160, 128]]
    assert found.pred_classes.tolist() == [1]
    assert found.pred_masks.shape == (1, 128, 160)
    assert found.pred_masks.dtype == torch.bool
    assert model.device == torch.device("cpu")
