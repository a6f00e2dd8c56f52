"""Evaluators: from a model's outputs to an ``OrderedDict`` of metrics."""

from d2kit.evaluation.coco_evaluation import COCOEvaluator
from d2kit.evaluation.evaluator import (
    DatasetEvaluator,
    DatasetEvaluators,
    inference_context,
    inference_on_dataset,
)
from d2kit.evaluation.testing import print_csv_format, verify_results

__all__ = [
    "COCOEvaluator",
    "DatasetEvaluator",
    "DatasetEvaluators",
    "inference_context",
    "inference_on_dataset",
    "print_csv_format",
    "verify_results",
]
