import sys

import pytest
import torch
import torchvision

from d2kit.layers import ROIAlign, ROIAlignRotated, roi_align, roi_align_rotated


def random_case(seed, n=2, channels=5):
    """Return a feature map and boxes, half of them beyond its border, for a scale of 1/8."""
    g = torch.Generator().manual_seed(seed)
    height, width = [1, 7, 20][seed % 3], [33, 9, 1][seed // 3 % 3]
    features = torch.randn(n, channels, height, width, generator=g)
    extent = torch.tensor([width, height]) * 8.0
    centre = (torch.rand(30, 2, generator=g) * 1.4 - 0.2) * extent
    half = torch.exp(torch.rand(30, 2, generator=g) * 6) / 2
    image = torch.randint(0, n, (30, 1), generator=g).float()
    return features, torch.cat([image, centre - half, centre + half], dim=1)


@pytest.mark.parametrize("seed", range(9))
@pytest.mark.parametrize("sampling", [-1, 0, 1, 2, 3])
@pytest.mark.parametrize("aligned", [True, False])
def test_equals_torchvision_with_gradient(seed, sampling, aligned):
    features, rois = random_case(seed)
    size = [7, (3, 5), 1][seed % 3]
    ours, theirs = features.clone().requires_grad_(), features.clone().requires_grad_()
    found = roi_align(ours, rois, size, 1 / 8, sampling, aligned)
    expected = torchvision.ops.roi_align(theirs, rois, size, 1 / 8, sampling, aligned)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed))
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_inverted_boxes():
    features, rois = random_case(4)
    rois = rois[:, [0, 3, 2, 1, 4]]
    expected = torchvision.ops.roi_align(features, rois, 7, 1 / 8, 2, True)
    torch.testing.assert_close(roi_align(features, rois, 7, 1 / 8, 2, True), expected)
    assert (roi_align(features, rois, 7, 1 / 8, 0, True) == 0).all()  # no sample at all


def test_not_finite_boxes_give_zeros():
    features, rois = random_case(1)
    rois = rois[:3].clone()
    rois[0, 1], rois[1, 3] = float("nan"), float("inf")
    for sampling in (0, 2):
        pooled = roi_align(features, rois, 7, 1 / 8, sampling, True)
        assert (pooled[:2] == 0).all()
        assert torch.isfinite(pooled).all()


def test_parts_do_not_change_the_result(monkeypatch):
    features, rois = random_case(1)
    features.requires_grad_()
    whole = roi_align(features, rois, 7, 1 / 8, 0, True)
    (grad,) = torch.autograd.grad(whole.square().sum(), features)
    monkeypatch.setattr(sys.modules["d2kit.layers.roi_align"], "_TAPS_AT_ONCE", 5000)
    parts = roi_align(features, rois, 7, 1 / 8, 0, True)
    assert torch.equal(whole, parts)
    (again,) = torch.autograd.grad(parts.square().sum(), features)
    torch.testing.assert_close(grad, again)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_features_keep_the_boxes(dtype):
    features, rois = random_case(1)
    features = features.to(dtype)
    pooled = ROIAlign(7, 1 / 8, 2)(features, rois)
    assert pooled.dtype == dtype
    expected = roi_align(features.float(), rois, 7, 1 / 8, 2, True)
    assert torch.equal(pooled, expected.to(dtype))


def test_gradient_in_double():
    features = torch.randn(1, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0, 3.0, 4, 40, 60]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: roi_align(x, rois, 3, 0.1, 0, True), features)
    turned = torch.tensor([[0, 3.0, 4, 5, 6, 33]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: roi_align_rotated(x, turned, 3, 1.0, 0), features)


@pytest.mark.parametrize("columns", [5, 6])
def test_no_boxes(columns):
    features = torch.randn(2, 3, 8, 8, requires_grad=True)
    layer = ROIAlign(7, 0.5, 0) if columns == 5 else ROIAlignRotated(7, 0.5, 0)
    pooled = layer(features, torch.zeros(0, columns))
    assert pooled.shape == (0, 3, 7, 7)
    pooled.sum().backward()
    assert features.grad.abs().sum() == 0
    assert "spatial_scale=0.5" in repr(layer)


def test_boxes_per_image_and_layout():
    features, _ = random_case(1)
    boxes = [torch.tensor([[3.0, 4, 30, 40]]), torch.tensor([[1.0, 2, 20, 20], [5, 5, 9, 9]])]
    pooled = roi_align(features, boxes, 7, 1 / 8, 2)
    expected = torchvision.ops.roi_align(features, boxes, 7, 1 / 8, 2)
    torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-5)
    rows = features.contiguous(memory_format=torch.channels_last)
    assert torch.equal(roi_align(rows, boxes, 7, 1 / 8, 2), pooled)


def test_wrong_shapes():
    with pytest.raises(ValueError, match=r"boxes \(R, 5\)"):
        roi_align(torch.zeros(1, 1, 4, 4), torch.zeros(3, 4), 7)
    with pytest.raises(ValueError, match=r"boxes \(R, 6\)"):
        roi_align_rotated(torch.zeros(1, 1, 4, 4), torch.zeros(3, 5), 7, 1.0, 0)


@pytest.mark.parametrize("sampling", [0, 2])
def test_rotated_by_nothing_is_roi_align(sampling):
    features, rois = random_case(1)
    centre, side = (rois[:, 1:3] + rois[:, 3:]) / 2, rois[:, 3:] - rois[:, 1:3]
    turned = torch.cat([rois[:, :1], centre, side, torch.zeros(30, 1)], dim=1)
    found = roi_align_rotated(features, turned, (3, 5), 1 / 8, sampling)
    expected = roi_align(features, rois, (3, 5), 1 / 8, sampling, True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_rotated_by_a_quarter_is_roi_align_of_the_turned_map():
    features = torch.randn(1, 2, 20, 20)
    found = roi_align_rotated(features, torch.tensor([[0, 9.0, 11, 8, 6, 90]]), 4, 1.0, 2)
    turned = torch.rot90(features, -1, (2, 3))  # clockwise: (x, y) goes to (20 - y, x)
    upright = torch.tensor([[0, 20.0 - 11, 9, 8, 6, 0]])
    torch.testing.assert_close(found, roi_align_rotated(turned, upright, 4, 1.0, 2))


@pytest.mark.gpu
def test_same_on_the_gpu():
    features, rois = random_case(1)
    cpu = roi_align(features, rois, 7, 1 / 8, 0, True)
    gpu = roi_align(features.cuda(), rois.cuda(), 7, 1 / 8, 0, True).cpu()
    torch.testing.assert_close(cpu, gpu, rtol=1e-5, atol=1e-5)
    turned = torch.cat([rois, torch.full((30, 1), 20.0)], dim=1)
    cpu = roi_align_rotated(features, turned, 7, 1 / 8, 0)
    gpu = roi_align_rotated(features.cuda(), turned.cuda(), 7, 1 / 8, 0).cpu()
    torch.testing.assert_close(cpu, gpu, rtol=1e-5, atol=1e-5)
