"""The losses of a model on a test set."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from d2kit.config import CfgNode
from d2kit.evaluation.evaluator import modes_kept
from d2kit.utils import comm
from d2kit.utils.env import derive_seed
from d2kit.utils.events import EventStorage
from d2kit.utils.stopping import in_progress, leave_if_asked

__all__ = ["build_validation_loader", "validation_losses"]


def build_validation_loader(cfg: CfgNode, dataset_name: str) -> Any:
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
    return build_detection_test_loader(records, mapper=mapper, num_workers=workers)


def validation_losses(model: nn.Module, loader: Any) -> dict[str, float]:
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
    with modes_kept(model):
        for module in model.modules():
            module.training = next(module.children(), None) is not None
        model.training = True
        yield
