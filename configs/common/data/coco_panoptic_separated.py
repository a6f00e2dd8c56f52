"""COCO's instances with the semantic labels of its panoptic annotation."""

from d2kit.config import LazyCall as L
from d2kit.evaluation import COCOEvaluator, COCOPanopticEvaluator, SemSegEvaluator

from .coco import dataloader

dataloader.train.dataset.update(names="coco_2017_train_panoptic_separated", filter_empty=False)
dataloader.test.dataset.names = "coco_2017_val_panoptic_separated"
dataloader.evaluator = [
    L(evaluator)(dataset_name="${...test.dataset.names}")
    for evaluator in (COCOEvaluator, SemSegEvaluator, COCOPanopticEvaluator)
]
