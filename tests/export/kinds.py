"""Small models of every kind with random weights whose scores are spread, and pictures."""

import torch
from torch import Tensor, nn

from d2kit.config import CfgNode, get_cfg
from d2kit.modeling import build_model

_TWO_STAGE = [
    "MODEL.DEVICE", "cpu",
    "MODEL.WEIGHTS", "",
    "MODEL.RESNETS.DEPTH", 50,
    "MODEL.RESNETS.RES2_OUT_CHANNELS", 16,
    "MODEL.RESNETS.STEM_OUT_CHANNELS", 8,
    "MODEL.RESNETS.WIDTH_PER_GROUP", 4,
    "MODEL.RPN.PRE_NMS_TOPK_TEST", 200,
    "MODEL.RPN.POST_NMS_TOPK_TEST", 60,
    "MODEL.ROI_HEADS.NUM_CLASSES", 5,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.2,
    "MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC", 1,
    "MODEL.ROI_BOX_HEAD.FC_DIM", 32,
    "MODEL.ROI_MASK_HEAD.NUM_CONV", 1,
    "MODEL.ROI_MASK_HEAD.CONV_DIM", 8,
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [16],
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 4,
    "TEST.DETECTIONS_PER_IMAGE", 30,
]  # fmt: skip
_LEVELS = ["res2", "res3", "res4", "res5"]
FPN = [
    "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES", _LEVELS,
    "MODEL.FPN.IN_FEATURES", _LEVELS,
    "MODEL.FPN.OUT_CHANNELS", 16,
    "MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [64], [96], [128]],
    "MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"],
    "MODEL.ROI_HEADS.NAME", "StandardROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"],
    "MODEL.SEM_SEG_HEAD.IN_FEATURES", ["p2", "p3", "p4", "p5"],
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 4,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32,
]  # fmt: skip
_DENSE = [
    *FPN,
    "MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES", _LEVELS[1:],
    "MODEL.FPN.IN_FEATURES", _LEVELS[1:],
    "MODEL.ANCHOR_GENERATOR.SIZES", [[24], [48], [64], [96], [128]],
    "MODEL.RETINANET.NUM_CLASSES", 5,
    "MODEL.RETINANET.NUM_CONVS", 1,
    "MODEL.RETINANET.TOPK_CANDIDATES_TEST", 100,
    "MODEL.RETINANET.SCORE_THRESH_TEST", 0.3,
    "MODEL.FCOS.NUM_CLASSES", 5,
    "MODEL.FCOS.NUM_CONVS", 1,
    "MODEL.FCOS.NORM", "",
    "MODEL.FCOS.TOPK_CANDIDATES_TEST", 100,
    "MODEL.FCOS.SCORE_THRESH_TEST", 0.3,
]  # fmt: skip
_DC5 = [
    "MODEL.RESNETS.OUT_FEATURES", ["res5"],
    "MODEL.RESNETS.RES5_DILATION", 2,
    "MODEL.RPN.IN_FEATURES", ["res5"],
    "MODEL.ROI_HEADS.NAME", "StandardROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES", ["res5"],
    "MODEL.ANCHOR_GENERATOR.SIZES", [[24, 48, 96]],
]  # fmt: skip
_C4 = ["MODEL.ANCHOR_GENERATOR.SIZES", [[24, 48, 96]]]

KINDS: dict[str, list] = {
    "faster FPN": FPN,
    "mask FPN": [*FPN, "MODEL.MASK_ON", True],
    "keypoint FPN": [*FPN, "MODEL.KEYPOINT_ON", True, "MODEL.ROI_HEADS.NUM_CLASSES", 1],
    "cascade mask FPN": [
        *FPN,
        *("MODEL.MASK_ON", True, "MODEL.ROI_HEADS.NAME", "CascadeROIHeads"),
        *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
    ],
    "cascade mask FPN, GN": [
        *FPN,
        *("MODEL.MASK_ON", True, "MODEL.ROI_HEADS.NAME", "CascadeROIHeads"),
        *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True, "MODEL.FPN.NORM", "GN"),
        *("MODEL.ROI_BOX_HEAD.NORM", "GN", "MODEL.ROI_BOX_HEAD.NUM_CONV", 1),
        *("MODEL.ROI_BOX_HEAD.CONV_DIM", 32, "MODEL.FPN.OUT_CHANNELS", 32),
        *("MODEL.ROI_MASK_HEAD.NORM", "GN", "MODEL.ROI_MASK_HEAD.CONV_DIM", 32),
    ],
    "RPN FPN": [*FPN, "MODEL.META_ARCHITECTURE", "ProposalNetwork"],
    "RPN C4": [*_C4, "MODEL.META_ARCHITECTURE", "ProposalNetwork"],
    "faster C4": _C4,
    "mask C4": [*_C4, "MODEL.MASK_ON", True],
    "faster DC5": _DC5,
    "mask DC5": [*_DC5, "MODEL.MASK_ON", True],
    "RetinaNet": [*_DENSE, "MODEL.META_ARCHITECTURE", "RetinaNet"],
    "FCOS": [*_DENSE, "MODEL.META_ARCHITECTURE", "FCOS"],
    "semantic FPN": [*FPN, "MODEL.META_ARCHITECTURE", "SemanticSegmentor"],
    "panoptic FPN": [
        *FPN,
        *("MODEL.META_ARCHITECTURE", "PanopticFPN", "MODEL.MASK_ON", True),
        *("MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT", 20),
        *("MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH", 0.3),
    ],
}
SIZES = {
    "landscape": (96, 160),
    "portrait": (192, 112),
    "many": (128, 224),
    "nothing": (64, 96),
    "odd": (101, 147),
}


def config_of(kind: str, *options) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_list([*_TWO_STAGE, *KINDS[kind], *options])
    return cfg


_SPREAD = {
    **dict.fromkeys(("cls_score", "objectness_logits", "predictor", "score_lowres"), 2.0),
    **dict.fromkeys(("bbox_pred", "anchor_deltas"), 0.5),
}


def model_of(kind: str, *options) -> nn.Module:
    """The model, in evaluation mode, whose predictors tell places apart."""
    torch.manual_seed(3)
    model = build_model(config_of(kind, *options)).eval()

    def spread(module, inputs, output):
        # a layer that serves several levels is scaled once, by the finest
        if output.numel() > 1 and not hasattr(module, "spread"):
            target = _SPREAD[module.last]
            factor = target / max(float((output - output.mean()).std()), 1e-6)
            with torch.no_grad():
                module.weight *= factor
            module.spread = factor
            if module.bias is not None and target == 2.0:
                module.bias.data.zero_()

    hooks = []
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if last in _SPREAD and isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            module.last = last
            hooks.append(module.register_forward_hook(spread))
    with torch.no_grad():
        for _ in range(2):  # what follows a layer sees it scaled in the second round
            model([{"image": picture("landscape")}])
    for hook in hooks:
        hook.remove()
    return model


def picture(name: str) -> Tensor:
    """A picture (3, H, W), 0..255, of rectangles on a gradient; "nothing" is grey."""
    height, width = SIZES[name]
    if name == "nothing":
        return torch.full((3, height, width), 110.0)
    random = torch.Generator().manual_seed(len(name))
    image = torch.linspace(0, 90, width).expand(3, height, width).clone()
    for _ in range(25 if name == "many" else 6):
        x, y, w, h = (torch.rand(4, generator=random) * torch.tensor([width, height, 60, 50])).int()
        colour = torch.rand(3, 1, 1, generator=random) * 255
        image[:, y : y + h + 6, x : x + w + 6] = colour
    return image
