"""`get`, `get_config`, `get_config_file` and `get_checkpoint_url`: the zoo by config name."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torchvision.models import detection, list_models

from d2kit.checkpoint import DetectionCheckpointer
from d2kit.config import CfgNode, LazyConfig, get_cfg, instantiate
from d2kit.config.yaml import (
    SUFFIXES,
    find_zoo_file,
    nearest_zoo_names,
    zoo_folder,
    zoo_names,
)
from d2kit.modeling import build_model
from d2kit.utils.names import NoWeightsError, ZooError

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = ["get", "get_checkpoint_url", "get_config", "get_config_file"]


URL_PREFIX = "https://dl.fbaipublicfiles.com/detectron2/"

_IDS = {
    "COCO-Detection": """
        fast_rcnn_R_50_FPN_1x/137635226/model_final_e5f7ce
        faster_rcnn_R_50_C4_1x/137257644/model_final_721ade
        faster_rcnn_R_50_DC5_1x/137847829/model_final_51d356
        faster_rcnn_R_50_FPN_1x/137257794/model_final_b275ba
        faster_rcnn_R_50_C4_3x/137849393/model_final_f97cb7
        faster_rcnn_R_50_DC5_3x/137849425/model_final_68d202
        faster_rcnn_R_50_FPN_3x/137849458/model_final_280758
        faster_rcnn_R_101_C4_3x/138204752/model_final_298dad
        faster_rcnn_R_101_DC5_3x/138204841/model_final_3e0943
        faster_rcnn_R_101_FPN_3x/137851257/model_final_f6e8b1
        faster_rcnn_X_101_32x8d_FPN_3x/139173657/model_final_68b088
        retinanet_R_50_FPN_1x/190397773/model_final_bfca0b
        retinanet_R_50_FPN_3x/190397829/model_final_5bd44e
        retinanet_R_101_FPN_3x/190397697/model_final_971ab9
        rpn_R_50_C4_1x/137258005/model_final_450694
        rpn_R_50_FPN_1x/137258492/model_final_02ce48""",
    "COCO-InstanceSegmentation": """
        mask_rcnn_R_50_C4_1x/137259246/model_final_9243eb
        mask_rcnn_R_50_DC5_1x/137260150/model_final_4f86c3
        mask_rcnn_R_50_FPN_1x/137260431/model_final_a54504
        mask_rcnn_R_50_C4_3x/137849525/model_final_4ce675
        mask_rcnn_R_50_DC5_3x/137849551/model_final_84107b
        mask_rcnn_R_50_FPN_3x/137849600/model_final_f10217
        mask_rcnn_R_101_C4_3x/138363239/model_final_a2914c
        mask_rcnn_R_101_DC5_3x/138363294/model_final_0464b7
        mask_rcnn_R_101_FPN_3x/138205316/model_final_a3ec72
        mask_rcnn_X_101_32x8d_FPN_3x/139653917/model_final_2d9806""",
    "COCO-Keypoints": """
        keypoint_rcnn_R_50_FPN_1x/137261548/model_final_04e291
        keypoint_rcnn_R_50_FPN_3x/137849621/model_final_a6e10b
        keypoint_rcnn_R_101_FPN_3x/138363331/model_final_997cc7
        keypoint_rcnn_X_101_32x8d_FPN_3x/139686956/model_final_5ad38f""",
    "COCO-PanopticSegmentation": """
        panoptic_fpn_R_50_1x/139514544/model_final_dbfeb4
        panoptic_fpn_R_50_3x/139514569/model_final_c10459
        panoptic_fpn_R_101_3x/139514519/model_final_cafdb1""",
    "Cityscapes": "mask_rcnn_R_50_FPN/142423278/model_final_af9cf5",
    "PascalVOC-Detection": "faster_rcnn_R_50_C4/142202221/model_final_b1acc2",
    "LVISv0.5-InstanceSegmentation": """
        mask_rcnn_R_50_FPN_1x/144219072/model_final_571f7c
        mask_rcnn_R_101_FPN_1x/144219035/model_final_824ab5
        mask_rcnn_X_101_32x8d_FPN_1x/144219108/model_final_5e3439""",
    "Detectron1-Comparisons": """
        faster_rcnn_R_50_FPN_noaug_1x/137781054/model_final_7ab50c
        mask_rcnn_R_50_FPN_noaug_1x/137781281/model_final_62ca52
        keypoint_rcnn_R_50_FPN_1x/137781195/model_final_cce136""",
    "Misc": """
        mask_rcnn_R_50_FPN_1x_dconv_c3-c5/138602867/model_final_65c703
        mask_rcnn_R_50_FPN_3x_dconv_c3-c5/144998336/model_final_821d0b
        cascade_mask_rcnn_R_50_FPN_1x/138602847/model_final_e9d89b
        cascade_mask_rcnn_R_50_FPN_3x/144998488/model_final_480dd8
        mask_rcnn_R_50_FPN_3x_syncbn/169527823/model_final_3b3c51
        mask_rcnn_R_50_FPN_3x_gn/138602888/model_final_dc5d9e
        scratch_mask_rcnn_R_50_FPN_3x_gn/138602908/model_final_01ca85
        panoptic_fpn_R_101_dconv_cascade_gn_3x/139797668/model_final_be35db
        cascade_mask_rcnn_X_152_32x8d_FPN_IN5k_gn_dconv/18131413/model_0039999_e76410""",
    "new_baselines": """
        mask_rcnn_R_50_FPN_100ep_LSJ/42047764/model_final_bb69de
        mask_rcnn_R_50_FPN_200ep_LSJ/42047638/model_final_89a8d3
        mask_rcnn_R_50_FPN_400ep_LSJ/42019571/model_final_14d201""",
}
"""Folder -> ``config/id/file`` of the published table of the model zoo.

Nine are also in the configs measured for the reference; the others are as remembered from the
published table and were never downloaded. A wrong one is a file that is not found.
"""

CHECKPOINTS = {
    f"{folder}/{line.split('/')[0]}": f"{URL_PREFIX}{folder}/{line}.pkl"
    for folder, lines in _IDS.items()
    for line in lines.split()
}
"""Name of a config without its suffix -> URL of its weights."""


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
        raise ZooError(
            f"'{config_path}' is no name of the model zoo: expected one relative to "
            f"'{zoo_folder()}' that ends in .yaml or .py; {near}"
        )
    raise ZooError(f"the model zoo has no config '{config_path}' ({near})")


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
    folder, _, model = key.partition("/")
    if folder == "torchvision" and model in list_models(detection):
        return f"torchvision://{model}"
    if key not in CHECKPOINTS:
        near = nearest_zoo_names(key, sorted(CHECKPOINTS))
        raise NoWeightsError(
            f"no published weights are known for '{config_path}' ({near}); if you have some, set "
            "MODEL.WEIGHTS (or train.init_checkpoint) to their path or URL"
        )
    return CHECKPOINTS[key]


def get_config(config_path: str, trained: bool = False) -> CfgNode | DictConfig:
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
        lazy: DictConfig = LazyConfig.load(file)
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


def _build_from_lazy_config(cfg: DictConfig, device: str | None) -> tuple[nn.Module, str]:
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
