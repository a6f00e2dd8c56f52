import json
import pickle

import numpy as np
import pytest
from fvcore.common.config import CfgNode as FvcoreCfgNode

from d2kit.config import CfgNode, get_cfg, global_cfg, set_global_cfg
from d2kit.config.cfg_node import looks_like_typo
from d2kit.config.config import _C
from d2kit.config.keys import KEYS, OWN_KEYS
from tests.support.reference_files import reference_path


def flat(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_defaults_are_those_of_detectron2():
    expected = json.loads(reference_path("config_defaults.json").read_text())
    ours = {k: v for k, v in flat(get_cfg()) if k not in OWN_KEYS}
    assert json.loads(json.dumps(ours)) == expected
    assert set(KEYS) - set(ours) == OWN_KEYS


def test_every_key_has_a_line_of_meaning():
    for name, key in KEYS.items():
        assert key.meaning.endswith("."), name
        assert "\n" not in key.meaning, name


def test_get_cfg_is_fresh():
    cfg = get_cfg()
    cfg.MODEL.ANCHOR_GENERATOR.SIZES[0].append(1024)
    cfg.SOLVER.BASE_LR = 1.0
    assert get_cfg().MODEL.ANCHOR_GENERATOR.SIZES == [[32, 64, 128, 256, 512]]
    assert get_cfg().SOLVER.BASE_LR == 0.001
    assert isinstance(cfg, FvcoreCfgNode)
    assert type(cfg.MODEL.RPN) is CfgNode


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        ("SOLVER.BASE_LR", "0.02", 0.02),
        ("SOLVER.BASE_LR", "1", 1.0),
        ("SOLVER.BASE_LR", 2, 2.0),
        ("SOLVER.BASE_LR", "1e-3", 0.001),
        ("SOLVER.STEPS", "(1, 2)", (1, 2)),
        ("SOLVER.STEPS", "[1, 2]", (1, 2)),
        ("SOLVER.STEPS", [3], (3,)),
        ("MODEL.RPN.IN_FEATURES", "('p2', 'p3')", ["p2", "p3"]),
        ("SOLVER.WEIGHT_DECAY_BIAS", "0.1", 0.1),
        ("SOLVER.WEIGHT_DECAY_NORM", "None", None),
        ("MODEL.MASK_ON", "True", True),
        ("OUTPUT_DIR", "2024", "2024"),
        ("OUTPUT_DIR", "'quoted'", "quoted"),
        ("MODEL.WEIGHTS", "", ""),
        ("MODEL.FPN.NORM", "GN", "GN"),
        ("MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS", "[[1, 2, 3, 4]]", ((1, 2, 3, 4),)),
        ("DATASETS.TRAIN", "('a', 'b')", ("a", "b")),
    ],
)
def test_merge_from_list(key, given, expected):
    cfg = get_cfg()
    cfg.merge_from_list([key, given])
    value = dict(flat(cfg))[key]
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (["SOLVER.BASE_LRR", 1], KeyError, ["SOLVER.BASE_LRR", "nearest: SOLVER.BASE_LR,"]),
        (["SOLVR.BASE_LR", 1], KeyError, ["SOLVER.BASE_LR"]),
        (["BASE_LR", 1], KeyError, ["SOLVER.BASE_LR"]),
        (["SOLVER.BASE_LR.X", 1], KeyError, ["SOLVER.BASE_LR.X"]),
        (["SOLVER.BASE_LR"], ValueError, ["KEY VALUE", "1 items"]),
        (["SOLVER.BASE_LR=1"], ValueError, ["KEY VALUE"]),
        (["SOLVER.BASE_LR", "fast"], ValueError, ["SOLVER.BASE_LR", "float", "'fast'"]),
        (["SOLVER.MAX_ITER", "1.5"], ValueError, ["int", "1.5"]),
        (["SOLVER.MAX_ITER", "True"], ValueError, ["int", "bool"]),
        (["SOLVER.BASE_LR", "True"], ValueError, ["float", "bool"]),
        (["MODEL.MASK_ON", "1"], ValueError, ["bool", "int"]),
        (["DATASETS.TRAIN", "mine"], ValueError, ["tuple", "('mine',)"]),
        (["SOLVER", "1"], ValueError, ["section"]),
        (["OUTPUT_DIR", 3], ValueError, ["str", "int"]),
    ],
)
def test_bad_overrides(overrides, error, words):
    cfg = get_cfg()
    with pytest.raises(error) as caught:
        cfg.merge_from_list(overrides)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert cfg == get_cfg()


def test_failed_list_changes_nothing():
    cfg = get_cfg()
    with pytest.raises(KeyError):
        cfg.merge_from_list(["SOLVER.BASE_LR", 3.0, "SOLVER.NOPE", 1])
    assert cfg == get_cfg()


def test_values_are_not_executed():
    cfg = get_cfg()
    cfg.merge_from_list(["OUTPUT_DIR", "__import__('os').getcwd()"])
    assert cfg.OUTPUT_DIR == "__import__('os').getcwd()"


def test_user_code_extends_configs_as_ever():
    cfg = get_cfg()
    cfg.MODEL.MYTHING = CfgNode()
    cfg.MODEL.MYTHING.STAGE1 = 1
    cfg.MODEL.MYTHING.STAGE2 = 2
    cfg.MODEL.MYTHING.NESTED = CfgNode({"A": 1.0})
    cfg.MODEL.RESNETS.RES4_DILATION = 1
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1
    cfg.SOLVER.WEIGHT_DECAY_EMBED = 0.0
    cfg.MODEL.RESNET = CfgNode()
    cfg.INPUT.COLOR_AUG_SSD = False
    cfg.merge_from_list(["MODEL.MYTHING.NESTED.A", "2", "INPUT.COLOR_AUG_SSD", "True"])
    assert cfg.MODEL.MYTHING.NESTED.A == 2.0
    assert cfg.INPUT.COLOR_AUG_SSD is True
    assert cfg.clone().MODEL.MYTHING.STAGE2 == 2


@pytest.mark.parametrize(
    ("name", "known", "slip"),
    [
        ("NUM_CLASS", "NUM_CLASSES", True),
        ("NUMCLASSES", "NUM_CLASSES", True),
        ("num_classes", "NUM_CLASSES", True),
        ("NUM_CALSSES", "NUM_CLASSES", True),
        ("BASE_LRR", "BASE_LR", True),
        ("STEP", "STEPS", True),
        ("WEIGHT", "WEIGHTS", True),
        ("MAX_ITERS", "MAX_ITER", True),
        ("IMS_PER_BACH", "IMS_PER_BATCH", True),
        ("RES4_DILATION", "RES5_DILATION", False),
        ("NMS_THRESH_TRAIN", "NMS_THRESH_TEST", False),
        ("WEIGHT_DECAY_EMBED", "WEIGHT_DECAY_BIAS", False),
        ("BASE_LR_MULTIPLIER", "BASE_LR", False),
        ("NORM", "NAME", False),
        ("AMP", "AUG", False),
        ("FC", "FC_DIM", False),
    ],
)
def test_slips(name, known, slip):
    assert looks_like_typo(name, known) is slip


def test_no_default_key_is_a_slip_of_a_sibling():
    """Else a user who deletes and sets a key, or builds a section anew, would be stopped."""
    allowed = {frozenset(("MIN_SIZE_TRAIN", "MAX_SIZE_TRAIN"))}
    for node in [get_cfg(), *sections(get_cfg())]:
        for a in node:
            for b in node:
                if a < b and frozenset((a, b)) not in allowed:
                    assert "SIZE" in a or not looks_like_typo(a, b), (a, b)


def sections(node):
    for value in node.values():
        if isinstance(value, CfgNode):
            yield value
            yield from sections(value)


def test_slip_is_refused_and_can_be_forced():
    cfg = get_cfg()
    with pytest.raises(AttributeError, match=r"MODEL.ROI_HEADS.*NUM_CLASS.*NUM_CLASSES"):
        cfg.MODEL.ROI_HEADS.NUM_CLASS = 3
    assert "NUM_CLASS" not in cfg.MODEL.ROI_HEADS
    cfg.MODEL.ROI_HEADS["NUM_CLASS"] = 3
    assert cfg.MODEL.ROI_HEADS.NUM_CLASS == 3
    other = pickle.loads(pickle.dumps(get_cfg().clone()))
    with pytest.raises(AttributeError):
        other.SOLVER.MAX_ITERS = 3
    other.set_new_allowed(True)
    other.SOLVER.MAX_ITERS = 3
    assert other.SOLVER.MAX_ITERS == 3


def test_reading_an_unknown_attribute_names_the_nearest():
    with pytest.raises(AttributeError, match=r"MODEL.*ROI_HEDS.*ROI_HEADS"):
        get_cfg().MODEL.ROI_HEDS  # noqa: B018
    assert not hasattr(get_cfg(), "NOPE")
    assert getattr(get_cfg().MODEL, "NOPE", 3) == 3


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda c: c.SOLVR, ["'cfg'", "'SOLVR'", "nearest: SOLVER"]),
        (lambda c: c["SOLVR"], ["'cfg'", "'SOLVR'", "nearest: SOLVER"]),
        (lambda c: c["MODEL"]["RPN"]["NMS_TRESH"], ["'MODEL.RPN'", "nearest: NMS_THRESH"]),
        (lambda c: c.BASE_LR, ["'cfg'", "nearest: SOLVER.BASE_LR"]),
        (lambda c: c["MODEL"].NUM_CLASSES, ["'MODEL'", "nearest: MODEL.ROI_HEADS.NUM_CLASSES"]),
        (lambda c: c["XYZZY"], ["'cfg'", "'XYZZY'", "none is similar"]),
        (lambda c: setattr(c.MODEL.ROI_HEADS, "NUM_CLASS", 3), ["'NUM_CLASSES'"]),
        (lambda c: setattr(c.SOLVER.CLIP_GRADIENTS, "CLIP_VALU", 3), ["'CLIP_VALUE'"]),
        (lambda c: setattr(c, "SOLVR", 3), ["'SOLVER'"]),
        (lambda c: c.merge_from_list(["SOLVR.BASE_LR", 3]), ["SOLVER.BASE_LR"]),
        (lambda c: c.merge_from_other_cfg(CfgNode({"SOLVR": {"BASE_LR": 3}})), ["SOLVER"]),
    ],
)
def test_each_way_to_a_key_that_does_not_exist_names_the_nearest(wrong, words, copied):
    """Files: test_files.py::test_bad_files."""
    cfg = pickle.loads(pickle.dumps(get_cfg().clone())) if copied else get_cfg()
    before = cfg.dump()
    with pytest.raises((KeyError, AttributeError)) as caught:
        wrong(cfg)
    assert all(word in str(caught.value.args[0]) for word in words), str(caught.value)
    assert cfg.dump() == before


def test_get_is_that_of_a_dict():
    assert get_cfg().get("SOLVR") is None
    assert get_cfg().DATALOADER.get("RANDOM_SUBSET_RATIO", 1.0) == 1.0


def test_a_new_key_that_stands_in_a_section_below_is_a_warning(caplog):
    cfg = get_cfg()
    cfg.MODEL.NUM_CLASSES = 3
    assert "MODEL.ROI_HEADS.NUM_CLASSES or" in caplog.messages[0]
    cfg.BASE_LR = 0.1
    assert "'BASE_LR' in section 'cfg'" in caplog.messages[1]
    cfg.MODEL.NUM_CLASSES, cfg.INPUT.MINE = 4, 3
    cfg.MODEL["MASK_HEAD_NAME"] = CfgNode({"NAME": 1})
    assert len(caplog.messages) == 2


def test_freeze():
    cfg = get_cfg()
    cfg.freeze()
    assert cfg.is_frozen()
    with pytest.raises(AttributeError):
        cfg.SEED = 1
    with pytest.raises(AttributeError):
        cfg.MODEL.MASK_ON = True
    with pytest.raises(AttributeError, match="defrost"):
        cfg.merge_from_list(["SEED", 1])
    copy = cfg.clone()
    assert copy.is_frozen()
    copy.defrost()
    copy.SEED = 1
    assert (copy.SEED, cfg.SEED) == (1, -1)
    assert not copy.is_frozen()


def test_dump_round_trips(tmp_path):
    cfg = get_cfg()
    cfg.SOLVER.STEPS = (10, 20)
    cfg.MODEL.WEIGHTS = "1e-3"
    cfg.SOLVER.CLIP_GRADIENTS.NORM_TYPE = float("inf")
    cfg.DATASETS.TRAIN = ("käse: [x]",)
    cfg.TEST.EXPECTED_RESULTS = [["bbox", "AP", 38.5, 0.2]]
    file = tmp_path / "config.yaml"
    file.write_text(cfg.dump(), encoding="utf-8")
    other = get_cfg()
    other.merge_from_file(str(file))
    assert other == cfg
    assert other.dump() == cfg.dump()


def test_dump_of_numpy_scalars_and_objects():
    cfg = get_cfg()
    cfg.SOLVER.BASE_LR = np.float64(0.5)
    assert type(cfg.SOLVER.BASE_LR) is float
    assert "BASE_LR: 0.5\n" in cfg.dump()
    with pytest.raises(TypeError, match="BASE_LR"):
        cfg.SOLVER.BASE_LR = object()
    cfg.SOLVER["BASE_LR"] = object()
    with pytest.raises(ValueError, match=r"SOLVER\.BASE_LR"):
        cfg.dump()


def test_merge_from_other_cfg():
    cfg = get_cfg()
    cfg.merge_from_other_cfg(CfgNode({"SOLVER": {"BASE_LR": 1, "STEPS": [5]}}))
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.STEPS) == (1.0, (5,))
    with pytest.raises(KeyError, match=r"SOLVER\.MAX_ITER"):
        cfg.merge_from_other_cfg(CfgNode({"SOLVER": {"MAX_ITRE": 1}}))
    with pytest.raises(KeyError, match="_BASE_"):
        cfg.merge_from_other_cfg(CfgNode({"_BASE_": "x.yaml"}))


def test_new_allowed_takes_sections_and_values():
    cfg = CfgNode({"A": {"B": 1}})
    cfg.set_new_allowed(True)
    cfg.merge_from_other_cfg(CfgNode({"A": {"C": {"D": "(1, 2)"}}, "E": 3}))
    assert cfg.A.C.D == "(1, 2)"
    assert cfg.E == 3
    assert isinstance(cfg.A.C, CfgNode)


def test_deprecated_and_renamed_keys():
    cfg = CfgNode({"A": 1})
    cfg.register_deprecated_key("OLD")
    cfg.register_renamed_key("B", "A")
    cfg.merge_from_list(["OLD", 3])
    cfg.merge_from_other_cfg(CfgNode({"OLD": 3}))
    assert cfg == CfgNode({"A": 1})
    with pytest.raises(KeyError, match="renamed to A"):
        cfg.merge_from_list(["B", 3])


def test_computed_keys():
    cfg = get_cfg()
    cfg.COMPUTED_SIZE = 3
    with pytest.raises(KeyError):
        cfg.COMPUTED_SIZE = 4


def test_global_cfg():
    cfg = get_cfg()
    cfg.GLOBAL.HACK = 2.0
    set_global_cfg(cfg)
    assert global_cfg.GLOBAL.HACK == 2.0
    global_cfg.clear()


def test_defaults_module():
    assert get_cfg() == _C
