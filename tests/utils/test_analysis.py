"""Counts of operations and activations of every kind of model, against a count by hooks."""

import math
from collections import Counter

import pytest
import torch
from torch import nn

from d2kit import model_zoo
from d2kit.modeling import build_model
from d2kit.modeling.roi_heads import MaskRCNNConvUpsampleHead
from d2kit.structures import Boxes, Instances
from d2kit.utils import analysis

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
SMALL = [
    "MODEL.DEVICE", "cpu",
    "MODEL.WEIGHTS", "",
    "MODEL.FPN.OUT_CHANNELS", 16,
    "MODEL.RPN.POST_NMS_TOPK_TEST", 20,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0,
    "TEST.DETECTIONS_PER_IMAGE", 5,
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [16],
]  # fmt: skip
RESNET18 = ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
MODELS = {
    "COCO-Detection/fast_rcnn_R_50_FPN_1x": [*SMALL, *RESNET18],
    "COCO-Detection/rpn_R_50_FPN_1x": [*SMALL, *RESNET18],
    "COCO-Detection/retinanet_R_50_FPN_1x": [*SMALL, *RESNET18],
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x": [*SMALL, *RESNET18],
    "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x": SMALL,
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x": [*SMALL, *RESNET18],
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x": [*SMALL, *RESNET18],
    "Misc/cascade_mask_rcnn_R_50_FPN_1x": [*SMALL, *RESNET18],
    "Misc/semantic_R_50_FPN_1x": [*SMALL, *RESNET18],
}


def sample(cfg) -> dict:
    size = (64, 96)
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0)) * 255
    found = {"image": image, "height": size[0], "width": size[1]}
    if cfg.MODEL.LOAD_PROPOSALS:
        # one box for each level of the pyramid: the graph leaves out what nobody reads
        boxes = Boxes(torch.tensor([[0.0, 0, s, s] for s in (60, 150, 300, 600)]))
        found["proposals"] = Instances(size, proposal_boxes=boxes, objectness_logits=torch.ones(4))
    return found


def counted_by_hooks(model: nn.Module, batch: list[dict]) -> tuple[Counter, Counter]:
    """Multiply-adds and outputs of every convolution and linear layer, by kind."""
    multiplications, outputs = Counter(), Counter()

    def hook(layer, inputs, output):
        if isinstance(layer, nn.Linear):
            kind, each, places = "linear", layer.in_features, output.numel()
        else:
            kind = "conv"
            transposed = isinstance(layer, nn.ConvTranspose2d)
            channels = layer.out_channels if transposed else layer.in_channels
            each = math.prod(layer.kernel_size) * channels // layer.groups
            places = inputs[0].numel() if transposed else output.numel()
        multiplications[kind] += each * places
        outputs[kind] += output.numel()

    def mask_hook(head, inputs, output):
        # its deconvolution runs as a linear map of each pixel to four
        regions, _, height, width = inputs[0].shape
        each = head.deconv.in_channels * head.deconv.out_channels * 4
        multiplications["linear"] += regions * height * width * each

    layers = [
        m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)
    ]
    handles = [layer.register_forward_hook(hook) for layer in layers]
    heads = [m for m in model.modules() if isinstance(m, MaskRCNNConvUpsampleHead)]
    handles += [head.register_forward_hook(mask_hook) for head in heads]
    with torch.no_grad():
        model(batch)
    for handle in handles:
        handle.remove()
    return multiplications, outputs


FAST = {"COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x", "Misc/semantic_R_50_FPN_1x"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in MODELS]
)
def test_counts_of_a_kind_of_model(name, caplog):
    cfg = model_zoo.get_config(f"{name}.yaml")
    cfg.merge_from_list(MODELS[name])
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    batch = [sample(cfg)]
    multiplications, outputs = counted_by_hooks(model, batch)
    flops = analysis.flop_count_operators(model, batch)
    activations = analysis.activation_count_operators(model, batch)
    assert flops["conv"] * 1e9 == pytest.approx(multiplications["conv"], rel=1e-9)
    assert flops["linear"] * 1e9 == pytest.approx(multiplications["linear"], rel=1e-9)
    assert activations["conv"] * 1e6 == pytest.approx(outputs["conv"], rel=1e-9)
    assert multiplications["conv"] > 0
    assert caplog.text == ""


def test_own_way_to_count_an_operator():
    relu = {"aten::relu": lambda inputs, outputs: 1e6}
    counts = analysis.activation_count_operators(nn.ReLU(), [torch.ones(3)], supported_ops=relu)
    assert sum(counts.values()) == 1
