"""What `DefaultTrainer` evaluates with, and the losses of a model on a test set."""

from __future__ import annotations

import contextlib
import logging
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from d2kit.checkpoint import DetectionCheckpointer
from d2kit.config import CfgNode
from d2kit.engine.preflight.records import check_same_classes, evaluator_kind
from d2kit.engine.resolve import build_trained_classes, register_listed_datasets
from d2kit.utils import comm
from d2kit.utils.devices import choose_inference_dtype
from d2kit.utils.env import derive_seed
from d2kit.utils.events import EventStorage
from d2kit.utils.logger import setup_logger
from d2kit.utils.names import nearest_names
from d2kit.utils.stopping import in_progress, leave_if_asked
from d2kit.utils.text import file_name

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from d2kit.evaluation import DatasetEvaluator


def build_dataset_evaluator(
    cfg: CfgNode, dataset_name: str, output_dir: str | None = None
) -> DatasetEvaluator:
    """Build what evaluates a dataset, by the `evaluator_type` in its metadata.

    Args:
        cfg: the config; a model of rotated boxes is evaluated by rotated boxes.
        dataset_name: a registered dataset.
        output_dir: where the evaluators write; default: ``inference`` in OUTPUT_DIR, and in it a
            folder of the dataset's name where DATASETS.TEST has several.

    Returns:
        One evaluator, or `DatasetEvaluators` of several (panoptic datasets).

    Raises:
        ValueError: the metadata name no evaluator that d2kit knows.
    """
    from d2kit import evaluation
    from d2kit.data import MetadataCatalog

    folder = _build_folder(cfg, dataset_name) if output_dir is None else output_dir
    metadata = MetadataCatalog.get(dataset_name)
    kind = evaluator_kind(metadata)
    if kind == "coco" and cfg.MODEL.PROPOSAL_GENERATOR.NAME == "RRPN":
        kind = "rotated_coco"

    def coco() -> DatasetEvaluator:
        sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS
        return evaluation.COCOEvaluator(dataset_name, output_dir=folder, kpt_oks_sigmas=sigmas)

    def panoptic() -> DatasetEvaluator:
        parts: list[Any] = [evaluation.COCOPanopticEvaluator(dataset_name, folder)]
        if metadata.get("sem_seg_root"):
            parts.insert(0, evaluation.SemSegEvaluator(dataset_name, output_dir=folder))
        if metadata.get("json_file"):
            parts.insert(0, coco())
        return evaluation.DatasetEvaluators(parts) if len(parts) > 1 else parts[0]

    makers = {
        "coco": coco,
        "rotated_coco": lambda: evaluation.RotatedCOCOEvaluator(dataset_name, output_dir=folder),
        "coco_panoptic_seg": panoptic,
        "sem_seg": lambda: evaluation.SemSegEvaluator(dataset_name, output_dir=folder),
        "cityscapes_instance": lambda: evaluation.CityscapesInstanceEvaluator(dataset_name),
        "cityscapes_sem_seg": lambda: evaluation.CityscapesSemSegEvaluator(dataset_name),
        "pascal_voc": lambda: evaluation.PascalVOCDetectionEvaluator(dataset_name),
        "lvis": lambda: evaluation.LVISEvaluator(dataset_name, output_dir=folder),
    }
    if kind not in makers:
        near = ", ".join(nearest_names(str(kind), makers) or makers)
        raise ValueError(
            f"no evaluator is known for dataset '{dataset_name}' (evaluator_type {kind!r}; nearest "
            f"{near}); set it in the metadata, or override DefaultTrainer.build_evaluator"
        )
    evaluator = makers[kind]()
    if cfg.TEST.CLASSIFICATION_REPORT:
        report = evaluation.ClassificationReport(dataset_name, output_dir=folder)
        return evaluation.DatasetEvaluators([evaluator, report])
    return evaluator


def _build_folder(cfg: CfgNode, dataset_name: str) -> str:
    """Return where a test set's results go: each of several has a folder of its own."""
    folder = os.path.join(cfg.OUTPUT_DIR, "inference")
    if len(cfg.DATASETS.TEST) <= 1:
        return folder
    return os.path.join(folder, file_name(dataset_name))


def table_of_results(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Lay the main metrics of all test sets out in one table.

    Args:
        results: dataset -> task -> metric -> value.

    Returns:
        One row per dataset and task; metrics per class (``AP-person``) are left out.
    """
    from tabulate import tabulate

    rows: list[list[Any]] = []
    columns: list[str] = []
    for dataset, by_task in results.items():
        for task, metrics in by_task.items():
            if not isinstance(metrics, Mapping):
                continue
            shown = {name: value for name, value in metrics.items() if "-" not in name}
            columns += [name for name in shown if name not in columns]
            rows.append([dataset, task, shown])
    cells = [[d, t, *(shown.get(name, "") for name in columns)] for d, t, shown in rows]
    return tabulate(cells, headers=["dataset", "task", *columns], floatfmt=".2f", tablefmt="pipe")


logger = logging.getLogger(__name__)


class DefaultEvaluation:
    """Builds loaders and evaluators of the test sets and runs them; a base of `DefaultTrainer`."""

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[Any]:
        """Build the loader of a test set, see `d2kit.data.build_detection_test_loader`."""
        from d2kit.data import build_detection_test_loader

        loader: Iterable[Any] = build_detection_test_loader(cfg, dataset_name)
        return loader

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """Build the evaluator of a test set, by the `evaluator_type` of its metadata.

        Raises:
            ValueError: if d2kit knows none for it; override this method then.
        """
        return build_dataset_evaluator(cfg, dataset_name)

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        evaluators: DatasetEvaluator | Sequence[DatasetEvaluator] | None = None,
    ) -> dict[str, Any]:
        """Evaluate a model on each dataset of DATASETS.TEST.

        Args:
            cfg: the config.
            model: the model.
            evaluators: one per dataset; None calls `build_evaluator`.

        Returns:
            Results of the dataset, or dataset -> results where there are several; empty on other
            processes than rank 0.

        Raises:
            ValueError: if the number of evaluators is not that of the datasets, or a dataset has
                other classes than the model or the training set (another order is mapped by name).
        """
        from d2kit.data import MetadataCatalog
        from d2kit.data.datasets.coco import prefer_class_order
        from d2kit.evaluation import DatasetEvaluator, inference_on_dataset
        from d2kit.modeling import computing_in

        names = list(cfg.DATASETS.TEST)
        if isinstance(evaluators, DatasetEvaluator):
            evaluators = [evaluators]
        if evaluators is not None and len(evaluators) != len(names):
            raise ValueError(f"{len(names)} test datasets, but {len(evaluators)} evaluators")
        if not logging.getLogger("d2kit").isEnabledFor(logging.INFO):
            setup_logger()  # a script without default_setup
        register_listed_datasets(cfg, names)
        classes, source = build_trained_classes(cfg)
        weight = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        dtype = torch.float32  # of what is not ours to decide: an export, a function
        if weight is not None:
            dtype = choose_inference_dtype(cfg.TEST.DTYPE, weight.device)
        for name in names:
            prefer_class_order(name, classes)
        results: dict[str, Any] = OrderedDict()
        for index, name in enumerate(names):
            loader = cls.build_test_loader(cfg, name)
            known = MetadataCatalog.get(name).get("thing_classes") or ()
            check_same_classes(name, known, source, classes)
            evaluator = evaluators[index] if evaluators else cls.build_evaluator(cfg, name)
            with computing_in(model, dtype):
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
        from d2kit.evaluation.test_time_augmentation import GeneralizedRCNNWithTTA

        apart = cfg.clone()
        apart.defrost()
        apart.OUTPUT_DIR = f"{cfg.OUTPUT_DIR}/TTA"
        results = cls.test(apart, GeneralizedRCNNWithTTA(cfg, model))
        return OrderedDict((f"{key}_TTA", value) for key, value in results.items())


def _log_results(name: str, results: Mapping[str, Any]) -> None:
    from d2kit.evaluation import print_csv_format

    logger.info("Evaluation results for %s in csv format:", name)
    print_csv_format(results)


def check_evaluated_weights(checkpointer: DetectionCheckpointer, allow: bool = False) -> None:
    """Refuse to evaluate a model that was not, or not wholly, loaded from a file.

    Args:
        checkpointer: after `resume_or_load`.
        allow: warn only.

    Raises:
        ValueError: no weights were loaded, or some of the model were not in the file.
    """
    lacking = checkpointer.not_loaded
    if lacking == []:
        return
    if lacking is None:
        what = "no weights were loaded (MODEL.WEIGHTS is empty, and nothing was resumed)"
    else:
        shown = ", ".join(lacking[:3]) + (", ..." if len(lacking) > 3 else "")
        what = f"{len(lacking)} weights of the model did not fit the file ({shown})"
    text = f"{what}: the figures would be those of an untrained model"
    if not allow:
        raise ValueError(
            f"{text}; give MODEL.WEIGHTS, or --resume with the OUTPUT_DIR of a training, or "
            "--allow-untrained to evaluate all the same"
        )
    logger.warning("%s", text)


def build_validation_loader(cfg: CfgNode, dataset_name: str) -> DataLoader[Any]:
    """Return a loader of a test set with its objects, resized as in inference, one image a batch.

    Args:
        cfg: a full config.
        dataset_name: a registered dataset.

    Raises:
        ValueError: if no image of the dataset has labels.
    """
    from d2kit.data import (
        DatasetMapper,
        build_detection_test_loader,
        get_detection_dataset_dicts,
    )
    from d2kit.data.detection_utils import build_augmentation

    records = get_detection_dataset_dicts([dataset_name], filter_empty=False)
    labels = ("annotations", "sem_seg_file_name")
    records = [record for record in records if any(key in record for key in labels)]
    if not records:
        raise ValueError(
            f"TEST.VALIDATION_LOSS: dataset '{dataset_name}' has no labels to compute losses from"
        )
    mapper = DatasetMapper(
        cfg,
        is_train=True,
        augmentations=build_augmentation(cfg, is_train=False),
        recompute_boxes=False,
    )
    workers = cfg.DATALOADER.NUM_WORKERS
    loader: DataLoader[Any] = build_detection_test_loader(
        records, mapper=mapper, num_workers=workers
    )
    return loader


def validation_losses(model: nn.Module, loader: DataLoader[Any]) -> dict[str, float]:
    """Return the mean of each loss over the images of a loader; all processes call it together.

    The model computes losses as in training, but learns nothing: BatchNorm uses its statistics and
    keeps them, nothing is dropped. Each image is alone in its batch and draws from a seed of its
    own, so that the result depends on the weights only, not on order or number of processes.

    Args:
        model: unwrapped if it is data-parallel; afterwards as it was.
        loader: yields lists of samples, each process its contiguous part of the images.

    Returns:
        Loss -> mean, and their sum as ``total_loss``; empty on other processes than rank 0.

    Raises:
        ValueError: if there is no image.
    """
    model = comm.unwrap_model(model)
    sums: dict[str, float] = {}
    images = 0
    first = sum(comm.all_gather(len(loader))[: comm.get_rank()])
    stateful: list[Any] = [m for m in model.modules() if hasattr(m, "training_state")]
    kept = [(module, module.training_state()) for module in stateful]
    with _as_in_training(model), EventStorage(), in_progress("a validation loss", loader):
        for number, batch in enumerate(loader, start=first):
            leave_if_asked()
            for module, state in kept:
                module.load_training_state(state)
            for name, value in _losses_of(model, batch, derive_seed(0, number)).items():
                sums[name] = sums.get(name, 0.0) + float(value)
            images += 1
    for module, state in kept:
        module.load_training_state(state)
    parts = comm.gather((sums, images))
    if not comm.is_main_process():
        return {}
    total = sum(count for _, count in parts)
    if not total:
        raise ValueError("validation_losses: the loader has no image")
    names = sorted({name for part, _ in parts for name in part})
    means = {name: sum(part.get(name, 0.0) for part, _ in parts) / total for name in names}
    return {"total_loss": sum(means.values()), **means}


def _losses_of(model: nn.Module, batch: list[dict[str, Any]], seed: int) -> Mapping[str, Tensor]:
    """Return the losses of one batch; all its choices by chance depend on `seed`."""
    batch = [{**sample, "sample_seed": seed} for sample in batch]
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), comm.on_its_own(), torch.no_grad():
        torch.manual_seed(seed)
        losses = model(batch)
    return {"loss": losses} if isinstance(losses, Tensor) else losses


@contextlib.contextmanager
def _as_in_training(model: nn.Module) -> Iterator[None]:
    """Let a model compute losses, while its layers (modules without parts) stay in eval mode."""
    from d2kit.evaluation.evaluator import modes_kept

    with modes_kept(model):
        for module in model.modules():
            module.training = next(module.children(), None) is not None
        model.training = True
        yield
