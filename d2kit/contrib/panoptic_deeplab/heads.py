"""The two heads of Panoptic-DeepLab: classes, and centres with offsets.

Source: Cheng et al., Panoptic-DeepLab (2020), sections 3.1 and 3.2 and figure 2.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from d2kit.config import CfgNode, configurable
from d2kit.contrib.deeplab import DeepLabV3PlusHead
from d2kit.contrib.deeplab.semantic_seg import DeepLabCE
from d2kit.layers import Conv2d, DepthwiseSeparableConv2d, ShapeSpec, get_norm
from d2kit.layers.blocks import normal_fill, xavier_fill
from d2kit.modeling import SEM_SEG_HEADS_REGISTRY
from d2kit.utils.registry import Registry

__all__ = [
    "INS_EMBED_BRANCHES_REGISTRY",
    "PanopticDeepLabInsEmbedHead",
    "PanopticDeepLabSemSegHead",
    "build_ins_embed_branch",
]

INS_EMBED_BRANCHES_REGISTRY = Registry("INS_EMBED_BRANCHES")
"""Heads of centres and offsets: called with ``(cfg, input_shape: dict[str, ShapeSpec])``."""

Norm = str | Callable[[int], nn.Module] | None


def build_ins_embed_branch(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> nn.Module:
    """Build the head that ``cfg.MODEL.INS_EMBED_HEAD.NAME`` names.

    Args:
        cfg: the config.
        input_shape: feature name -> its shape.
    """
    found: nn.Module = INS_EMBED_BRANCHES_REGISTRY.get(cfg.MODEL.INS_EMBED_HEAD.NAME)(
        cfg, input_shape
    )
    return found


@SEM_SEG_HEADS_REGISTRY.register()
class PanopticDeepLabSemSegHead(DeepLabV3PlusHead):
    """The decoder of DeepLabV3+ with finer levels, two convolutions, and a classifier.

    Args:
        input_shape: feature name -> its shape.
        decoder_channels: see `DeepLabV3PlusHead`.
        norm: see there.
        head_channels: channels before the classifier.
        loss_weight: factor of the loss.
        loss_type: "cross_entropy" or "hard_pixel_mining".
        loss_top_k: share of the pixels that the latter takes, in (0, 1].
        ignore_value: label of pixels without loss.
        num_classes: K, things and stuff in one numbering.
        **kwargs: as of `DeepLabV3PlusHead`.
    """

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        decoder_channels: Sequence[int],
        norm: Norm,
        head_channels: int,
        loss_weight: float,
        loss_type: str,
        loss_top_k: float,
        ignore_value: int,
        num_classes: int,
        **kwargs: object,
    ) -> None:
        super().__init__(
            input_shape,
            decoder_channels=decoder_channels,
            norm=norm,
            ignore_value=ignore_value,
            loss_weight=loss_weight,
            loss_type=loss_type,
            **kwargs,
        )
        self.head = _tower(
            decoder_channels[0], head_channels, norm, self.use_depthwise_separable_conv
        )
        self.predictor = _predictor(head_channels, num_classes)
        # the cross entropy of a pixel is weighted, then averaged over those that are taken
        share = loss_top_k if loss_type == "hard_pixel_mining" else 1.0
        self.loss = DeepLabCE(ignore_value, share)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg` and the backbone's output shapes."""
        node = cfg.MODEL.SEM_SEG_HEAD
        arguments = super().from_config(cfg, input_shape)
        return {**arguments, "head_channels": node.HEAD_CHANNELS, "loss_top_k": node.LOSS_TOP_K}

    def forward(
        self,
        features: dict[str, Tensor],
        targets: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Any:
        """Compute the loss in training mode, or the scores of every pixel.

        Args:
            features: name -> (N, C, Hi, Wi).
            targets: int64 (N, H, W), in training.
            weights: (N, H, W), factors of the pixels' losses.

        Returns:
            In training None and the losses; else logits (N, K, H, W) and an empty dict.

        Raises:
            ValueError: in training without `targets`.
        """
        scores = self.layers(features)
        if not self.training:
            return self._upsampled(scores), {}
        if targets is None:
            raise ValueError("PanopticDeepLabSemSegHead needs targets in training mode, got None")
        return None, self.losses(scores, targets, weights)

    def layers(self, features: dict[str, Tensor]) -> Tensor:
        """Return logits (N, K, H, W) of the finest level's size."""
        found: Tensor = self.predictor(self.head(super().layers(features)))
        return found

    def losses(  # type: ignore[override]
        self, predictions: Tensor, targets: Tensor, weights: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return ``loss_sem_seg``.

        Args:
            predictions: logits (N, K, H / common_stride, W / common_stride).
            targets: int64 (N, H, W).
            weights: (N, H, W), or None.
        """
        height, width = targets.shape[-2:]
        scores = self._upsampled(predictions.float())[..., :height, :width]
        return {"loss_sem_seg": self.loss(scores, targets, weights) * self.loss_weight}


@INS_EMBED_BRANCHES_REGISTRY.register()
class PanopticDeepLabInsEmbedHead(DeepLabV3PlusHead):
    """The decoder of DeepLabV3+, and two branches: a heat map of centres, and offsets to them.

    Args:
        input_shape: feature name -> its shape.
        decoder_channels: see `DeepLabV3PlusHead`.
        norm: see there.
        head_channels: channels before the predictors.
        center_loss_weight: factor of the mean squared error of the heat map.
        offset_loss_weight: factor of the mean absolute error of the offsets, in pixels.
        **kwargs: as of `DeepLabV3PlusHead`.
    """

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        decoder_channels: Sequence[int],
        norm: Norm,
        head_channels: int,
        center_loss_weight: float,
        offset_loss_weight: float,
        **kwargs: object,
    ) -> None:
        super().__init__(input_shape, decoder_channels=decoder_channels, norm=norm, **kwargs)
        self.center_loss_weight = center_loss_weight
        self.offset_loss_weight = offset_loss_weight
        separable, width = self.use_depthwise_separable_conv, decoder_channels[0]
        self.center_head = nn.Sequential(
            _conv(width, width, norm), _conv(width, head_channels, norm)
        )
        self.center_predictor = _predictor(head_channels, 1)
        self.offset_head = _tower(width, head_channels, norm, separable)
        self.offset_predictor = _predictor(head_channels, 2)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg` and the backbone's output shapes."""
        node, crop = cfg.MODEL.INS_EMBED_HEAD, cfg.INPUT.CROP
        return {
            **cls.decoder_arguments("INS_EMBED_HEAD", node, crop, input_shape),
            "head_channels": node.HEAD_CHANNELS,
            "center_loss_weight": node.CENTER_LOSS_WEIGHT,
            "offset_loss_weight": node.OFFSET_LOSS_WEIGHT,
            "use_depthwise_separable_conv": cfg.MODEL.SEM_SEG_HEAD.USE_DEPTHWISE_SEPARABLE_CONV,
        }

    def forward(  # type: ignore[override]
        self,
        features: dict[str, Tensor],
        center_targets: Tensor | None = None,
        center_weights: Tensor | None = None,
        offset_targets: Tensor | None = None,
        offset_weights: Tensor | None = None,
    ) -> Any:
        """Compute the losses in training mode, or heat map and offsets.

        Args:
            features: name -> (N, C, Hi, Wi).
            center_targets: (N, 1, H, W) in 0..1, in training, as the others.
            center_weights: (N, H, W).
            offset_targets: (N, 2, H, W) (y, x) in pixels.
            offset_weights: (N, H, W).

        Returns:
            In training None, None and two dicts of a loss each; else the heat map (N, 1, H, W), the
            offsets (N, 2, H, W) in pixels, and two empty dicts.

        Raises:
            ValueError: in training without targets.
        """
        center, offset = self.layers(features)
        if not self.training:
            return self._upsampled(center), self._upsampled(offset) * self.common_stride, {}, {}
        if center_targets is None or offset_targets is None:
            raise ValueError("PanopticDeepLabInsEmbedHead needs targets in training mode")
        return (
            None,
            None,
            self.center_losses(center, center_targets, center_weights),
            self.offset_losses(offset, offset_targets, offset_weights),
        )

    def layers(self, features: dict[str, Tensor]) -> Any:
        """Return heat map (N, 1, H, W) and offsets (N, 2, H, W) in cells, of the finest level."""
        x = super().layers(features)
        return (
            self.center_predictor(self.center_head(x)),
            self.offset_predictor(self.offset_head(x)),
        )

    def center_losses(
        self, predictions: Tensor, targets: Tensor, weights: Tensor | None
    ) -> dict[str, Tensor]:
        """Return ``loss_center``, the weighted mean squared error."""
        scores = self._fitted(predictions, targets)
        error = F.mse_loss(scores, targets, reduction="none")
        return {"loss_center": _weighted_mean(error, weights) * self.center_loss_weight}

    def offset_losses(
        self, predictions: Tensor, targets: Tensor, weights: Tensor | None
    ) -> dict[str, Tensor]:
        """Return ``loss_offset``, the weighted mean over pixels of the absolute error."""
        scores = self._fitted(predictions, targets) * self.common_stride
        error = F.l1_loss(scores, targets, reduction="none").sum(dim=1, keepdim=True)
        return {"loss_offset": _weighted_mean(error, weights) * self.offset_loss_weight}

    def _fitted(self, predictions: Tensor, targets: Tensor) -> Tensor:
        height, width = targets.shape[-2:]
        return self._upsampled(predictions.float())[..., :height, :width]


def _weighted_mean(error: Tensor, weights: Tensor | None) -> Tensor:
    """Return the mean of (N, 1, H, W) by weights (N, H, W); 0 where all of them are 0."""
    if weights is None:
        return error.mean()
    weights = weights.reshape(error.shape)
    return (error * weights).sum() / weights.sum().clamp(min=1e-6)


def _predictor(in_channels: int, out_channels: int) -> Conv2d:
    layer = Conv2d(in_channels, out_channels, kernel_size=1)
    normal_fill(layer, std=0.001)
    return layer


def _conv(in_channels: int, out_channels: int, norm: Norm) -> Conv2d:
    layer = Conv2d(
        in_channels,
        out_channels,
        kernel_size=3,
        padding=1,
        bias=not norm,
        norm=get_norm(norm, out_channels),
        activation=F.relu,
    )
    xavier_fill(layer)
    return layer


def _tower(in_channels: int, out_channels: int, norm: Norm, separable: bool) -> nn.Module:
    """The convolutions before a predictor: one 5x5, separable, or two 3x3."""
    if separable:
        return DepthwiseSeparableConv2d(
            in_channels,
            out_channels,
            kernel_size=5,
            padding=2,
            norm1=norm,
            activation1=F.relu,
            norm2=norm,
            activation2=F.relu,
        )
    first = _conv(in_channels, in_channels, norm)
    return nn.Sequential(first, _conv(in_channels, out_channels, norm))
