"""Config keys of the backbones that Detectron2 reaches from Python only: (default, meaning).

All of them are ours. `MODEL.BACKBONE.FREEZE_AT` and `MODEL.FPN` count for these backbones, too; an
empty `MODEL.FPN.IN_FEATURES` means all of a backbone's maps.
"""

from typing import Any

_DROP_PATH = "Probability that a branch of the last block is dropped in training; 0 at the first."
_RECOMPUTE = "Compute activations again in the backward pass: less memory, more time."
_HEADS = "Attention heads of the first stage; doubled per stage."

BACKBONE_KEYS: dict[str, tuple[Any, str]] = {
    "MODEL.FPN.TOP_BLOCK": (
        "pool",
        "Levels above the last one of RegNet, Swin, MViT, ViT, timm: pool (one), conv (two).",
    ),
    "MODEL.REGNET.DEPTH": (23, "Blocks of all stages; the defaults are RegNetX-4.0GF's."),
    "MODEL.REGNET.W_A": (38.65, "Slope of the channels over the blocks."),
    "MODEL.REGNET.W_0": (96, "Channels at the start, a multiple of 8."),
    "MODEL.REGNET.W_M": (2.43, "Factor between the channels of stages."),
    "MODEL.REGNET.GROUP_WIDTH": (40, "Channels of each group of the 3x3 convolutions."),
    "MODEL.REGNET.SE_RATIO": (0.0, "Squeeze-and-excitation, share of channels: 0 X, 0.25 Y."),
    "MODEL.REGNET.STEM_WIDTH": (32, "Channels of the stem."),
    "MODEL.REGNET.NORM": ("FrozenBN", "Normalisation: FrozenBN, BN, SyncBN, GN, LN or empty."),
    "MODEL.SWIN.EMBED_DIM": (96, "Channels of the first stage; doubled per stage."),
    "MODEL.SWIN.DEPTHS": ([2, 2, 6, 2], "Blocks of each stage; the defaults are Swin-T's."),
    "MODEL.SWIN.NUM_HEADS": ([3, 6, 12, 24], "Attention heads of each stage."),
    "MODEL.SWIN.WINDOW_SIZE": (7, "Side of the windows, in tokens."),
    "MODEL.SWIN.DROP_PATH_RATE": (0.2, _DROP_PATH),
    "MODEL.SWIN.USE_CHECKPOINT": (False, _RECOMPUTE),
    "MODEL.VIT.IMG_SIZE": (1024, "Side of the images that relative positions are made for."),
    "MODEL.VIT.PATCH_SIZE": (16, "Side of a patch."),
    "MODEL.VIT.EMBED_DIM": (768, "Channels; the defaults are ViTDet-B's."),
    "MODEL.VIT.DEPTH": (12, "Blocks."),
    "MODEL.VIT.NUM_HEADS": (12, "Attention heads of each block."),
    "MODEL.VIT.WINDOW_SIZE": (14, "Side of the windows of local blocks, in tokens."),
    "MODEL.VIT.GLOBAL_BLOCKS": ([2, 5, 8, 11], "Blocks that look at the whole image, from 0."),
    "MODEL.VIT.USE_REL_POS": (True, "Relative positions in the attention."),
    "MODEL.VIT.DROP_PATH_RATE": (0.1, _DROP_PATH),
    "MODEL.VIT.USE_CHECKPOINT": (False, _RECOMPUTE),
    "MODEL.VIT.SQUARE_PAD": (0, "Pad batches to a square of this side; 0 for none."),
    "MODEL.MVIT.IMG_SIZE": (224, "Side of the images that relative positions are made for."),
    "MODEL.MVIT.EMBED_DIM": (96, "Channels of the first stage; doubled per stage."),
    "MODEL.MVIT.DEPTH": (10, "Blocks of all stages; the defaults are MViTv2-T's."),
    "MODEL.MVIT.NUM_HEADS": (1, _HEADS),
    "MODEL.MVIT.LAST_BLOCKS": ([0, 2, 7, 9], "Index of the last block of each stage, from 0."),
    "MODEL.MVIT.WINDOW_SIZE": (56, "Side of the first stage's windows, in tokens; 0 for none."),
    "MODEL.MVIT.DROP_PATH_RATE": (0.2, _DROP_PATH),
    "MODEL.MVIT.USE_CHECKPOINT": (False, _RECOMPUTE),
    "MODEL.TIMM.NAME": ("resnet18", "Name of a model of timm that gives feature maps."),
    "MODEL.TIMM.PRETRAINED": (
        False,
        "Download timm's weights (mind PIXEL_MEAN, PIXEL_STD, FORMAT).",
    ),
    "MODEL.TIMM.OUT_INDICES": ([], "Which of its maps to use; empty: those of strides 4 to 32."),
}
