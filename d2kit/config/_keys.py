"""The table of config keys: full name -> default and one line of meaning with its unit."""

from typing import Any, NamedTuple

from d2kit.config._keys_backbones import BACKBONE_KEYS
from d2kit.config._keys_heads import HEAD_KEYS
from d2kit.config._keys_model import MODEL_KEYS
from d2kit.config._keys_run import RUN_KEYS


class Key(NamedTuple):
    """One config key: its default and what it means."""

    default: Any
    meaning: str


_TABLES = (MODEL_KEYS, BACKBONE_KEYS, HEAD_KEYS, RUN_KEYS)
KEYS: dict[str, Key] = {name: Key(*entry) for table in _TABLES for name, entry in table.items()}
"""All keys, in the order of the documentation; `defaults._C` and docs/config.md come from it."""

OWN_KEYS = frozenset(
    {
        *BACKBONE_KEYS,
        "DATASETS.REGISTER_COCO",
        "DATALOADER.MAX_SKIPPED_IMAGES",
        "DETERMINISTIC",
        "INPUT.RESIZE",
        "MODEL.CLASS_NAMES",
        "MODEL.FPN.P6_FROM",
        "MODEL.FREEZE",
        "MODEL.RESNETS.NORM_EPS",
        "MODEL.RETINANET.CLIP_BOXES_TEST",
        "MODEL.ROI_HEADS.CLASS_WEIGHTS",
        "MODEL.ROI_HEADS.MIN_SIZE_TEST",
        "MODEL.ROI_MASK_HEAD.WHOLE_PIXELS",
        "INPUT.FIXED_SIZE",
        "INPUT.ROTATION_ANGLES",
        "PREFLIGHT.ENABLED",
        "PREFLIGHT.MAX_IMAGES",
        "SOLVER.ACCUMULATE_STEPS",
        "SOLVER.AMP.PRECISION",
        "RESUME_CHANGED",
        "SOLVER.EARLY_STOPPING.METRIC",
        "SOLVER.EARLY_STOPPING.MIN_DELTA",
        "SOLVER.EARLY_STOPPING.PATIENCE",
        "SOLVER.EMA.DECAY",
        "SOLVER.EMA.ENABLED",
        "SOLVER.EMA.WARMUP",
        "SOLVER.LR_FACTORS",
        "SOLVER.MAX_EPOCHS",
        "SOLVER.OPTIMIZER",
        "SOLVER.REFERENCE_BATCH",
        "SOLVER.STEPS_EPOCHS",
        "TEST.BEST_METRIC",
        "TEST.CLASSIFICATION_REPORT",
        "TEST.EVAL_EPOCHS",
        "TEST.VALIDATION_LOSS",
        "TEST.VIS_IMAGES",
        *(name for name in KEYS if name.startswith(("MODEL.FCOS.", "TRACKER_HEADS.", "WRITERS."))),
    }
)
"""Keys that Detectron2 does not have."""
