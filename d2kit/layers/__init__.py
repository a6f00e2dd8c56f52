"""Layers and low-level operations: what torch and torchvision lack, or do too slowly."""

from d2kit.layers.batch_norm import (
    CycleBatchNormList,
    FrozenBatchNorm2d,
    LayerNorm,
    NaiveSyncBatchNorm,
    get_norm,
)
from d2kit.layers.blocks import CNNBlockBase, DepthwiseSeparableConv2d
from d2kit.layers.nms import batched_nms, batched_nms_rotated, nms, nms_rotated
from d2kit.layers.shape_spec import ShapeSpec
from d2kit.layers.wrappers import (
    BatchNorm2d,
    Conv2d,
    ConvTranspose2d,
    Linear,
    cat,
    cross_entropy,
    empty_input_loss_func_wrapper,
    interpolate,
    move_device_like,
    nonzero_tuple,
    shapes_to_tensor,
)
