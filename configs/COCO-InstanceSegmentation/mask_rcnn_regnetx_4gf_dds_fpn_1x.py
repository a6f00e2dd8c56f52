"""Mask R-CNN with a RegNetX-4GF and a feature pyramid, 1x schedule.

The backbone starts from weights trained on ImageNet: set `train.init_checkpoint` to your file.
"""

from ..common.coco_schedule import lr_multiplier_1x as lr_multiplier
from ..common.data.coco import dataloader
from ..common.models.mask_rcnn_fpn import model
from ..common.models.regnet import pixel_std as _pixel_std
from ..common.models.regnet import regnetx_4gf as _backbone
from ..common.optim import SGD as optimizer
from ..common.train import train

_backbone.norm = "FrozenBN"
_backbone.freeze_at = 2
model.backbone.bottom_up = _backbone
model.pixel_std = _pixel_std
optimizer.weight_decay = 5e-5
train.init_checkpoint = ""
