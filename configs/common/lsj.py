"""Training from random weights with large-scale jitter: 100 epochs and more, 64 images per step.

Source: Ghiasi et al. 2021, section 3 and appendix (arXiv 2012.07177).
"""

from typing import Any

from fvcore.common.param_scheduler import MultiStepParamScheduler

from d2kit.config import LazyCall as L
from d2kit.layers import NaiveSyncBatchNorm
from d2kit.solver import WarmupParamScheduler

from .data.coco_lsj import dataloader
from .models.mask_rcnn_fpn import model
from .optim import SGD as optimizer
from .train import train

IMAGES = 118000
BATCH = 64


def schedule(epochs: int) -> tuple[int, Any]:
    """Return the number of steps of some epochs, and the multiplier of the learning rate."""
    steps = round(epochs * IMAGES / BATCH)
    return steps, L(WarmupParamScheduler)(
        scheduler=L(MultiStepParamScheduler)(
            values=[1.0, 0.1, 0.01],
            milestones=[round(steps * 8 / 9), round(steps * 26 / 27)],
            num_updates=steps,
        ),
        warmup_length=500 / steps,
        warmup_factor=0.067,
    )


def head_norm(channels: int) -> NaiveSyncBatchNorm:
    """Return a norm that weighs each process by its number of boxes, which may be zero."""
    return NaiveSyncBatchNorm(channels, stats_mode="N")


model.backbone.bottom_up.freeze_at = 0
model.backbone.bottom_up.stem.norm = "SyncBN"
model.backbone.bottom_up.stages.norm = "SyncBN"
model.backbone.norm = "SyncBN"
model.proposal_generator.head.conv_dims = [-1, -1]
model.roi_heads.box_head.conv_dims = [256, 256, 256, 256]
model.roi_heads.box_head.fc_dims = [1024]
model.roi_heads.box_head.conv_norm = head_norm
model.roi_heads.mask_head.conv_norm = head_norm

train.init_checkpoint = ""
train.amp.enabled = True
train.ddp.fp16_compression = True
train.max_iter, lr_multiplier = schedule(100)

optimizer.lr = 0.1
optimizer.weight_decay = 4e-5
