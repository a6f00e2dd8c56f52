"""Evaluators: from a model's outputs to an ``OrderedDict`` of metrics."""

from d2kit.evaluation.cityscapes_evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
)
from d2kit.evaluation.classification_report import ClassificationReport
from d2kit.evaluation.coco_evaluation import COCOEvaluator, RotatedCOCOEvaluator
from d2kit.evaluation.evaluator import (
    DatasetEvaluator,
    DatasetEvaluators,
    inference_context,
    inference_on_dataset,
    print_csv_format,
    verify_results,
)
from d2kit.evaluation.lvis_evaluation import LVISEvaluator
from d2kit.evaluation.pascal_voc_evaluation import PascalVOCDetectionEvaluator
from d2kit.evaluation.sem_seg_evaluation import COCOPanopticEvaluator, SemSegEvaluator

__all__ = [
    "COCOEvaluator",
    "COCOPanopticEvaluator",
    "CityscapesInstanceEvaluator",
    "CityscapesSemSegEvaluator",
    "ClassificationReport",
    "DatasetEvaluator",
    "DatasetEvaluators",
    "LVISEvaluator",
    "PascalVOCDetectionEvaluator",
    "RotatedCOCOEvaluator",
    "SemSegEvaluator",
    "inference_context",
    "inference_on_dataset",
    "print_csv_format",
    "verify_results",
]
