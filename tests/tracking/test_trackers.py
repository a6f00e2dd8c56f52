"""Trackers: the reference's identities, order of detections, memory, masks, the package's ones."""

import json

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_util

from d2kit.config import CfgNode, get_cfg
from d2kit.structures import BitMasks, Boxes, Instances
from d2kit.tracking import (
    TRACKER_HEADS_REGISTRY,
    BaseHungarianTracker,
    BaseTracker,
    BBoxIOUTracker,
    IOUWeightedHungarianBBoxIOUTracker,
    VanillaHungarianBBoxIOUTracker,
    build_tracker_head,
    create_prediction_pairs,
)
from tests.support.reference_files import reference_path

OVERLAP = [
    "BBoxIOUTracker",
    "VanillaHungarianBBoxIOUTracker",
    "IOUWeightedHungarianBBoxIOUTracker",
]
MOTION = ["ByteTrack", "OCSORT", "BoTSORT"]
SIZE = (240, 320)


def instances(boxes, scores=None, **fields):
    boxes = torch.as_tensor(np.asarray(boxes, np.float32).reshape(-1, 4))
    scores = torch.ones(len(boxes)) if scores is None else torch.as_tensor(scores)
    classes = torch.zeros(len(boxes), dtype=torch.int64)
    return Instances(SIZE, pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes, **fields)


def tracker(name, **keys):
    cfg = get_cfg()
    settings = {"TRACKER_NAME": name, "VIDEO_HEIGHT": SIZE[0], "VIDEO_WIDTH": SIZE[1], **keys}
    for key, value in settings.items():
        cfg.merge_from_list([f"TRACKER_HEADS.{key}", value])
    return build_tracker_head(cfg)


def walkers(frames=30, people=5, seed=0, step=3.0):
    """Return boxes (frames, people, 4) of people who walk, each straight on with a little noise."""
    rng = np.random.default_rng(seed)
    start = rng.uniform(0, 200, (people, 2))
    speed = rng.uniform(-step, step, (people, 2))
    size = rng.uniform(25, 50, (people, 2))
    corner = start + speed * np.arange(frames)[:, None, None] + rng.normal(0, 0.4, (frames, 1, 2))
    return np.concatenate([corner, corner + size], 2)


@pytest.mark.parametrize("name", OVERLAP)
@pytest.mark.parametrize("least", [0.0, 0.1])
def test_identities_are_the_references(name, least):
    reference = json.loads(reference_path("ops/trackers.json").read_text())
    made = tracker(name, MAX_LOST_FRAME_COUNT=3, MIN_MATCH_IOU=least)
    found = [made.update(instances(boxes)).ID for boxes in reference["frames"]]
    assert found == reference["ids"][name]


def test_a_config_written_for_detectron2_builds():
    cfg = CfgNode()
    cfg.TRACKER_HEADS = CfgNode()
    cfg.TRACKER_HEADS.TRACKER_NAME = "VanillaHungarianBBoxIOUTracker"
    cfg.TRACKER_HEADS.VIDEO_HEIGHT, cfg.TRACKER_HEADS.VIDEO_WIDTH = SIZE
    cfg.TRACKER_HEADS.MAX_NUM_INSTANCES = 200
    cfg.TRACKER_HEADS.MAX_LOST_FRAME_COUNT = 0
    cfg.TRACKER_HEADS.MIN_BOX_REL_DIM = 0.02
    cfg.TRACKER_HEADS.MIN_INSTANCE_PERIOD = 1
    cfg.TRACKER_HEADS.TRACK_IOU_THRESHOLD = 0.5
    made = build_tracker_head(cfg)
    assert isinstance(made, VanillaHungarianBBoxIOUTracker)
    assert made.update(instances([[1, 2, 30, 40]])).ID == [0]


def test_unknown_name_lists_the_nearest():
    with pytest.raises(KeyError, match="ByteTrack"):
        tracker("ByteTracker")


@pytest.mark.parametrize("name", OVERLAP + MOTION)
def test_result_does_not_depend_on_the_order_of_detections(name):
    """Scores differ, so that even the numbers of new identities must agree."""
    rng = np.random.default_rng(1)
    frames = walkers(people=8)
    first, second = tracker(name), tracker(name)
    seen = set()
    for everybody in frames:
        # misses, so that objects get lost and come back
        boxes = everybody[rng.random(len(everybody)) > 0.15]
        scores = rng.uniform(0.75, 1, len(boxes)).astype(np.float32)
        shuffle = rng.permutation(len(boxes))
        one = first.update(instances(boxes, scores))
        two = second.update(instances(boxes[shuffle], scores[shuffle]))
        assert [one.ID[i] for i in shuffle] == two.ID
        seen |= set(one.ID)
    assert len(seen - {-1}) >= 8


@pytest.mark.parametrize("name", OVERLAP)
def test_with_equal_scores_the_partition_does_not_depend_on_the_order(name):
    rng = np.random.default_rng(2)
    first, second = tracker(name), tracker(name)
    renamed = {}
    for boxes in walkers(people=8, seed=3):
        shuffle = rng.permutation(len(boxes))
        one = first.update(instances(boxes)).ID
        two = second.update(instances(boxes[shuffle])).ID
        for row, place in enumerate(shuffle):
            assert renamed.setdefault(one[place], two[row]) == two[row]
    assert len(set(renamed.values())) == len(renamed)


@pytest.mark.parametrize("name", OVERLAP + MOTION)
@pytest.mark.parametrize("people", [0, 1, 6])
def test_everybody_keeps_one_identity(name, people):
    made = tracker(name)
    frames = walkers(people=max(people, 1), seed=4, step=1.0)[:, :people]
    ids = np.array([made.update(instances(boxes)).ID for boxes in frames]).reshape(30, people)
    settled = ids[5:]
    assert (settled == settled[:1]).all()
    assert len(np.unique(settled)) == people
    assert (settled >= 0).all()


@pytest.mark.parametrize("name", OVERLAP + MOTION)
def test_input_is_not_changed_and_fields_are_added(name):
    given = instances([[10, 10, 60, 90], [100, 20, 150, 120]])
    made = tracker(name)
    made.update(given)
    found = made.update(given)
    assert set(given.get_fields()) == {"pred_boxes", "scores", "pred_classes"}
    assert {"ID", "ID_period", "lost_frame_count"} <= set(found.get_fields())
    torch.testing.assert_close(found.pred_boxes.tensor, given.pred_boxes.tensor)
    assert found.lost_frame_count == [0, 0]


@pytest.mark.parametrize(
    ("settings", "box", "same"),
    [
        ({"MAX_LOST_FRAME_COUNT": 2}, [50, 50, 90, 100], True),
        ({"MAX_LOST_FRAME_COUNT": 1}, [50, 50, 90, 100], False),  # away for two frames
        ({"MAX_LOST_FRAME_COUNT": 9, "MIN_INSTANCE_PERIOD": 3}, [50, 50, 90, 100], False),
        ({"MAX_LOST_FRAME_COUNT": 9, "MIN_BOX_REL_DIM": 0.2}, [50, 50, 90, 100], False),
    ],
)
@pytest.mark.parametrize("name", OVERLAP)
def test_who_is_remembered(name, settings, box, same):
    made = tracker(name, **settings)
    ids = [made.update(instances(b)).ID for b in ([box], [box], [box], [], [], [box])]
    assert ids[:3] == [[0], [0], [0]]
    assert ids[5] == ([0] if same else [1])


def test_memory_is_bounded():
    made = tracker("BBoxIOUTracker", MAX_NUM_INSTANCES=3, MIN_INSTANCE_PERIOD=0)
    for shift in range(5):
        made.update(instances([[60 * shift, 0, 60 * shift + 20, 50]]))
        assert len(made._prev_instances) <= 3
    assert made._prev_instances.ID == [4, 3, 2]


@pytest.mark.parametrize(("least", "identity"), [(0.0, 0), (0.1, 1)])
@pytest.mark.parametrize("name", OVERLAP[1:])
def test_a_pair_without_overlap(name, least, identity):
    """Detectron2's trackers take any pair that is left; MIN_MATCH_IOU forbids it."""
    made = tracker(name, MIN_MATCH_IOU=least)
    made.update(instances([[10, 10, 40, 60]]))
    assert [identity] == made.update(instances([[200, 100, 240, 160]])).ID


def masks_of(boxes, kind):
    masks = np.zeros((len(boxes), *SIZE), bool)
    for mask, (x0, y0, x1, y1) in zip(masks, np.asarray(boxes, int), strict=True):
        mask[y0:y1, x0:x1] = True
    if kind == "rle":
        encoded = mask_util.encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8)))
        return [dict(rle) for rle in encoded]
    return BitMasks(torch.from_numpy(masks)) if kind == "bitmasks" else torch.from_numpy(masks)


@pytest.mark.parametrize("kind", ["rle", "tensor", "bitmasks"])
@pytest.mark.parametrize("name", OVERLAP)
def test_masks_tell_apart_whom_boxes_confuse(name, kind):
    """Equal boxes; the masks are the upper and the lower half, listed in turn."""
    box = [50, 50, 150, 150]
    halves = [[50, 50, 150, 98], [50, 102, 150, 150]]
    made = tracker(name, ASSOCIATION="mask")
    for turn in range(4):
        order = [0, 1] if turn % 2 == 0 else [1, 0]
        masks = masks_of([halves[i] for i in order], kind)
        found = made.update(instances([box, box], pred_masks=masks)).ID
        if turn == 0:
            names = dict(zip(order, found, strict=True))
        assert [names[i] for i in order] == found


def test_mask_association_without_masks_is_named():
    made = tracker("BBoxIOUTracker", ASSOCIATION="mask")
    made.update(instances([[1, 1, 50, 50]]))
    with pytest.raises(ValueError, match="pred_masks"):
        made.update(instances([[1, 1, 50, 50]]))


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("BBoxIOUTracker", "ASSOCIATION", "masks", "ASSOCIATION"),
        ("BBoxIOUTracker", "TRACK_IOU_THRESHOLD", 1.5, "TRACK_IOU_THRESHOLD"),
        ("BBoxIOUTracker", "MAX_LOST_FRAME_COUNT", -1, "MAX_LOST_FRAME_COUNT"),
        ("ByteTrack", "PARAMS", ["lost_buffer", 3], "lost_track_buffer"),
        ("ByteTrack", "PARAMS", ["lost_track_buffer"], "PARAMS"),
    ],
)
def test_wrong_settings_are_named(name, key, value, message):
    with pytest.raises(ValueError, match=message):
        tracker(name, **{key: value})


def test_params_reach_the_package():
    made = tracker("ByteTrack", PARAMS=["track_activation_threshold", 0.9])
    box = [[10, 10, 60, 90]]
    assert [made.update(instances(box, [0.8])).ID for _ in range(4)] == [[-1]] * 4
    made.update(instances(box, [0.95]))
    assert made.update(instances(box, [0.95])).ID == [0]


def test_only_botsort_looks_at_the_picture():
    image = np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
    for name in MOTION:
        made = tracker(name)
        assert made.uses_image is (name == "BoTSORT")
        for _ in range(3):
            found = made.update(instances([[10, 10, 60, 90]]), image=image)
        assert found.ID == [0]


def test_prediction_pairs():
    now = instances([[0, 0, 10, 10], [50, 50, 60, 60]])
    before = instances([[0, 0, 10, 10], [0, 5, 10, 15]], ID=[4, 7], ID_period=[3, 1])
    iou = np.array([[1.0, 1 / 3], [0.0, 0.0]])
    assert create_prediction_pairs(now, before, iou) == [
        {"idx": 0, "prev_idx": 0, "prev_id": 4, "IoU": 1.0, "prev_period": 3}
    ]
    assert len(create_prediction_pairs(now, before, iou, threshold=0.3)) == 2
    assert create_prediction_pairs(now, before, iou, threshold=0.3)[1]["prev_id"] == 7


@pytest.mark.parametrize(
    ("cls", "values"),
    [
        (VanillaHungarianBBoxIOUTracker, [[-1, 1e5], [1e5, -1]]),
        (IOUWeightedHungarianBBoxIOUTracker, [[-1, 1e5], [1e5, -0.5]]),
    ],
)
def test_cost_matrix(cls, values):
    made = cls(video_height=240, video_width=320)
    before = instances([[0, 0, 10, 10], [50, 50, 60, 60]], ID=[0, 1], ID_period=[1, 1])
    now = instances([[0, 0, 10, 10], [50, 50, 60, 55]])
    np.testing.assert_allclose(made.build_cost_matrix(now, before), values, rtol=1e-5)


def test_a_users_own_tracker():
    @TRACKER_HEADS_REGISTRY.register()
    class ByLeftEdge(BaseHungarianTracker):
        def build_cost_matrix(self, instances, prev_instances):
            now, before = instances.pred_boxes.tensor, prev_instances.pred_boxes.tensor
            return (now[:, None, 0] - before[None, :, 0]).abs().numpy()

    try:
        made = tracker("ByLeftEdge", MIN_MATCH_IOU=0.0)
        made.update(instances([[0, 0, 10, 10], [100, 0, 120, 10]]))
        assert made.update(instances([[101, 90, 120, 99], [2, 0, 10, 10]])).ID == [1, 0]
    finally:
        del TRACKER_HEADS_REGISTRY._obj_map["ByLeftEdge"]


def test_the_interface_alone_does_nothing():
    with pytest.raises(NotImplementedError):
        BaseTracker().update(instances([]))
    with pytest.raises(NotImplementedError):
        BaseTracker(get_cfg())
    assert isinstance(BBoxIOUTracker(video_height=1, video_width=1), BaseTracker)
