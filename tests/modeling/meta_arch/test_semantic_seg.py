import pytest
import torch
import torch.nn.functional as F

from d2kit.layers import ShapeSpec
from d2kit.modeling import SEM_SEG_HEADS_REGISTRY
from d2kit.modeling.meta_arch.panoptic_fpn import SemSegFPNHead
from tests.support.tiny_dense import labelled_input, tiny_dense_model


def head(strides=(4, 8, 16), **options):
    shapes = {f"p{i}": ShapeSpec(channels=8, stride=s) for i, s in enumerate(strides)}
    options = {"num_classes": 5, "conv_dims": 6, "common_stride": 4, **options}
    return SemSegFPNHead(shapes, **options)


def features(strides=(4, 8, 16), size=32):
    torch.manual_seed(0)
    return {f"p{i}": torch.randn(2, 8, size // s, size // s) for i, s in enumerate(strides)}


def test_shapes_and_names():
    module = head().eval()
    scores, losses = module(features())
    assert scores.shape == (2, 5, 32, 32)
    assert losses == {}
    convolutions = {k for k in module.state_dict() if k.endswith("weight")}
    assert convolutions == {
        "p0.0.weight", "p1.0.weight", "p2.0.weight", "p2.2.weight", "predictor.weight",
    }  # fmt: skip


def test_levels_are_added():
    module = head().eval()
    levels = features()
    together = module.layers(levels)
    bias = module.predictor.bias[:, None, None]
    apart = [
        module.layers({k: v if k == name else torch.zeros_like(v) for k, v in levels.items()})
        for name in levels
    ]
    torch.nn.init.zeros_(module.p0[0].bias)  # so they are all: a level of zeros adds nothing
    torch.testing.assert_close(sum(apart) - 2 * bias, together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ignored", [0, 1, 1024])
def test_loss_is_the_mean_over_labelled_pixels(ignored):
    module = head(loss_weight=0.5, ignore_value=255).train()
    labels = torch.randint(0, 5, (2, 32, 32), generator=torch.Generator().manual_seed(0))
    labels.view(-1)[:ignored] = 255
    none, losses = module(features(), labels)
    assert none is None
    scores = module.eval()(features())[0]
    expected = 0.5 * F.cross_entropy(scores, labels, ignore_index=255)
    torch.testing.assert_close(losses["loss_sem_seg"], expected)


def test_loss_without_any_labelled_pixel_is_zero():
    module = head(ignore_value=255).train()
    _, losses = module(features(), torch.full((2, 32, 32), 255))
    losses["loss_sem_seg"].backward()
    assert losses["loss_sem_seg"] == 0
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: head(strides=(2, 4)), "COMMON_STRIDE"),
        (lambda: head(strides=(4, 12)), "power of 2"),
        (lambda: head(strides=()), "IN_FEATURES"),
        (lambda: head().train()(features()), "targets"),
        (lambda: tiny_dense_model("PanopticFPN", "MODEL.SEM_SEG_HEAD.IN_FEATURES", ["p9"]), "p9"),
    ],
)
def test_mistakes_are_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("value", [-1, 3, 254])
def test_label_that_is_no_class_is_named(value):
    item = labelled_input(0)
    item["sem_seg"][5, 6] = value
    item["file_name"] = "street.png"
    with pytest.raises(ValueError, match=rf"street\.png.*{value}.*NUM_CLASSES"):
        tiny_dense_model("SemanticSegmentor")([item])


def test_padding_of_a_batch_has_no_loss():
    model = tiny_dense_model("SemanticSegmentor", "MODEL.SEM_SEG_HEAD.NORM", "")
    seen = {}

    def losses(predictions, targets):
        seen["targets"] = targets
        return {}

    model.sem_seg_head.losses = losses
    model([labelled_input(0, size=(64, 80)), labelled_input(1, size=(50, 62))])
    targets = seen["targets"]
    assert targets.shape == (2, 64, 80)
    assert targets[0].max() == 2
    assert (targets[1, 50:] == 255).all()
    assert (targets[1, :, 62:] == 255).all()
    assert targets[1, :50, :62].max() == 2


@torch.no_grad()
def test_scores_in_the_wanted_size():
    model = tiny_dense_model("SemanticSegmentor").eval()
    small, large = model([labelled_input(0), {**labelled_input(0), "height": 32, "width": 100}])
    assert small["sem_seg"].shape == (3, 64, 80)
    assert large["sem_seg"].shape == (3, 32, 100)


def test_registered():
    assert "SemSegFPNHead" in SEM_SEG_HEADS_REGISTRY
    with pytest.raises(KeyError, match="SemSegFPNHead"):
        tiny_dense_model("SemanticSegmentor", "MODEL.SEM_SEG_HEAD.NAME", "SemSegFPN")
