"""What is known of a family agrees with the models that are built."""

import pytest

from d2kit.config import get_cfg
from d2kit.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, RetinaNet, build_model
from d2kit.modeling.facts import FAMILIES, build_facts, build_with_thresholds, model_facts
from tests.support.tiny_dense import OPTIONS, SEMANTIC, tiny_dense_config
from tests.support.tiny_model import tiny_config

TINY = [
    *(tiny_dense_config(name) for name in OPTIONS),
    tiny_config(),
    tiny_config("MODEL.META_ARCHITECTURE", "ProposalNetwork"),
    tiny_config(
        *("MODEL.ROI_HEADS.NAME", "CascadeROIHeads"),
        *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
    ),
]


@pytest.mark.parametrize("cfg", TINY, ids=lambda c: c.MODEL.META_ARCHITECTURE)
def test_a_config_and_its_model_tell_the_same(cfg):
    facts = build_facts(cfg)
    assert model_facts(build_model(cfg)) == facts


@pytest.mark.parametrize("name", ["RetinaNet", "FCOS", "GeneralizedRCNN", "PanopticFPN"])
def test_thresholds_reach_the_model(name):
    options = OPTIONS.get(name, [])
    cfg = tiny_config("MODEL.META_ARCHITECTURE", name, *SEMANTIC, *options)
    changed = build_with_thresholds(cfg, score=0.83, nms=0.37)
    found = model_facts(build_model(changed))
    assert (found.score_threshold, found.nms_threshold) == (0.83, 0.37)
    assert build_with_thresholds(cfg) is cfg
    assert build_facts(cfg).score_threshold != 0.83


@pytest.mark.parametrize("value", [float("nan"), -1, 1.5, float("inf")])
def test_thresholds_are_shares(value):
    with pytest.raises(ValueError, match=r"score threshold: expected a number in \[0, 1\]"):
        build_with_thresholds(get_cfg(), score=value)


def test_a_model_without_threshold_says_so():
    cfg = tiny_dense_config("SemanticSegmentor")
    with pytest.raises(ValueError, match=r"SemanticSegmentor has none"):
        build_with_thresholds(cfg, score=0.5)


@pytest.mark.parametrize(
    ("base", "key"),
    [(GeneralizedRCNN, "MODEL.ROI_HEADS.NUM_CLASSES"), (RetinaNet, "MODEL.RETINANET.NUM_CLASSES")],
)
def test_a_model_of_ones_own_counts_as_its_base(base, key):
    name = f"Own{base.__name__}"
    if name not in META_ARCH_REGISTRY:
        META_ARCH_REGISTRY.register(type(name, (base,), {}))
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = name
    assert build_facts(cfg).classes_key == key
    cfg.MODEL.META_ARCHITECTURE = "Unheard"
    assert build_facts(cfg).classes_key is None


@pytest.mark.parametrize(
    ("options", "learns"),
    [
        (["MODEL.MASK_ON", True], ("boxes", "masks")),
        (["MODEL.KEYPOINT_ON", True], ("boxes", "keypoints")),
        (["MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.MASK_ON", True], ("boxes",)),
        (["MODEL.META_ARCHITECTURE", "SemanticSegmentor"], ("segmentation",)),
        (["MODEL.META_ARCHITECTURE", "PanopticDeepLab"], ("panoptic",)),
    ],
)
def test_what_a_model_learns_from(options, learns):
    cfg = get_cfg()
    cfg.merge_from_list(options)
    assert build_facts(cfg).learns_from == learns


def test_every_model_of_the_library_is_known():
    names = {name for name, kind in META_ARCH_REGISTRY if kind.__module__.startswith("d2kit.")}
    assert names <= set(FAMILIES)


@pytest.mark.parametrize(("heads", "rotated"), [("RROIHeads", True), ("StandardROIHeads", False)])
def test_rotated(heads, rotated):
    cfg = get_cfg()
    cfg.MODEL.ROI_HEADS.NAME = heads
    assert build_facts(cfg).rotated is rotated
