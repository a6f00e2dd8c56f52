"""Every config of the zoo builds its model; names and shapes of the weights are those measured."""

import gzip
import json

import pytest
import torch
from torch import nn

from d2kit import model_zoo
from d2kit.modeling import build_model
from tests.support.reference_files import reference_path

with gzip.open(reference_path("state_dicts.json.gz")) as file:
    STATE_DICTS = json.load(file)
NAMES = list(json.loads(reference_path("zoo_configs.json").read_text()))


def build(name: str) -> nn.Module:
    cfg = model_zoo.get_config(name)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):  # no memory, no initial values
        return build_model(cfg)


@pytest.mark.parametrize("name", sorted(STATE_DICTS))
def test_state_dict_is_that_of_the_zoo(name):
    expected = {key: tuple(shape) for key, shape in STATE_DICTS[name].items()}
    state = build(name if name.endswith(".yaml") else f"{name}.yaml").state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_config_builds(name):
    model = build(name)
    assert type(model).__name__ == model_zoo.get_config(name).MODEL.META_ARCHITECTURE
    frozen = [key for key, p in model.named_parameters() if not p.requires_grad]
    assert bool(frozen) is (model_zoo.get_config(name).MODEL.BACKBONE.FREEZE_AT > 0)
    assert all(key.startswith("backbone.") for key in frozen)
