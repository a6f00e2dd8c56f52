"""Names and shapes of the parameters of every ResNet backbone of the zoo."""

import gzip
import json

import pytest
import torch

from d2kit.config import get_cfg
from d2kit.modeling.backbone import build_backbone
from tests.support.reference_files import reference_path

with reference_path("backbone_configs.json").open() as f:
    CONFIGS = json.load(f)
with gzip.open(reference_path("state_dicts.json.gz")) as f:
    STATE_DICTS = json.load(f)


def build(name: str) -> torch.nn.Module:
    cfg = get_cfg()
    cfg.merge_from_list([item for pair in CONFIGS[name].items() for item in pair])
    return build_backbone(cfg)


@pytest.mark.parametrize("name", sorted(STATE_DICTS))
def test_names_shapes_and_order_are_those_of_the_zoo(name):
    expected = {
        key.removeprefix("backbone."): tuple(shape)
        for key, shape in STATE_DICTS[name].items()
        if key.startswith("backbone.")
    }
    with torch.device("meta"):  # no memory, no initialisation: 152 layers in 0.2 s
        state = build(name).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == expected
    assert list(state) == list(expected)
