import copy
import logging

import pytest
import torch

from d2kit.modeling import META_ARCH_REGISTRY, build_model, optimize_for_inference
from d2kit.structures import Boxes, Instances
from d2kit.utils.events import EventStorage
from tests.support.tiny_model import tiny_config, tiny_input

LOSSES = {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"}


def model(*options):
    torch.manual_seed(0)
    return build_model(tiny_config(*options))


def without(item, *names):
    return {k: v for k, v in item.items() if k not in names}


@pytest.mark.parametrize("objects", [(0, 0), (1,), (0, 3)])
def test_training_step_with_and_without_ground_truth(objects):
    detector = model()
    losses = detector([tiny_input(i, n) for i, n in enumerate(objects)])
    assert set(losses) == LOSSES
    sum(losses.values()).backward()
    assert all(torch.isfinite(v) for v in losses.values())
    for name, p in detector.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name


def test_same_seeds_give_the_same_losses_whatever_the_global_state():
    detector = model()
    batch = [tiny_input(0), tiny_input(1, 3)]

    def losses(inputs):
        torch.rand(1)
        return torch.stack(list(detector(inputs).values()))

    assert torch.equal(losses(batch), losses(batch))
    other = [{**item, "sample_seed": 9} for item in batch]
    assert not torch.equal(losses(batch), losses(other))
    free = [without(item, "sample_seed") for item in batch]
    assert not torch.equal(losses(free), losses(free))


@torch.no_grad()
def test_detections_in_the_wanted_size():
    detector = model().eval()
    item = {**tiny_input(0), "height": 128, "width": 240}
    (output,) = detector([item])
    result = output["instances"]
    assert result.image_size == (128, 240)
    assert result.pred_masks.shape == (len(result), 128, 240)
    assert result.pred_masks.dtype == torch.bool
    (raw,) = detector.inference([item], do_postprocess=False)
    assert raw.image_size == (64, 80)
    assert raw.pred_masks.shape == (len(raw), 1, 8, 8)
    scale = torch.tensor([3.0, 2.0, 3.0, 2.0])
    kept = raw[raw.pred_boxes.nonempty()]
    torch.testing.assert_close(kept.pred_boxes.tensor * scale, result.pred_boxes.tensor)


@torch.no_grad()
def test_masks_of_given_boxes():
    detector = model().eval()
    (raw,) = detector.inference([tiny_input(0)], do_postprocess=False)
    given = Instances(raw.image_size, pred_boxes=raw.pred_boxes, pred_classes=raw.pred_classes)
    (again,) = detector.inference([tiny_input(0)], [given], do_postprocess=False)
    torch.testing.assert_close(again.pred_masks, raw.pred_masks)


@torch.no_grad()
def test_an_image_gives_alone_what_it_gives_in_a_batch():
    detector = model().eval()
    first, second = tiny_input(0, size=(64, 80)), tiny_input(1, size=(48, 72))
    wanted, smaller = detector.inference([first, second], do_postprocess=False)
    (alone,) = detector.inference([first], do_postprocess=False)
    torch.testing.assert_close(alone.pred_boxes.tensor, wanted.pred_boxes.tensor)
    torch.testing.assert_close(alone.pred_masks, wanted.pred_masks)
    assert smaller.pred_boxes.inside_box((48, 72), 1e-3).all()


def test_precomputed_proposals():
    detector = model("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals")
    assert detector.proposal_generator is None
    item = tiny_input(0)
    with pytest.raises(ValueError, match="proposals"):
        detector([item])
    item["proposals"] = Instances(
        (64, 80),
        proposal_boxes=Boxes(torch.tensor([[0.0, 0, 20, 20], [5, 5, 40, 40]])),
        objectness_logits=torch.zeros(2),
    )
    assert set(detector([item])) == {"loss_cls", "loss_box_reg", "loss_mask"}
    with torch.no_grad():
        assert "instances" in detector.eval()([item])[0]


def test_proposal_network():
    network = model("MODEL.META_ARCHITECTURE", "ProposalNetwork")
    assert set(network([tiny_input(0)])) == {"loss_rpn_cls", "loss_rpn_loc"}
    with torch.no_grad():
        (output,) = network.eval()([{**tiny_input(0), "height": 128, "width": 160}])
    assert output["proposals"].image_size == (128, 160)
    assert 0 < len(output["proposals"]) <= 50
    with pytest.raises(ValueError, match="PrecomputedProposals"):
        model(
            "MODEL.META_ARCHITECTURE", "ProposalNetwork",
            "MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals",
        )  # fmt: skip


@torch.no_grad()
def test_optimized_copy_has_equal_outputs_and_leaves_the_model_alone():
    detector = model().train()
    before = copy.deepcopy(detector.state_dict())
    fast = optimize_for_inference(detector)
    assert detector.training
    assert not fast.training
    assert not any(p.requires_grad for p in fast.parameters())
    assert all(torch.equal(v, before[k]) for k, v in detector.state_dict().items())
    (got,), (wanted,) = fast([tiny_input(0)]), detector.eval()([tiny_input(0)])
    torch.testing.assert_close(
        got["instances"].scores, wanted["instances"].scores, rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        got["instances"].pred_boxes.tensor,
        wanted["instances"].pred_boxes.tensor,
        rtol=1e-4,
        atol=1e-3,
    )


def test_statistics_and_pictures_go_to_the_event_storage():
    detector = model("VIS_PERIOD", 2)
    with EventStorage(2) as storage:
        detector([tiny_input(0), tiny_input(1)])
        names = set(storage.latest())
        pictures = {name: image for name, image, _ in storage._vis_data}
    assert names >= {
        "rpn/num_pos_anchors",
        "rpn/num_neg_anchors",
        "roi_head/num_fg_samples",
        "roi_head/num_bg_samples",
        "fast_rcnn/cls_accuracy",
        "fast_rcnn/fg_cls_accuracy",
        "fast_rcnn/false_negative",
        "mask_rcnn/accuracy",
        "mask_rcnn/false_positive",
        "mask_rcnn/false_negative",
    }
    shapes = {name: tuple(image.shape) for name, image in pictures.items()}
    assert shapes == {
        "Left: GT bounding boxes;  Right: Predicted proposals": (3, 64, 160),
        "Left: mask prediction;   Right: mask GT": (3, 8, 16),
    }
    with EventStorage(3) as storage:
        detector([tiny_input(0)])
        assert storage._vis_data == []


def test_diverged_training_is_an_error_that_names_the_part():
    detector = model()
    torch.nn.init.constant_(detector.backbone.stem.weight, float("nan"))
    with pytest.raises(FloatingPointError, match="RPN"):
        detector([tiny_input(0)])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda item: without(item, "image"), "'image'"),
        (lambda item: {**item, "image": item["image"][0]}, "C, H, W"),
        (lambda item: without(item, "instances"), "'instances'"),
    ],
)
def test_bad_inputs_are_named(change, match):
    with pytest.raises(ValueError, match=match):
        model()([change(tiny_input(0))])


def test_mistakes_are_named():
    with pytest.raises(KeyError, match="GeneralizedRCNN"):
        model("MODEL.META_ARCHITECTURE", "GeneralisedRCNN")
    with pytest.raises(ValueError, match="eval"):
        model().inference([tiny_input(0)])
    with pytest.raises(ValueError, match="PIXEL_STD"):
        model("MODEL.PIXEL_MEAN", [1.0, 2.0])
    assert {"GeneralizedRCNN", "ProposalNetwork"} <= set(dict(META_ARCH_REGISTRY))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_falls_back_to_the_cpu_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        detector = model("MODEL.DEVICE", "cuda")
    assert detector.device.type == "cpu"
    assert "no CUDA device" in caplog.text
