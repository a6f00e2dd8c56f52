"""What holds for every one-stage and segmentation model."""

import pytest
import torch

from d2kit.modeling import META_ARCH_REGISTRY, optimize_for_inference
from d2kit.utils.events import EventStorage
from tests.support.tiny_dense import OPTIONS, labelled_input, tiny_dense_model

DETECTORS = ["RetinaNet", "FCOS"]
LOSSES = {
    "RetinaNet": {"loss_cls", "loss_box_reg"},
    "FCOS": {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"},
    "SemanticSegmentor": {"loss_sem_seg"},
    "PanopticFPN": {"loss_sem_seg", "loss_cls", "loss_box_reg", "loss_mask"}
    | {"loss_rpn_cls", "loss_rpn_loc"},
}


def without(item, *names):
    return {k: v for k, v in item.items() if k not in names}


@pytest.mark.parametrize("name", LOSSES)
def test_three_steps_of_training(name):
    model = tiny_dense_model(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    batch = [labelled_input(0), labelled_input(1, 3, (48, 72))]
    totals = []
    for _ in range(3):
        losses = model(batch)
        assert set(losses) == LOSSES[name]
        optimizer.zero_grad()
        sum(losses.values()).backward()
        for key, p in model.named_parameters():
            assert p.grad is not None, key
            assert torch.isfinite(p.grad).all(), key
            assert p.grad.any(), key
        optimizer.step()
        # the divisor of one-stage losses starts too high for tiny images, and falls
        divisor = model.loss_normalizer.average if name in DETECTORS else 1.0
        totals.append(sum(losses.values()).item() * float(divisor))
    assert totals[0] > totals[1] > totals[2]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("objects", [(0, 0), (1,), (0, 3)])
def test_training_step_with_and_without_ground_truth(name, objects):
    model = tiny_dense_model(name)
    losses = model([labelled_input(i, n) for i, n in enumerate(objects)])
    assert set(losses) == LOSSES[name]
    sum(losses.values()).backward()
    assert all(torch.isfinite(v) for v in losses.values())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("name", LOSSES)
def test_mixed_precision(name):
    model = tiny_dense_model(name)
    batch = [labelled_input(0), labelled_input(1, 3)]
    exact = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(batch)
    sum(losses.values()).backward()
    for key, value in losses.items():
        assert value.dtype == torch.float32, key
        torch.testing.assert_close(value, exact[key], rtol=0.15, atol=0.05)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (output,) = model.eval()([labelled_input(0)])
    if "instances" in output:
        assert output["instances"].pred_boxes.tensor.dtype == torch.float32
        assert output["instances"].scores.dtype == torch.float32


@pytest.mark.parametrize("name", ["RetinaNet", "FCOS", "SemanticSegmentor"])
def test_a_training_step_waits_for_no_value(name):
    """Tensors without values: whatever the host would have to wait for on a GPU raises here."""
    model = tiny_dense_model(name).to("meta")
    batch = [labelled_input(0), labelled_input(1, 0), labelled_input(2, 3)]
    for item in batch:
        item["instances"] = item["instances"].to("meta")
        item["sem_seg"], item["image"] = item["sem_seg"].to("meta"), item["image"].to("meta")
    sum(model(batch).values()).backward()


@pytest.mark.parametrize("name", DETECTORS)
@torch.no_grad()
def test_detections_in_the_wanted_size(name):
    model = tiny_dense_model(name).eval()
    (small,) = model([labelled_input(0)])
    (large,) = model([{**labelled_input(0), "height": 128, "width": 240}])
    small, large = small["instances"], large["instances"]
    assert 0 < len(small) <= 100
    assert large.image_size == (128, 240)
    assert large.pred_boxes.inside_box((128, 240), 1e-3).all()
    assert (small.scores.diff() <= 0).all()
    assert set(small.pred_classes.tolist()) <= {0, 1, 2}
    scale = torch.tensor([3.0, 2.0, 3.0, 2.0])
    torch.testing.assert_close(small.pred_boxes.tensor * scale, large.pred_boxes.tensor)


@pytest.mark.parametrize("name", DETECTORS)
@torch.no_grad()
def test_the_candidates_are_the_best_pairs(name):
    """Against the definition: all pairs of a level, sorted; and one image at a time."""
    key = {"RetinaNet": "RETINANET", "FCOS": "FCOS"}[name]
    model = tiny_dense_model(name, f"MODEL.{key}.TOPK_CANDIDATES_TEST", 40).eval()
    features = [torch.zeros(1, 1, 6, 7), torch.zeros(1, 1, 3, 4)]
    anchors = model.anchor_generator(features)
    rng = torch.Generator().manual_seed(0)
    scores = [torch.rand(2, len(a), 3, generator=rng) for a in anchors]
    deltas = [torch.randn(2, len(a), 4, generator=rng) * 0.2 for a in anchors]
    boxes, best, classes = model._best_candidates(anchors, scores, deltas)
    for i in range(2):
        column = 0
        for anchor, score, delta in zip(anchors, scores, deltas, strict=True):
            everything = model.box2box_transform.apply_deltas(delta[i], anchor.tensor)
            order = score[i].flatten().argsort(descending=True)[:40]
            place = slice(column, column + len(order))
            assert torch.equal(best[i, place], score[i].flatten()[order])
            assert torch.equal(classes[i, place], order % 3)
            torch.testing.assert_close(boxes[i, place], everything[order // 3])
            column += len(order)
        assert column == best.shape[1]
        alone = model.inference_single_image(
            anchors, [s[i] for s in scores], [d[i] for d in deltas], (64, 80)
        )
        together = model._detections(boxes, best, classes, [(64, 80)] * 2)[i]
        assert torch.equal(alone.pred_boxes.tensor, together.pred_boxes.tensor)
        assert torch.equal(alone.scores, together.scores)


@pytest.mark.parametrize("name", DETECTORS)
@torch.no_grad()
def test_no_detection(name):
    key = {"RetinaNet": "RETINANET", "FCOS": "FCOS"}[name]
    model = tiny_dense_model(name, f"MODEL.{key}.SCORE_THRESH_TEST", 1.0).eval()
    (output,) = model([labelled_input(0)])
    assert len(output["instances"]) == 0
    assert output["instances"].pred_boxes.tensor.shape == (0, 4)


@pytest.mark.parametrize("name", DETECTORS)
@torch.no_grad()
def test_predictions_that_are_not_finite_are_no_detections(name):
    model = tiny_dense_model(name).eval()
    torch.nn.init.constant_(model.head.bbox_pred.bias, float("nan"))
    (output,) = model([labelled_input(0)])
    assert len(output["instances"]) == 0


@pytest.mark.parametrize("name", LOSSES)
@torch.no_grad()
def test_an_image_gives_alone_what_it_gives_in_a_batch(name):
    model = tiny_dense_model(name).eval()
    first, second = labelled_input(0, size=(64, 80)), labelled_input(1, size=(48, 72))
    (alone,), (wanted, smaller) = model([first]), model([first, second])
    for key in set(alone) & {"sem_seg"}:
        torch.testing.assert_close(alone[key], wanted[key])
        assert smaller[key].shape == (3, 48, 72)
    if "instances" in alone:
        torch.testing.assert_close(alone["instances"].scores, wanted["instances"].scores)
        assert smaller["instances"].image_size == (48, 72)


@pytest.mark.parametrize("name", LOSSES)
@torch.no_grad()
def test_optimized_copy_has_equal_outputs(name):
    options = {"SemanticSegmentor": ["MODEL.SEM_SEG_HEAD.NORM", "BN"]}.get(name, [])
    model = tiny_dense_model(name, *options).eval()
    fast = optimize_for_inference(model)
    if options:
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in fast.modules())
    (got,), (wanted,) = fast([labelled_input(0)]), model([labelled_input(0)])
    for key in wanted:
        if key == "instances":
            torch.testing.assert_close(got[key].scores, wanted[key].scores, rtol=1e-4, atol=1e-5)
        elif key == "sem_seg":
            torch.testing.assert_close(got[key], wanted[key], rtol=1e-4, atol=1e-4)
        else:
            assert (got[key][0] == wanted[key][0]).float().mean() > 0.99


@pytest.mark.parametrize("name", DETECTORS)
def test_pictures_and_counts_go_to_the_event_storage(name):
    model = tiny_dense_model(name, "VIS_PERIOD", 2)
    with EventStorage(2) as storage:
        model([labelled_input(0), labelled_input(1)])
        assert storage.latest()["num_pos_anchors"][0] > 0
        ((title, picture, _),) = storage._vis_data
    assert title == "Top: GT bounding boxes; Bottom: 20 Highest Scoring Results"
    assert picture.shape == (3, 128, 80)
    with EventStorage(3) as storage:
        model([labelled_input(0)])
        assert storage._vis_data == []


@pytest.mark.parametrize("name", LOSSES)
def test_missing_ground_truth_is_named(name):
    key = "instances" if name in DETECTORS else "sem_seg"
    with pytest.raises(ValueError, match=f"'{key}'"):
        tiny_dense_model(name)([without(labelled_input(0), key)])


def test_registered():
    assert set(OPTIONS) <= set(dict(META_ARCH_REGISTRY))


@pytest.mark.parametrize("name", ["RetinaNet", "FCOS", "PanopticFPN"])
@pytest.mark.parametrize("wrong", [3, -1])
def test_a_class_that_the_model_has_not_is_refused(name, wrong):
    model = tiny_dense_model(name)
    batch = [labelled_input(1), labelled_input(2)]
    batch[1]["instances"].gt_classes[1] = wrong
    with pytest.raises(ValueError, match=r"input 1 of the batch: ground-truth classes must be in"):
        model(batch)
