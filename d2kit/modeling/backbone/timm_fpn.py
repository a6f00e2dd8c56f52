"""Any network of timm that gives feature maps, as a backbone.

timm is installed by ``pip install d2kit[timm]``.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from d2kit.modeling.backbone.backbone import Backbone
from d2kit.utils.registry import nearest_names

__all__ = ["TimmBackbone"]

_PROBE = 128  # side of the image that tells which weights a feature depends on, in pixels


class TimmBackbone(Backbone):
    """Feature maps of a network of timm, called `res2` (stride 4), `res3` (stride 8) and so on.

    Maps whose size is not that of the image over the stride (networks without padding, such as
    Inception) are extended or cut at all sides, so that every level looks at the same place.

    Args:
        name: of the model, as `timm.list_models` has it.
        pretrained: download its weights.
        out_indices: which of its maps; empty for those of strides 4 to 32.
        in_channels: channels of the images.
        freeze_at: 0 trains all; k does not train what the maps of stride up to 2**k depend on (for
            a ResNet: 1 the stem, 2 the stem and `res2`, ...). Norms there keep their statistics.
        norm_eps: number added to variances in BatchNorm; 0 for the model's own.
        fix_norm_statistics: BatchNorm keeps the statistics that were loaded, also in training; its
            weights and biases are trained. timm's layers stay: they hold the activation.

    Raises:
        ImportError: timm is not installed.
        ValueError: an unknown model, or one without such maps.
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = False,
        out_indices: Sequence[int] = (),
        in_channels: int = 3,
        freeze_at: int = 0,
        norm_eps: float = 0.0,
        fix_norm_statistics: bool = False,
    ) -> None:
        super().__init__()
        arguments = {"pretrained": pretrained, "in_chans": in_channels}
        every = _create(name, arguments)
        strides = list(every.feature_info.reduction())
        chosen = list(out_indices) or [
            i for i, stride in enumerate(strides) if stride in (4, 8, 16, 32)
        ]
        used = [strides[i] for i in chosen if -len(strides) <= i < len(strides)]
        powers = [s for s in used if isinstance(s, int) and s > 0 and s & (s - 1) == 0]
        if not chosen or len(powers) < len(chosen) or len(set(used)) < len(used):
            raise ValueError(
                f"MODEL.TIMM: a pyramid needs maps of different strides that are powers of 2, but "
                f"{name!r} has strides {strides} and MODEL.TIMM.OUT_INDICES {list(out_indices)} "
                f"takes {used}; choose other indices or another model (for a plain ViT: "
                "MODEL.BACKBONE.NAME build_vit_sfp_backbone)"
            )
        chosen = sorted(range(len(strides))[i] for i in chosen)
        channels = every.feature_info.channels()
        self.features = every
        if len(chosen) < len(strides):
            self.features = _create(name, {**arguments, "out_indices": chosen})
        self._out_features = [f"res{strides[i].bit_length() - 1}" for i in chosen]
        self._out_feature_channels = {
            key: channels[i] for key, i in zip(self._out_features, chosen, strict=True)
        }
        self._out_feature_strides = {
            key: strides[i] for key, i in zip(self._out_features, chosen, strict=True)
        }
        self._frozen: list[nn.Module] = []
        norms = [m for m in self.features.modules() if isinstance(m, _BatchNorm)]
        for norm in norms:
            norm.eps = norm_eps or norm.eps
        if fix_norm_statistics:
            self._frozen += norms
        still = [i for i, stride in enumerate(strides) if stride <= 2**freeze_at]
        if freeze_at > 0 and still:
            self._freeze(_weights_of(every, still, in_channels))
        self.train()

    def _freeze(self, used: set[str]) -> None:
        """Freeze the modules all of whose own weights are among those named."""
        for name, module in self.features.named_modules():
            own = dict(module.named_parameters(recurse=False))
            below = [f"{name}.{key}".lstrip(".") for key in own]
            if own and set(below) <= used:
                module.requires_grad_(False)
                self._frozen.append(module)

    def train(self, mode: bool = True) -> "TimmBackbone":
        """Set the mode of all but the frozen parts, which stay in inference mode."""
        super().train(mode)
        for module in self._frozen:
            module.train(False)
        return self

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the feature maps of an image batch.

        Args:
            x: float (N, in_channels, H, W).

        Returns:
            Name to (N, C_f, H / stride, W / stride), rounded up.
        """
        if x.device.type == "cpu" and x.dtype == torch.float32:
            # Depthwise layers take a fifth less time so; what follows keeps the order.
            x = x.contiguous(memory_format=torch.channels_last)
        maps = {}
        for name, feature in zip(self._out_features, self.features(x), strict=True):
            stride, channels = self._out_feature_strides[name], self._out_feature_channels[name]
            if feature.shape[1] != channels and feature.shape[-1] == channels:
                feature = feature.permute(0, 3, 1, 2).contiguous()  # noqa: PLW2901
            size = (-(-x.shape[2] // stride), -(-x.shape[3] // stride))
            maps[name] = _centred(feature, size)
        return maps


def _weights_of(net: nn.Module, maps: list[int], in_channels: int) -> set[str]:
    """Return the names of the weights that some maps of a network depend on: the graph tells."""
    names, weights = zip(*net.named_parameters(), strict=True)
    features = net.eval()(torch.zeros(1, in_channels, _PROBE, _PROBE))
    total = torch.stack([features[i].sum() for i in maps]).sum()
    gradients = torch.autograd.grad(total, weights, allow_unused=True)
    return {n for n, gradient in zip(names, gradients, strict=True) if gradient is not None}


def _centred(feature: Tensor, size: tuple[int, int]) -> Tensor:
    """Give a map (N, C, H, W) another size: repeat its border outwards, or cut, at all sides."""
    more_h, more_w = size[0] - feature.shape[2], size[1] - feature.shape[3]
    if more_h == more_w == 0:
        return feature
    left, top = more_w // 2, more_h // 2
    sides = (left, more_w - left, top, more_h - top)
    return F.pad(feature, sides, mode="replicate")


def _create(name: str, arguments: dict[str, Any]) -> Any:
    """Make a network of timm that returns maps."""
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            "MODEL.BACKBONE.NAME build_timm_fpn_backbone needs the package timm: "
            "pip install d2kit[timm]"
        ) from error
    on_a_hub = ":" in name  # hf_hub:owner/model, local-dir:path
    if not on_a_hub and not timm.is_model(name.split(".", maxsplit=1)[0]):
        near = nearest_names(name, timm.list_models())
        raise ValueError(f"MODEL.TIMM.NAME: timm has no model {name!r}; nearest: {near}")
    try:  # those made for one size of images are told that there will be others
        return timm.create_model(name, features_only=True, strict_img_size=False, **arguments)
    except TypeError:
        return timm.create_model(name, features_only=True, **arguments)
