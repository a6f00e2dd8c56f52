"""The report on somebody's code, and every symbol that public code imports."""

import csv
import subprocess
import sys

import pytest
import torch

from d2kit.as_detectron2.scan import report, resolve, scan
from d2kit.modeling.box_regression import Box2BoxTransform
from d2kit.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from d2kit.modeling.roi_heads.fast_rcnn_outputs import FastRCNNOutputs
from d2kit.structures import Boxes, Instances
from tests.support.reference_files import reference_path
from tests.support.scope import out_of_scope

CODE = """
import detectron2.utils.comm as comm
from detectron2.config import get_cfg
from detectron2.data import transforms as T
from detectron2.layers import ShapeSpecs
from detectron2.modeling import ROI_HEADS_REGISTRY, build_model
from detectron2 import _C

@ROI_HEADS_REGISTRY.register()
class MyHeads:
    pass

def setup():
    cfg = get_cfg()
    cfg.MODEL.MINE = 3
    print(cfg.MODEL.MINE, cfg.MODEL.DEVICE, cfg.SOLVER.BASE_LRR)
    return comm.get_rank(), comm.get_rnk(), T.ResizeShortestEdge, T.ResizeShortEdge
"""
CONFIG = """
_BASE_: base.yaml
MODEL:
  META_ARCHITECTURE: GeneralizedRCNN
  ROI_HEADS: {NAME: MyHeads, NUM_CLASSES: 3}
  BACKBONE: {NAME: build_resnet_fpn_backbon}
  MINE: 4
  OTHERS: 5
"""


@pytest.fixture
def code(tmp_path):
    (tmp_path / "train.py").write_text(CODE)
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "other.yaml").write_text("jobs: {build: {MODEL: 1}}")
    return tmp_path


def test_what_is_missing_is_found_with_its_place_and_fix(code):
    uses = scan([code])
    missing = {use.name: use for use in uses if not use.supported}
    assert set(missing) == {
        "detectron2.layers.ShapeSpecs",
        "detectron2._C",
        "SOLVER.BASE_LRR",
        "detectron2.utils.comm.get_rnk",
        "detectron2.data.transforms.ResizeShortEdge",
        "MODEL.OTHERS",
        "MODEL.BACKBONE.NAME: build_resnet_fpn_backbon",
    }
    assert missing["detectron2.layers.ShapeSpecs"].where.endswith("train.py:5")
    assert "nearest: ShapeSpec" in missing["detectron2.layers.ShapeSpecs"].fix
    assert "compiled" in missing["detectron2._C"].fix
    assert "SOLVER.BASE_LR" in missing["SOLVER.BASE_LRR"].fix
    backbone = missing["MODEL.BACKBONE.NAME: build_resnet_fpn_backbon"]
    assert "build_resnet_fpn_backbone" in backbone.fix
    supported = {use.name for use in uses if use.supported}
    assert {"MODEL.MINE", "MODEL.DEVICE", "detectron2.utils.comm.get_rank"} <= supported
    assert "MODEL.ROI_HEADS.NAME: MyHeads" in supported
    text = report(uses)
    assert "train.py:5" in text
    assert "build_resnet_fpn_backbone" in text


def test_nothing_of_the_code_is_run(tmp_path):
    (tmp_path / "bad.py").write_text("import detectron2\nopen('ran', 'w')\nraise SystemExit(3)")
    (tmp_path / "broken.py").write_text("def f(:")
    (tmp_path / "bad.yaml").write_text("MODEL: !!python/object/apply:os.system ['touch ran']")
    uses = scan([tmp_path])
    assert not (tmp_path / "ran").exists()
    assert [use.kind for use in uses if not use.supported] == ["file", "file"]


@pytest.mark.slow
def test_command_line_exits_with_what_it_found(code, tmp_path):
    command = [sys.executable, "-m", "d2kit.as_detectron2", "--scan"]
    done = subprocess.run([*command, str(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "ShapeSpecs" in done.stdout
    (code / "train.py").write_text("from detectron2.config import get_cfg")
    (code / "config.yaml").unlink()
    done = subprocess.run([*command, str(code)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def symbols():
    """Every path by which public code imports a name (413 symbols), as measured."""
    with open(reference_path("symbols.csv"), encoding="utf-8") as file:
        return [row["path"].replace("d2kit", "detectron2", 1) for row in csv.DictReader(file)]


@pytest.mark.parametrize("name", symbols())
def test_every_imported_symbol_resolves(name):
    if out_of_scope(name):
        with pytest.raises(AttributeError):
            resolve(name)
    else:
        resolve(name)


def test_old_outputs_are_those_of_the_predictor():
    torch.manual_seed(0)
    transform = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))
    logits, deltas = torch.randn(6, 4), torch.randn(6, 12)
    corners = torch.rand(6, 2) * 50
    proposals = Instances(
        (100, 100),
        proposal_boxes=Boxes(torch.cat([corners, corners + 30], 1)),
        gt_boxes=Boxes(torch.cat([corners + 1, corners + 28], 1)),
        gt_classes=torch.tensor([0, 1, 2, 3, 3, 0]),
    )
    old = FastRCNNOutputs(transform, logits, deltas, [proposals])
    new = FastRCNNOutputLayers(
        1, box2box_transform=transform, num_classes=3, test_score_thresh=0.1, test_nms_thresh=0.4
    )
    expected = new.losses((logits, deltas), [proposals])
    assert old.losses() == expected
    assert old.softmax_cross_entropy_loss() == expected["loss_cls"]
    assert old.smooth_l1_loss() == expected["loss_box_reg"]
    [ours], _ = new.inference((logits, deltas), [proposals])
    [theirs], _ = old.inference(0.1, 0.4, 100)
    torch.testing.assert_close(theirs.pred_boxes.tensor, ours.pred_boxes.tensor)
    torch.testing.assert_close(theirs.scores, ours.scores)


CAUGHT = """
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Instances
try:
    {call}
except {kind}:
    pass
"""


@pytest.mark.parametrize(
    ("call", "kind", "told"),
    [
        ("Matcher([0.7, 0.3], [0, 1])", "AssertionError", True),
        ("Matcher([0.7, 0.3], [0, 1])", "(AssertionError, ValueError)", False),
        ("Matcher([0.7, 0.3], [0, 1])", "Exception", False),
        ("DatasetCatalog.register('x', list)", "AssertionError", False),
        ("MetadataCatalog.get('x').set(a=1)", "AssertionError", False),
        ("Instances((1, 2))", "AssertionError", False),
        ("build_model(None)", "RuntimeError", False),
    ],
)
def test_exceptions_that_are_no_longer_caught(tmp_path, call, kind, told):
    (tmp_path / "code.py").write_text(CAUGHT.format(call=call, kind=kind))
    missing = [use for use in scan([tmp_path]) if not use.supported]
    assert [use.kind for use in missing] == ["exception"] * told
    if told:
        assert missing[0].where.endswith("code.py:7")
        assert "ValueError" in missing[0].fix
