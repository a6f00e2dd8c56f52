"""Parts of the classification loss of the second stage."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from d2kit.modeling._metrics import put_scalars
from d2kit.utils import comm

BALANCED = "balanced"


def region_count(of_regions: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the number of regions, the mean over processes, at least 1.

    Args:
        of_regions: (R, ...), of all images of this process; with `weights` (R,) int64, classes.
        weights: (K+1,) a region of class c counts as ``weights[c]``; None: as 1. The sum is then
            bounded from below by a tiny number only.
    """
    if weights is not None:
        return comm.mean_over_ranks(weights[of_regions].sum()).clamp(min=1e-6)
    count = torch.tensor(float(len(of_regions)), device=of_regions.device)
    return comm.mean_over_ranks(count).clamp(min=1)


def full_class_weights(weights: Sequence[float] | str, num_classes: int) -> Tensor:
    """Return the weight of each class and of the background in the classification loss.

    Args:
        weights: K numbers, the background has 1; or K+1, the background's last.
        num_classes: K.

    Returns:
        (K+1,) float32.

    Raises:
        ValueError: if they are not K or K+1 finite numbers of at least 0, or all 0.
    """
    numbers = [] if isinstance(weights, str) else [float(weight) for weight in weights]
    if len(numbers) == num_classes:
        numbers.append(1.0)
    found = torch.tensor(numbers)
    fine = torch.isfinite(found).all() and (found >= 0).all() and (found > 0).any()
    if len(found) != num_classes + 1 or not fine:
        raise ValueError(
            f"MODEL.ROI_HEADS.CLASS_WEIGHTS needs one weight of at least 0 for each of the "
            f"{num_classes} classes (MODEL.ROI_HEADS.NUM_CLASSES), and may have one more, for the "
            f"background; got {weights!r}"
        )
    return found


def loss_weights(weights: Tensor | str | None) -> Tensor | None:
    """Return the weights that a loss may use.

    Raises:
        ValueError: if nobody has put numbers in the place of "balanced".
    """
    if isinstance(weights, str):
        raise ValueError(
            f"MODEL.ROI_HEADS.CLASS_WEIGHTS '{weights}' is computed from the training set by "
            "DefaultTrainer alone; in a training loop of your own write one weight per class into "
            "the config before build_model: (number of all objects) / (number of classes x number "
            "of objects of the class)"
        )
    return weights


def federated_weights(
    get_weights: Callable[[], Tensor] | None, num_classes: int, use_sigmoid_ce: bool
) -> Tensor:
    """Return the drawing weight of each class (K,) for the federated loss.

    Args:
        get_weights: returns them.
        num_classes: K.
        use_sigmoid_ce: whether classes are scored independently, which the loss needs.

    Raises:
        ValueError: if one of these is missing, or the weights are not K.
    """
    if not use_sigmoid_ce or get_weights is None:
        raise ValueError(
            "the federated loss (MODEL.ROI_BOX_HEAD.USE_FED_LOSS) needs "
            "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE True and the class frequencies: pass "
            "get_fed_loss_cls_weights, a function that returns one weight per class, to "
            f"FastRCNNOutputLayers; got use_sigmoid_ce={use_sigmoid_ce}, "
            f"get_fed_loss_cls_weights={get_weights}"
        )
    weights = get_weights()
    if len(weights) != num_classes:
        raise ValueError(
            f"the federated loss needs one weight per class, {num_classes} "
            f"(MODEL.ROI_HEADS.NUM_CLASSES), got {len(weights)}"
        )
    return weights


def draw_federated_classes(
    gt_classes: Tensor, num_fed_loss_classes: int, num_classes: int, weight: Tensor
) -> Tensor:
    """See `FastRCNNOutputLayers.get_fed_loss_classes`."""
    present = torch.unique(gt_classes)
    waiting = weight.float().clone()
    waiting[present[present < num_classes]] = 0
    candidates = waiting.nonzero().flatten()
    places = min(num_fed_loss_classes - len(present), len(candidates))
    if places <= 0:
        return present
    drawn = torch.multinomial(waiting[candidates], places, replacement=False)
    return torch.cat([present, candidates[drawn]])


def _log_classification_stats(
    pred_logits: Tensor, gt_classes: Tensor, prefix: str = "fast_rcnn"
) -> None:
    """Publish accuracy, accuracy on foreground, and the share of foreground called background.

    The two shares of the foreground are 0 where there is none.

    Args:
        pred_logits: (R, K+1), background last.
        gt_classes: (R,) int64.
        prefix: first part of the names.
    """
    if gt_classes.numel() == 0:
        return
    background = pred_logits.shape[1] - 1
    predicted = pred_logits.detach().argmax(dim=1)
    right = predicted == gt_classes
    foreground = (gt_classes >= 0) & (gt_classes < background)
    count = foreground.sum().clamp(min=1)
    put_scalars(
        prefix,
        cls_accuracy=right.float().mean(),
        fg_cls_accuracy=(right & foreground).sum() / count,
        false_negative=((predicted == background) & foreground).sum() / count,
    )
