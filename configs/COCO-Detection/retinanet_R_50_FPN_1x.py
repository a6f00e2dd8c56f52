"""RetinaNet R50-FPN, 1x schedule: the YAML config of this name as a lazy config."""

from ..common.coco_schedule import lr_multiplier_1x as lr_multiplier
from ..common.data.coco import dataloader
from ..common.models.retinanet import model
from ..common.optim import SGD as optimizer
from ..common.train import train

dataloader.train.mapper.use_instance_mask = False
optimizer.lr = 0.01
