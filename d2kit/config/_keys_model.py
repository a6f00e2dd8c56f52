"""Config keys of the model as a whole, backbones, anchors and the RPN: name -> (default, meaning).

Keys, order and defaults are Detectron2's. Lengths are pixels of the network's input unless a line
says otherwise.
"""

from typing import Any

_GENERAL: dict[str, tuple[Any, str]] = {
    "VERSION": (2, "Version of the set of keys; files of version 1 are converted when read."),
    "MODEL.LOAD_PROPOSALS": (False, "Take proposals from DATASETS.PROPOSAL_FILES_* files."),
    "MODEL.MASK_ON": (False, "Add the mask head and read segmentations."),
    "MODEL.KEYPOINT_ON": (False, "Add the keypoint head and read keypoints."),
    "MODEL.DEVICE": ("cuda", "Device of the model: cuda, cuda:N, cpu; cpu where CUDA is absent."),
    "MODEL.META_ARCHITECTURE": ("GeneralizedRCNN", "Class of the whole model, in META_ARCH."),
    "MODEL.FREEZE": (
        [],
        "Globs on names of modules and parameters that do not learn, e.g. [backbone, *.norm.*].",
    ),
    "MODEL.CLASS_NAMES": (
        [],
        "Names of the classes by their ids; a training writes them into its run's config.yaml, "
        "so that the model knows them without its dataset.",
    ),
    "MODEL.WEIGHTS": ("", "Path or URL of the weights to start from; empty for random ones."),
    "MODEL.PIXEL_MEAN": (
        [103.530, 116.280, 123.675],
        "Subtracted from each channel, in the order of INPUT.FORMAT, values in [0, 255].",
    ),
    "MODEL.PIXEL_STD": (
        [1.0, 1.0, 1.0],
        "Divides each channel; 1 for Caffe weights, about 57 for torchvision's.",
    ),
}

_BACKBONE: dict[str, tuple[Any, str]] = {
    "MODEL.BACKBONE.NAME": ("build_resnet_backbone", "Function or class in BACKBONE."),
    "MODEL.BACKBONE.FREEZE_AT": (
        2,
        "First stages that are not trained: 0 none, 1 the stem, 2 the stem and res2, ...",
    ),
    "MODEL.FPN.IN_FEATURES": ([], "Backbone stages that feed the feature pyramid, fine to coarse."),
    "MODEL.FPN.OUT_CHANNELS": (256, "Channels of each pyramid level."),
    "MODEL.FPN.NORM": ("", "Normalisation in the pyramid: empty, BN, SyncBN, FrozenBN, GN, LN."),
    "MODEL.FPN.FUSE_TYPE": ("sum", "How the lateral and top-down paths are fused: sum or avg."),
    "MODEL.FPN.P6_FROM": ("res5", "Feature that RetinaNet's p6 is made from: res5 or p5."),
    "MODEL.RESNETS.DEPTH": (50, "Layers: 18, 34, 50, 101 or 152."),
    "MODEL.RESNETS.OUT_FEATURES": (["res4"], "Stages whose features are returned: stem, res2-5."),
    "MODEL.RESNETS.NUM_GROUPS": (1, "Groups of the 3x3 convolutions; 1 ResNet, 32 ResNeXt."),
    "MODEL.RESNETS.NORM": ("FrozenBN", "Normalisation: FrozenBN, BN, SyncBN, GN, LN or empty."),
    "MODEL.RESNETS.NORM_EPS": (
        1e-5,
        "Added to variances in BN and FrozenBN; 0 for torchvision's first COCO detectors.",
    ),
    "MODEL.RESNETS.WIDTH_PER_GROUP": (64, "Channels of each group of res2's 3x3 convolutions."),
    "MODEL.RESNETS.STRIDE_IN_1X1": (
        True,
        "Stride in the 1x1 (True: MSRA weights) or the 3x3 convolution (False: torchvision's).",
    ),
    "MODEL.RESNETS.RES5_DILATION": (1, "Dilation in res5: 1, or 2 for DC5 models."),
    "MODEL.RESNETS.RES2_OUT_CHANNELS": (256, "Channels of res2; doubled per stage; 64 for 18, 34."),
    "MODEL.RESNETS.STEM_OUT_CHANNELS": (64, "Channels of the stem."),
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": (
        [False, False, False, False],
        "Deformable 3x3 convolutions in res2, res3, res4, res5.",
    ),
    "MODEL.RESNETS.DEFORM_MODULATED": (False, "Modulated deformable convolutions (version 2)."),
    "MODEL.RESNETS.DEFORM_NUM_GROUPS": (1, "Groups of offsets in deformable convolutions."),
}

_PROPOSALS: dict[str, tuple[Any, str]] = {
    "MODEL.PROPOSAL_GENERATOR.NAME": ("RPN", "RPN, RRPN or PrecomputedProposals."),
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": (0, "Proposals with a side not above it are dropped."),
    "MODEL.ANCHOR_GENERATOR.NAME": ("DefaultAnchorGenerator", "Class in ANCHOR_GENERATOR."),
    "MODEL.ANCHOR_GENERATOR.SIZES": (
        [[32, 64, 128, 256, 512]],
        "Square roots of anchor areas, one list per level, or one list for all levels.",
    ),
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": (
        [[0.5, 1.0, 2.0]],
        "Height over width of anchors, one list per level, or one list for all levels.",
    ),
    "MODEL.ANCHOR_GENERATOR.ANGLES": (
        [[-90, 0, 90]],
        "Angles of rotated anchors in degrees counter-clockwise, per level or for all.",
    ),
    "MODEL.ANCHOR_GENERATOR.OFFSET": (0.0, "Centre of the first anchor, in strides, in [0, 1)."),
    "MODEL.RPN.HEAD_NAME": ("StandardRPNHead", "Class in RPN_HEAD."),
    "MODEL.RPN.IN_FEATURES": (["res4"], "Features that the RPN runs on, fine to coarse."),
    "MODEL.RPN.BOUNDARY_THRESH": (
        -1,
        "Anchors that pass the image border by more are not trained on; -1 trains on all.",
    ),
    "MODEL.RPN.IOU_THRESHOLDS": ([0.3, 0.7], "IoU limits between the entries of IOU_LABELS."),
    "MODEL.RPN.IOU_LABELS": (
        [0, -1, 1],
        "Label of anchors below, between and above the limits: 0 background, -1 ignored, 1 object.",
    ),
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": (256, "Anchors sampled per image for the RPN's losses."),
    "MODEL.RPN.POSITIVE_FRACTION": (0.5, "Largest share of objects among sampled anchors."),
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": ("smooth_l1", "Box loss: smooth_l1, giou, diou or ciou."),
    "MODEL.RPN.BBOX_REG_LOSS_WEIGHT": (1.0, "Factor of the RPN's box loss."),
    "MODEL.RPN.BBOX_REG_WEIGHTS": (
        (1.0, 1.0, 1.0, 1.0),
        "Factors of the RPN's box deltas (dx, dy, dw, dh).",
    ),
    "MODEL.RPN.SMOOTH_L1_BETA": (0.0, "Delta where smooth L1 turns from square to linear; 0: L1."),
    "MODEL.RPN.LOSS_WEIGHT": (1.0, "Factor of both RPN losses."),
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": (12000, "Best proposals kept before NMS, per level, training."),
    "MODEL.RPN.PRE_NMS_TOPK_TEST": (6000, "Best proposals kept before NMS, per level, inference."),
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": (2000, "Proposals kept after NMS, per image, training."),
    "MODEL.RPN.POST_NMS_TOPK_TEST": (1000, "Proposals kept after NMS, per image, inference."),
    "MODEL.RPN.NMS_THRESH": (0.7, "Proposals that overlap a better one by a larger IoU go."),
    "MODEL.RPN.CONV_DIMS": (
        [-1],
        "Channels of the RPN head's 3x3 convolutions; -1 keeps the input's.",
    ),
}

MODEL_KEYS: dict[str, tuple[Any, str]] = {**_GENERAL, **_BACKBONE, **_PROPOSALS}
