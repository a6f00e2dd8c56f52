"""Mask R-CNN with a RegNetX-4GF and a feature pyramid, from random weights, 200 epochs."""

from ..common.lsj import schedule
from .mask_rcnn_regnetx_4gf_dds_FPN_100ep_LSJ import dataloader, model, optimizer, train

train.max_iter, lr_multiplier = schedule(200)
