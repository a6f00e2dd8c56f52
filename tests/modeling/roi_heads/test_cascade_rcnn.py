import pytest
import torch

from d2kit.layers import ShapeSpec
from d2kit.modeling import build_roi_heads
from d2kit.modeling.box_regression import Box2BoxTransform, Matcher
from d2kit.modeling.roi_heads import CascadeROIHeads, FastRCNNConvFCHead, FastRCNNOutputLayers
from d2kit.structures import Boxes, ImageList, Instances, pairwise_iou
from d2kit.utils.events import EventStorage
from tests.support.tiny_heads import (
    CASCADE_OPTIONS,
    KEYPOINT_OPTIONS,
    SIZE,
    features,
    random_proposals,
    with_keypoints,
)
from tests.support.tiny_model import TinyBackbone, tiny_config, tiny_input

STAGES = range(3)
BOX_LOSSES = {f"{name}_stage{k}" for name in ("loss_cls", "loss_box_reg") for k in STAGES}


def heads(*options):
    torch.manual_seed(0)
    cfg = tiny_config(*CASCADE_OPTIONS, *options)
    return build_roi_heads(cfg, TinyBackbone(cfg, None).output_shape())


def run(module, objects, proposals):
    targets = [with_keypoints(tiny_input(i, n))["instances"] for i, n in enumerate(objects)]
    given = [random_proposals(n, i) for i, n in enumerate(proposals)]
    images = ImageList(torch.zeros(len(given), 3, *SIZE), [SIZE] * len(given))
    return module(images, features(len(given)), given, targets if module.training else None)


@pytest.mark.parametrize("objects", [(0, 0), (1, 0), (2, 7)])
@pytest.mark.parametrize("proposals", [(0, 0), (1, 0), (60, 40)])
def test_losses_are_finite_and_reach_every_weight(objects, proposals):
    module = heads(*KEYPOINT_OPTIONS)
    _, losses = run(module, objects, proposals)
    assert set(losses) == BOX_LOSSES | {"loss_mask", "loss_keypoint"}
    sum(losses.values()).backward()
    assert all(torch.isfinite(v) for v in losses.values())
    for name, p in module.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name


@pytest.mark.parametrize("proposals", [(0, 0), (1, 0), (60, 40)])
@torch.no_grad()
def test_inference(proposals):
    results, losses = run(heads().eval(), (0, 0), proposals)
    assert losses == {}
    for result, count in zip(results, proposals, strict=True):
        assert (len(result) > 0) == (count > 0)
        assert result.pred_masks.shape == (len(result), 1, 8, 8)
        assert result.pred_boxes.inside_box(SIZE, 1e-3).all()


class Fixed(FastRCNNOutputLayers):
    """Always the same probabilities and deltas."""

    def __init__(self, probabilities, deltas):
        super().__init__(
            ShapeSpec(channels=2),
            box2box_transform=Box2BoxTransform((1.0, 1.0, 1.0, 1.0)),
            num_classes=2,
            cls_agnostic_bbox_reg=True,
            test_topk_per_image=10,
        )
        self.scores = torch.tensor([probabilities]).log()
        self.deltas = torch.tensor([deltas])

    def forward(self, x):
        return self.scores.expand(len(x), -1), self.deltas.expand(len(x), -1)


def fixed_cascade(probabilities, deltas, **options):
    cfg = tiny_config()
    base = heads("MODEL.MASK_ON", False)
    return CascadeROIHeads(
        box_in_features=["p2", "p3"],
        box_pooler=base.box_pooler,
        box_heads=[
            FastRCNNConvFCHead(cfg, ShapeSpec(channels=16, height=4, width=4)) for _ in deltas
        ],
        box_predictors=[Fixed(p, d) for p, d in zip(probabilities, deltas, strict=True)],
        proposal_matchers=[Matcher([iou], [0, 1]) for iou in (0.5, 0.6, 0.7)[: len(deltas)]],
        num_classes=2,
        batch_size_per_image=16,
        positive_fraction=0.25,
        **options,
    )


@torch.no_grad()
def test_scores_are_averaged_and_boxes_refined_step_by_step():
    module = fixed_cascade(
        [[0.62, 0.08, 0.3], [0.2, 0.6, 0.2], [0.2, 0.1, 0.7]],
        [[0.25, 0.0, 0.0, 0.0], [0.0, 0.5, 0.0, 0.0], [-0.125, 0.0, 0.0, 0.0]],
    ).eval()
    box = Instances(SIZE, proposal_boxes=Boxes(torch.tensor([[8.0, 8, 24, 24]])))
    (result,), _ = module(None, features(1), [box])
    assert result.pred_classes.tolist() == [0, 1]
    torch.testing.assert_close(result.scores, torch.tensor([0.34, 0.26]))
    moved = torch.tensor([8.0 + 4 - 2, 8 + 8, 24 + 4 - 2, 24 + 8])
    torch.testing.assert_close(result.pred_boxes.tensor, moved.repeat(2, 1))


@torch.no_grad()
def test_small_detections_go_where_the_config_says_so():
    plain = run(heads().eval(), (0,), (60,))[0][0]
    sides = plain.pred_boxes.tensor[:, 2:] - plain.pred_boxes.tensor[:, :2]
    assert sides.min() < 15
    module = heads("MODEL.ROI_HEADS.MIN_SIZE_TEST", 15.0).eval()
    (large,), _ = run(module, (0,), (60,))
    assert (large.pred_boxes.tensor[:, 2:] - large.pred_boxes.tensor[:, :2]).min() >= 15


def test_later_stages_are_labelled_on_the_refined_boxes_at_their_own_iou():
    """A box of IoU 0.55 is foreground for stage 0 (0.5), background for stage 1 (0.6)."""
    module = fixed_cascade([[0.3, 0.3, 0.4]] * 2, [[0.0] * 4] * 2, proposal_append_gt=False)
    target = Instances(SIZE, gt_boxes=Boxes(torch.tensor([[0.0, 0, 20, 20]])))
    target.gt_classes = torch.tensor([1])
    boxes = Boxes(torch.tensor([[0.0, 0, 20, 11]]))
    assert pairwise_iou(boxes, target.gt_boxes).item() == pytest.approx(0.55)
    given = Instances(SIZE, proposal_boxes=boxes, objectness_logits=torch.zeros(1))
    with EventStorage() as storage:
        _, losses = module(None, features(1), [given], [target])
        latest = {k: v[0] for k, v in storage.latest().items()}
    assert losses["loss_cls_stage0"].item() == pytest.approx(-torch.tensor(0.3).log().item())
    assert losses["loss_cls_stage1"].item() == pytest.approx(-torch.tensor(0.4).log().item())
    assert losses["loss_box_reg_stage0"] > 0
    assert losses["loss_box_reg_stage1"] == 0
    assert latest["stage1/roi_head/num_fg_samples"] == 0
    assert latest["stage1/roi_head/num_bg_samples"] == 1
    assert "stage0/fast_rcnn/cls_accuracy" in latest


def test_boxes_that_leave_the_image_are_dropped_in_training():
    module = fixed_cascade([[0.3, 0.3, 0.4]] * 2, [[-9.0, 0.0, 0.0, 0.0], [0.0] * 4])
    with EventStorage() as storage:
        _, losses = run(module, (0,), (5,))
        assert storage.latest()["stage1/roi_head/num_bg_samples"][0] == 0
    assert losses["loss_cls_stage1"] == 0


def test_gradients_into_the_features_are_shared_out():
    module, maps = heads(), features(1)
    levels = [x.requires_grad_() for x in maps.values()]
    levels, pulls = [maps[name] for name in module.box_in_features], []
    for share in (1, 4):
        module.num_cascade_stages = share  # of which three are there
        target = with_keypoints(tiny_input(0, 2))["instances"]
        torch.manual_seed(1)
        _, losses = module(None, maps, [random_proposals(30, 0)], [target])
        pulls.append(torch.autograd.grad(losses["loss_cls_stage0"], levels, allow_unused=True))
    for whole, part in zip(*pulls, strict=True):
        assert torch.allclose(part, whole / 4, rtol=1e-5, atol=1e-9)
    assert sum(whole.abs().sum() for whole in pulls[0]) > 0


def test_refined_boxes_pass_no_gradient():
    module = heads()
    _, losses = run(module, (2,), (30,))
    losses["loss_box_reg_stage2"].backward()
    assert module.box_predictor[0].bbox_pred.weight.grad is None
    assert module.box_predictor[2].bbox_pred.weight.grad is not None


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", False], "CLS_AGNOSTIC_BBOX_REG"),
        (["MODEL.ROI_BOX_CASCADE_HEAD.IOUS", (0.5, 0.6)], "one entry per stage"),
        (["MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.6]], "IOU_THRESHOLDS"),
        (["MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", True], "TRAIN_ON_PRED_BOXES"),
    ],
)
def test_mistakes_in_the_config_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        heads(*options)


def test_counts_must_agree():
    with pytest.raises(ValueError, match="as many heads"):
        fixed_cascade([], [])
