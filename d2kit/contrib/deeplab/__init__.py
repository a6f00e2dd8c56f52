"""DeepLabV3+ (Chen et al. 2018): semantic segmentation by dilated features and a decoder.

    cfg = get_cfg()
    add_deeplab_config(cfg)
    cfg.merge_from_file("deeplab.yaml")

where the file has, for instance, the keys

    MODEL:
      META_ARCHITECTURE: SemanticSegmentor
      BACKBONE: {NAME: build_resnet_deeplab_backbone, FREEZE_AT: 0}
      RESNETS: {OUT_FEATURES: [res2, res5], STEM_OUT_CHANNELS: 128, RES5_DILATION: 2, NORM: BN}
      SEM_SEG_HEAD: {NAME: DeepLabV3PlusHead, IN_FEATURES: [res2, res5], NORM: BN}
    SOLVER: {LR_SCHEDULER_NAME: WarmupPolyLR}

The trainer's `build_lr_scheduler` returns this package's.
"""

from d2kit.contrib.deeplab.config import add_deeplab_config, build_lr_scheduler
from d2kit.contrib.deeplab.semantic_seg import DeepLabV3PlusHead, build_resnet_deeplab_backbone

__all__ = [
    "DeepLabV3PlusHead",
    "add_deeplab_config",
    "build_lr_scheduler",
    "build_resnet_deeplab_backbone",
]
