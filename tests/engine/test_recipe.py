"""The recipe's choices on five shapes of data."""

import numpy as np
import pytest

from d2kit.config import get_cfg
from d2kit.engine.recipe import Budget, anchor_recall, data_facts, make_recipe


def dataset(images, box, *, classes=("a",), rare=0, size=(640, 480), masks=True):
    """Return `images` images with two boxes each; class 2 is in `rare` of them."""
    rng = np.random.default_rng(0)
    coco = {"images": [], "annotations": [], "categories": []}
    coco["categories"] = [{"id": i, "name": n} for i, n in enumerate(classes, 1)]
    for i in range(images):
        coco["images"].append(
            {"id": i, "file_name": f"{i}.jpg", "width": size[0], "height": size[1]}
        )
        for k in range(2):
            w, h = np.array(box) * rng.uniform(0.8, 1.25, 2)
            category = 2 if i < rare and k else 1
            entry = {"id": 2 * i + k, "image_id": i, "category_id": category, "iscrowd": 0}
            entry["bbox"] = [5.0, 5.0, float(w), float(h)]
            entry["segmentation"] = [[5, 5, 9, 5, 9, 9]] if masks else []
            coco["annotations"].append(entry)
    return coco


def keys(coco, **budget):
    return {c.key: c.value for c in make_recipe(data_facts(coco), Budget(**budget))}


SHAPES = {
    "tiny objects": (
        dataset(200, (14, 14)),
        {
            "INPUT.MIN_SIZE_TEST": 448,
            "TEST.BEST_METRIC": "segm/AP",
            "MODEL.MASK_ON": True,
            "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
        },
    ),
    "long objects": (
        dataset(200, (400, 40), masks=False),
        {"INPUT.MIN_SIZE_TEST": 240, "MODEL.MASK_ON": False, "TEST.BEST_METRIC": "bbox/AP"},
    ),
    "12 images": (
        dataset(12, (200, 150)),
        {
            "SOLVER.MAX_ITER": 600,
            "SOLVER.WARMUP_ITERS": 30,
            "SOLVER.EARLY_STOPPING.PATIENCE": 0,
            "MODEL.RPN.IN_FEATURES": ["p3", "p4", "p5", "p6"],
            "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256]],
        },
    ),
    "5000 images": (
        dataset(5000, (200, 150)),
        {"SOLVER.MAX_ITER": 30_000, "SOLVER.WARMUP_ITERS": 1000, "TEST.EVAL_PERIOD": 7500},
    ),
    "one class in 1 %": (
        dataset(300, (200, 150), classes=("a", "b"), rare=3),
        {
            "DATALOADER.SAMPLER_TRAIN": "RepeatFactorTrainingSampler",
            "DATALOADER.REPEAT_THRESHOLD": 0.1,
            "MODEL.ROI_HEADS.NUM_CLASSES": 2,
        },
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_choices(name):
    coco, expected = SHAPES[name]
    choices = make_recipe(data_facts(coco), Budget())
    found = {c.key: c.value for c in choices}
    assert {k: found[k] for k in expected} == expected
    assert len(found) == len(choices)
    assert all(c.reason for c in choices)
    cfg = get_cfg()  # every choice is a key of the config, of the right type
    cfg.merge_from_list([part for c in choices for part in (c.key, c.value)])


def test_anchors_follow_long_objects():
    coco, _ = SHAPES["long objects"]
    facts = data_facts(coco)
    choices = {c.key: c for c in make_recipe(facts, Budget())}
    sizes = np.array(choices["MODEL.ANCHOR_GENERATOR.SIZES"].value).ravel()
    (ratios,) = choices["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"].value
    boxes = facts.boxes * choices["INPUT.MIN_SIZE_TRAIN"].value[-1]
    before = anchor_recall(boxes, np.array([16, 32, 64, 128, 256]), np.array([0.5, 1, 2]))
    after = anchor_recall(boxes, sizes, np.array(ratios))
    assert before < 0.5
    assert after > 0.95
    reason = choices["MODEL.ANCHOR_GENERATOR.SIZES"].reason
    assert f"{before:.1%}" in reason
    assert f"{after:.1%}" in reason


def test_anchor_recall():
    boxes = np.array([[32.0, 32.0], [320.0, 10.0]])
    assert anchor_recall(boxes, np.array([32.0]), np.array([1.0])) == 0.5
    # 64 x 64 holds a quarter of its area
    assert anchor_recall(boxes[:1], np.array([64.0]), np.array([1.0])) == 0


def test_time_sets_the_length_and_then_the_size():
    coco = dataset(120, (200, 300))
    plenty = keys(coco, minutes=600, seconds=0.5)
    assert plenty["SOLVER.MAX_ITER"] == 1800
    assert plenty["INPUT.MIN_SIZE_TRAIN"][-1] == 256
    short = keys(coco, minutes=10, seconds=1.0)
    assert short["INPUT.MIN_SIZE_TRAIN"][-1] == 192
    spent = short["SOLVER.MAX_ITER"] * (0.4 + 0.6 * 192 * 256 / (240 * 320))
    assert 0.8 * 600 < spent <= 0.85 * 600
    assert keys(coco, epochs=3)["SOLVER.MAX_ITER"] == 180
    odd = keys(coco, epochs=16.67)
    assert odd["SOLVER.MAX_ITER"] == 1001
    assert 3 * odd["TEST.EVAL_PERIOD"] < 1001 <= 4 * odd["TEST.EVAL_PERIOD"]


def test_objects_without_a_mask_make_a_box_model():
    coco = dataset(20, (200, 150))
    coco["annotations"][3]["segmentation"] = []
    choices = {c.key: c for c in make_recipe(data_facts(coco), Budget())}
    assert choices["MODEL.MASK_ON"].value is False
    assert "39 of 40 objects" in choices["MODEL.MASK_ON"].reason


def test_no_objects_are_refused():
    with pytest.raises(ValueError, match="0 objects"):
        data_facts({"images": [{"id": 1, "width": 4, "height": 4}], "annotations": []})
