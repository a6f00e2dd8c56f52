"""Config keys of PointRend, which `get_cfg` does not hold: name -> (default, meaning)."""

from __future__ import annotations

from typing import Any

from d2kit.config.cfg_node import CfgNode, add_keys

POINTREND_KEYS: dict[str, tuple[Any, str]] = {
    "INPUT.COLOR_AUG_SSD": (False, "Photometric augmentation of SSD, in training."),
    "MODEL.ROI_MASK_HEAD.IN_FEATURES": ((), "Features of the coarse mask head."),
    "MODEL.ROI_MASK_HEAD.FC_DIM": (1024, "Width of its fully connected layers."),
    "MODEL.ROI_MASK_HEAD.NUM_FC": (2, "Number of its fully connected layers."),
    "MODEL.ROI_MASK_HEAD.OUTPUT_SIDE_RESOLUTION": (7, "Side of the coarse mask, in cells."),
    "MODEL.ROI_MASK_HEAD.POINT_HEAD_ON": (False, "Refine the coarse mask by a point head."),
    "MODEL.POINT_HEAD.NAME": ("StandardPointHead", "Class in POINT_HEAD."),
    "MODEL.POINT_HEAD.NUM_CLASSES": (80, "As MODEL.ROI_HEADS.NUM_CLASSES."),
    "MODEL.POINT_HEAD.IN_FEATURES": ((), "Features that points are sampled from."),
    "MODEL.POINT_HEAD.TRAIN_NUM_POINTS": (14 * 14, "Points per object in training."),
    "MODEL.POINT_HEAD.OVERSAMPLE_RATIO": (3, "Candidates per point, in training."),
    "MODEL.POINT_HEAD.IMPORTANCE_SAMPLE_RATIO": (
        0.75,
        "Share of the points chosen for being uncertain, in training.",
    ),
    "MODEL.POINT_HEAD.SUBDIVISION_STEPS": (5, "Doublings of the mask's side at inference."),
    "MODEL.POINT_HEAD.SUBDIVISION_NUM_POINTS": (28 * 28, "Points predicted at each doubling."),
    "MODEL.POINT_HEAD.FC_DIM": (256, "Width of the hidden layers."),
    "MODEL.POINT_HEAD.NUM_FC": (3, "Number of hidden layers."),
    "MODEL.POINT_HEAD.CLS_AGNOSTIC_MASK": (False, "One mask for all classes."),
    "MODEL.POINT_HEAD.COARSE_PRED_EACH_LAYER": (
        True,
        "Give the coarse prediction to every layer, not to the first alone.",
    ),
    "MODEL.POINT_HEAD.COARSE_SEM_SEG_HEAD_NAME": (
        "SemSegFPNHead",
        "Coarse head of semantic segmentation; not used by the mask head.",
    ),
    "MODEL.IMPLICIT_POINTREND.IMAGE_FEATURE_ENABLED": (
        True,
        "Give the image's features to the points of ImplicitPointRendMaskHead.",
    ),
    "MODEL.IMPLICIT_POINTREND.POS_ENC_ENABLED": (True, "Give them their encoded positions."),
    "MODEL.IMPLICIT_POINTREND.PARAMS_L2_REGULARIZER": (
        0.00001,
        "Factor of the squared size of the predicted parameters, in the loss.",
    ),
}


def add_pointrend_config(cfg: CfgNode) -> None:
    """Add the keys of PointRend's heads to a config, in place; call it before files are merged.

    Args:
        cfg: not frozen.
    """
    add_keys(cfg, POINTREND_KEYS)
