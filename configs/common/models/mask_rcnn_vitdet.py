"""Mask R-CNN on a plain vision transformer, ViT-B, with a simple feature pyramid.

Source: Li et al. 2022, "Exploring plain vision transformer backbones for object detection"
(arXiv 2203.16527), section 3 and appendix A.2.
"""

from functools import partial

from torch import nn

from d2kit.config import LazyCall as L
from d2kit.modeling.backbone import SimpleFeaturePyramid, ViT
from d2kit.modeling.backbone.fpn import LastLevelMaxPool

from ..data.constants import constants
from .mask_rcnn_fpn import model

DEPTH = 12
SIZE = 1024
GLOBAL = (2, 5, 8, 11)  # blocks that attend to the whole image; the others to windows

model.backbone = L(SimpleFeaturePyramid)(
    net=L(ViT)(
        img_size=SIZE,
        patch_size=16,
        embed_dim=768,
        depth=DEPTH,
        num_heads=12,
        drop_path_rate=0.1,
        window_size=14,
        mlp_ratio=4,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        window_block_indexes=[index for index in range(DEPTH) if index not in GLOBAL],
        residual_block_indexes=[],
        use_rel_pos=True,
        out_feature="last_feat",
    ),
    in_feature="${.net.out_feature}",
    out_channels=256,
    scale_factors=(4.0, 2.0, 1.0, 0.5),
    top_block=L(LastLevelMaxPool)(),
    norm="LN",
    square_pad=SIZE,
)
model.proposal_generator.head.conv_dims = [-1, -1]
model.roi_heads.box_head.update(conv_dims=[256, 256, 256, 256], fc_dims=[1024], conv_norm="LN")
model.roi_heads.mask_head.conv_norm = "LN"
model.update(
    pixel_mean=constants.imagenet_rgb256_mean,
    pixel_std=constants.imagenet_rgb256_std,
    input_format="RGB",
)
