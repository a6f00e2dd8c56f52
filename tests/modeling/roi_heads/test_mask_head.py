import pytest
import torch
import torch.nn.functional as F

from d2kit.layers import ShapeSpec
from d2kit.modeling.roi_heads.mask_head import (
    BaseMaskRCNNHead,
    MaskRCNNConvUpsampleHead,
    mask_rcnn_inference,
    mask_rcnn_loss,
)
from d2kit.structures import BitMasks, Boxes, Instances
from d2kit.utils.events import EventStorage

CLASSES = 5


def head(num_classes=CLASSES, **changes):
    torch.manual_seed(0)
    options = {"num_classes": num_classes, "conv_dims": [6, 4], **changes}
    module = MaskRCNNConvUpsampleHead(ShapeSpec(channels=3), **options)
    torch.nn.init.normal_(module.predictor.weight)
    torch.nn.init.normal_(module.predictor.bias)
    torch.nn.init.normal_(module.deconv.bias)
    return module


def regions(*counts):
    """Per image: boxes on whole pixels, classes, and rectangular masks."""
    result = []
    for count in counts:
        masks = torch.zeros(count, 20, 24, dtype=torch.bool)
        masks[:, 4:12, 3:15] = True
        one = Instances(
            (20, 24), proposal_boxes=Boxes(torch.tensor([[2.0, 2, 18, 18]] * count).reshape(-1, 4))
        )
        one.gt_classes = one.pred_classes = torch.arange(count) % CLASSES
        one.gt_masks = BitMasks(masks)
        result.append(one)
    return result


@pytest.mark.parametrize("num_classes", [CLASSES, 1])
@pytest.mark.parametrize("counts", [(0,), (1,), (4, 0, 3)])
def test_own_class_alone_equals_all_classes(num_classes, counts):
    module = head(num_classes).eval()
    x = torch.randn(sum(counts), 3, 7, 5)
    instances, expected = regions(*counts), regions(*counts)
    with torch.no_grad():
        assert module(x, instances) is instances
        mask_rcnn_inference(module.layers(x), expected)
    for got, wanted in zip(instances, expected, strict=True):
        assert got.pred_masks.shape == (len(got), 1, 14, 10)
        torch.testing.assert_close(got.pred_masks, wanted.pred_masks)


def test_loss_and_gradients_equal_those_over_all_classes():
    module = head()
    x = torch.randn(5, 3, 7, 7)
    module(x, regions(3, 2))["loss_mask"].backward()
    grads = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    mask_rcnn_loss(module.layers(x), regions(3, 2)).backward()
    for p, grad in zip(module.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-6)


def test_loss_is_the_mean_cross_entropy_of_the_own_class():
    logits = torch.randn(3, CLASSES, 8, 8)
    instances = regions(1, 2)
    own = logits[torch.arange(3), torch.tensor([0, 0, 1])]
    target = torch.cat(
        [i.gt_masks.crop_and_resize(i.proposal_boxes.tensor, 8) for i in instances]
    ).float()
    assert 0 < target.mean() < 1
    expected = F.binary_cross_entropy_with_logits(own, target)
    with EventStorage() as storage:
        assert mask_rcnn_loss(logits, instances, 1).item() == pytest.approx(expected.item())
        latest = {k: v[0] for k, v in storage.latest().items()}
    accuracy = ((own > 0) == (target > 0.5)).float().mean().item()
    assert latest["mask_rcnn/accuracy"] == pytest.approx(accuracy)


@pytest.mark.parametrize("counts", [(), (0, 0), (1, 0), (2, 3)])
def test_gradients_are_finite_and_reach_every_weight(counts):
    module = head()
    x = torch.randn(sum(counts), 3, 7, 7)
    loss = module(x, regions(*counts))["loss_mask"]
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())


def test_a_subclass_that_redefines_layers_is_obeyed():
    class Constant(MaskRCNNConvUpsampleHead):
        def layers(self, x):
            return super().layers(x) * 0 + 2.0

    module = Constant(ShapeSpec(channels=3), num_classes=CLASSES, conv_dims=[4]).eval()
    instances = module(torch.randn(2, 3, 7, 7), regions(2))
    expected = torch.full((2, 1, 14, 14), 2.0).sigmoid()
    torch.testing.assert_close(instances[0].pred_masks, expected)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="conv_dims"):
        MaskRCNNConvUpsampleHead(ShapeSpec(channels=3), num_classes=1, conv_dims=[])
    with pytest.raises(NotImplementedError, match="layers"):
        BaseMaskRCNNHead()(torch.zeros(0, 1, 1, 1), [])
