"""Panoptic FPN: a semantic branch beside Mask R-CNN (Kirillov et al. 2019, arXiv 1901.02446)."""

from d2kit.config import LazyCall as L
from d2kit.layers import ShapeSpec
from d2kit.modeling.meta_arch import PanopticFPN
from d2kit.modeling.meta_arch.panoptic_fpn import SemSegFPNHead

from .mask_rcnn_fpn import ROI_LEVELS, model

model.update(
    _target_=PanopticFPN,
    sem_seg_head=L(SemSegFPNHead)(
        input_shape=L(dict)(
            **{
                name: L(ShapeSpec)(stride=4 * 2**index, channels=256)
                for index, name in enumerate(ROI_LEVELS)
            }
        ),
        ignore_value=255,
        num_classes=54,  # 53 kinds of stuff, and one for all things
        conv_dims=128,
        common_stride=4,
        loss_weight=0.5,
        norm="GN",
    ),
)
