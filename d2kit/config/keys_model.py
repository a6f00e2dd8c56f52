"""Config keys of the heads: name -> (default, meaning).

Keys, order and defaults are Detectron2's. Lengths are pixels of the network's input unless a line
says otherwise.
"""

from __future__ import annotations

from typing import Any

_GENERAL: dict[str, tuple[Any, str]] = {
    "VERSION": (2, "Version of the set of keys; files of version 1 are converted when read."),
    "MODEL.LOAD_PROPOSALS": (False, "Take proposals from DATASETS.PROPOSAL_FILES_* files."),
    "MODEL.MASK_ON": (False, "Add the mask head and read segmentations."),
    "MODEL.KEYPOINT_ON": (False, "Add the keypoint head and read keypoints."),
    "MODEL.DEVICE": ("cuda", "Device of the model: cuda, cuda:N, cpu; cpu where CUDA is absent."),
    "MODEL.COMPILE": (
        "none",
        "none; trunk: backbone and dense heads under torch.compile, which takes minutes at the "
        "first step and needs a C++ compiler (CUDA: triton); graph: at inference on CUDA the same "
        "parts as CUDA graphs, one for each padded size.",
    ),
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


_DROP_PATH = "Probability that a branch of the last block is dropped in training; 0 at the first."
_RECOMPUTE = "Compute activations again in the backward pass: less memory, more time."
_HEADS = "Attention heads of the first stage; doubled per stage."

BACKBONE_KEYS: dict[str, tuple[Any, str]] = {
    "MODEL.FPN.TOP_BLOCK": (
        "pool",
        "Levels above the last one of RegNet, Swin, MViT, ViT, timm: pool (one), conv (two).",
    ),
    "MODEL.REGNET.DEPTH": (23, "Blocks of all stages; the defaults are RegNetX-4.0GF's."),
    "MODEL.REGNET.W_A": (38.65, "Slope of the channels over the blocks."),
    "MODEL.REGNET.W_0": (96, "Channels at the start, a multiple of 8."),
    "MODEL.REGNET.W_M": (2.43, "Factor between the channels of stages."),
    "MODEL.REGNET.GROUP_WIDTH": (40, "Channels of each group of the 3x3 convolutions."),
    "MODEL.REGNET.SE_RATIO": (0.0, "Squeeze-and-excitation, share of channels: 0 X, 0.25 Y."),
    "MODEL.REGNET.STEM_WIDTH": (32, "Channels of the stem."),
    "MODEL.REGNET.NORM": ("FrozenBN", "Normalisation: FrozenBN, BN, SyncBN, GN, LN or empty."),
    "MODEL.SWIN.EMBED_DIM": (96, "Channels of the first stage; doubled per stage."),
    "MODEL.SWIN.DEPTHS": ([2, 2, 6, 2], "Blocks of each stage; the defaults are Swin-T's."),
    "MODEL.SWIN.NUM_HEADS": ([3, 6, 12, 24], "Attention heads of each stage."),
    "MODEL.SWIN.WINDOW_SIZE": (7, "Side of the windows, in tokens."),
    "MODEL.SWIN.DROP_PATH_RATE": (0.2, _DROP_PATH),
    "MODEL.SWIN.USE_CHECKPOINT": (False, _RECOMPUTE),
    "MODEL.VIT.IMG_SIZE": (1024, "Side of the images that relative positions are made for."),
    "MODEL.VIT.PATCH_SIZE": (16, "Side of a patch."),
    "MODEL.VIT.EMBED_DIM": (768, "Channels; the defaults are ViTDet-B's."),
    "MODEL.VIT.DEPTH": (12, "Blocks."),
    "MODEL.VIT.NUM_HEADS": (12, "Attention heads of each block."),
    "MODEL.VIT.WINDOW_SIZE": (14, "Side of the windows of local blocks, in tokens."),
    "MODEL.VIT.GLOBAL_BLOCKS": ([2, 5, 8, 11], "Blocks that look at the whole image, from 0."),
    "MODEL.VIT.USE_REL_POS": (True, "Relative positions in the attention."),
    "MODEL.VIT.DROP_PATH_RATE": (0.1, _DROP_PATH),
    "MODEL.VIT.USE_CHECKPOINT": (False, _RECOMPUTE),
    "MODEL.VIT.SQUARE_PAD": (0, "Pad batches to a square of this side; 0 for none."),
    "MODEL.MVIT.IMG_SIZE": (224, "Side of the images that relative positions are made for."),
    "MODEL.MVIT.EMBED_DIM": (96, "Channels of the first stage; doubled per stage."),
    "MODEL.MVIT.DEPTH": (10, "Blocks of all stages; the defaults are MViTv2-T's."),
    "MODEL.MVIT.NUM_HEADS": (1, _HEADS),
    "MODEL.MVIT.LAST_BLOCKS": ([0, 2, 7, 9], "Index of the last block of each stage, from 0."),
    "MODEL.MVIT.WINDOW_SIZE": (56, "Side of the first stage's windows, in tokens; 0 for none."),
    "MODEL.MVIT.DROP_PATH_RATE": (0.2, _DROP_PATH),
    "MODEL.MVIT.USE_CHECKPOINT": (False, _RECOMPUTE),
    "MODEL.TIMM.NAME": ("resnet18", "Name of a model of timm that gives feature maps."),
    "MODEL.TIMM.PRETRAINED": (
        False,
        "Download timm's weights (mind PIXEL_MEAN, PIXEL_STD, FORMAT).",
    ),
    "MODEL.TIMM.OUT_INDICES": ([], "Which of its maps to use; empty: those of strides 4 to 32."),
    "MODEL.TIMM.NORM_EPS": (0.0, "Number added to variances in its BatchNorm; 0: timm's own."),
    "MODEL.TIMM.FIX_NORM_STATISTICS": (
        False,
        "Its BatchNorm layers keep the statistics of the weights in training; small batches.",
    ),
}


_POOLER_TYPE = "ROIAlignV2, ROIAlign, ROIPool or ROIAlignRotated."
_SAMPLING = "RoIAlign samples per bin and axis; 0 adapts to the box."
_NORM = "Normalisation in the convolutions: empty, BN, SyncBN, FrozenBN, GN, LN."

_BOXES: dict[str, tuple[Any, str]] = {
    "MODEL.ROI_HEADS.NAME": ("Res5ROIHeads", "Class in ROI_HEADS."),
    "MODEL.ROI_HEADS.NUM_CLASSES": (80, "Number of object classes, background not counted."),
    "MODEL.ROI_HEADS.IN_FEATURES": (["res4"], "Features that boxes are pooled from."),
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": ([0.5], "IoU limits between the entries of IOU_LABELS."),
    "MODEL.ROI_HEADS.IOU_LABELS": (
        [0, 1],
        "Label of proposals below and above the limit: 0 background, -1 ignored, 1 object.",
    ),
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": (512, "Proposals sampled per image for the losses."),
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": (0.25, "Largest share of objects among the sampled."),
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": (0.05, "Detections with a score not above it go."),
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": (
        0.5,
        "Detections that overlap a better one of their class by a larger IoU go.",
    ),
    "MODEL.ROI_HEADS.MIN_SIZE_TEST": (
        0.0,
        "Detections with a shorter side inside the image go before NMS, pixels; torchvision: 0.01.",
    ),
    "MODEL.ROI_HEADS.CLASS_WEIGHTS": (
        None,
        "What a region of each class counts in the classification loss of the box heads: a list of "
        "NUM_CLASSES numbers (the background counts 1) or one more, the background's last; "
        "balanced: all objects / (classes x objects of the class) of the training set; None: 1 "
        "each. R-CNN models only; set for RetinaNet, FCOS or a model without box heads it is an "
        "error.",
    ),
    "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT": (True, "Add the true boxes to the proposals, training."),
    "MODEL.ROI_BOX_HEAD.NAME": ("", "Class in ROI_BOX_HEAD; not used by Res5ROIHeads."),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": (
        "smooth_l1",
        "Box loss: smooth_l1, giou, diou, ciou.",
    ),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": (1.0, "Factor of the box loss."),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": (
        (10.0, 10.0, 5.0, 5.0),
        "Factors of the box deltas (dx, dy, dw, dh).",
    ),
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": (
        0.0,
        "Delta where smooth L1 turns from square to linear; 0: L1.",
    ),
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": (14, "Side of the pooled features, in bins."),
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": (0, _SAMPLING),
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": ("ROIAlignV2", _POOLER_TYPE),
    "MODEL.ROI_BOX_HEAD.NUM_FC": (0, "Fully connected layers, after the convolutions."),
    "MODEL.ROI_BOX_HEAD.FC_DIM": (1024, "Width of each fully connected layer."),
    "MODEL.ROI_BOX_HEAD.NUM_CONV": (0, "3x3 convolutions."),
    "MODEL.ROI_BOX_HEAD.CONV_DIM": (256, "Channels of each convolution."),
    "MODEL.ROI_BOX_HEAD.NORM": ("", _NORM),
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": (False, "One set of box deltas for all classes."),
    "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": (
        False,
        "Train the other heads on the boxes predicted by the box head.",
    ),
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS": (False, "Federated loss over sampled classes (LVIS)."),
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": (False, "Sigmoid instead of softmax cross-entropy."),
    "MODEL.ROI_BOX_HEAD.FED_LOSS_FREQ_WEIGHT_POWER": (
        0.5,
        "Power of the class frequency by which the federated loss samples classes.",
    ),
    "MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES": (50, "Classes in each federated loss, at least."),
    "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": (
        ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0)),
        "Factors of the box deltas, one tuple per stage.",
    ),
    "MODEL.ROI_BOX_CASCADE_HEAD.IOUS": ((0.5, 0.6, 0.7), "IoU above which an object, per stage."),
}

_MASKS: dict[str, tuple[Any, str]] = {
    "MODEL.ROI_MASK_HEAD.NAME": ("MaskRCNNConvUpsampleHead", "Class in ROI_MASK_HEAD."),
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": (
        14,
        "Side of the pooled features, in bins; masks have twice as many.",
    ),
    "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": (0, _SAMPLING),
    "MODEL.ROI_MASK_HEAD.NUM_CONV": (0, "3x3 convolutions before the upsampling."),
    "MODEL.ROI_MASK_HEAD.CONV_DIM": (256, "Channels of each convolution."),
    "MODEL.ROI_MASK_HEAD.NORM": ("", _NORM),
    "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": (False, "One mask for all classes."),
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": ("ROIAlignV2", _POOLER_TYPE),
    "MODEL.ROI_MASK_HEAD.WHOLE_PIXELS": (
        False,
        "Lay masks on boxes of whole pixels, as torchvision does; False: on the predicted boxes.",
    ),
}

_KEYPOINTS: dict[str, tuple[Any, str]] = {
    "MODEL.ROI_KEYPOINT_HEAD.NAME": ("KRCNNConvDeconvUpsampleHead", "Class in ROI_KEYPOINT_HEAD."),
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION": (14, "Side of the pooled features, in bins."),
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_SAMPLING_RATIO": (0, _SAMPLING),
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": ((512,) * 8, "Channels of the 3x3 convolutions."),
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": (17, "Keypoints of an object (17: COCO person)."),
    "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE": (
        1,
        "Training images with fewer annotated keypoints are left out.",
    ),
    "MODEL.ROI_KEYPOINT_HEAD.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS": (
        True,
        "Divide the loss by the visible keypoints (True) or a constant (False).",
    ),
    "MODEL.ROI_KEYPOINT_HEAD.LOSS_WEIGHT": (1.0, "Factor of the keypoint loss."),
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE": ("ROIAlignV2", _POOLER_TYPE),
}

_SEGMENTATION: dict[str, tuple[Any, str]] = {
    "MODEL.SEM_SEG_HEAD.NAME": ("SemSegFPNHead", "Class in SEM_SEG_HEADS."),
    "MODEL.SEM_SEG_HEAD.IN_FEATURES": (["p2", "p3", "p4", "p5"], "Features that are merged."),
    "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": (255, "Label of pixels without a class; no loss there."),
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": (54, "Number of classes of pixels."),
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": (128, "Channels of the convolutions."),
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": (4, "Stride at which features are merged, in pixels."),
    "MODEL.SEM_SEG_HEAD.NORM": ("GN", _NORM),
    "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT": (1.0, "Factor of the segmentation loss."),
    "MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT": (1.0, "Factor of all losses of instances."),
    "MODEL.PANOPTIC_FPN.COMBINE.ENABLED": (True, "Combine instances and pixels at inference."),
    "MODEL.PANOPTIC_FPN.COMBINE.OVERLAP_THRESH": (
        0.5,
        "An instance is dropped where better ones cover more than this share of it.",
    ),
    "MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT": (
        4096,
        "Stuff segments of fewer pixels of the output are dropped.",
    ),
    "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH": (
        0.5,
        "Instances with a lower score are dropped.",
    ),
}

_RETINANET: dict[str, tuple[Any, str]] = {
    "MODEL.RETINANET.NUM_CLASSES": (80, "Number of object classes, background not counted."),
    "MODEL.RETINANET.IN_FEATURES": (["p3", "p4", "p5", "p6", "p7"], "Features of the head."),
    "MODEL.RETINANET.NUM_CONVS": (4, "3x3 convolutions of each tower."),
    "MODEL.RETINANET.IOU_THRESHOLDS": ([0.4, 0.5], "IoU limits between entries of IOU_LABELS."),
    "MODEL.RETINANET.IOU_LABELS": (
        [0, -1, 1],
        "Label of anchors below, between and above the limits: 0 background, -1 ignored, 1 object.",
    ),
    "MODEL.RETINANET.PRIOR_PROB": (0.01, "Score of every anchor at the start of training."),
    "MODEL.RETINANET.SCORE_THRESH_TEST": (0.05, "Detections with a score not above it go."),
    "MODEL.RETINANET.TOPK_CANDIDATES_TEST": (1000, "Best anchors kept before NMS, per level."),
    "MODEL.RETINANET.NMS_THRESH_TEST": (
        0.5,
        "Detections that overlap a better one of their class by a larger IoU go.",
    ),
    "MODEL.RETINANET.CLIP_BOXES_TEST": (
        False,
        "Clip boxes to the image before NMS, as torchvision does; False: only at the end.",
    ),
    "MODEL.RETINANET.BBOX_REG_WEIGHTS": (
        (1.0, 1.0, 1.0, 1.0),
        "Factors of the box deltas (dx, dy, dw, dh).",
    ),
    "MODEL.RETINANET.FOCAL_LOSS_GAMMA": (2.0, "Exponent by which the focal loss spares the easy."),
    "MODEL.RETINANET.FOCAL_LOSS_ALPHA": (0.25, "Weight of objects in the focal loss, in [0, 1]."),
    "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": (
        0.1,
        "Delta where smooth L1 turns from square to linear; 0: L1.",
    ),
    "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": ("smooth_l1", "Box loss: smooth_l1, giou, diou, ciou."),
    "MODEL.RETINANET.NORM": ("", _NORM),
}

_FCOS: dict[str, tuple[Any, str]] = {
    "MODEL.FCOS.NUM_CLASSES": (80, "Number of object classes, background not counted."),
    "MODEL.FCOS.IN_FEATURES": (["p3", "p4", "p5", "p6", "p7"], "Features of the head."),
    "MODEL.FCOS.NUM_CONVS": (4, "3x3 convolutions of each tower."),
    "MODEL.FCOS.NORM": ("GN", _NORM),
    "MODEL.FCOS.PRIOR_PROB": (0.01, "Score of every place at the start of training."),
    "MODEL.FCOS.CENTER_SAMPLING_RADIUS": (
        1.5,
        "Largest distance of positives to the centre of their box, in strides; 0: any.",
    ),
    "MODEL.FCOS.FOCAL_LOSS_GAMMA": (2.0, "Exponent by which the focal loss spares the easy."),
    "MODEL.FCOS.FOCAL_LOSS_ALPHA": (0.25, "Weight of objects in the focal loss, in [0, 1]."),
    "MODEL.FCOS.SCORE_THRESH_TEST": (0.2, "Detections with a score not above it go."),
    "MODEL.FCOS.TOPK_CANDIDATES_TEST": (1000, "Best places kept before NMS, per level."),
    "MODEL.FCOS.NMS_THRESH_TEST": (
        0.6,
        "Detections that overlap a better one of their class by a larger IoU go.",
    ),
}

HEAD_KEYS: dict[str, tuple[Any, str]] = {
    **_BOXES,
    **_MASKS,
    **_KEYPOINTS,
    **_SEGMENTATION,
    **_RETINANET,
    **_FCOS,
}
