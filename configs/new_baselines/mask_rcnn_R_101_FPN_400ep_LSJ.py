"""Mask R-CNN with a ResNet-101 and a feature pyramid, from random weights, 400 epochs."""

from ..common.lsj import schedule
from .mask_rcnn_R_101_FPN_100ep_LSJ import dataloader, model, optimizer, train

train.max_iter, lr_multiplier = schedule(400)
