import copy

import numpy as np
import pytest
import torch

from d2kit.config import get_cfg
from d2kit.layers import ShapeSpec
from d2kit.modeling.anchor_generator import (
    BufferList,
    DefaultAnchorGenerator,
    RotatedAnchorGenerator,
    build_anchor_generator,
)
from d2kit.structures import Boxes, RotatedBoxes
from tests.support.reference_files import reference_path


def grids(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    return [torch.zeros(1, 1, h, w) for h, w in sizes]


def joined(boxes) -> np.ndarray:
    return torch.cat([b.tensor for b in boxes]).numpy()


@pytest.mark.parametrize("order", [[(6, 5), (3, 3), (2, 2)]])
def test_pyramid_equals_the_reference(order):
    generator = DefaultAnchorGenerator(
        sizes=[[32], [64], [128]], aspect_ratios=[[0.5, 1, 2]], strides=[4, 8, 16], offset=0.0
    )
    anchors = generator(grids(*order))
    assert all(isinstance(a, Boxes) for a in anchors)
    reference = np.load(reference_path("ops/anchors.npz"))
    np.testing.assert_allclose(joined(anchors), reference["fpn"], rtol=1e-5, atol=1e-5)


def test_offset_equals_the_reference():
    generator = DefaultAnchorGenerator(
        sizes=[[32, 64]], aspect_ratios=[[0.5, 1, 2]], strides=[16], offset=0.5
    )
    reference = np.load(reference_path("ops/anchors.npz"))
    np.testing.assert_allclose(
        joined(generator(grids((6, 5)))), reference["offset"], rtol=1e-5, atol=1e-5
    )


def test_rotated_equals_the_reference():
    generator = RotatedAnchorGenerator(
        sizes=[[32, 64]], aspect_ratios=[[0.5, 1]], angles=[[-45, 0, 45]], strides=[8]
    )
    anchors = generator(grids((2, 3)))
    assert isinstance(anchors[0], RotatedBoxes)
    reference = np.load(reference_path("ops/anchors.npz"))
    np.testing.assert_allclose(joined(anchors), reference["rotated"], rtol=1e-5, atol=1e-5)
    assert generator.num_anchors == [12]
    assert generator.box_dim == 5


def small() -> DefaultAnchorGenerator:
    return DefaultAnchorGenerator(sizes=[[8.0]], aspect_ratios=[[1.0]], strides=[4, 8], offset=0.0)


def test_one_list_serves_all_levels():
    flat = DefaultAnchorGenerator(sizes=[8.0], aspect_ratios=[1.0], strides=[4, 8], offset=0.0)
    features = grids((2, 2), (1, 1))
    np.testing.assert_array_equal(joined(flat(features)), joined(small()(features)))
    assert flat.num_anchors == flat.num_cell_anchors == [1, 1]


def test_grids_are_kept_per_size_and_forgotten_in_time():
    generator = small()
    features = grids((3, 2), (2, 1))
    first, again = generator(features), generator(features)
    assert first[0].tensor.data_ptr() == again[0].tensor.data_ptr()
    other = generator(grids((2, 3), (1, 2)))
    assert other[0].tensor[1].tolist() == [0.0, -4.0, 8.0, 4.0]  # x varies fastest
    for width in range(1, 20):
        assert len(generator(grids((1, width), (1, 1)))[0]) == width
    assert len(generator._grids) <= 8


def test_kept_grids_follow_the_module():
    generator = small()
    features = grids((3, 2), (2, 1))
    assert generator._grid_anchors([x.shape[-2:] for x in features])[0].dtype == torch.float32
    generator.to(torch.float64)
    assert generator._grid_anchors([x.shape[-2:] for x in features])[0].dtype == torch.float64
    generator.cell_anchors = BufferList([torch.ones(2, 4)] * 2)
    assert len(generator(features)[0]) == 12
    assert len(copy.deepcopy(generator)(features)[1]) == 4


def test_grids_made_in_inference_mode_can_be_trained_on():
    generator = small()
    features = grids((3, 2), (2, 1))
    with torch.inference_mode():
        generator(features)
    anchors = generator(features)[0].tensor
    deltas = torch.ones(6, 4, requires_grad=True)
    (deltas * anchors).sum().backward()
    assert torch.equal(deltas.grad, anchors)


def test_anchors_are_no_part_of_the_state():
    assert small().state_dict() == {}


def test_number_of_features_is_checked():
    with pytest.raises(ValueError, match="2 feature maps"):
        small()(grids((2, 2)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": [[8], [8], [8]]}, "sizes must be one list"),
        ({"aspect_ratios": []}, "aspect_ratios is empty"),
        ({"offset": 1.0}, "OFFSET"),
    ],
)
def test_bad_settings_are_refused(change, message):
    settings = {"sizes": [[8]], "aspect_ratios": [[1]], "strides": [4, 8], "offset": 0.0, **change}
    with pytest.raises(ValueError, match=message):
        DefaultAnchorGenerator(**settings)


@pytest.mark.parametrize(
    ("name", "counts"), [("DefaultAnchorGenerator", 15), ("RotatedAnchorGenerator", 45)]
)
def test_from_config(name, counts):
    cfg = get_cfg()
    cfg.MODEL.ANCHOR_GENERATOR.NAME = name
    generator = build_anchor_generator(cfg, [ShapeSpec(stride=16)])
    assert generator.num_anchors == [counts]
    assert generator.strides == [16]


def test_unknown_name_lists_the_nearest():
    cfg = get_cfg()
    cfg.MODEL.ANCHOR_GENERATOR.NAME = "DefaultAnchorGenerato"
    with pytest.raises(KeyError, match="DefaultAnchorGenerator"):
        build_anchor_generator(cfg, [ShapeSpec(stride=16)])
