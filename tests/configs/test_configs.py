"""Every config file reads; those named like a zoo config resolve to exactly its keys and values."""

import json
from pathlib import Path

import pytest
import yaml

from d2kit.config import CfgNode, get_cfg
from tests.support.reference_files import reference_path

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.rglob("*.yaml"))


def _flat(node: CfgNode, prefix: str = "") -> dict:
    """Return {dotted key: value}, with tuples as lists."""
    flat = {}
    for key, value in node.items():
        if isinstance(value, CfgNode):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = json.loads(json.dumps(value))
    return flat


@pytest.mark.parametrize("file", FILES)
def test_config(file):
    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIGS / file))
    defaults = _flat(get_cfg())
    ours = {k: v for k, v in _flat(cfg).items() if v != defaults[k]}
    zoo = json.loads(reference_path("zoo_configs.json").read_text())
    if file in zoo:
        assert ours == zoo[file]
    else:
        assert ours, "a config that changes nothing"


def test_every_zoo_config_is_there():
    zoo = json.loads(reference_path("zoo_configs.json").read_text())
    assert len(zoo) == 86
    assert not set(zoo) - set(FILES)


@pytest.mark.parametrize("file", [f for f in FILES if "/" in f])
def test_no_config_repeats_its_base(file):
    """A value that the base already has is noise to the reader."""
    own = yaml.safe_load((CONFIGS / file).read_text())
    base = get_cfg()
    base.merge_from_file(str((CONFIGS / file).parent / own.pop("_BASE_")))
    inherited = _flat(base)
    repeated = {k for k, v in _flat(CfgNode(own)).items() if inherited.get(k) == v}
    assert not repeated
