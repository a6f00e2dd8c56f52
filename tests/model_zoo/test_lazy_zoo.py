"""The lazy configs of the zoo: they load, instantiate, and equal the YAML configs of their name."""

import pytest
import torch
from torch import nn

from d2kit import model_zoo
from d2kit.config import LazyConfig, instantiate
from d2kit.config.yaml import zoo_folder
from d2kit.modeling import build_model
from d2kit.solver import WarmupParamScheduler

pytest.importorskip("omegaconf")

ROOT = zoo_folder()
ALL = sorted(file.relative_to(ROOT).as_posix() for file in ROOT.rglob("*.py"))
ZOO = [name for name in ALL if not name.startswith("common/")]
PAIRS = [name for name in ZOO if (ROOT / name).with_suffix(".yaml").exists()]
PLAIN = (bool, int, float, str, list, tuple, dict, type(None))
NOT_COMPARED = {"input_format"}  # None and the default mean the same


def plain(value):
    """A setting without the difference of lists and tuples, and without weights of 1."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items() if v != 1.0}
    if isinstance(value, (list, tuple)):
        return tuple(plain(v) for v in value)
    return value if isinstance(value, PLAIN) else type(value).__name__


def settings(module: nn.Module) -> dict:
    """The plain attributes of a module and of the helpers that it holds: thresholds, weights."""
    found = {}
    for name, value in vars(module).items():
        if name.startswith("_") or name in NOT_COMPARED:
            continue
        if isinstance(value, PLAIN):
            found[name] = plain(value)
        elif type(value).__module__.startswith("d2kit.") and not isinstance(value, nn.Module):
            found |= {f"{name}.{k}": plain(v) for k, v in vars(value).items()}
    return found


def on_meta(build) -> nn.Module:
    with torch.device("meta"):  # no memory, no initial values
        return build()


@pytest.mark.parametrize("name", ALL)
def test_every_file_loads(name):
    assert len(model_zoo.get_config(name))


@pytest.mark.parametrize("name", ZOO)
def test_every_model_and_schedule_can_be_built(name):
    cfg = model_zoo.get_config(name)
    assert set(cfg) == {"dataloader", "lr_multiplier", "model", "optimizer", "train"}
    model = on_meta(lambda: instantiate(cfg.model))
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == set(map(id, trained))
    schedule = instantiate(cfg.lr_multiplier)
    assert isinstance(schedule, WarmupParamScheduler)
    assert [round(schedule(where), 4) for where in (0.5, 0.99)] == [1.0, 0.01]
    for mapper in (cfg.dataloader.train.mapper, cfg.dataloader.test.mapper):
        assert callable(instantiate(mapper))


@pytest.mark.parametrize("name", [n for n in ALL if n.startswith("common/models/")])
def test_every_common_model_can_be_built_and_written(name, tmp_path):
    found = [v for v in model_zoo.get_config(name).values() if "_target_" in v]
    for model in found:
        assert isinstance(on_meta(lambda described=model: instantiate(described)), nn.Module)
        LazyConfig.save(model, str(tmp_path / "model.yaml"))
    assert found


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in PAIRS if "C4" not in n])
def test_a_model_that_was_written_as_yaml_is_the_same(name, tmp_path):
    cfg = model_zoo.get_config(name).model
    LazyConfig.save(cfg, str(tmp_path / "model.yaml"))
    again = LazyConfig.load(str(tmp_path / "model.yaml"))
    first, second = (on_meta(lambda c=c: instantiate(c)) for c in (cfg, again))
    assert repr(first) == repr(second)


@pytest.mark.parametrize("name", PAIRS)
def test_lazy_model_is_the_yaml_model(name):
    lazy = on_meta(lambda: instantiate(model_zoo.get_config(name).model))
    cfg = model_zoo.get_config(name.replace(".py", ".yaml"))
    cfg.MODEL.DEVICE = "meta"
    other = on_meta(lambda: build_model(cfg))
    assert repr(lazy) == repr(other)
    shapes = [{k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (lazy, other)]
    assert shapes[0] == shapes[1]
    frozen = [[n for n, p in m.named_parameters() if not p.requires_grad] for m in (lazy, other)]
    assert frozen[0] == frozen[1]
    pairs = zip(lazy.named_modules(), other.named_modules(), strict=True)
    different = {
        f"{path}.{key}": (ours.get(key), theirs.get(key))
        for (path, ours_module), (_, theirs_module) in pairs
        for ours, theirs in [(settings(ours_module), settings(theirs_module))]
        for key in ours.keys() | theirs.keys()
        if ours.get(key) != theirs.get(key)
    }
    assert different == {}
