"""Layers and low-level operations: what torch and torchvision lack, or do too slowly."""

import sys

from d2kit.layers.batch_norm import (
    CycleBatchNormList,
    FrozenBatchNorm2d,
    LayerNorm,
    NaiveSyncBatchNorm,
    SyncBatchNorm,
    get_norm,
)
from d2kit.layers.blocks import (
    ASPP,
    CNNBlockBase,
    DeformConv,
    DepthwiseSeparableConv2d,
    ModulatedDeformConv,
    fold_batch_norm,
)
from d2kit.layers.losses import (
    ciou_loss,
    diou_loss,
    giou_loss,
    sigmoid_focal_loss,
    smooth_l1_loss,
)
from d2kit.layers.mask_ops import masks_to_rle, paste_masks_in_image
from d2kit.layers.nms import batched_nms, batched_nms_rotated, nms, nms_rotated
from d2kit.layers.roi_align import ROIAlign, roi_align
from d2kit.layers.rotated_boxes import ROIAlignRotated, roi_align_rotated
from d2kit.layers.wrappers import (
    BatchNorm2d,
    Conv2d,
    ConvTranspose2d,
    Linear,
    ShapeSpec,
    cat,
    cross_entropy,
    empty_input_loss_func_wrapper,
    interpolate,
    move_device_like,
    nonzero_tuple,
    shapes_to_tensor,
)

# Python binds each module that it loads in its package: loaded later by its old path (d2kit.MOVED),
# this one would replace the function.
sys.modules[f"{__name__}.roi_align_rotated"] = sys.modules[f"{__name__}.rotated_boxes"]
