"""Writers to tracking services that a config switches on."""

import yaml

from d2kit.config import CfgNode
from d2kit.utils._remote_writers import require_package
from d2kit.utils.events import EventWriter, MLflowWriter, WandbWriter

__all__ = ["build_tracker_writers", "default_tracker_check"]


def default_tracker_check(cfg: CfgNode) -> None:
    """Make sure that the packages of the services that a config asks for are installed.

    Raises:
        ValueError: if one is not; the message names the pip command.
    """
    for package, section in (("wandb", cfg.WRITERS.WANDB), ("mlflow", cfg.WRITERS.MLFLOW)):
        if section.ENABLED:
            require_package(package, f"WRITERS.{package.upper()}.ENABLED")


def build_tracker_writers(cfg: CfgNode) -> list[EventWriter]:
    """Return the writers of ``WRITERS``; put them before TensorBoard's, which clears the pictures.

    Args:
        cfg: a full config, sent along.
    """
    found: list[EventWriter] = []
    config = yaml.safe_load(cfg.dump())
    wandb, mlflow = cfg.WRITERS.WANDB, cfg.WRITERS.MLFLOW
    if wandb.ENABLED:
        found.append(
            WandbWriter(
                cfg.OUTPUT_DIR,
                project=wandb.PROJECT,
                name=wandb.NAME,
                entity=wandb.ENTITY,
                mode=wandb.MODE,
                config=config,
            )
        )
    if mlflow.ENABLED:
        found.append(
            MLflowWriter(
                cfg.OUTPUT_DIR,
                tracking_uri=mlflow.TRACKING_URI,
                experiment=mlflow.EXPERIMENT,
                name=mlflow.NAME,
                config=config,
            )
        )
    return found
