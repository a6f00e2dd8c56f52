"""Our models compute what torchvision's detectors compute, from their files."""

import numpy as np
import pytest
import torch
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from d2kit.data.transforms import TorchvisionResize
from d2kit.layers.mask_ops import paste_masks_in_image, whole_pixel_boxes
from tests.checkpoint.torchvision_models import both, picture, results

SIZES = [(80, 120), (97, 64), (150, 133)]
SHORT = 96  # length of the short side that both resize to; the default is 800
OPTIONS = ["INPUT.MIN_SIZE_TEST", SHORT, "INPUT.MAX_SIZE_TEST", 2 * SHORT]
PROPOSALS = 60
TWO_STAGE = [*OPTIONS, "MODEL.RPN.POST_NMS_TOPK_TEST", PROPOSALS]
RESIZE = {"min_size": SHORT, "max_size": 2 * SHORT}


def assert_equal(theirs, ours, dense=False):
    """All detections agree within 1e-4: boxes relative to the image, scores, masks as pixels.

    Torchvision's RetinaNet also returns boxes without area, which we drop at the end. Returns the
    number of classes found.
    """
    full = (theirs["boxes"][:, 2:] > theirs["boxes"][:, :2]).all(dim=1)
    theirs = {name: value[full] for name, value in theirs.items()}
    assert len(ours) == len(theirs["boxes"]) >= 10
    height, width = ours.image_size
    first = 0 if dense else 1  # R-CNN: label 0 is background there
    boxes = (ours.pred_boxes.tensor[:, None] - theirs["boxes"]).abs().amax(dim=2)
    scores = (ours.scores[:, None] - theirs["scores"]).abs()
    wrong = (ours.pred_classes[:, None] + first != theirs["labels"]) | (scores > 1e-4)
    # of scores that agree to the last bits either may be first
    distance, match = (boxes / max(height, width) + 10 * wrong).min(dim=1)
    assert distance.max() < 1e-4
    assert len(match.unique()) == len(match)
    assert (match - torch.arange(len(match))).abs().max() <= 3
    theirs = {name: value[match] for name, value in theirs.items()}
    if "masks" in theirs:
        soft = theirs["masks"][:, 0]
        assert ours.pred_masks.any()
        clear = (soft - 0.5).abs() > 1e-4
        assert torch.equal(ours.pred_masks & clear, (soft > 0.5) & clear)
        assert clear.float().mean() > 0.99
    if "keypoints" in theirs:
        distance = (ours.pred_keypoints[..., :2] - theirs["keypoints"][..., :2]).abs()
        assert distance.max() / max(height, width) < 1e-4
    return len(theirs["labels"].unique())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn"])
@pytest.mark.parametrize("version", ["", "_v2"])
def test_rcnn(tmp_path, name, version):
    models = both(tmp_path, name + version, TWO_STAGE, rpn_post_nms_top_n_test=PROPOSALS, **RESIZE)
    assert max(assert_equal(*results(*models, picture(*size))) for size in SIZES) > 1


@pytest.mark.slow
def test_keypoint_rcnn(tmp_path):
    models = both(
        tmp_path,
        "keypointrcnn_resnet50_fpn",
        TWO_STAGE,
        rpn_post_nms_top_n_test=PROPOSALS,
        **RESIZE,
    )
    for size in SIZES:
        assert_equal(*results(*models, picture(*size)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2"])
def test_retinanet(tmp_path, name):
    models = both(tmp_path, name, OPTIONS, **RESIZE)
    for size in SIZES:
        assert assert_equal(*results(*models, picture(*size)), dense=True) > 1


@pytest.mark.slow
def test_default_sizes(tmp_path):
    """With 800 pixels, 1000 proposals and everything else as both have it without arguments."""
    models = both(tmp_path, "maskrcnn_resnet50_fpn", [], seed=4)
    assert_equal(*results(*models, picture(300, 400)))


def test_small_rcnn(tmp_path, monkeypatch):
    """The arithmetic in a second: a ResNet-18, few proposals."""
    from torchvision.models import detection

    def small(weights, weights_backbone, **kwargs):
        body = detection.backbone_utils.resnet_fpn_backbone(
            backbone_name="resnet18", weights=None, norm_layer=torch.nn.BatchNorm2d
        )
        return MaskRCNN(body, 91, **kwargs)

    monkeypatch.setattr(detection, "maskrcnn_resnet50_fpn", small)
    options = [*TWO_STAGE, "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
    models = both(
        tmp_path,
        "maskrcnn_resnet50_fpn",
        options,
        rpn_post_nms_top_n_test=PROPOSALS,
        **RESIZE,
    )
    assert_equal(*results(*models, picture(70, 100)))


def test_resizing_is_torchvisions():
    rng = np.random.default_rng(0)
    for _ in range(40):
        height, width = rng.integers(20, 200, 2)
        short = int(rng.integers(16, 128))
        longest = int(short * rng.uniform(1, 2))
        theirs = GeneralizedRCNNTransform(short, longest, [0, 0, 0], [1, 1, 1]).eval()
        image = picture(height, width)
        expected = theirs([torch.from_numpy(image).permute(2, 0, 1) / 255])[0]
        resize = TorchvisionResize([short, short], longest).get_transform(image)
        got = resize.apply_image(image)
        assert got.shape[:2] == expected.image_sizes[0]
        tensor = expected.tensors[0][:, : got.shape[0], : got.shape[1]].permute(1, 2, 0)
        assert np.abs(got / 255 - tensor.numpy()).max() < 1e-6


def test_pasting_is_torchvisions():
    from torchvision.models.detection.roi_heads import paste_masks_in_image as theirs

    rng = torch.Generator().manual_seed(0)
    masks = torch.rand(200, 28, 28, generator=rng)
    corner = torch.rand(200, 2, generator=rng) * torch.tensor([90.0, 70.0])
    boxes = torch.cat([corner, corner + torch.rand(200, 2, generator=rng) * 40], dim=1)
    boxes[:20] -= boxes[:20, :2].repeat(1, 2)  # at the border
    soft = theirs(masks[:, None], boxes, (80, 100))[:, 0]
    ours = paste_masks_in_image(masks, whole_pixel_boxes(boxes, 28), (80, 100))
    clear = (soft - 0.5).abs() > 1e-4
    assert torch.equal(ours & clear, (soft > 0.5) & clear)
    assert soft.count_nonzero() > 1000
