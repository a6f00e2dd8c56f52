"""The configs in the pages on models build what the pages say."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from d2kit.config import get_cfg
from d2kit.modeling import build_model
from d2kit.modeling.proposal_generator import RRPN

ROOT = Path(__file__).parent.parent.parent
FENCE = re.compile(r"```yaml\n(.*?)```", re.DOTALL)


def configs(page):
    return FENCE.findall((ROOT / f"docs/{page}.md").read_text(encoding="utf-8"))


def built(text, tmp_path, *options):
    (tmp_path / "configs").mkdir()
    for base in (ROOT / "configs").glob("Base-*.yaml"):
        shutil.copy(base, tmp_path / "configs")
    (tmp_path / "configs/mine.yaml").write_text(text)
    cfg = get_cfg()
    cfg.merge_from_file(str(tmp_path / "configs/mine.yaml"))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *options])
    return build_model(cfg)


@pytest.mark.parametrize(
    ("text", "options"),
    zip(
        configs("backbones"),
        [["MODEL.SWIN.EMBED_DIM", 24], ["MODEL.TIMM.PRETRAINED", False]],
        strict=True,
    ),
)
def test_backbones(text, options, tmp_path):
    model = built(text, tmp_path, *options)
    assert list(model.backbone.output_shape()) == ["p2", "p3", "p4", "p5", "p6"]
    with torch.no_grad():
        found = model.eval()([{"image": torch.zeros(3, 64, 64)}])
    assert len(found) == 1


def test_rotated(tmp_path):
    (text,) = configs("rotated")
    assert isinstance(built(text, tmp_path).proposal_generator, RRPN)
