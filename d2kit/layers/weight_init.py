"""The weight fills of the R-CNN family."""

from typing import Any, Protocol

from torch import Tensor, nn


class _HasWeight(Protocol):
    """A convolution (plain, transposed, deformable) or linear layer."""

    weight: Any

    @property
    def bias(self) -> Tensor | None: ...


def msra_fill(module: _HasWeight) -> None:
    """Draw the weight of `module` from a normal of variance 2 / fan-out and zero its bias.

    Args:
        module: a layer with `weight` and, optionally, `bias`; changed in place.

    Source: He et al., Delving Deep into Rectifiers (2015), section 2.2, backward case.
    """
    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def xavier_fill(module: _HasWeight) -> None:
    """Draw the weight of `module` from a uniform of variance 1 / fan-in and zero its bias.

    Args:
        module: a layer with `weight` and, optionally, `bias`; changed in place.

    Source: Glorot and Bengio (2010), with the fan-in alone, as Caffe2 does.
    """
    nn.init.kaiming_uniform_(module.weight, a=1)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def normal_fill(module: _HasWeight, std: float, bias: float = 0.0) -> None:
    """Draw the weight of `module` from a normal around 0 and set its bias, as predictors start.

    Args:
        module: a layer with `weight` and, optionally, `bias`; changed in place.
        std: standard deviation of the weights.
        bias: value of each bias.
    """
    nn.init.normal_(module.weight, std=std)
    if module.bias is not None:
        nn.init.constant_(module.bias, bias)
