import numpy as np
import pytest
import torch

from d2kit.layers import ShapeSpec
from d2kit.modeling.roi_heads import KRCNNConvDeconvUpsampleHead, build_roi_heads
from d2kit.modeling.roi_heads.keypoint_head import (
    BaseKeypointRCNNHead,
    keypoint_rcnn_inference,
    keypoint_rcnn_loss,
)
from d2kit.structures import Boxes, ImageList, Instances, Keypoints
from tests.support.tiny_heads import (
    KEYPOINT_OPTIONS,
    SIZE,
    features,
    random_proposals,
    with_keypoints,
)
from tests.support.tiny_model import TinyBackbone, tiny_config, tiny_input


def regions(count, keypoints=3, visible=2.0, side=8.0):
    """Regions of 8x8 pixels whose keypoint k lies in cell (k, k) of an 8x8 map."""
    points = torch.arange(keypoints) + 0.5
    keypoint = torch.stack([points, points, torch.full((keypoints,), visible)], dim=1)
    return Instances(
        SIZE,
        proposal_boxes=Boxes(torch.tensor([[0.0, 0, side, side]]).repeat(count, 1)),
        gt_keypoints=Keypoints(keypoint.repeat(count, 1, 1)),
    )


@pytest.mark.parametrize(
    ("normalizer", "divisor"), [(None, 6.0), (12.0, 12.0)], ids=["visible", "number"]
)
def test_loss_is_the_mean_cross_entropy(normalizer, divisor):
    logits = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    loss = keypoint_rcnn_loss(logits, [regions(1), regions(0), regions(1)], normalizer)
    log_p = logits.double().flatten(2).log_softmax(dim=2)
    wanted = -sum(log_p[r, k, 9 * k] for r in range(2) for k in range(3)) / divisor
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_only_labelled_keypoints_inside_the_box_count():
    logits = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    both = [regions(1), regions(1, visible=0.0)]
    alone = keypoint_rcnn_loss(logits[:1], both[:1], None)
    assert keypoint_rcnn_loss(logits, both, None).item() == pytest.approx(alone.item())
    narrow = regions(1, side=2.0)  # the third keypoint, at 2.5, lies outside
    log_p = logits[0].flatten(1).log_softmax(dim=1)
    wanted = -(log_p[0, 2 * 8 + 2] + log_p[1, 6 * 8 + 6]) / 2  # cells of a quarter pixel
    assert keypoint_rcnn_loss(logits[:1], [narrow], None).item() == pytest.approx(wanted.item())


@pytest.mark.parametrize("instances", [[], [regions(0)], [regions(0), Instances(SIZE, gt=[])]])
@pytest.mark.parametrize("normalizer", [None, 4.0])
def test_loss_without_regions_is_zero_with_a_graph(instances, normalizer):
    logits = torch.zeros(0, 3, 8, 8, requires_grad=True)
    loss = keypoint_rcnn_loss(logits, instances, normalizer)
    assert loss.item() == 0
    loss.backward()
    hidden = torch.zeros(1, 3, 8, 8, requires_grad=True)
    loss = keypoint_rcnn_loss(hidden, [regions(1, visible=0.0)], normalizer)
    assert loss.item() == 0
    loss.backward()
    assert (hidden.grad == 0).all()


def test_other_numbers_of_keypoints_are_named():
    with pytest.raises(ValueError, match="NUM_KEYPOINTS to 4"):
        keypoint_rcnn_loss(torch.zeros(1, 3, 8, 8), [regions(1, keypoints=4)], None)


def test_inference_splits_by_image():
    maps = torch.zeros(3, 2, 8, 8)
    maps[torch.arange(3), :, torch.arange(3) + 2, 5] = 10
    box = torch.tensor([[16.0, 8, 32, 24]])
    results = [Instances(SIZE, pred_boxes=Boxes(box.repeat(n, 1))) for n in (1, 0, 2)]
    keypoint_rcnn_inference(maps, results)
    assert [r.pred_keypoints.shape for r in results] == [(1, 2, 3), (0, 2, 3), (2, 2, 3)]
    assert [len(r.pred_keypoint_heatmaps) for r in results] == [1, 0, 2]
    found = torch.cat([r.pred_keypoints for r in results])
    # cells are 2 pixels wide; the bicubic peak lies within one pixel of the cell's centre
    centre = 8 + 2 * (torch.arange(3) + 2) + 1
    assert (found[:, 0, 1] - centre).abs().max() <= 1
    assert (found[..., 0] - (16 + 2 * 5 + 1)).abs().max() <= 1
    assert (found[..., 2] > 1 / 64).all()  # more than chance


def test_head_shape_and_start():
    head = KRCNNConvDeconvUpsampleHead(ShapeSpec(channels=6), num_keypoints=5, conv_dims=[8, 4])
    assert list(head.state_dict()) == [
        f"{name}.{kind}"
        for name in ("conv_fcn1", "conv_fcn2", "score_lowres")
        for kind in ("weight", "bias")
    ]
    for count in (0, 1, 3):
        assert head.layers(torch.zeros(count, 6, 7, 7)).shape == (count, 5, 28, 28)
    with pytest.raises(ValueError, match="visible"):
        BaseKeypointRCNNHead(num_keypoints=1, loss_normalizer="all")


@pytest.mark.parametrize(("by_visible", "normalizer"), [(True, "visible"), (False, 3 * 16 * 0.25)])
def test_normalizer_of_the_config(by_visible, normalizer):
    key = "MODEL.ROI_KEYPOINT_HEAD.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS"
    module = heads(key, by_visible)
    assert module.keypoint_head.loss_normalizer == normalizer


def heads(*options):
    torch.manual_seed(0)
    cfg = tiny_config(*KEYPOINT_OPTIONS, *options)
    return build_roi_heads(cfg, TinyBackbone(cfg, None).output_shape())


def run(module, objects, proposals):
    targets = [with_keypoints(tiny_input(i, n))["instances"] for i, n in enumerate(objects)]
    given = [random_proposals(n, i) for i, n in enumerate(proposals)]
    images = ImageList(torch.zeros(len(given), 3, *SIZE), [SIZE] * len(given))
    return module(images, features(len(given)), given, targets if module.training else None)


@pytest.mark.parametrize("by_visible", [True, False])
@pytest.mark.parametrize("objects", [(0, 0), (1, 0), (2, 7)])
@pytest.mark.parametrize("proposals", [(0, 0), (60, 40)])
def test_losses_are_finite_and_reach_every_weight(objects, proposals, by_visible):
    module = heads("MODEL.ROI_KEYPOINT_HEAD.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS", by_visible)
    _, losses = run(module, objects, proposals)
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_mask", "loss_keypoint"}
    sum(losses.values()).backward()
    assert all(torch.isfinite(v) for v in losses.values())
    assert (losses["loss_keypoint"] > 0) == (sum(objects) > 0)
    for name, p in module.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name


@pytest.mark.parametrize("proposals", [(0, 0), (1, 0), (60, 40)])
@torch.no_grad()
def test_inference(proposals):
    results, _ = run(heads().eval(), (0, 0), proposals)
    for result, count in zip(results, proposals, strict=True):
        assert (len(result) > 0) == (count > 0)
        assert result.pred_keypoints.shape == (len(result), 3, 3)
        assert torch.isfinite(result.pred_keypoints).all()


def test_objects_without_keypoints_are_an_error():
    target = tiny_input(0, 2)["instances"]
    with pytest.raises(ValueError, match="KEYPOINT_ON"):
        heads()(None, features(1), [random_proposals(20)], [target])


def test_learns_where_a_keypoint_is():
    """Heat maps of fixed regions move to the keypoints: from chance to a score above a half."""
    torch.manual_seed(0)
    head = KRCNNConvDeconvUpsampleHead(
        ShapeSpec(channels=4), num_keypoints=3, conv_dims=[16], loss_normalizer="visible"
    )
    x, target = torch.randn(2, 4, 2, 2), [regions(1), regions(1)]
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        loss = head(x, target)["loss_keypoint"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(np.log(64), rel=0.5)
    results = [Instances(SIZE, pred_boxes=t.proposal_boxes) for t in target]
    with torch.no_grad():
        (first, _) = head.eval()(x, results)
    assert (
        first.pred_keypoints[0, :, :2] - target[0].gt_keypoints.tensor[0, :, :2]
    ).abs().max() <= 1
    assert losses[-1] < 0.5 * losses[0]
