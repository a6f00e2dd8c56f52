"""Config keys of Panoptic-DeepLab, which `get_cfg` does not hold."""

from typing import Any

from d2kit.config import CfgNode
from d2kit.config.cfg_node import add_keys
from d2kit.contrib.deeplab.config import add_deeplab_config

__all__ = ["add_panoptic_deeplab_config"]

_INSTANCES = "MODEL.INS_EMBED_HEAD"
_MERGE = "MODEL.PANOPTIC_DEEPLAB"

PANOPTIC_DEEPLAB_KEYS: dict[str, tuple[Any, str]] = {
    "INPUT.GAUSSIAN_SIGMA": (10, "Deviation of the Gaussian of a centre, in pixels."),
    "INPUT.IGNORE_STUFF_IN_OFFSET": (True, "Offsets have no loss in stuff."),
    "INPUT.SMALL_INSTANCE_AREA": (4096, "Instances below this area are small, in pixels."),
    "INPUT.SMALL_INSTANCE_WEIGHT": (3, "Weight of their pixels in the semantic loss."),
    "INPUT.IGNORE_CROWD_IN_SEMANTIC": (False, "Crowds have no semantic label."),
    "SOLVER.OPTIMIZER": ("ADAM", "SGD, Adam or AdamW."),
    "MODEL.SEM_SEG_HEAD.HEAD_CHANNELS": (256, "Channels before the classifier."),
    "MODEL.SEM_SEG_HEAD.LOSS_TOP_K": (0.2, "Share of the pixels in hard pixel mining, in (0, 1]."),
    f"{_INSTANCES}.NAME": ("PanopticDeepLabInsEmbedHead", "Head of centres and offsets."),
    f"{_INSTANCES}.IN_FEATURES": (["res2", "res3", "res5"], "Features that it uses."),
    f"{_INSTANCES}.PROJECT_FEATURES": (["res2", "res3"], "The finer ones of them."),
    f"{_INSTANCES}.PROJECT_CHANNELS": ([32, 64], "Channels that each of these is reduced to."),
    f"{_INSTANCES}.ASPP_CHANNELS": (256, "Channels of the pyramid pooling."),
    f"{_INSTANCES}.ASPP_DILATIONS": ([6, 12, 18], "Its dilations, in pixels of the feature."),
    f"{_INSTANCES}.ASPP_DROPOUT": (0.1, "Probability of zeroing one of its outputs."),
    f"{_INSTANCES}.HEAD_CHANNELS": (32, "Channels before the predictors."),
    f"{_INSTANCES}.CONVS_DIM": (128, "Channels of the decoder."),
    f"{_INSTANCES}.COMMON_STRIDE": (4, "Stride of the finest feature, in pixels."),
    f"{_INSTANCES}.NORM": ("SyncBN", "Normalisation."),
    f"{_INSTANCES}.CENTER_LOSS_WEIGHT": (200.0, "Factor of the squared error of the heat map."),
    f"{_INSTANCES}.OFFSET_LOSS_WEIGHT": (0.01, "Factor of the absolute error of the offsets."),
    f"{_MERGE}.STUFF_AREA": (2048, "Least area of stuff in results, in pixels."),
    f"{_MERGE}.CENTER_THRESHOLD": (0.1, "Least value of a centre in the heat map, 0..1."),
    f"{_MERGE}.NMS_KERNEL": (7, "Side of the window in which one centre is kept, in pixels."),
    f"{_MERGE}.TOP_K_INSTANCE": (200, "Most centres of an image."),
    f"{_MERGE}.PREDICT_INSTANCES": (True, "Also return instances."),
    f"{_MERGE}.USE_DEPTHWISE_SEPARABLE_CONV": (False, "Depthwise separable convolutions."),
    f"{_MERGE}.SIZE_DIVISIBILITY": (-1, "Images are padded to multiples of it; -1: not."),
    f"{_MERGE}.BENCHMARK_NETWORK_SPEED": (False, "Leave the merging out."),
}
"""Full name -> (default, meaning)."""


def add_panoptic_deeplab_config(cfg: CfgNode) -> None:
    """Add the keys of Panoptic-DeepLab and DeepLab to a config, in place, before files are merged.

    Args:
        cfg: not frozen. Its ``SOLVER.OPTIMIZER`` becomes ADAM.
    """
    add_deeplab_config(cfg)
    add_keys(cfg, PANOPTIC_DEEPLAB_KEYS)
