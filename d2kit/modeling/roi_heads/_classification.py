"""Parts of the classification loss of the second stage."""

import torch
from torch import Tensor

from d2kit.modeling._metrics import put_scalars
from d2kit.utils import comm


def region_count(gt_classes: Tensor) -> Tensor:
    """Return the number of sampled regions, the mean over processes, at least 1.

    Args:
        gt_classes: (R,), of all images of this process.
    """
    count = torch.tensor(float(gt_classes.numel()), device=gt_classes.device)
    return comm.mean_over_ranks(count).clamp(min=1)


def draw_federated_classes(
    gt_classes: Tensor, num_fed_loss_classes: int, num_classes: int, weight: Tensor
) -> Tensor:
    """See `FastRCNNOutputLayers.get_fed_loss_classes`."""
    present = torch.unique(gt_classes)
    missing = num_fed_loss_classes - len(present)
    if missing <= 0:
        return present
    chance = weight.new_zeros(num_classes + 1, dtype=torch.float32)
    chance[:num_classes] = weight
    chance[present] = 0
    missing = min(missing, int((chance > 0).sum()))
    if missing == 0:
        return present
    return torch.cat([present, torch.multinomial(chance, missing, replacement=False)])


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
