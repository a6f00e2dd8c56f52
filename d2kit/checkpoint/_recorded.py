"""What a checkpoint says about the training that made it."""

from collections.abc import Mapping
from pathlib import Path

from d2kit.checkpoint._formats import read_checkpoint

__all__ = ["recorded_config"]


def recorded_config(path: Path) -> str:
    """Return the config that a checkpoint of `DefaultTrainer` was trained with, as YAML.

    Args:
        path: a local file.

    Raises:
        ValueError: if the file is damaged, or records no config.
    """
    record = read_checkpoint(path).get("config")
    text = record.get("yaml") if isinstance(record, Mapping) else None
    if not isinstance(text, str):
        raise ValueError(
            f"{path} records no config: only checkpoints of DefaultTrainer do, as .pth; give the "
            "config.yaml of its run"
        )
    return text
