"""No number of a picture or a proposal becomes a constant: traced on one input, run on others."""

import warnings

import pytest
import torch
from torch import nn

from d2kit.export import TracingAdapter
from d2kit.layers import batched_nms
from d2kit.layers.mask_ops import paste_masks_in_image
from d2kit.modeling.anchor_generator import DefaultAnchorGenerator
from d2kit.modeling.poolers import ROIPooler
from d2kit.modeling.postprocessing import detector_postprocess
from d2kit.structures import Boxes, ImageList, Instances, heatmaps_to_keypoints
from tests.export.kinds import SIZES, model_of, picture

COUNTS = (4, 0, 1, 9, 30)


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def boxes(count, seed=0):
    rng = torch.Generator().manual_seed(seed + count)
    low = torch.rand(count, 2, generator=rng) * 90
    return torch.cat([low, low + 1 + torch.rand(count, 2, generator=rng) ** 2 * 300], dim=1)


def trace(function, inputs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(Call(function), inputs, check_trace=False)


def padded(image):
    images = ImageList.from_tensors([image, image[:, 3:, :-5]], 32, 7.0)
    sizes = torch.stack([torch.as_tensor(x) for size in images.image_sizes for x in size])
    return images.tensor, sizes


def clipped(rows, image):
    found = Boxes(rows)
    found.clip(image.shape[-2:])
    found.scale(image.shape[-1] / 100, 0.5)
    return found[found.nonempty()].tensor


def pooled(rows, image):
    pooler = ROIPooler(5, (1 / 4, 1 / 8, 1 / 16), 0, "ROIAlignV2")
    features = [image[None, :, ::step, ::step] for step in (4, 8, 16)]
    return pooler(features, [Boxes(rows)])


def suppressed(rows, image):
    scores = (rows.sum(dim=1) * 1.37) % 1
    return batched_nms(rows, scores, (rows[:, 0] > 40).long(), 0.4)


def pasted(rows, image):
    masks = (rows[:, :1, None] * 0.01 + torch.eye(7)).clamp(0, 1)
    return paste_masks_in_image(masks, rows, image.shape[-2:])


def processed(rows, image):
    found = Instances(image.shape[-2:], pred_boxes=Boxes(rows), scores=rows[:, 0])
    done = detector_postprocess(found, image.shape[-2] * 2, image.shape[-1] * 3)
    return done.pred_boxes.tensor


def keypoints(rows, image):
    cells = torch.linspace(0, 1, 196).view(1, 1, 14, 14)
    return heatmaps_to_keypoints((rows[:, :2, None, None] * cells).sin(), rows)


def anchors(image):
    generator = DefaultAnchorGenerator(sizes=[[8, 16]], aspect_ratios=[[1.0, 2.0]], strides=[4])
    return generator([image[None, :, ::4, ::4]])[0].tensor


@pytest.mark.parametrize("function", [padded, anchors])
def test_sizes_of_pictures(function):
    traced = trace(function, (picture("landscape"),))
    for name in SIZES:
        torch.testing.assert_close(traced(picture(name)), function(picture(name)))


@pytest.mark.parametrize("function", [clipped, pooled, suppressed, pasted, processed, keypoints])
def test_numbers_of_boxes_and_sizes(function):
    traced = trace(function, (boxes(4), picture("landscape")))
    for count, name in zip(COUNTS, SIZES, strict=True):
        inputs = boxes(count), picture(name)
        torch.testing.assert_close(traced(*inputs), function(*inputs), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["keypoint FPN", "RetinaNet", "panoptic FPN", "mask C4"])
def test_whole_models(kind):
    model = model_of(kind)
    adapter = TracingAdapter(model, [{"image": picture("landscape")}])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
    for name in SIZES:
        expected, found = adapter(picture(name)), traced(picture(name))
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(b, a, atol=1e-2, rtol=1e-3)
