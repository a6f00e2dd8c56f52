import pytest
import torch

from d2kit.modeling import build_proposal_generator
from d2kit.modeling.proposal_generator import RPN, StandardRPNHead
from d2kit.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from d2kit.modeling.sampling import per_image_seeds
from d2kit.structures import Boxes, ImageList, Instances
from d2kit.utils.events import EventStorage
from tests.support.tiny_model import CHANNELS, TinyBackbone, tiny_config

SIZES = [(64, 80), (64, 72)]


@pytest.fixture
def rpn():
    torch.manual_seed(0)
    cfg = tiny_config()
    return build_proposal_generator(cfg, TinyBackbone(cfg, None).output_shape())


@pytest.fixture
def features():
    rng = torch.Generator().manual_seed(1)
    return {
        "p2": torch.randn(2, CHANNELS, 16, 20, generator=rng),
        "p3": torch.randn(2, CHANNELS, 8, 10, generator=rng),
    }


def images():
    return ImageList(torch.zeros(2, 3, 64, 80), SIZES)


def truths(*counts):
    result = []
    for count, size in zip(counts, SIZES, strict=True):
        offset = torch.arange(count).float().unsqueeze(1) * 7
        boxes = torch.tensor([[5.0, 5, 25, 25]]) + offset
        result.append(Instances(size, gt_boxes=Boxes(boxes[:, :4].reshape(-1, 4))))
    return result


@pytest.mark.parametrize("counts", [(0, 0), (1, 0), (3, 5)])
def test_losses_are_finite_and_reach_every_weight(rpn, features, counts):
    with EventStorage() as storage:
        proposals, losses = rpn(images(), features, truths(*counts))
        sum(losses.values()).backward()
        positives = storage.latest()["rpn/num_pos_anchors"][0]
    assert all(torch.isfinite(v) for v in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in rpn.parameters())
    assert (losses["loss_rpn_loc"] > 0) == (sum(counts) > 0)
    assert positives >= sum(counts) / 2
    assert [p.image_size for p in proposals] == SIZES


def test_losses_are_sums_over_the_sampled_anchors_by_the_nominal_number(rpn, features):
    """Against the formulas, anchor by anchor."""
    levels = [features["p2"], features["p3"]]
    anchors = rpn.anchor_generator(levels)
    logits, deltas = rpn.rpn_head(levels)
    logits = [x.permute(0, 2, 3, 1).flatten(1) for x in logits]
    deltas = [x.permute(0, 2, 3, 1).reshape(2, -1, 4) for x in deltas]
    labels, boxes = rpn.label_and_sample_anchors(anchors, truths(3, 1))
    losses = rpn.losses(anchors, logits, labels, deltas, boxes)
    objectness = location = 0.0
    every, all_anchors = torch.cat(logits, 1), Boxes.cat(anchors).tensor
    for i in range(2):
        assert (labels[i] >= 0).sum() == rpn.batch_size_per_image
        for a in (labels[i] >= 0).nonzero().flatten().tolist():
            p = every[i, a].sigmoid()
            objectness -= torch.log(p if labels[i][a] == 1 else 1 - p).item()
            if labels[i][a] == 1:
                target = rpn.box2box_transform.get_deltas(
                    all_anchors[a : a + 1], boxes[i][a : a + 1]
                )
                location += (target[0] - torch.cat(deltas, 1)[i, a]).abs().sum().item()
    normalizer = 2 * rpn.batch_size_per_image
    assert losses["loss_rpn_cls"].item() == pytest.approx(objectness / normalizer, rel=1e-4)
    assert losses["loss_rpn_loc"].item() == pytest.approx(location / normalizer, rel=1e-4)


def test_decoding_after_the_choice_equals_decoding_before_it(rpn, features):
    rpn.eval()
    levels = [features["p2"], features["p3"]]
    anchors = rpn.anchor_generator(levels)
    logits = [torch.randn(2, len(a)) for a in anchors]
    deltas = [torch.randn(2, len(a), 4) * 0.3 for a in anchors]
    decoded = [
        torch.stack([rpn.box2box_transform.apply_deltas(d, a.tensor) for d in delta])
        for a, delta in zip(anchors, deltas, strict=True)
    ]
    expected = find_top_rpn_proposals(
        decoded, logits, SIZES, rpn.nms_thresh, 100, 50, rpn.min_box_size, False
    )
    for got, wanted in zip(
        rpn.predict_proposals(anchors, logits, deltas, SIZES), expected, strict=True
    ):
        assert torch.equal(got.objectness_logits, wanted.objectness_logits)
        torch.testing.assert_close(got.proposal_boxes.tensor, wanted.proposal_boxes.tensor)


def test_sampling_depends_on_the_seed_of_the_image_alone(rpn, features):
    anchors = rpn.anchor_generator([features["p2"], features["p3"]])
    gt = truths(3, 3)

    def labels(seeds, order):
        with per_image_seeds([seeds[i] for i in order]):
            return rpn.label_and_sample_anchors(anchors, [gt[0]] * len(order))[0]

    first, swapped = labels([4, 5], [0, 1]), labels([4, 5], [1, 0])
    assert torch.equal(first[0], swapped[1])
    assert torch.equal(first[1], swapped[0])
    assert not torch.equal(first[0], first[1])


def test_anchors_outside_the_image_are_ignored_where_asked(rpn, features):
    anchors = rpn.anchor_generator([features["p2"], features["p3"]])
    rpn.anchor_boundary_thresh, rpn.batch_size_per_image = 0, 10**6
    labels, _ = rpn.label_and_sample_anchors(anchors, truths(1, 1))
    for label, size in zip(labels, SIZES, strict=True):
        outside = ~Boxes.cat(anchors).inside_box(size)
        assert outside.any()
        assert (label[outside] == -1).all()


def test_several_convolutions_have_names_of_their_own():
    head = StandardRPNHead(in_channels=8, num_anchors=3, conv_dims=[-1, 4])
    shapes = {k: tuple(v.shape) for k, v in head.state_dict().items() if k.endswith("weight")}
    assert shapes == {
        "conv.conv0.weight": (8, 8, 3, 3),
        "conv.conv1.weight": (4, 8, 3, 3),
        "objectness_logits.weight": (3, 4, 1, 1),
        "anchor_deltas.weight": (12, 4, 1, 1),
    }


def test_mistakes_are_named(rpn, features):
    with pytest.raises(ValueError, match="gt_instances"):
        rpn(images(), features)
    with pytest.raises(ValueError, match="CONV_DIMS"):
        StandardRPNHead(in_channels=8, num_anchors=3, conv_dims=[0])
    cfg = tiny_config("MODEL.PROPOSAL_GENERATOR.NAME", "RPM")
    with pytest.raises(KeyError, match="RPN"):
        build_proposal_generator(cfg, {})
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "PrecomputedProposals"
    assert build_proposal_generator(cfg, {}) is None
    assert isinstance(rpn, RPN)
