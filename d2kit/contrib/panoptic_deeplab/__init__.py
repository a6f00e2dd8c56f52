"""Panoptic-DeepLab (Cheng et al. 2020): classes, centres and offsets of pixels.

    cfg = get_cfg()
    add_panoptic_deeplab_config(cfg)
    loader = build_detection_train_loader(cfg, mapper=PanopticDeeplabDatasetMapper(cfg))

on a dataset with panoptic labels whose classes of things and stuff share one numbering, such as
``coco_2017_train_panoptic``.
"""

from d2kit.contrib.panoptic_deeplab.dataset_mapper import (
    PanopticDeeplabDatasetMapper,
    PanopticDeepLabTargetGenerator,
)
from d2kit.contrib.panoptic_deeplab.panoptic_seg import (
    INS_EMBED_BRANCHES_REGISTRY,
    PanopticDeepLab,
    PanopticDeepLabInsEmbedHead,
    PanopticDeepLabSemSegHead,
    add_panoptic_deeplab_config,
    build_ins_embed_branch,
)

__all__ = [
    "INS_EMBED_BRANCHES_REGISTRY",
    "PanopticDeepLab",
    "PanopticDeepLabInsEmbedHead",
    "PanopticDeepLabSemSegHead",
    "PanopticDeepLabTargetGenerator",
    "PanopticDeeplabDatasetMapper",
    "add_panoptic_deeplab_config",
    "build_ins_embed_branch",
]
