"""Mask R-CNN with a RegNetY-4GF and a feature pyramid, from random weights, 100 epochs."""

from ..common.models.regnet import pixel_std as _pixel_std
from ..common.models.regnet import regnety_4gf as _backbone
from .mask_rcnn_R_50_FPN_100ep_LSJ import dataloader, lr_multiplier, model, optimizer, train

_backbone.norm = "SyncBN"
model.backbone.bottom_up = _backbone
model.pixel_std = _pixel_std
