"""Semantic segmentation: a class for every pixel.

Source: Kirillov et al., Panoptic Feature Pyramid Networks (2019), section 3.1.
"""

import math
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from d2kit.config import CfgNode, configurable
from d2kit.layers import Conv2d, ShapeSpec, get_norm
from d2kit.layers.shape_spec import region_shape, shapes_of
from d2kit.layers.weight_init import msra_fill
from d2kit.modeling.backbone import Backbone, build_backbone
from d2kit.modeling.meta_arch.build import META_ARCH_REGISTRY
from d2kit.modeling.meta_arch.common import ImageNormalizer, semantic_targets
from d2kit.modeling.postprocessing import sem_seg_postprocess
from d2kit.utils import comm
from d2kit.utils.registry import Registry

__all__ = ["SEM_SEG_HEADS_REGISTRY", "SemSegFPNHead", "SemanticSegmentor", "build_sem_seg_head"]

SEM_SEG_HEADS_REGISTRY = Registry("SEM_SEG_HEADS")
"""Segmentation heads: called with ``(cfg, input_shape: dict[str, ShapeSpec])``.

The module has `ignore_value` and maps features and, in training, labels (N, H, W) to a pair: in
training (None, losses), else (scores (N, K, H, W), {}).
"""


def build_sem_seg_head(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> nn.Module:
    """Build the segmentation head that ``cfg.MODEL.SEM_SEG_HEAD.NAME`` names.

    Args:
        cfg: the config.
        input_shape: feature name -> its shape.

    Returns:
        The head.

    Raises:
        KeyError: no head of that name is registered.
    """
    return SEM_SEG_HEADS_REGISTRY.get(cfg.MODEL.SEM_SEG_HEAD.NAME)(cfg, input_shape)


@META_ARCH_REGISTRY.register()
class SemanticSegmentor(ImageNormalizer):
    """Image -> features -> segmentation head.

    Args:
        backbone: images (N, C, H, W) -> name -> features.
        sem_seg_head: see `SEM_SEG_HEADS_REGISTRY`.
        pixel_mean: per channel, in the order of the input, values in 0..255.
        pixel_std: per channel.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        sem_seg_head: nn.Module,
        pixel_mean: tuple[float, ...],
        pixel_std: tuple[float, ...],
    ) -> None:
        super().__init__(pixel_mean=pixel_mean, pixel_std=pixel_std)
        self.backbone = backbone
        self.sem_seg_head = sem_seg_head

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg`."""
        backbone = build_backbone(cfg)
        return {
            "backbone": backbone,
            "sem_seg_head": build_sem_seg_head(cfg, backbone.output_shape()),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Compute the losses in training mode, or the scores of every pixel.

        Args:
            batched_inputs: per image a dict with

                * `image`: (C, H, W), values in 0..255.
                * `sem_seg`: int64 (H, W), the class of each pixel, or the ignored value; in
                  training.
                * `height`, `width`: size of the wanted result, by default the image's.

        Returns:
            In training, name -> 0-dim loss. Else per image ``{"sem_seg": (K, height, width)}``:
            logits, the class is their argmax.
        """
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        if self.training:
            targets = semantic_targets(batched_inputs, self.backbone, self.sem_seg_head)
            return self.sem_seg_head(features, targets)[1]
        scores, _ = self.sem_seg_head(features)
        results = []
        for score, item, size in zip(scores, batched_inputs, images.image_sizes, strict=True):
            height, width = item.get("height", size[0]), item.get("width", size[1])
            results.append({"sem_seg": sem_seg_postprocess(score, size, height, width)})
        return results


@SEM_SEG_HEADS_REGISTRY.register()
class SemSegFPNHead(nn.Module):
    """Bring all levels to one stride by convolutions and upsampling, add them, classify.

    Args:
        input_shape: feature name -> its shape; all are used.
        num_classes: K.
        conv_dims: channels of the convolutions.
        common_stride: at which the levels are added, in pixels.
        loss_weight: factor of the loss.
        norm: after each convolution, as `d2kit.layers.get_norm` takes it.
        ignore_value: label of pixels without loss.

    Raises:
        ValueError: a stride that is no power of two times `common_stride`.

    Source: Kirillov et al. (2019), figure 3.
    """

    not_deterministic_on_cuda = "cross_entropy of maps (nll_loss2d)"

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        num_classes: int,
        conv_dims: int,
        common_stride: int,
        loss_weight: float = 1.0,
        norm: str | Callable[[int], nn.Module] | None = None,
        ignore_value: int = -1,
    ) -> None:
        super().__init__()
        levels = sorted(input_shape.items(), key=lambda item: item[1].stride or 0)
        if not levels:
            raise ValueError("SemSegFPNHead needs at least one feature (SEM_SEG_HEAD.IN_FEATURES)")
        self.in_features = [name for name, _ in levels]
        self.num_classes = num_classes
        self.common_stride = common_stride
        self.loss_weight = loss_weight
        self.ignore_value = ignore_value
        for name, shape in levels:
            doublings = _doublings(name, shape.stride or 0, common_stride)
            channels, _, _ = region_shape(shape, name)
            self.add_module(name, _upsampling_head(channels, conv_dims, doublings, norm))
        self.predictor = Conv2d(conv_dims, num_classes, kernel_size=1)
        msra_fill(self.predictor)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg` and the backbone's output shapes."""
        node = cfg.MODEL.SEM_SEG_HEAD
        shapes = shapes_of(node.IN_FEATURES, input_shape, "MODEL.SEM_SEG_HEAD.IN_FEATURES")
        return {
            "input_shape": dict(zip(node.IN_FEATURES, shapes, strict=True)),
            "num_classes": node.NUM_CLASSES,
            "conv_dims": node.CONVS_DIM,
            "common_stride": node.COMMON_STRIDE,
            "loss_weight": node.LOSS_WEIGHT,
            "norm": node.NORM,
            "ignore_value": node.IGNORE_VALUE,
        }

    def forward(
        self, features: dict[str, Tensor], targets: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Compute the losses in training mode, or the scores of every pixel.

        Args:
            features: name -> (N, C, Hi, Wi).
            targets: int64 (N, H, W), in training.

        Returns:
            In training None and the losses; else logits (N, K, H, W) and an empty dict.

        Raises:
            ValueError: in training without `targets`.
        """
        scores = self.layers(features)
        if self.training:
            if targets is None:
                raise ValueError("SemSegFPNHead needs targets in training mode, got None")
            return None, self.losses(scores, targets)
        return self._upsampled(scores), {}

    @property
    def scale_heads(self) -> list[nn.Module]:
        """The layers of each level, in the order of `in_features`."""
        return [self.get_submodule(name) for name in self.in_features]

    def layers(self, features: dict[str, Tensor]) -> Tensor:
        """Return logits (N, K, H / common_stride, W / common_stride).

        Args:
            features: name -> (N, C, Hi, Wi).
        """
        merged: Any = 0
        for name, head in zip(self.in_features, self.scale_heads, strict=True):
            merged = merged + head(features[name])
        return self.predictor(merged)

    def losses(self, predictions: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the mean cross entropy of the pixels that are not ignored.

        Args:
            predictions: logits (N, K, H / common_stride, W / common_stride).
            targets: int64 (N, H, W).

        Returns:
            ``loss_sem_seg``; 0 where every pixel is ignored.
        """
        scores = self._upsampled(predictions.float())
        total = F.cross_entropy(scores, targets, reduction="sum", ignore_index=self.ignore_value)
        count = comm.mean_over_ranks((targets != self.ignore_value).sum()).clamp(min=1)
        return {"loss_sem_seg": total / count * self.loss_weight}

    def _upsampled(self, scores: Tensor) -> Tensor:
        """Return the logits at the size of the image."""
        factor = float(self.common_stride)
        return F.interpolate(scores, scale_factor=factor, mode="bilinear", align_corners=False)


def _doublings(name: str, stride: int, common_stride: int) -> int:
    """Return how often a level is upsampled by 2."""
    ratio = stride / common_stride
    if ratio < 1 or not math.log2(ratio).is_integer():
        raise ValueError(
            f"feature '{name}' (MODEL.SEM_SEG_HEAD.IN_FEATURES) has stride {stride}; it must be "
            f"COMMON_STRIDE, {common_stride}, times a power of 2"
        )
    return int(math.log2(ratio))


def _upsampling_head(
    channels: int,
    conv_dims: int,
    doublings: int,
    norm: str | Callable[[int], nn.Module] | None,
) -> nn.Sequential:
    """Make a convolution for each doubling, and one where there is none."""
    steps = nn.Sequential()
    for before in [channels] + [conv_dims] * (doublings - 1):
        conv = Conv2d(
            before,
            conv_dims,
            kernel_size=3,
            padding=1,
            bias=not norm,
            norm=get_norm(norm, conv_dims),
            activation=F.relu,
        )
        msra_fill(conv)
        steps.append(conv)
        if doublings > 0:
            steps.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
    return steps
