import pytest
import torch
from torch.nn import functional as F

from d2kit.contrib.point_rend import ImplicitPointRendMaskHead, add_pointrend_config
from d2kit.contrib.point_rend.point_head import ImplicitPointHead
from d2kit.modeling import build_model
from d2kit.structures import BitMasks, Boxes, Instances
from tests.modeling.roi_heads.test_point_rend import OPTIONS
from tests.support.tiny_model import tiny_config, tiny_input

IMPLICIT = [
    *OPTIONS,
    *("MODEL.ROI_MASK_HEAD.NAME", "ImplicitPointRendMaskHead"),
    *("MODEL.POINT_HEAD.NAME", "ImplicitPointHead"),
]


def model(*options):
    torch.manual_seed(0)
    cfg = tiny_config()
    add_pointrend_config(cfg)
    cfg.merge_from_list([*IMPLICIT, *options])
    return build_model(cfg)


@pytest.mark.parametrize("objects", [(0, 0), (1,), (0, 3)])
def test_training_step(objects):
    detector = model()
    losses = detector([tiny_input(i, n) for i, n in enumerate(objects)])
    assert {"loss_mask_point", "loss_mask_params"} < set(losses)
    assert "loss_mask" not in losses
    sum(losses.values()).backward()
    assert all(torch.isfinite(v) for v in losses.values())
    for name, p in detector.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name


@torch.no_grad()
def test_inference():
    detector = model().eval()
    (raw,) = detector.inference([tiny_input(0)], do_postprocess=False)
    assert raw.pred_masks.shape == (len(raw), 1, 16, 16)
    features = detector.backbone(detector.preprocess_image([tiny_input(0)]).tensor)
    (none,) = detector.roi_heads.mask_head(features, [raw[:0]])
    assert none.pred_masks.shape == (0, 1, 16, 16)


@pytest.mark.parametrize("features", [True, False])
@pytest.mark.parametrize("positions", [True, False])
def test_point_head_is_a_network_with_the_given_weights(features, positions):
    options = {"image_feature_enabled": features, "positional_encoding_enabled": positions}
    if not (features or positions):
        with pytest.raises(ValueError, match="encoded positions"):
            ImplicitPointHead(input_channels=4, num_classes=3, fc_dims=[5], **options)
        return
    torch.manual_seed(0)
    head = ImplicitPointHead(input_channels=4, num_classes=3, fc_dims=[5], **options)
    assert head.num_params == 4 * 5 + 5 + 5 * 3 + 3
    assert list(head.parameters()) == []
    given, x, points = torch.randn(2, 43), torch.randn(2, 4, 6), torch.rand(2, 6, 2)
    found = head(x, points, given)
    for region in range(2):
        w1, b1, w2, b2 = given[region].split([20, 5, 15, 3])
        described = torch.zeros(6, 4)
        if features:
            described = described + x[region].T
        if positions:
            angle = 2 * torch.pi * (2 * points[region] - 1)
            angle = angle @ head.positional_encoding_gaussian_matrix
            described = described + torch.cat([angle.sin(), angle.cos()], dim=1)
        hidden = F.linear(described, w1.view(5, 4), b1).relu()
        torch.testing.assert_close(found[region].T, F.linear(hidden, w2.view(3, 5), b2))


def test_learns_a_mask_from_points_alone():
    """From random weights to a disc in a box, by the loss at points; features are noise."""
    torch.manual_seed(0)
    detector = model(
        *("MODEL.POINT_HEAD.FC_DIM", 16, "MODEL.POINT_HEAD.TRAIN_NUM_POINTS", 64),
        *("MODEL.ROI_MASK_HEAD.FC_DIM", 32, "MODEL.POINT_HEAD.SUBDIVISION_STEPS", 3),
    )
    head = detector.roi_heads.mask_head
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(80.0), indexing="ij")
    truth = ((x - 31.5) ** 2 + (y - 31.5) ** 2).sqrt() < 12
    box = Boxes(torch.tensor([[16.0, 16, 48, 48]]))
    target = Instances(
        (64, 80), gt_masks=BitMasks(truth[None]), gt_classes=torch.tensor([1]), proposal_boxes=box
    )
    features = {"p2": torch.randn(1, 16, 16, 20), "p3": torch.randn(1, 16, 8, 10)}
    optimizer = torch.optim.Adam(head.parameters(), lr=0.01)
    for _ in range(150):
        total = sum(head(features, [target]).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    with torch.no_grad():
        found = Instances((64, 80), pred_boxes=box, pred_classes=torch.tensor([1]))
        (found,) = head.eval()(features, [found])
    assert found.pred_masks.shape == (1, 1, 32, 32)
    mask, wanted = found.pred_masks[0, 0] > 0.5, truth[16:48, 16:48]
    assert (mask & wanted).sum() / (mask | wanted).sum() > 0.85


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="ImplicitPointHead"):
        model("MODEL.POINT_HEAD.NAME", "StandardPointHead")
    with pytest.raises(ValueError, match="ImplicitPointRendMaskHead needs the keys"):
        ImplicitPointRendMaskHead(tiny_config(), {})
