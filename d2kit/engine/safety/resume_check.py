"""Compares the config of a resumed run with that of its checkpoint."""

import logging
from collections.abc import Mapping
from typing import Any

import yaml

from d2kit.utils.nested import flatten

__all__ = ["ConfigRecord", "config_differences"]

logger = logging.getLogger(__name__)

_ABSENT = "(no such key)"

# Keys, or the beginnings of keys, that do not change what is trained. A longer training is no
# other one until it comes to the old end; the seed is taken from the checkpoint.
HARMLESS = (
    *("OUTPUT_DIR", "VERSION", "VIS_PERIOD", "TEST.", "DATASETS.TEST", "SEED", "RESUME_CHANGED"),
    *("DATALOADER.NUM_WORKERS", "DATALOADER.MAX_SKIPPED_IMAGES", "SOLVER.MAX_ITER"),
    *("SOLVER.MAX_EPOCHS", "MODEL.WEIGHTS"),
    *(
        "SOLVER.CHECKPOINT_PERIOD",
        "MODEL.DEVICE",
        "MODEL.COMPILE",  # other digits, as of another device
        "SOLVER.AMP.ENABLED",  # the machine decides, as it does the device
        "CUDNN_BENCHMARK",
        "DETERMINISTIC",
        "DETERMINISTIC_STRICT",
        "INPUT.MIN_SIZE_TEST",
    ),
    *("INPUT.MAX_SIZE_TEST", "SOLVER.EARLY_STOPPING", "GLOBAL.HACK", "PREFLIGHT.", "WRITERS."),
)


class ConfigRecord:
    """Keeps a config in checkpoints, and refuses to go on from one of another training.

    Args:
        config: the config as YAML.
        allow: go on nevertheless.
    """

    def __init__(self, config: str, *, allow: bool) -> None:
        self._config = config
        self._allow = allow

    def state_dict(self) -> dict[str, str]:
        """Return the config as YAML."""
        return {"yaml": self._config}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Log the differences from the config of a checkpoint.

        Raises:
            ValueError: if one changes the result, unless that is allowed.
        """
        lines, harmful = config_differences(state_dict["yaml"], self._config)
        if not lines:
            return
        text = "\n  ".join(["the config differs from the checkpoint's:", *lines])
        if harmful and not self._allow:
            raise ValueError(
                f"{text}\nA resumed run would be neither the old training nor the new one. Undo "
                f"the change of {', '.join(harmful)}, choose another OUTPUT_DIR, start without "
                "--resume, or go on nevertheless with RESUME_CHANGED True"
            )
        logger.warning("Resuming although %s", text) if harmful else logger.info("Note: %s", text)


def config_differences(before: str, now: str) -> tuple[list[str], list[str]]:
    """Compare two configs.

    Args:
        before: YAML of the first.
        now: YAML of the second.

    Returns:
        A line for each key that differs, and the keys of those that change what is trained.
    """
    old, new = flatten(yaml.safe_load(before)), flatten(yaml.safe_load(now))
    keys = [key for key in sorted({*old, *new}) if old.get(key, _ABSENT) != new.get(key, _ABSENT)]
    lines = [f"{key}: {old.get(key, _ABSENT)!r} -> {new.get(key, _ABSENT)!r}" for key in keys]
    # a key that one of them lacks came or went with another version of d2kit
    harmful = [k for k in keys if k in old and k in new and not k.startswith(HARMLESS)]
    return lines, harmful
