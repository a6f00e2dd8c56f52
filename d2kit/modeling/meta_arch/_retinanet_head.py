"""The head of RetinaNet: two towers of convolutions, shared by all levels."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from d2kit.config import CfgNode, configurable
from d2kit.layers import CycleBatchNormList, NaiveSyncBatchNorm, ShapeSpec, get_norm
from d2kit.layers._weight_init import normal_fill
from d2kit.modeling._shapes import region_shape
from d2kit.modeling.anchor_generator import build_anchor_generator


class RetinaNetHead(nn.Module):
    """One tower for the classes and one for the boxes.

    With ``BN`` or ``SyncBN`` every level has its own statistics (the affine map is shared): the
    levels differ too much for one mean (Wu and Johnson, Rethinking "Batch" in BatchNorm, 2021,
    section 5).

    Args:
        input_shape: shape of each level.
        num_classes: K.
        num_anchors: A, anchors per position, the same on every level.
        conv_dims: output channels of each convolution of a tower.
        norm: after each convolution, as `d2kit.layers.get_norm` takes it.
        prior_prob: score of every anchor at the start.

    Source: Lin et al., Focal Loss for Dense Object Detection (2017), sections 3.3 and 4.
    """

    @configurable
    def __init__(
        self,
        *,
        input_shape: Sequence[ShapeSpec],
        num_classes: int,
        num_anchors: int,
        conv_dims: Sequence[int],
        norm: str | Callable[[int], nn.Module] = "",
        prior_prob: float = 0.01,
    ) -> None:
        super().__init__()
        channels = {region_shape(shape, type(self).__name__)[0] for shape in input_shape}
        if len(channels) != 1:
            raise ValueError(
                "the head of a one-stage detector is shared by all levels, so all need the same "
                f"channels; got {sorted(channels)} (see MODEL.RETINANET.IN_FEATURES)"
            )
        if not 0 < prior_prob < 1:
            raise ValueError(f"prior_prob (MODEL.RETINANET.PRIOR_PROB) in (0, 1), got {prior_prob}")
        dims = [channels.pop(), *conv_dims]
        make_norm = _norm_per_level(norm, len(input_shape))
        self.cls_subnet = _tower(dims, make_norm)
        self.bbox_subnet = _tower(dims, make_norm)
        self.cls_score = nn.Conv2d(dims[-1], num_anchors * num_classes, 3, padding=1)
        self.bbox_pred = nn.Conv2d(dims[-1], num_anchors * 4, 3, padding=1)
        for layer in (*self.cls_subnet, *self.bbox_subnet):
            if isinstance(layer, nn.Conv2d):
                normal_fill(layer, std=0.01)
        normal_fill(self.cls_score, std=0.01, bias=math.log(prior_prob / (1 - prior_prob)))
        normal_fill(self.bbox_pred, std=0.01)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Sequence[ShapeSpec]) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg` and the levels' shapes.

        Raises:
            ValueError: if the levels differ in anchors per position.
        """
        node = cfg.MODEL.RETINANET
        generator: Any = build_anchor_generator(cfg, list(input_shape))
        anchors = set(generator.num_anchors)
        if len(anchors) != 1:
            raise ValueError(
                "RetinaNet's head is shared by all levels, so all need the same number of anchors "
                f"per position; got {sorted(anchors)} (see MODEL.ANCHOR_GENERATOR)"
            )
        return {
            "input_shape": input_shape,
            "num_classes": node.NUM_CLASSES,
            "num_anchors": anchors.pop(),
            "conv_dims": [input_shape[0].channels] * node.NUM_CONVS,
            "norm": node.NORM,
            "prior_prob": node.PRIOR_PROB,
        }

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Predict classes and boxes on every level.

        Args:
            features: per level (N, C, Hi, Wi).

        Returns:
            Per level: logits (N, A*K, Hi, Wi); deltas (N, A*4, Hi, Wi).
        """
        logits = [self.cls_score(self.cls_subnet(x)) for x in features]
        return logits, [self.bbox_pred(self.bbox_subnet(x)) for x in features]


def _tower(dims: Sequence[int], make_norm: Callable[[int], nn.Module | None]) -> nn.Sequential:
    """Make 3x3 convolutions from `dims[0]` over `dims[1]` ... channels, each with norm and ReLU."""
    layers: list[nn.Module] = []
    for before, after in zip(dims[:-1], dims[1:], strict=True):
        layers.append(nn.Conv2d(before, after, 3, padding=1))
        norm = make_norm(after)
        if norm is not None:
            layers.append(norm)
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def _norm_per_level(
    norm: str | Callable[[int], nn.Module] | None, levels: int
) -> Callable[[int], nn.Module | None]:
    """Return what makes the norm of one layer: batch norms have statistics for each level."""
    batch_norms: dict[str, Any] = {
        "BN": nn.BatchNorm2d,
        "SyncBN": nn.SyncBatchNorm
        if torch.cuda.is_available()
        else partial(NaiveSyncBatchNorm, stats_mode="N"),
    }
    if isinstance(norm, str) and norm in batch_norms:
        return lambda c: CycleBatchNormList(levels, batch_norms[norm], num_features=c)
    return lambda c: get_norm(norm, c)
