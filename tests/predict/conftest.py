"""One tiny detector for the tests of prediction."""

import pytest
import torch

from d2kit.modeling import build_model
from tests.support.tiny_model import tiny_config


@pytest.fixture(scope="package")
def detector(tmp_path_factory):
    """A config file and weights of a tiny detector that finds something everywhere."""
    folder = tmp_path_factory.mktemp("predict")
    cfg = tiny_config()
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 48, 64
    cfg.TEST.DETECTIONS_PER_IMAGE = 4
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, folder / "model.pth")
    (folder / "config.yaml").write_text(cfg.dump())
    return folder / "config.yaml", folder / "model.pth"
