"""Config keys of the heads: name -> (default, meaning).

Keys, order and defaults are Detectron2's. Lengths are pixels of the network's input unless a line
says otherwise.
"""

from typing import Any

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
