"""Mask R-CNN with a ResNet-50 and a feature pyramid, from random weights, 100 epochs."""

from ..common.lsj import dataloader, lr_multiplier, model, optimizer, train
