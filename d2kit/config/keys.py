"""docs/config.md, from the table of keys."""

from __future__ import annotations

from itertools import groupby
from typing import Any, NamedTuple

from d2kit.config.keys_model import BACKBONE_KEYS, HEAD_KEYS, MODEL_KEYS
from d2kit.config.keys_run import RUN_KEYS


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
        "DATASETS.STRICT_ANNOTATIONS",
        "DATALOADER.MAX_SKIPPED_IMAGES",
        "DETERMINISTIC",
        "DETERMINISTIC_STRICT",
        "INPUT.RESIZE",
        "DATASETS.KEYPOINT_FLIP_MAP",
        "DATASETS.KEYPOINT_NAMES",
        "MODEL.CLASS_NAMES",
        "MODEL.COMPILE",
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
        "TEST.DTYPE",
        "TEST.EVAL_EPOCHS",
        "TEST.REPORT",
        "TEST.VALIDATION_LOSS",
        "TEST.VIS_IMAGES",
        *(name for name in KEYS if name.startswith(("MODEL.FCOS.", "TRACKER_HEADS.", "WRITERS."))),
    }
)
"""Keys that Detectron2 does not have."""


_HEAD = """# Config keys

Made from `d2kit/config/keys*.py` by `python -m d2kit.config > docs/config.md`; do not edit.
`d2kit config explain KEY` (or `python -m d2kit.config explain KEY`) explains keys, sections
(`SOLVER`) and patterns (`"*NUM_CLASSES"`), and with `--config-file` tells the value there and the
file and line that set it; `diff A B` compares two configs, `print CONFIG --changed` shows what
differs from the defaults. They read YAML files, folders of runs and names of the model zoo, and
execute nothing.

All keys and defaults are Detectron2's, except those marked **ours**. Sizes are in pixels of the
network's input unless a line says otherwise.

## Rules

- **Files** are plain YAML. `!!python/...` tags are refused and nothing in a file is executed;
  `allow_unsafe` is accepted and has no effect.
- **`_BASE_`** names one file or a list of files whose values come first. The path is relative to
  the file and local: never a URL, and within the config tree. The tree is the nearest folder named
  `configs` above the first file (its own folder, where there is none), or a folder `configs` that
  stands beside one of the folders above it. Where there is no such file it may be a name of the
  model zoo, wherever d2kit lies: `_BASE_: COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml`.
  Circles are refused.
- **Unknown keys** in a file or on the command line are an error that names file, line, key and the
  nearest keys. A merge that fails changes nothing.
- **Types**: an int passes for a float, a list for a tuple and the reverse, null for anything and
  anything for null. Anything else is an error. Strings are read as Python literals where they are
  one, unless the key holds a string.
- **New keys from Python**: `cfg.MODEL.MINE = CfgNode()`, `cfg.MODEL.MINE.X = 1` and
  `cfg.INPUT.MINE = 3` work as ever. Refused is only a new value in a section of the defaults whose
  name is a slip of a default key there: equal up to case and underscores, or at most two
  letters apart (one, below eight letters), for example `NUM_CLASS` beside `NUM_CLASSES`; names
  that differ in a digit (`RES4_DILATION`) are not slips. `cfg.SECTION["NUM_CLASS"] = 3` or
  `cfg.set_new_allowed(True)` add it all the same. A new value whose name exists in a section
  below, `cfg.MODEL.NUM_CLASSES = 3`, is a warning. Reading a key that does not exist,
  `cfg.SOLVR` or `cfg["SOLVR"]`, is an error with the nearest names.
- **Versions**: files of VERSION 1 are converted when they are read, with a warning.
"""


def _section(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[:2] if len(parts) > 2 and parts[0] == "MODEL" else parts[:1])


def markdown() -> str:
    """Return the text of docs/config.md."""
    groups: dict[str, list[str]] = {}
    for section, names in groupby(KEYS, key=_section):
        title = section if any(name.startswith(f"{section}.") for name in KEYS) else "The run"
        groups.setdefault(title, []).extend(names)
    parts = [_HEAD]
    for title, listed in groups.items():
        parts.append(f"\n## {title}\n\n| key | default | meaning |\n|---|---|---|\n")
        for name in listed:
            ours = " **Ours.**" if name in OWN_KEYS else ""
            default = repr(KEYS[name].default).replace("|", "\\|")
            parts.append(f"| `{name}` | `{default}` | {KEYS[name].meaning}{ours} |\n")
    return "".join(parts)
