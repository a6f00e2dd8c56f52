"""Checkpoints of others as a folder."""

import json

import pytest
import torch

from d2kit.cli.weights import write_folder
from d2kit.config import get_cfg
from d2kit.modeling import build_model
from tests.export.kinds import config_of


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    cfg = config_of("RPN C4")
    (folder / "config.yaml").write_text(cfg.dump(), encoding="utf-8")
    torch.save({"model": build_model(cfg).state_dict()}, folder / "model_final.pth")
    return folder


def test_folder_has_config_weights_and_metadata(trained, tmp_path):
    done = write_folder(trained / "config.yaml", str(trained / "model_final.pth"), tmp_path / "out")
    assert "model_final.pth" in done
    metadata = json.loads((tmp_path / "out/metadata.json").read_text())
    assert metadata["format"] == "d2kit"
    assert metadata["input_format"] == "BGR"
    cfg = get_cfg()
    cfg.merge_from_file(str(tmp_path / "out/config.yaml"))
    written = torch.load(cfg.MODEL.WEIGHTS, weights_only=True)["model"]
    given = torch.load(trained / "model_final.pth", weights_only=True)["model"]
    assert written.keys() == given.keys()
    assert all(torch.equal(written[name], value) for name, value in given.items())


def test_weights_that_lack_something_are_refused(trained, tmp_path):
    state = torch.load(trained / "model_final.pth", weights_only=True)["model"]
    gone = "proposal_generator.rpn_head.conv.weight"
    del state[gone]
    torch.save({"model": state}, tmp_path / "part.pth")
    with pytest.raises(ValueError, match=gone):
        write_folder(trained / "config.yaml", str(tmp_path / "part.pth"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mean_in_the_other_order_is_refused(trained, tmp_path):
    cfg = config_of("RPN C4", "INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", [103.53, 116.28, 123.675])
    (tmp_path / "config.yaml").write_text(cfg.dump())
    with pytest.raises(ValueError, match="other order"):
        write_folder(tmp_path / "config.yaml", str(trained / "model_final.pth"), tmp_path / "out")


def test_a_config_with_pythons_tags_is_read_as_data(trained, tmp_path):
    """Detectron2's dumps hold tuples and arithmetic behind Python's tags; other tags are code."""
    text = (trained / "config.yaml").read_text(encoding="utf-8")
    lines = text.splitlines()
    [steps] = [i for i, line in enumerate(lines) if line == "  STEPS:"]
    tagged = ["  STEPS: !!python/tuple", *lines[steps + 1 :]]
    text = "\n".join([*lines[:steps], *tagged]) + "\n"
    [line] = [line for line in lines if line.startswith("  BASE_LR:")]
    text = text.replace(line, '  BASE_LR: !!python/object/apply:eval ["0.02 / 8"]')
    (tmp_path / "config.yaml").write_text(text)
    write_folder(tmp_path / "config.yaml", str(trained / "model_final.pth"), tmp_path / "out")
    cfg, given = get_cfg(), get_cfg()
    cfg.merge_from_file(str(tmp_path / "out/config.yaml"))
    given.merge_from_file(str(trained / "config.yaml"))
    assert tuple(cfg.SOLVER.STEPS) == tuple(given.SOLVER.STEPS)
    assert pytest.approx(0.0025) == cfg.SOLVER.BASE_LR
    code = text.replace('eval ["0.02 / 8"]', f"os.system ['touch {tmp_path}/mark']")
    (tmp_path / "code.yaml").write_text(code)
    with pytest.raises(ValueError, match="os.system"):
        write_folder(tmp_path / "code.yaml", str(trained / "model_final.pth"), tmp_path / "other")
    assert not (tmp_path / "mark").exists()
    assert not (tmp_path / "other").exists()
