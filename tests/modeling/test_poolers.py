import numpy as np
import pytest
import torch

from d2kit.modeling.poolers import (
    ROIPooler,
    assign_boxes_to_levels,
    convert_boxes_to_pooler_format,
)
from d2kit.structures import Boxes, RotatedBoxes
from tests.support.reference_files import reference_path

SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]


@pytest.fixture
def ref() -> dict[str, torch.Tensor]:
    arrays = np.load(reference_path("ops/pooling.npz"))
    return {name: torch.from_numpy(arrays[name]) for name in arrays}


def boxes_of_sides(*sides: float) -> Boxes:
    return Boxes(torch.tensor([[1.0, 2.0, 1.0 + s, 2.0 + s] for s in sides]).view(-1, 4))


def test_boxes_without_a_size_are_pooled_too():
    boxes = Boxes(torch.tensor([[float("nan"), 0, 9, 9], [9.0, 0, 0, 9], [0.0, 0, 64, 64]]))
    levels = assign_boxes_to_levels([boxes], 2, 5, 224, 4)
    assert levels.tolist() == [0, 0, 0]
    pooled = ROIPooler(3, SCALES, 0, "ROIAlignV2")(pyramid(), [boxes])
    assert (pooled[:2] == 0).all()
    assert pooled[2].abs().sum() > 0


def pyramid(num_images: int = 1, channels: int = 3, requires_grad: bool = False):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(num_images, channels, 512 // s, 512 // s, generator=generator).requires_grad_(
            requires_grad
        )
        for s in (4, 8, 16, 32)
    ]


def test_levels_equal_the_reference(ref):
    levels = assign_boxes_to_levels([Boxes(ref["boxes"])], 2, 5, 224, 4)
    assert levels.dtype == torch.int64
    assert torch.equal(levels, ref["levels"])


@pytest.mark.parametrize(
    ("side", "level"), [(0, 0), (1, 0), (111, 0), (112, 1), (223, 1), (224, 2), (448, 3), (9999, 3)]
)
def test_level_of_a_box(side, level):
    assert assign_boxes_to_levels([boxes_of_sides(side)], 2, 5, 224, 4).tolist() == [level]


@pytest.mark.parametrize(
    ("key", "pooler_type", "sampling"),
    [("roi_align_v2", "ROIAlignV2", 0), ("roi_align", "ROIAlign", 2)],
)
def test_pooled_features_equal_the_reference(ref, key, pooler_type, sampling):
    pooler = ROIPooler(7, SCALES, sampling, pooler_type)
    features = [ref[f"feature{i}"] for i in range(4)]
    out = pooler(features, [Boxes(ref["boxes0"]), Boxes(ref["boxes1"])])
    torch.testing.assert_close(out, ref[key], rtol=1e-5, atol=1e-5)


def test_pooler_format():
    lists = [boxes_of_sides(3, 4), boxes_of_sides(), boxes_of_sides(5)]
    rois = convert_boxes_to_pooler_format(lists)
    assert rois[:, 0].tolist() == [0, 0, 2]
    assert torch.equal(rois[:, 1:], torch.cat([b.tensor for b in lists]))
    assert convert_boxes_to_pooler_format([RotatedBoxes(torch.zeros(2, 5))]).shape == (2, 6)


@pytest.mark.parametrize("pooler_type", ["ROIAlign", "ROIAlignV2", "ROIPool"])
@pytest.mark.parametrize("sides", [(), (10,), (500, 10, 120, 11, 230), (10, 11)])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_each_box_is_pooled_from_its_level(pooler_type, sides, requires_grad):
    features = pyramid(2, requires_grad=requires_grad)
    pooler = ROIPooler((3, 4), SCALES, 2, pooler_type)
    lists = [boxes_of_sides(*sides), boxes_of_sides(300, 20)]
    out = pooler(features, lists)
    levels = assign_boxes_to_levels(lists, 2, 5, 224, 4)
    rois = convert_boxes_to_pooler_format(lists)
    assert out.shape == (len(sides) + 2, 3, 3, 4)
    for i, level in enumerate(levels.tolist()):
        alone = pooler.level_poolers[level](features[level], rois[i : i + 1])
        torch.testing.assert_close(out[i : i + 1], alone)


def test_no_box_at_all():
    pooler = ROIPooler(7, SCALES, 0, "ROIAlignV2")
    assert pooler(pyramid(2), [boxes_of_sides(), boxes_of_sides()]).shape == (0, 3, 7, 7)


def test_gradient_reaches_the_used_level_and_links_the_others():
    features = pyramid(requires_grad=True)
    ROIPooler(7, SCALES, 2, "ROIAlignV2")(features, [boxes_of_sides(50)]).sum().backward()
    assert features[0].grad.abs().sum() > 0
    assert all(f.grad is not None and (f.grad == 0).all() for f in features[1:])


def test_single_level():
    pooler = ROIPooler(14, [1 / 16], 0, "ROIAlignV2")
    assert (pooler.min_level, pooler.max_level) == (4, 4)
    assert pooler(pyramid()[2:3], [boxes_of_sides(500, 10)]).shape == (2, 3, 14, 14)


def test_rotated_boxes_at_angle_zero_equal_upright_ones():
    upright = boxes_of_sides(30, 150)
    x = upright.tensor
    centres = (x[:, :2] + x[:, 2:]) / 2
    rotated = RotatedBoxes(torch.cat([centres, x[:, 2:] - x[:, :2], torch.zeros(2, 1)], dim=1))
    features = pyramid()
    a = ROIPooler(5, SCALES, 2, "ROIAlignRotated")(features, [rotated])
    b = ROIPooler(5, SCALES, 2, "ROIAlignV2")(features, [upright])
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((7, SCALES, 0, "ROICrop"), "POOLER_TYPE"),
        ((7, [1 / 4, 1 / 16], 0, "ROIAlign"), "half the one before"),
        ((7, [1 / 3], 0, "ROIAlign"), "powers of 2"),
        (((7, 7, 7), SCALES, 0, "ROIAlign"), "output_size"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ROIPooler(*arguments)


def test_wrong_numbers_of_inputs_are_refused():
    pooler = ROIPooler(7, SCALES, 0, "ROIAlignV2")
    with pytest.raises(ValueError, match="4 feature maps"):
        pooler(pyramid()[:3], [boxes_of_sides(4)])
    with pytest.raises(ValueError, match="each of the 1 images"):
        pooler(pyramid(), [boxes_of_sides(4)] * 2)


@pytest.mark.parametrize("scales", [(0.25,), (0.25, 0.125)])
def test_a_batch_of_no_images_pools_to_nothing(scales):
    features = [torch.zeros(0, 8, 16, 16)] * len(scales)
    pooled = ROIPooler(7, scales, 2, "ROIAlignV2")(features, [])
    assert pooled.shape == (0, 8, 7, 7)
    assert convert_boxes_to_pooler_format([]).shape == (0, 5)
    assert assign_boxes_to_levels([], 2, 3, 224, 4).shape == (0,)
