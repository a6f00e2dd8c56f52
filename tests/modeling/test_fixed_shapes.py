"""Detection with padded tensors gives what detection with lists of boxes gives."""

import pytest
import torch

from d2kit.layers import batched_nms
from d2kit.layers.nms import keep_masks
from d2kit.modeling import build_model
from d2kit.modeling.meta_arch.rcnn import without_padding
from d2kit.modeling.poolers import ROIPooler
from d2kit.modeling.proposal_generator.proposal_utils import (
    fast_rcnn_inference_single_image,
    padded_detections,
    suppress_and_pad,
    suppress_and_trim,
)
from d2kit.structures import Boxes
from d2kit.utils.devices import fixed_shapes, note_exactness, shapes_are_fixed
from tests.support.tiny_heads import CASCADE_OPTIONS, KEYPOINT_OPTIONS
from tests.support.tiny_model import tiny_config, tiny_input

SIZES = [(60, 80), (48, 64)]


def random_boxes(*shape, seed=0, side=40.0):
    rng = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=rng) * 60
    return torch.cat([corner, corner + 1 + torch.rand(*shape, 2, generator=rng) * side], dim=-1)


def random_scores(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [0, 1, 2, 300])
@pytest.mark.parametrize("threshold", [0.3, 0.7])
@pytest.mark.parametrize("kinds", [1, 3])
def test_masks_of_what_stays_are_nms(count, threshold, kinds):
    boxes = random_boxes(2, count, seed=count)
    scores = random_scores(2, count, seed=1).sort(descending=True).values
    valid = random_scores(2, count, seed=2) > 0.2
    groups = (random_scores(2, count, seed=3) * kinds).long()
    keep, final = keep_masks(boxes, valid, threshold, groups=groups)
    assert final.all()
    for i in range(2):
        rows = valid[i].nonzero().squeeze(1)
        kept = batched_nms(boxes[i, rows], scores[i, rows], groups[i, rows], threshold)
        assert rows[kept].tolist() == keep[i].nonzero().squeeze(1).tolist()


def test_a_chain_longer_than_the_rounds_is_not_final():
    """Each box overlaps its neighbours only: every second one stays, found link by link."""
    left = torch.arange(40.0) * 5
    boxes = torch.stack([left, torch.zeros(40), left + 10, torch.full((40,), 10.0)], dim=1)[None]
    valid = torch.ones(1, 40, dtype=torch.bool)
    keep, final = keep_masks(boxes, valid, 0.3, rounds=45)
    assert final.all()
    assert keep[0].tolist() == [True, False] * 20
    assert not keep_masks(boxes, valid, 0.3, rounds=20)[1].any()


@pytest.mark.parametrize("kind", ["ROIAlignV2", "ROIAlign", "ROIPool"])
@pytest.mark.parametrize("counts", [(0, 0), (1, 0), (5, 40)])
@pytest.mark.parametrize("sampling", [0, 2])
def test_pooling_from_all_levels(kind, counts, sampling):
    pooler = ROIPooler(4, [1 / 4, 1 / 8, 1 / 16], sampling, kind)
    pooler.canonical_box_size = 40
    features = [torch.randn(2, 3, 64 // s, 80 // s) for s in (4, 8, 16)]
    boxes = [Boxes(random_boxes(n, seed=n, side=70)) for n in counts]
    with fixed_shapes():
        found = pooler(features, boxes)
    assert torch.equal(found, pooler(features, boxes))


@pytest.mark.parametrize("least", [0.0, 12.0])
@pytest.mark.parametrize("wrong", [False, True])
def test_proposals(least, wrong):
    counts = [50, 30, 7]
    boxes = random_boxes(2, 87, seed=4)
    boxes[0, 5] = torch.tensor([300.0, 300, 320, 320])  # outside
    if wrong:
        boxes[0, :60] = float("nan")
    scores = random_scores(2, 87, seed=5)
    scores = torch.cat([x.sort(descending=True).values for x in scores.split(counts, 1)], dim=1)
    scores[:, 10] = scores[:, 51]  # one score on two levels
    levels = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    limits = {"nms_thresh": 0.5, "post_nms_topk": 25, "min_box_size": least}
    expected = suppress_and_trim(boxes, scores, levels, SIZES, training=False, **limits)
    with fixed_shapes() as exact:
        found = suppress_and_pad(boxes, scores, counts, SIZES, **limits)
    assert torch.stack(exact).all()
    for padded, one in zip(found, expected, strict=True):
        assert len(padded) == 25
        valid = padded.objectness_logits > -torch.inf
        assert int(valid.sum()) == len(one)
        assert torch.equal(padded.proposal_boxes.tensor[valid], one.proposal_boxes.tensor)
        assert torch.equal(padded.objectness_logits[valid], one.objectness_logits)
        assert not padded.proposal_boxes.tensor[~valid].any()


class Added:
    """A transform of boxes that adds the deltas."""

    weights = (1, 1, 1, 1)

    @staticmethod
    def apply_deltas(deltas, boxes):
        return (boxes.repeat(1, deltas.shape[1] // 4) + deltas).float()


@pytest.mark.parametrize(
    ("threshold", "topk", "exact"),
    [(2.0, 5, True), (0.995, 5, True), (0.3, 5, True), (0.0, 100, True), (0.0, 5, False)],
)
@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("least", [0.0, 12.0])
def test_detections(threshold, topk, exact, agnostic, least):
    """None, few and all pairs above the threshold; and boxes so alike that the best are too few."""
    regions, kinds = 90, 3
    boxes, valid = random_boxes(2, regions, seed=6), random_scores(2, regions, seed=7) > 0.3
    if not exact:
        boxes[:] = boxes[:, :1]
    probs = random_scores(2, regions, kinds + 1, seed=8)
    deltas = torch.randn(2, regions, 4 if agnostic else 4 * kinds) * (3 if exact else 0.01)
    limits = {"score_thresh": threshold, "nms_thresh": 0.5, "min_size": least}
    with fixed_shapes() as noted:
        found = padded_detections(boxes, valid, deltas, probs, SIZES, Added, topk=topk, **limits)
    assert bool(torch.stack(noted).all()) is exact
    for i, padded in enumerate(found):
        decoded = Added.apply_deltas(deltas[i], boxes[i])[valid[i]]
        expected, _ = fast_rcnn_inference_single_image(
            decoded, probs[i][valid[i]], SIZES[i], topk_per_image=topk, **limits
        )
        count = int((padded.scores > -torch.inf).sum())
        assert (count == len(expected)) or not exact
        if exact:
            assert torch.equal(padded.scores[:count], expected.scores)
            assert torch.equal(padded.pred_classes[:count], expected.pred_classes)
            assert torch.equal(padded.pred_boxes.tensor[:count], expected.pred_boxes.tensor)
            assert not padded.pred_boxes.tensor[count:].any()


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["MODEL.MASK_ON", False],
        ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.9999],
        ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.3],
        ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True, "MODEL.ROI_HEADS.MIN_SIZE_TEST", 3.0],
        ["MODEL.RPN.POST_NMS_TOPK_TEST", 1],
        ["MODEL.PROPOSAL_GENERATOR.MIN_SIZE", 1000],
        ["TEST.DETECTIONS_PER_IMAGE", 1],
    ],
)
def test_a_whole_model(options):
    """With zero, one and many proposals and detections, of images of two sizes."""
    torch.manual_seed(0)
    model = build_model(tiny_config(*options)).eval()
    assert model.can_detect_padded
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight.mul_(100)
        model.proposal_generator.rpn_head.anchor_deltas.weight.mul_(10)
        batch = [tiny_input(1), tiny_input(2, size=(48, 72)), tiny_input(3)]
        images = model.preprocess_image(batch)
        expected = model.inference(batch, do_postprocess=False)
        padded, read = model.detect_padded(images.tensor, images.image_sizes)
        assert padded["facts"].shape == (4,)
        assert len({len(x) for x in padded.values()} - {4}) == 1
        assert read
        found = without_padding(padded, images.image_sizes)
    assert found is not None
    for mine, theirs in zip(found, expected, strict=True):
        assert set(mine.get_fields()) == set(theirs.get_fields())
        assert torch.equal(mine.scores, theirs.scores)
        assert torch.equal(mine.pred_classes, theirs.pred_classes)
        assert torch.equal(mine.pred_boxes.tensor, theirs.pred_boxes.tensor)
        if theirs.has("pred_masks"):
            torch.testing.assert_close(mine.pred_masks, theirs.pred_masks, rtol=1e-5, atol=1e-6)


def test_results_that_are_not_all_are_not_used():
    facts = torch.tensor([1, 0])
    assert without_padding({"facts": facts, "pred_boxes": torch.zeros(1, 3, 4)}, SIZES[:1]) is None


@pytest.mark.parametrize(
    "options",
    [
        KEYPOINT_OPTIONS,
        CASCADE_OPTIONS,
        ["MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"],
    ],
)
def test_other_heads_are_left_as_they_are(options):
    assert not build_model(tiny_config(*options)).can_detect_padded


def test_the_region_ends_with_its_block():
    note_exactness(torch.tensor(False))  # nothing listens
    with fixed_shapes() as exact:
        assert shapes_are_fixed()
        note_exactness(torch.tensor(True))
    assert not shapes_are_fixed()
    assert len(exact) == 1
