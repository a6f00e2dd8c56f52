"""Box heads: from pooled region features to one vector per region."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2kit.config import CfgNode, configurable
from d2kit.layers import Conv2d, ShapeSpec, get_norm
from d2kit.layers.blocks import msra_fill, xavier_fill
from d2kit.layers.wrappers import region_shape
from d2kit.utils.registry import Registry

__all__ = ["ROI_BOX_HEAD_REGISTRY", "FastRCNNConvFCHead", "build_box_head"]


def add_convs(
    head: nn.Module,
    prefix: str,
    channels: int,
    dims: Sequence[int],
    norm: str | Callable[[int], nn.Module] | None = "",
) -> list[str]:
    """Give `head` 3x3 convolutions ``<prefix>1``, ``<prefix>2``, ..., each with a ReLU.

    Args:
        head: the module that gets them.
        prefix: first part of their names.
        channels: of the input of the first.
        dims: output channels of each.
        norm: after each, as of `get_norm`.

    Returns:
        Their names.
    """
    names: list[str] = []
    for before, after in zip([channels, *dims], dims, strict=False):
        conv = Conv2d(
            before,
            after,
            kernel_size=3,
            padding=1,
            bias=not norm,
            norm=get_norm(norm, after),
            activation=nn.ReLU(),
        )
        msra_fill(conv)
        names.append(_added(head, prefix, len(names), conv))
    return names


def add_fcs(head: nn.Module, size: int, dims: Sequence[int]) -> list[str]:
    """Give `head` linear layers ``fc1``, ``fc2``, ... from `size` on; return their names."""
    names: list[str] = []
    for before, after in zip([size, *dims], dims, strict=False):
        layer = nn.Linear(before, after)
        xavier_fill(layer)
        names.append(_added(head, "fc", len(names), layer))
    return names


def _added(head: nn.Module, prefix: str, index: int, layer: nn.Module) -> str:
    name = f"{prefix}{index + 1}"
    head.add_module(name, layer)
    return name


def in_turn(head: nn.Module, names: Iterable[str], x: Tensor) -> Tensor:
    """Apply the layers of `head` that have these names, one after the other."""
    for name in names:
        x = getattr(head, name)(x)
    return x


def own_class(logits: Tensor, classes: Tensor) -> Tensor:
    """Pick the logits of each region's class.

    Args:
        logits: (R, K, ...), or (R, 1, ...) where they do not depend on the class.
        classes: (R,) int64.

    Returns:
        (R, 1, ...).
    """
    if logits.shape[1] == 1:
        return logits
    return logits[torch.arange(logits.shape[0], device=logits.device), classes].unsqueeze(1)


ROI_BOX_HEAD_REGISTRY = Registry("ROI_BOX_HEAD")
"""Box heads: called with ``(cfg, input_shape: ShapeSpec)``; they map (R, C, H, W) to features and
state their `output_shape`."""


def build_box_head(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
    """Build the box head that ``cfg.MODEL.ROI_BOX_HEAD.NAME`` names.

    Args:
        cfg: the config.
        input_shape: channels, height and width of a pooled region.

    Returns:
        The head.
    """
    found: nn.Module = ROI_BOX_HEAD_REGISTRY.get(cfg.MODEL.ROI_BOX_HEAD.NAME)(cfg, input_shape)
    return found


@ROI_BOX_HEAD_REGISTRY.register()
class FastRCNNConvFCHead(nn.Module):
    """3x3 convolutions, then fully connected layers, each followed by ReLU.

    Args:
        input_shape: channels, height and width of a pooled region.
        conv_dims: output channels of each convolution.
        fc_dims: output size of each fully connected layer.
        conv_norm: normalisation of the convolutions, see `d2kit.layers.get_norm`.

    Raises:
        ValueError: if there is no layer at all.

    Source: FPN (Lin et al. 2017), section 4.2; with convolutions: Group Normalization (Wu and He
    2018), section 4.2.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        conv_dims: Sequence[int],
        fc_dims: Sequence[int],
        conv_norm: str = "",
    ) -> None:
        super().__init__()
        if not conv_dims and not fc_dims:
            raise ValueError(
                "FastRCNNConvFCHead needs at least one layer: set MODEL.ROI_BOX_HEAD.NUM_FC or "
                "MODEL.ROI_BOX_HEAD.NUM_CONV above 0"
            )
        channels, height, width = region_shape(input_shape, "FastRCNNConvFCHead")
        self.conv_names = add_convs(self, "conv", channels, conv_dims, conv_norm)
        channels = conv_dims[-1] if conv_dims else channels
        self.fc_names = add_fcs(self, channels * height * width, fc_dims)
        self._output_shape = (
            ShapeSpec(channels=fc_dims[-1])
            if fc_dims
            else ShapeSpec(channels=channels, height=height, width=width)
        )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg`."""
        head = cfg.MODEL.ROI_BOX_HEAD
        return {
            "input_shape": input_shape,
            "conv_dims": [head.CONV_DIM] * head.NUM_CONV,
            "fc_dims": [head.FC_DIM] * head.NUM_FC,
            "conv_norm": head.NORM,
        }

    @property
    def conv_norm_relus(self) -> list[nn.Module]:
        """The convolutions, each with its norm and activation."""
        return [self.get_submodule(name) for name in self.conv_names]

    @property
    def fcs(self) -> list[nn.Module]:
        """The fully connected layers."""
        return [self.get_submodule(name) for name in self.fc_names]

    def forward(self, x: Tensor) -> Tensor:
        """Map pooled features (R, C, H, W) to (R, D), or (R, D, H, W) without FC layers."""
        x = in_turn(self, self.conv_names, x)
        for name in self.fc_names:
            x = torch.relu_(getattr(self, name)(x.flatten(1)))
        return x

    @property
    def output_shape(self) -> ShapeSpec:
        """Shape of the output: channels and, without FC layers, height and width."""
        return self._output_shape
