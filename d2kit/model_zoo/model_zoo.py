"""`get`, `get_config`, `get_config_file` and `get_checkpoint_url`: the zoo by config name."""

from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from d2kit.checkpoint import DetectionCheckpointer
from d2kit.config import CfgNode, LazyConfig, get_cfg, instantiate
from d2kit.config._zoo_folder import (
    SUFFIXES,
    find_zoo_file,
    nearest_zoo_names,
    zoo_folder,
    zoo_names,
)
from d2kit.model_zoo._urls import CHECKPOINTS
from d2kit.modeling import build_model

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = ["get", "get_checkpoint_url", "get_config", "get_config_file"]


def get_config_file(config_path: str) -> str:
    """Return the file of a config of the zoo, to be merged or copied.

    Args:
        config_path: name relative to ``configs/``, for example
            ``"COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"``.

    Returns:
        Its absolute path.

    Raises:
        FileNotFoundError: if there is none; the nearest names are listed.
    """
    file = find_zoo_file(config_path)
    if file is not None:
        return str(file)
    near = nearest_zoo_names(config_path, zoo_names())
    name = PurePosixPath(config_path)
    if name.is_absolute() or ".." in name.parts or name.suffix not in SUFFIXES:
        raise FileNotFoundError(
            f"'{config_path}' is no name of the model zoo: expected one relative to "
            f"'{zoo_folder()}' that ends in .yaml or .py; {near}"
        )
    raise FileNotFoundError(f"the model zoo has no config '{config_path}' ({near})")


def get_checkpoint_url(config_path: str) -> str:
    """Return where the published weights of a config of the zoo lie.

    Args:
        config_path: name as for `get_config_file`.

    Returns:
        A URL, which `DetectionCheckpointer.load` and ``MODEL.WEIGHTS`` take.

    Raises:
        ValueError: if no weights are known for it; the nearest names that have some are listed.
    """
    name = PurePosixPath(config_path)
    key = str(name.with_suffix("")) if name.suffix in SUFFIXES else config_path
    if key not in CHECKPOINTS:
        near = nearest_zoo_names(key, sorted(CHECKPOINTS))
        raise ValueError(
            f"no published weights are known for '{config_path}' ({near}); if you have some, set "
            "MODEL.WEIGHTS (or train.init_checkpoint) to their path or URL"
        )
    return CHECKPOINTS[key]


def get_config(config_path: str, trained: bool = False) -> "CfgNode | DictConfig":
    """Return a config of the zoo.

    Args:
        config_path: name as for `get_config_file`; ``.py`` gives a lazy config.
        trained: point ``MODEL.WEIGHTS`` (``train.init_checkpoint``) to the published weights;
            otherwise it stays what the config says, mostly a backbone trained on ImageNet.

    Raises:
        FileNotFoundError: if there is no such config.
        ValueError: if `trained` and no weights are known.
    """
    file = get_config_file(config_path)
    url = get_checkpoint_url(config_path) if trained else ""
    if file.endswith(".py"):
        lazy = LazyConfig.load(file)
        if url and "train" not in lazy:
            raise ValueError(f"'{config_path}' has no section 'train' to put weights into")
        if url:
            lazy.train.init_checkpoint = url
        return lazy
    cfg = get_cfg()
    cfg.merge_from_file(file)
    if url:
        cfg.merge_from_list(["MODEL.WEIGHTS", url])
    return cfg


def _build_from_config(cfg: CfgNode, device: str | None) -> tuple[nn.Module, str]:
    """Return the model of a config, on `device` or the config's, and the name of its weights."""
    if device is not None:
        cfg.merge_from_list(["MODEL.DEVICE", device])
    return build_model(cfg), cfg.MODEL.WEIGHTS


def _build_from_lazy_config(cfg: Any, device: str | None) -> tuple[nn.Module, str]:
    """Return the model of a lazy config, on `device` or the best one, and its weights' name."""
    model = instantiate(cfg.model)
    weights = cfg.train.init_checkpoint if "train" in cfg else ""
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), str(weights)


def get(config_path: str, trained: bool = False, device: str | None = None) -> nn.Module:
    """Build a model of the zoo and load its weights.

    Args:
        config_path: name as for `get_config_file`.
        trained: load the published weights; otherwise those that the config starts from.
        device: for example ``"cpu"``; None: the config's, or the CPU where CUDA is absent.

    Returns:
        The model, in training mode as `build_model` gives it.

    Raises:
        FileNotFoundError: if there is no such config, or weights cannot be had.
        ValueError: if `trained` and no weights are known.
    """
    cfg: Any = get_config(config_path, trained)
    build = _build_from_config if isinstance(cfg, CfgNode) else _build_from_lazy_config
    model, weights = build(cfg, device)
    DetectionCheckpointer(model).load(weights)
    return model
