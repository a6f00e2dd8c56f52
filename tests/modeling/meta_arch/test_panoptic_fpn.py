import pytest
import torch

from d2kit.modeling.meta_arch.panoptic_fpn import combine_semantic_and_instance_outputs
from d2kit.modeling.postprocessing import roi_masks_kept
from d2kit.structures import Boxes, Instances, ROIMasks
from tests.support.tiny_dense import labelled_input, tiny_dense_model


def instances(columns, scores, classes=None, size=(4, 10)):
    """Instances that cover columns [a, b) of the image."""
    masks = torch.zeros(len(columns), *size, dtype=torch.bool)
    for mask, (a, b) in zip(masks, columns, strict=True):
        mask[:, a:b] = True
    result = Instances(size, pred_masks=masks, scores=torch.tensor(scores))
    result.pred_classes = torch.tensor(classes or [7] * len(columns), dtype=torch.int64)
    return result


def stuff(*labels):
    """Class of each column."""
    return torch.tensor(labels).expand(4, 10).clone()


GROUND = stuff(*[1] * 4, *[2] * 6)


@pytest.mark.parametrize(
    ("columns", "scores", "segments", "rows"),
    [
        ([], [], [0] * 4 + [1] * 6, []),
        ([(0, 3)], [0.9], [1] * 3 + [0] + [2] * 6, [0]),
        ([(0, 3)], [0.4], [0] * 4 + [1] * 6, []),  # below the score
        ([(0, 3)], [0.5], [1] * 3 + [0] + [2] * 6, [0]),  # at the score
        ([(2, 6), (0, 4)], [0.6, 0.9], [1] * 4 + [2] * 2 + [0] * 4, [1, 0]),  # half covered
        ([(1, 5), (0, 4)], [0.6, 0.9], [1] * 4 + [2] * 6, [1]),  # 3 of 4 covered
        ([(0, 4), (0, 4), (6, 9)], [0.9, 0.8, 0.7], [1] * 4 + [0, 0, 2, 2, 2, 0], [0, 2]),
        ([(3, 3), (0, 3)], [0.9, 0.8], [1] * 3 + [0] + [2] * 6, [1]),  # an empty mask
        ([(0, 10)], [0.9], [1] * 10, [0]),  # no pixel left for stuff
    ],
)
def test_merging(columns, scores, segments, rows):
    given = instances(columns, scores)
    ids, infos = combine_semantic_and_instance_outputs(given, GROUND, 0.5, 20, 0.5)
    assert ids.dtype == torch.int32
    assert ids[0].tolist() == segments
    assert (ids == ids[0]).all()
    assert [i["id"] for i in infos] == list(range(1, len(infos) + 1))
    things = [i for i in infos if i["isthing"]]
    assert [i["instance_id"] for i in things] == rows
    assert [i["score"] for i in things] == pytest.approx([scores[r] for r in rows])
    assert {i["category_id"] for i in things} <= {7}
    for info in infos[len(things) :]:
        assert info["area"] == (ids == info["id"]).sum()
        assert set(GROUND[ids == info["id"]].tolist()) == {info["category_id"]}


@pytest.mark.parametrize(("limit", "classes"), [(0, [1, 2, 9]), (9, [2, 9]), (13, [9]), (30, [])])
def test_small_stuff_goes_and_class_0_makes_no_segment(limit, classes):
    labels = stuff(0, 0, 1, 1, 2, 2, 2, 9, 9, 9)
    labels[:, 3] = 9
    given = instances([], [])
    ids, infos = combine_semantic_and_instance_outputs(given, labels, 0.5, limit, 0.5)
    assert [i["category_id"] for i in infos] == classes
    assert not any(i["isthing"] for i in infos)
    assert set(ids.unique().tolist()) - {0} == {i["id"] for i in infos}
    assert (ids[labels == 0] == 0).all()


def test_masks_in_boxes_are_pasted():
    boxes = Boxes(torch.tensor([[0.0, 0, 3, 4], [5, 0, 9, 4]]))
    given = Instances((4, 10), pred_boxes=boxes, scores=torch.tensor([0.3, 0.9]))
    given.pred_classes = torch.tensor([1, 2])
    given.pred_masks = ROIMasks(torch.ones(2, 8, 8))
    ids, infos = combine_semantic_and_instance_outputs(given, GROUND, 0.5, 99, 0.5)
    assert [i["instance_id"] for i in infos] == [1]
    assert ids[2].tolist() == [0] * 5 + [1] * 4 + [0]


@pytest.fixture(scope="module")
def model():
    score = "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH"
    return tiny_dense_model("PanopticFPN", score, 0.0, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.3)


@torch.no_grad()
def test_results(model):
    item = {**labelled_input(0), "height": 128, "width": 100}
    (result,) = model.eval()([item])
    assert set(result) == {"instances", "sem_seg", "panoptic_seg"}
    ids, infos = result["panoptic_seg"]
    assert ids.shape == (128, 100)
    assert result["sem_seg"].shape == (3, 128, 100)
    assert set(ids.unique().tolist()) - {0} == {i["id"] for i in infos}
    with roi_masks_kept():
        (kept,) = model([item])
    assert isinstance(kept["instances"].pred_masks, ROIMasks)
    assert torch.equal(kept["panoptic_seg"][0], ids)
    detections, scores = model.inference([item], do_postprocess=False)
    assert detections[0].image_size == (64, 80)
    assert scores.shape == (1, 3, 64, 80)


@torch.no_grad()
def test_no_instance():
    empty = tiny_dense_model("PanopticFPN", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 1.0).eval()
    (result,) = empty([labelled_input(0)])
    assert len(result["instances"]) == 0
    assert not any(info["isthing"] for info in result["panoptic_seg"][1])


@torch.no_grad()
def test_merging_can_be_switched_off():
    model = tiny_dense_model("PanopticFPN", "MODEL.PANOPTIC_FPN.COMBINE.ENABLED", False).eval()
    assert set(model([labelled_input(0)])[0]) == {"instances", "sem_seg"}


def test_weight_of_the_instances(model):
    batch = [labelled_input(0)]
    plain = model.train()(batch)
    weighted = tiny_dense_model("PanopticFPN", "MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT", 3.0)(
        batch
    )
    for name, value in plain.items():
        factor = 3.0 if name in {"loss_cls", "loss_box_reg", "loss_mask"} else 1.0
        torch.testing.assert_close(weighted[name], factor * value, msg=name)


def test_training_mode_is_named(model):
    with pytest.raises(ValueError, match="eval"):
        model.train().inference([labelled_input(0)])
