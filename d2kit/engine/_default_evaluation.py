"""What `DefaultTrainer` evaluates with."""

import logging
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import nn

from d2kit.config import CfgNode
from d2kit.engine._classes import default_check_datasets
from d2kit.engine._evaluators import build_dataset_evaluator
from d2kit.engine._tables import table_of_results
from d2kit.utils import comm

__all__ = ["DefaultEvaluation"]

logger = logging.getLogger(__name__)


class DefaultEvaluation:
    """Builds loaders and evaluators of the test sets and runs them; a base of `DefaultTrainer`."""

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Build the loader of a test set, see `d2kit.data.build_detection_test_loader`."""
        from d2kit.data import build_detection_test_loader

        return build_detection_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Build the evaluator of a test set, by the `evaluator_type` of its metadata.

        Raises:
            ValueError: if d2kit knows none for it; override this method then.
        """
        return build_dataset_evaluator(cfg, dataset_name)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict[str, Any]:
        """Evaluate a model on each dataset of DATASETS.TEST.

        Args:
            cfg: the config.
            model: the model.
            evaluators: one per dataset; None calls `build_evaluator`.

        Returns:
            Results of the dataset, or dataset -> results where there are several; empty on other
            processes than rank 0.

        Raises:
            ValueError: if the number of evaluators is not that of the datasets.
        """
        from d2kit.evaluation import DatasetEvaluator, inference_on_dataset

        names = list(cfg.DATASETS.TEST)
        if isinstance(evaluators, DatasetEvaluator):
            evaluators = [evaluators]
        if evaluators is not None and len(evaluators) != len(names):
            raise ValueError(f"{len(names)} test datasets, but {len(evaluators)} evaluators")
        default_check_datasets(cfg, names)
        results: dict[str, Any] = OrderedDict()
        for index, name in enumerate(names):
            loader = cls.build_test_loader(cfg, name)
            evaluator = evaluators[index] if evaluators else cls.build_evaluator(cfg, name)
            results[name] = inference_on_dataset(model, loader, evaluator)
            if comm.is_main_process():
                _log_results(name, results[name])
        if comm.is_main_process() and results:
            logger.info("Results:\n%s", table_of_results(results))
        return next(iter(results.values())) if len(results) == 1 else results

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:  # noqa: N802
        """Evaluate a model with test-time augmentation (TEST.AUG), as `test` does without.

        Args:
            cfg: the config.
            model: a `GeneralizedRCNN`.

        Returns:
            As `test`, each key with ``_TTA`` behind it. Files are written to the folder ``TTA``
            below OUTPUT_DIR.
        """
        from d2kit.evaluation._test_time_augmentation import GeneralizedRCNNWithTTA

        apart = cfg.clone()
        apart.defrost()
        apart.OUTPUT_DIR = f"{cfg.OUTPUT_DIR}/TTA"
        results = cls.test(apart, GeneralizedRCNNWithTTA(cfg, model))
        return OrderedDict((f"{key}_TTA", value) for key, value in results.items())


def _log_results(name: str, results: Mapping[str, Any]) -> None:
    from d2kit.evaluation import print_csv_format

    logger.info("Evaluation results for %s in csv format:", name)
    print_csv_format(results)
