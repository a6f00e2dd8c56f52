"""Names of the zoo: files, configs, URLs, models, and the messages about wrong names."""

import json
import re

import pytest
import torch

from d2kit import model_zoo
from d2kit.model_zoo import model_zoo as implementation
from d2kit.model_zoo.model_zoo import CHECKPOINTS, URL_PREFIX
from tests.support.reference_files import reference_path
from tests.support.tiny_model import tiny_config

MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x"


def zoo() -> dict:
    return json.loads(reference_path("zoo_configs.json").read_text())


def test_every_zoo_name_is_found():
    for name, keys in zoo().items():
        cfg = model_zoo.get_config(name)
        assert keys.get("SOLVER.MAX_ITER", 40000) == cfg.SOLVER.MAX_ITER
        assert model_zoo.get_config_file(name).endswith(name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (f"{MASK_RCNN}x.yaml", ["has no config", f"{MASK_RCNN}.yaml"]),
        ("mask_rcnn_R_50_FPN_3x.yaml", ["has no config", f"{MASK_RCNN}.yaml"]),
        (MASK_RCNN, ["ends in .yaml or .py", f"{MASK_RCNN}.yaml"]),
        (f"configs/{MASK_RCNN}.yaml", ["has no config", f"{MASK_RCNN}.yaml"]),
        (f"../configs/{MASK_RCNN}.yaml", ["is no name of the model zoo"]),
        ("/etc/passwd.yaml", ["is no name of the model zoo"]),
    ],
)
def test_wrong_names_list_the_nearest(name, words):
    with pytest.raises(FileNotFoundError) as caught:
        model_zoo.get_config(name)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_urls_are_those_that_the_reference_names():
    """The configs of the reference name nine of the files, with their ids."""
    text = reference_path("zoo_configs.json").read_text()
    named = set(re.findall(r"detectron2://([\w-]+/\w+/\d+/model_final_\w+\.pkl)", text))
    ours = {url.removeprefix(URL_PREFIX) for url in CHECKPOINTS.values()}
    assert len(named) == 9
    assert named <= ours


def test_every_url_belongs_to_a_config():
    form = re.compile(re.escape(URL_PREFIX) + r"(.+)/\d{8,9}/model_(final|\d{7})_[0-9a-f]{6}\.pkl")
    names = {name.rpartition(".")[0] for name in implementation.zoo_names()}
    for key, url in CHECKPOINTS.items():
        assert form.fullmatch(url)[1] == key
        assert key in names
    assert len(set(CHECKPOINTS.values())) == len(CHECKPOINTS)


def test_trained_config():
    url = f"{URL_PREFIX}{MASK_RCNN}/137849600/model_final_f10217.pkl"
    assert model_zoo.get_checkpoint_url(f"{MASK_RCNN}.yaml") == url
    weights = model_zoo.get_config(f"{MASK_RCNN}.yaml", trained=True).MODEL.WEIGHTS
    assert weights == url
    weights = model_zoo.get_config(f"{MASK_RCNN}.yaml").MODEL.WEIGHTS
    assert weights == "detectron2://ImageNetPretrained/MSRA/R-50.pkl"


def test_trained_lazy_config():
    pytest.importorskip("omegaconf")
    name = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py"
    assert "137260431" in model_zoo.get_config(name, trained=True).train.init_checkpoint
    with pytest.raises(ValueError, match="no section 'train'"):
        _without_train()


def _without_train():
    original = implementation.CHECKPOINTS
    implementation.CHECKPOINTS = {**original, "common/optim": "x"}
    try:
        model_zoo.get_config("common/optim.py", trained=True)
    finally:
        implementation.CHECKPOINTS = original


@pytest.mark.parametrize(
    "name",
    ["Misc/mask_rcnn_R_50_FPN_1x_cls_agnostic.yaml", "Base-RCNN-FPN.yaml", "no/such.yaml"],
)
def test_no_url_is_invented(name):
    with pytest.raises(ValueError, match="no published weights are known"):
        model_zoo.get_checkpoint_url(name)


def test_get_builds_on_a_device_and_loads(tmp_path, monkeypatch):
    """`get` with a tiny config and real weights in a file: what is built has these weights."""
    cfg = tiny_config("MODEL.DEVICE", "cuda")
    source = implementation.build_model(tiny_config())
    torch.save(source.state_dict(), tmp_path / "w.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "w.pth")
    monkeypatch.setattr(implementation, "get_config", lambda name, trained: cfg)
    model = model_zoo.get("x.yaml", device="cpu")
    assert model.training
    assert model.device.type == "cpu"
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_get_of_a_lazy_config(tmp_path, monkeypatch):
    omegaconf = pytest.importorskip("omegaconf")
    weights = {"weight": torch.full((2, 3), 4.0), "bias": torch.ones(2)}
    torch.save(weights, tmp_path / "w.pth")
    cfg = omegaconf.OmegaConf.create(
        {
            "model": {"_target_": "torch.nn.Linear", "in_features": 3, "out_features": 2},
            "train": {"init_checkpoint": str(tmp_path / "w.pth")},
        }
    )
    monkeypatch.setattr(implementation, "get_config", lambda name, trained: cfg)
    model = model_zoo.get("x.py", device="cpu")
    assert torch.equal(model.weight, weights["weight"])
