"""The head of DeepLabV3+."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from d2kit.config import get_cfg
from d2kit.contrib.deeplab import (
    DeepLabV3PlusHead,
)
from d2kit.layers import ShapeSpec
from d2kit.modeling import SEM_SEG_HEADS_REGISTRY


def head(strides=(4, 8, 16), **options):
    shapes = {f"p{i}": ShapeSpec(channels=8, stride=s) for i, s in enumerate(strides)}
    finer = len(strides) - 1
    options = {
        "project_channels": [3, 5][:finer],
        "aspp_dilations": [1, 2, 3],
        "aspp_dropout": 0.0,
        "decoder_channels": [6] * finer + [7],
        "common_stride": 4,
        "norm": "",
        "train_size": None,
        "num_classes": 5,
        **options,
    }
    torch.manual_seed(0)
    module = DeepLabV3PlusHead(shapes, **options)
    if options["num_classes"] is not None:
        torch.nn.init.normal_(module.predictor.weight)  # so that losses differ between pixels
    return module


def features(strides=(4, 8, 16), size=(32, 48)):
    rng = torch.Generator().manual_seed(0)
    return {
        f"p{i}": torch.randn(2, 8, -(-size[0] // s), -(-size[1] // s), generator=rng)
        for i, s in enumerate(strides)
    }


def labels(size=(32, 48)):
    return torch.randint(0, 5, (2, *size), generator=torch.Generator().manual_seed(1))


def test_shapes_and_names():
    module = head().eval()
    scores, losses = module(features())
    assert scores.shape == (2, 5, 32, 48)
    assert losses == {}
    assert module.layers(features()).shape == (2, 5, 8, 12)
    names = {k for k in module.state_dict() if k.endswith("weight")}
    assert names == {
        *(f"decoder.p2.project_conv.convs.{i}.weight" for i in range(4)),
        *("decoder.p2.project_conv.convs.4.1.weight", "decoder.p2.project_conv.project.weight"),
        *("decoder.p1.project_conv.weight", "decoder.p0.project_conv.weight"),
        *(f"decoder.p{i}.fuse_conv.{k}.weight" for i in (0, 1) for k in (0, 1)),
        "predictor.weight",
    }
    assert module.decoder["p1"]["fuse_conv"][0].weight.shape == (6, 5 + 7, 3, 3)


def test_depthwise_separable():
    module = head(use_depthwise_separable_conv=True).eval()
    assert module.decoder["p0"]["fuse_conv"].depthwise.weight.shape == (3 + 6, 1, 5, 5)
    assert module(features())[0].shape == (2, 5, 32, 48)


@pytest.mark.parametrize("strides", [(4,), (4, 16)])
def test_number_of_levels(strides):
    assert head(strides).eval()(features(strides))[0].shape == (2, 5, 32, 48)


@torch.no_grad()
def test_every_level_counts():
    module, levels = head().eval(), features()
    whole = module(levels)[0]
    for name in levels:
        assert not torch.allclose(
            module({**levels, name: torch.zeros_like(levels[name])})[0], whole
        )


def test_decoder_without_classifier():
    module = head(num_classes=None)
    assert module(features()).shape == (2, 6, 8, 12)
    assert not hasattr(module, "predictor")


@pytest.mark.parametrize("ignored", [0, 1, 3000])
def test_cross_entropy_is_the_mean_over_labelled_pixels(ignored):
    module, target = head(loss_weight=0.5, ignore_value=255), labels()
    target.view(-1)[:ignored] = 255
    none, losses = module(features(), target)
    assert none is None
    expected = 0.5 * F.cross_entropy(module.eval()(features())[0], target, ignore_index=255)
    torch.testing.assert_close(losses["loss_sem_seg"], expected)


def test_hard_pixels_are_a_fifth():
    module, target = head(loss_type="hard_pixel_mining", ignore_value=255), labels()
    target[:, :9] = 255
    _, losses = module(features(), target)
    scores = module.eval()(features())[0]
    each = F.cross_entropy(scores, target, ignore_index=255, reduction="none")
    expected = sorted(each.flatten().tolist(), reverse=True)[: int(0.2 * each.numel())]
    assert losses["loss_sem_seg"].item() == pytest.approx(np.mean(expected), rel=1e-5)


@pytest.mark.parametrize("loss_type", ["cross_entropy", "hard_pixel_mining"])
def test_everything_ignored_has_no_loss(loss_type):
    module = head(loss_type=loss_type, ignore_value=255)
    _, losses = module(features(), torch.full((2, 32, 48), 255))
    losses["loss_sem_seg"].backward()
    assert losses["loss_sem_seg"] == 0
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())


def test_image_that_is_no_multiple_of_the_stride():
    module = head()
    _, losses = module(features(size=(30, 45)), labels((30, 45)))
    assert torch.isfinite(losses["loss_sem_seg"])


def test_pooling_over_the_crops():
    module = head(train_size=(32, 48))
    assert module.decoder["p2"]["project_conv"].pool_kernel_size == (2, 3)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: head(strides=()), "IN_FEATURES"),
        (lambda: head(strides=(8, 16)), "COMMON_STRIDE"),
        (lambda: head(project_channels=[3]), "PROJECT_CHANNELS"),
        (lambda: head(decoder_channels=[3]), "decoder_channels"),
        (lambda: head(loss_type="focal"), "LOSS_TYPE"),
        (lambda: head(train_size=(32, 50)), r"CROP\.SIZE.*16"),
        (lambda: head()(features()), "targets"),
        (lambda: SEM_SEG_HEADS_REGISTRY.get("DeepLabV3PlusHead")(get_cfg(), {}), "add_deeplab"),
    ],
)
def test_mistakes_are_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()
