import pytest
import torch

from d2kit.layers import ShapeSpec
from d2kit.modeling.roi_heads import FastRCNNConvFCHead, build_box_head
from tests.support.tiny_model import tiny_config

SHAPE = ShapeSpec(channels=4, height=3, width=5)


@pytest.mark.parametrize(
    ("convs", "fcs", "norm", "output"),
    [
        ([], [7], "", (7,)),
        ([], [7, 6], "", (6,)),
        ([8], [], "BN", (8, 3, 5)),
        ([8, 6], [7], "", (7,)),
    ],
)
@pytest.mark.parametrize("regions", [0, 1, 3])
def test_shapes(convs, fcs, norm, output, regions):
    head = FastRCNNConvFCHead(SHAPE, conv_dims=convs, fc_dims=fcs, conv_norm=norm).eval()
    y = head(torch.randn(regions, 4, 3, 5))
    assert y.shape == (regions, *output)
    assert (y >= 0).all()
    stated = head.output_shape
    assert tuple(d for d in (stated.channels, stated.height, stated.width) if d) == output


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="NUM_FC"):
        FastRCNNConvFCHead(SHAPE, conv_dims=[], fc_dims=[])
    with pytest.raises(KeyError, match="FastRCNNConvFCHead"):
        build_box_head(tiny_config("MODEL.ROI_BOX_HEAD.NAME", "FastRCNConvFCHead"), SHAPE)
