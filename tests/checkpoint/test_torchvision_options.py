"""The options that make our arithmetic torchvision's, one by one."""

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from d2kit.config import get_cfg
from d2kit.data.detection_utils import build_augmentation
from d2kit.data.transforms import ResizeShortestEdge, TorchvisionResize
from d2kit.evaluation.coco_evaluation import instances_to_coco_json
from d2kit.layers import FrozenBatchNorm2d, ShapeSpec
from d2kit.modeling import build_backbone
from d2kit.modeling.anchor_generator import WholePixelAnchorGenerator
from d2kit.modeling.postprocessing import detector_postprocess
from d2kit.modeling.proposal_generator.proposal_utils import suppress
from d2kit.structures import Boxes, Instances, ROIMasks


@pytest.mark.parametrize("size", [(96, 64), (800, 1088), (32, 32), (224, 416)])
@pytest.mark.parametrize(
    "sizes", [[[32], [64], [128]], [[32, 40, 50], [64, 80, 101], [512, 645, 812]]]
)
def test_anchors(size, sizes):
    ratios = [[0.5, 1.0, 2.0]] * 3
    strides = [4, 8, 64]
    features = [torch.zeros(1, 1, -(-size[0] // s), -(-size[1] // s)) for s in strides]
    ours = WholePixelAnchorGenerator(
        sizes=sizes, aspect_ratios=ratios, strides=strides, offset=0.0
    )(features)
    theirs = AnchorGenerator(tuple(map(tuple, sizes)), tuple(map(tuple, ratios)))
    images = ImageList(torch.zeros(1, 3, *size), [size])
    expected = theirs(images, features)[0].view(-1, len(sizes[0]) * 3, 4)
    if len(sizes[0]) == 3:  # theirs: ratio, then size; ours: size, then ratio
        expected = expected.unflatten(1, (3, 3)).transpose(1, 2).flatten(1, 2)
    got = torch.cat([boxes.tensor for boxes in ours]).view(expected.shape)
    assert torch.equal(got, expected)


def test_anchors_of_one_grid_and_two_images_are_not_mixed_up():
    """The last level has one cell for both images, and another distance of cells."""
    generator = WholePixelAnchorGenerator(
        sizes=[[8], [16]], aspect_ratios=[1.0], strides=[4, 64], offset=0.5
    )
    for side, centre in ((8, 16.0), (16, 32.0), (8, 16.0)):
        anchors = generator([torch.zeros(1, 1, side, side), torch.zeros(1, 1, 1, 1)])[1]
        assert anchors.get_centers().tolist() == [[centre, centre]]


@pytest.mark.parametrize(("min_size", "kept"), [(0.0, 3), (0.01, 2), (5.0, 1), (50.0, 0)])
def test_small_detections(min_size, kept):
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 0, 21, 9], [90, 90, 130, 130.0]])
    boxes[2] += 10  # outside
    result, rows = suppress(
        boxes,
        torch.tensor([0.9, 0.8, 0.7]),
        torch.zeros(3, dtype=torch.int64),
        torch.tensor([4, 5, 6]),
        (100, 100),
        nms_thresh=0.5,
        topk=10,
        min_size=min_size,
    )
    assert rows.tolist() == [4, 5, 6][:kept]
    assert len(result) == kept


@pytest.mark.parametrize(
    ("norm", "kind"), [("FrozenBN", FrozenBatchNorm2d), ("BN", nn.BatchNorm2d)]
)
def test_norm_eps(norm, kind):
    cfg = get_cfg()
    options = ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
    cfg.merge_from_list([*options, "MODEL.RESNETS.NORM", norm, "MODEL.RESNETS.NORM_EPS", 0.0])
    network = build_backbone(cfg)
    norms = [m for m in network.modules() if isinstance(m, (FrozenBatchNorm2d, nn.BatchNorm2d))]
    assert {m.eps for m in norms} == {0.0}
    assert any(isinstance(m, kind) for m in norms)


@pytest.mark.parametrize(("source", "channels"), [("res5", 512), ("p5", 16)])
def test_source_of_p6(source, channels):
    cfg = get_cfg()
    stages = ["res3", "res4", "res5"]
    cfg.merge_from_list(
        [
            *("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
            *("MODEL.RESNETS.OUT_FEATURES", stages, "MODEL.FPN.IN_FEATURES", stages),
            *("MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone"),
            *("MODEL.FPN.OUT_CHANNELS", 16, "MODEL.FPN.P6_FROM", source),
        ]
    )
    network = build_backbone(cfg, ShapeSpec(channels=3)).eval()
    assert network.top_block.p6.in_channels == channels
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 64, 64))["p7"].shape == (1, 16, 1, 1)
    cfg.MODEL.FPN.P6_FROM = "res6"
    with pytest.raises(ValueError, match=r"makes p6 from res6 \(MODEL\.FPN\.P6_FROM\)"):
        build_backbone(cfg, ShapeSpec(channels=3))


@pytest.mark.parametrize(
    ("kind", "expected"), [("pillow", ResizeShortestEdge), ("torchvision", TorchvisionResize)]
)
def test_resize_by_config(kind, expected):
    cfg = get_cfg()
    cfg.INPUT.RESIZE = kind
    for train in (True, False):
        assert type(build_augmentation(cfg, train)[0]) is expected
    cfg.INPUT.RESIZE = "opencv"
    with pytest.raises(ValueError, match=r"INPUT\.RESIZE must be one of"):
        build_augmentation(cfg, False)


def test_resizing_keeps_polygons_with_the_image():
    resize = TorchvisionResize([50, 50], 60).get_transform(np.zeros((100, 130, 3), np.uint8))
    assert (resize.new_h, resize.new_w) == (46, 60)
    moved = resize.apply_coords(np.array([[130.0, 100.0], [65, 50]]))
    np.testing.assert_allclose(moved, [[60, 46], [30, 23]])
    untouched = TorchvisionResize(0, 60).get_transform(np.zeros((100, 130, 3), np.uint8))
    assert untouched.apply_image(np.ones((100, 130, 3), np.uint8)).shape == (100, 130, 3)


def test_whole_pixel_masks_are_pasted_and_encoded_alike():
    rng = torch.Generator().manual_seed(0)
    found = Instances((40, 50), scores=torch.rand(5, generator=rng))
    found.pred_classes = torch.zeros(5, dtype=torch.int64)
    corner = torch.rand(5, 2, generator=rng) * 20
    found.pred_boxes = Boxes(
        torch.cat([corner, corner + 4.3 + torch.rand(5, 2, generator=rng)], dim=1)
    )
    masks = torch.rand(5, 1, 28, 28, generator=rng)
    found.pred_masks = ROIMasks(masks[:, 0], whole_pixels=True)
    assert found[:2].pred_masks.whole_pixels
    pasted = detector_postprocess(found, 80, 100)
    compact = detector_postprocess(found, 80, 100, paste_masks=False)
    assert compact.pred_masks.to("cpu").whole_pixels
    assert instances_to_coco_json(pasted, 1) == instances_to_coco_json(compact, 1)
    found.pred_masks = masks
    elsewhere = detector_postprocess(found, 80, 100).pred_masks
    assert not torch.equal(pasted.pred_masks, elsewhere)
    assert (pasted.pred_masks != elsewhere).float().mean() < 0.05
