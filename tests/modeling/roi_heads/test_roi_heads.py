import pytest
import torch

from d2kit.modeling import build_roi_heads
from d2kit.modeling.roi_heads import select_foreground_proposals
from d2kit.modeling.roi_heads.roi_heads import select_proposals_with_visible_keypoints
from d2kit.modeling.sampling import SampledBitMasks, per_image_seeds
from d2kit.structures import BitMasks, Boxes, ImageList, Instances, Keypoints
from d2kit.utils.events import EventStorage
from tests.support.tiny_heads import SIZE, features, random_proposals
from tests.support.tiny_model import TinyBackbone, tiny_config, tiny_input


def heads(*options):
    torch.manual_seed(0)
    cfg = tiny_config(*options)
    return build_roi_heads(cfg, TinyBackbone(cfg, None).output_shape())


def run(module, objects, proposals):
    targets = [tiny_input(i, n)["instances"] for i, n in enumerate(objects)]
    given = [random_proposals(n, i) for i, n in enumerate(proposals)]
    images = ImageList(torch.zeros(len(given), 3, *SIZE), [SIZE] * len(given))
    return module(images, features(len(given)), given, targets if module.training else None)


@pytest.mark.parametrize("objects", [(0, 0), (1, 0), (2, 7)])
@pytest.mark.parametrize("proposals", [(0, 0), (1, 0), (60, 40)])
def test_losses_are_finite_and_reach_every_weight(objects, proposals):
    module = heads()
    _, losses = run(module, objects, proposals)
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_mask"}
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


def test_sampling_labels_and_targets():
    module = heads("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 20)
    target = tiny_input(0, 3)["instances"]
    with EventStorage() as storage:
        sampled, empty = module.label_and_sample_proposals(
            [random_proposals(50), random_proposals(50)], [target, target[:0]]
        )
        latest = {k: v[0] for k, v in storage.latest().items()}
    foreground = sampled.gt_classes < 3
    count = int(foreground.sum())
    assert len(sampled) == len(empty) == 20
    assert 3 <= count <= 5  # the ground truths themselves; a quarter of 20
    assert foreground[:count].all()
    assert (empty.gt_classes == 3).all()
    iou = torch.tensor(
        [
            float(_iou(p, g))
            for p, g in zip(sampled.proposal_boxes.tensor, sampled.gt_boxes.tensor, strict=True)
        ]
    )
    assert ((iou >= 0.5) == foreground).all()
    assert len(sampled.gt_masks) == 20
    assert latest["roi_head/num_fg_samples"] == count / 2
    assert latest["roi_head/num_bg_samples"] == (40 - count) / 2


def _iou(a, b):
    inter = (torch.min(a[2:], b[2:]) - torch.max(a[:2], b[:2])).clamp(min=0).prod()
    return inter / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - inter)


@pytest.mark.parametrize("picked", [[], [1], [0, 1, 1, 0, 2]])
def test_sampled_bitmaps_equal_copied_ones(picked):
    rng = torch.Generator().manual_seed(0)
    masks = BitMasks(torch.rand(3, 20, 24, generator=rng) > 0.5)
    index = torch.tensor(picked, dtype=torch.int64)
    shared, copied = SampledBitMasks(masks.tensor, index), masks[index]
    corner = torch.rand(len(picked), 2, generator=rng) * 10
    boxes = torch.cat([corner, corner + 8], dim=1)
    for a, b in ((shared, copied), (shared[1:], copied[1:]), (shared.to("cpu"), copied)):
        assert len(a) == len(b)
        assert a.image_size == b.image_size
        assert torch.equal(a.tensor, b.tensor)
        wanted = b.crop_and_resize(boxes[-len(b) :] if len(b) else boxes[:0], 7)
        assert torch.equal(a.crop_and_resize(boxes[-len(a) :] if len(a) else boxes[:0], 7), wanted)
    if picked:
        assert torch.equal(shared[0].tensor, copied[0].tensor)
    with pytest.raises(ValueError, match="boxes"):
        shared.crop_and_resize(torch.zeros(9, 4), 7)


def test_bitmaps_of_the_ground_truth_are_not_copied():
    target = tiny_input(0, 3)["instances"]
    target.gt_masks = BitMasks.from_polygon_masks(target.gt_masks, *SIZE)
    (sampled,) = heads().label_and_sample_proposals([random_proposals(50)], [target])
    assert sampled.gt_masks.source.data_ptr() == target.gt_masks.tensor.data_ptr()
    _, losses = run_one(heads(), target)
    assert losses["loss_mask"] > 0


def run_one(module, target):
    images = ImageList(torch.zeros(1, 3, *SIZE), [SIZE])
    return module(images, features(1), [random_proposals(50)], [target])


def test_sampling_depends_on_the_seed_of_the_image_alone():
    module = heads()
    target = tiny_input(0, 2)["instances"]

    def draw(*seeds):
        with per_image_seeds(seeds):
            return [
                p.proposal_boxes.tensor
                for p in module.label_and_sample_proposals(
                    [random_proposals(80) for _ in seeds], [target for _ in seeds]
                )
            ]

    first, second = draw(1, 2)
    (again,) = draw(2)
    assert torch.equal(second, again)
    assert not torch.equal(first, second)


def test_ground_truth_classes_out_of_range_are_an_error():
    target = tiny_input(0, 1)["instances"]
    target.gt_classes = torch.tensor([3])
    with pytest.raises(ValueError, match="NUM_CLASSES"):
        heads().label_and_sample_proposals([random_proposals(4)], [target])


def test_train_on_pred_boxes_moves_the_boxes_of_the_mask_head():
    module = heads("MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", True)
    torch.nn.init.constant_(module.box_predictor.bbox_pred.bias, 1.0)
    sampled, losses = run(module, (2,), (30,))
    assert torch.isfinite(losses["loss_mask"])
    boxes = sampled[0].proposal_boxes.tensor
    given = torch.cat(
        [random_proposals(30).proposal_boxes.tensor, tiny_input(0, 2)["instances"].gt_boxes.tensor]
    )
    assert not (boxes[:, None] == given).all(-1).any()
    assert not boxes.requires_grad


def test_foreground_selection():
    p = random_proposals(4)
    p.gt_classes = torch.tensor([0, 3, -1, 2])
    (kept,), (mask,) = select_foreground_proposals([p], 3)
    assert mask.tolist() == [True, False, False, True]
    assert kept.gt_classes.tolist() == [0, 2]


def test_selection_by_visible_keypoints():
    p = Instances(SIZE, proposal_boxes=Boxes(torch.tensor([[0.0, 0, 10, 10]] * 3)))
    points = torch.tensor([[[5.0, 5, 2]], [[5, 5, 0]], [[15, 5, 2]]])
    p.gt_keypoints = Keypoints(points)
    kept, none = select_proposals_with_visible_keypoints([p, random_proposals(0)])
    assert kept.gt_keypoints.tensor.tolist() == points[:1].tolist()
    assert len(none) == 0


def test_a_keypoint_head_of_the_user_is_run():
    class Corner(torch.nn.Module):
        def forward(self, x, instances):
            for one in instances:
                one.pred_keypoints = one.pred_boxes.tensor[:, None, :3]
            return instances

    module = heads()
    module.keypoint_on, module.keypoint_in_features = True, ["p2"]
    module.keypoint_pooler, module.keypoint_head = None, Corner()
    results, _ = run(module.eval(), (0,), (5,))
    assert results[0].pred_keypoints.shape == (len(results[0]), 1, 3)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (
            ["MODEL.KEYPOINT_ON", True, "MODEL.ROI_HEADS.NAME", "Res5ROIHeads"],
            ValueError,
            "KEYPOINT_ON",
        ),
        (["MODEL.ROI_HEADS.NAME", "StandardRoiHeads"], KeyError, "StandardROIHeads"),
        (["MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p4"]], ValueError, "p4"),
        (["MODEL.ROI_HEADS.NAME", "Res5ROIHeads"], ValueError, "one level"),
        (["MODEL.ROI_MASK_HEAD.NAME", "MaskHead"], KeyError, "ROI_MASK_HEAD"),
    ],
)
def test_mistakes_in_the_config_are_named(options, error, match):
    with pytest.raises(error, match=match):
        heads(*options)


def test_mistakes_in_the_call_are_named():
    module = heads()
    with pytest.raises(ValueError, match="targets"):
        module(None, features(1), [random_proposals(2)])
    with pytest.raises(ValueError, match="eval"):
        module.forward_with_given_boxes(features(1), [])
    with pytest.raises(ValueError, match="gt_classes"):
        module.label_and_sample_proposals([random_proposals(2)], [Instances(SIZE)])
    with pytest.raises(ValueError, match="pred_classes"):
        module.eval().forward_with_given_boxes(features(1), [random_proposals(2)])
