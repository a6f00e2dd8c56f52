"""The report on somebody's code, and every symbol that public code imports."""

import csv
import json
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


EACH_KIND = """
import importlib.metadata
import pkg_resources
from detectron2.config import CfgNode, get_cfg
from detectron2.export import Caffe2Tracer
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads import StandardROIHeads
from torch import nn

class Heads(StandardROIHeads):
    def forward(self, *a):
        return self._own(self._sample_proposals(*a), self._not_there(a), super().neither(a))

    def _own(self, *a):
        return a

    def _forward_box(self, *a):
        return super()._forward_box(*a)

    def _nobody_calls_it(self, *a):
        return a

@META_ARCH_REGISTRY.register()
class GeneralizedRCNN(nn.Module):
    pass

META_ARCH_REGISTRY.register(RetinaNet)

@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg, shape):
    return None

cfg = get_cfg()
cfg.MODEL.MINE = CfgNode({"A": 1})
print(cfg.MODEL.MINE.A, cfg["MODEL"]["MINE"]["A"], cfg["MODEL"]["WRONG"])
cfg.merge_from_list(["SOLVER.BASE_LRR", 0.1])
print(importlib.metadata.version("detectron2"), pkg_resources.get_distribution("detectron2"))
try:
    Matcher([0.7, 0.3], [0, 1])
except AssertionError:
    pass
"""
TOLD = {
    "detectron2.export.Caffe2Tracer": 5,
    "StandardROIHeads._not_there": 13,
    "StandardROIHeads.neither": 13,
    "Heads._nobody_calls_it": 21,
    "GeneralizedRCNN": 25,
    "RetinaNet": 28,
    "MODEL.WRONG": 36,
    "SOLVER.BASE_LRR": 37,
    "get_distribution('detectron2')": 38,
    "except around Matcher": 40,
}


def test_each_kind_is_told_with_its_line(tmp_path):
    (tmp_path / "code.py").write_text(EACH_KIND)
    missing = [use for use in scan([tmp_path]) if not use.supported]
    lines = {use.name: int(use.where.rpartition(":")[2]) for use in missing}
    assert lines == TOLD
    assert all(use.fix for use in missing)
    assert "10 of " in report(missing).splitlines()[0]


def test_a_config_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "other.py").write_text("def f(cfg):\n    return cfg.USE_OCR.X, cfg.LINES\n")
    (tmp_path / "part.py").write_text("def f(cfg):\n    return cfg.MODEL.WRONG\n")
    assert [use.name for use in scan([tmp_path])] == ["MODEL.WRONG"]


def test_arithmetic_is_read_and_other_tags_are_told_with_their_line(tmp_path):
    tag = 'SOLVER:\n  STEPS: !!python/object/apply:eval ["{}"]\n'
    (tmp_path / "good.yaml").write_text(tag.format("[i for i in range(3)]"))
    (tmp_path / "bad.yaml").write_text(tag.format("open('x')"))
    missing = [use for use in scan([tmp_path]) if not use.supported]
    assert [use.where for use in missing] == [f"{tmp_path / 'bad.yaml'}:2"]


def test_cells_of_a_notebook(tmp_path):
    cells = [
        "%matplotlib inline\n!pip list\nfrom detectron2.export import Caffe2Tracer",
        "%%time\nfrom detectron2.layers import ShapeSpecs\nif ShapeSpecs:\n    files = !ls",
        "%%bash\nfrom detectron2.nothing import this",
        "print 'old'",
        "%%writefile train.py\nfrom detectron2.data import nothing_here",
        "",
        "from detectron2.config import get_cfg\nget_cfg?\ncfg = get_cfg()\ncfg.SOLVER.BASE_LRR",
    ]
    kinds = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    whole = {"cells": [{**kinds, "source": text} for text in cells], "metadata": {}}
    (tmp_path / "n.ipynb").write_text(json.dumps({**whole, "nbformat": 4, "nbformat_minor": 5}))
    missing = [use for use in scan([tmp_path]) if not use.supported]
    places = {use.where.partition(":")[2]: use.name for use in missing}
    assert places == {
        "cell 1:3": "detectron2.export.Caffe2Tracer",
        "cell 2:2": "detectron2.layers.ShapeSpecs",
        "cell 4:1": "cannot be read",
        "cell 5:2": "detectron2.data.nothing_here",
        "cell 7:4": "SOLVER.BASE_LRR",
    }
