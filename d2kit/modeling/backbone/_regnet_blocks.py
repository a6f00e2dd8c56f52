"""The stems and blocks of RegNet. Public names are re-exported by `regnet`.

Source: Radosavovic et al., Designing Network Design Spaces (2020), section 4; Hu et al.,
Squeeze-and-Excitation Networks (2018), section 3, for the Y variants.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from d2kit.layers import CNNBlockBase, get_norm
from d2kit.layers._weight_init import msra_fill

Activation = Callable[[], nn.Module]


def _relu() -> nn.Module:
    return nn.ReLU(inplace=True)


class _Conv(NamedTuple):
    """One convolution of a branch: its name, kernel side, channels, stride and groups."""

    name: str
    kernel: int
    inputs: int
    outputs: int
    stride: int = 1
    groups: int = 1


def _add_conv(module: nn.Module, conv: _Conv, norm: Any, norm_name: str) -> None:
    """Register a convolution without bias that keeps the size (at stride 1), and its norm."""
    layer = nn.Conv2d(
        conv.inputs,
        conv.outputs,
        conv.kernel,
        stride=conv.stride,
        padding=conv.kernel // 2,
        groups=conv.groups,
        bias=False,
    )
    msra_fill(layer)
    module.add_module(conv.name, layer)
    module.add_module(norm_name, get_norm(norm, conv.outputs) or nn.Identity())


class SimpleStem(CNNBlockBase):
    """A 3x3 convolution of stride 2 with norm and activation.

    Args:
        w_in: channels of the input.
        w_out: channels of the output.
        norm: as `d2kit.layers.get_norm` takes it.
        activation_class: makes the activation; None for ReLU.

    Source: Radosavovic et al. (2020), figure 3.
    """

    _kernel = 3
    _stride = 2

    def __init__(
        self, w_in: int, w_out: int, norm: Any, activation_class: Activation | None = None
    ) -> None:
        super().__init__(w_in, w_out, self._stride)
        _add_conv(self, _Conv("conv", self._kernel, w_in, w_out, 2), norm, "bn")
        self.af = (activation_class or _relu)()

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, w_out, H / stride, W / stride) for (N, w_in, H, W)."""
        return self.af(self.bn(self.conv(x)))  # type: ignore[operator]


class ResStem(SimpleStem):
    """The stem of ResNet: a 7x7 convolution of stride 2, norm, activation and 3x3 max-pooling.

    Args:
        w_in: channels of the input.
        w_out: channels of the output.
        norm: as `d2kit.layers.get_norm` takes it.
        activation_class: makes the activation; None for ReLU.

    Source: He et al., Deep Residual Learning (2016), table 1.
    """

    _kernel = 7
    _stride = 4

    def __init__(
        self, w_in: int, w_out: int, norm: Any, activation_class: Activation | None = None
    ) -> None:
        super().__init__(w_in, w_out, norm, activation_class)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, w_out, H / 4, W / 4) for (N, w_in, H, W)."""
        return self.pool(super().forward(x))


class SE(nn.Module):
    """Scales each channel by a factor in (0, 1) that depends on the means of all.

    Args:
        w_in: channels.
        w_se: channels of the hidden layer.
        activation_class: makes its activation; None for ReLU.

    Source: Hu et al. (2018), section 3.
    """

    def __init__(self, w_in: int, w_se: int, activation_class: Activation | None = None) -> None:
        super().__init__()
        self.f_ex = nn.Sequential(
            nn.Conv2d(w_in, w_se, 1),
            (activation_class or _relu)(),
            nn.Conv2d(w_se, w_in, 1),
            nn.Sigmoid(),
        )
        for layer in (self.f_ex[0], self.f_ex[2]):
            msra_fill(layer)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Scale `x` (N, C, H, W)."""
        return x * self.f_ex(x.mean((2, 3), keepdim=True))


class _Branch(nn.Module):
    """Convolutions in a row, each with its norm; activations between them.

    Args:
        convs: in order; the norm of `a` is called `a_bn`.
        norm: as `get_norm` takes it.
        activation: makes the activations.
        se: channels of the hidden layer of squeeze-and-excitation after `b`, or 0.
    """

    def __init__(
        self, convs: Sequence[_Conv], norm: Any, activation: Activation, se: int = 0
    ) -> None:
        super().__init__()
        self._names = [conv.name for conv in convs]
        for conv in convs:
            _add_conv(self, conv, norm, f"{conv.name}_bn")
            if conv.name == "b" and se:
                self.se = SE(conv.outputs, se, activation)
        self._between = activation()

    def forward(self, x: Tensor) -> Tensor:
        for name in self._names:
            x = getattr(self, f"{name}_bn")(getattr(self, name)(x))
            if name != self._names[-1]:
                x = self._between(x)
            if name == "b" and hasattr(self, "se"):
                x = self.se(x)
        return x


class VanillaBlock(CNNBlockBase):
    """Two 3x3 convolutions, each with norm and activation, without a shortcut.

    Args:
        w_in: channels of the input.
        w_out: channels of the output.
        stride: of the first convolution.
        norm: as `d2kit.layers.get_norm` takes it.
        activation_class: makes the activations; None for ReLU.
        bottleneck_ratio: not used, as by all blocks without a bottleneck.
        group_width: not used.
        se_ratio: not used.

    Source: Radosavovic et al., On Network Design Spaces for Visual Recognition (2019), section 3.
    """

    def __init__(
        self,
        w_in: int,
        w_out: int,
        stride: int,
        norm: Any,
        activation_class: Activation | None = None,
        *,
        bottleneck_ratio: float = 1.0,
        group_width: int = 1,
        se_ratio: float = 0.0,
    ) -> None:
        super().__init__(w_in, w_out, stride)
        self._build(norm, activation_class or _relu, bottleneck_ratio, group_width, se_ratio)

    def _build(
        self, norm: Any, activation: Activation, bottleneck: float, group_width: int, se: float
    ) -> None:
        del bottleneck, group_width, se
        _add_conv(
            self, _Conv("a", 3, self.in_channels, self.out_channels, self.stride), norm, "a_bn"
        )
        _add_conv(self, _Conv("b", 3, self.out_channels, self.out_channels), norm, "b_bn")
        self.af = activation()

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, w_out, H / stride, W / stride) for (N, w_in, H, W)."""
        x = self.af(self.a_bn(self.a(x)))  # type: ignore[operator]
        return self.af(self.b_bn(self.b(x)))  # type: ignore[operator]


class ResBasicBlock(VanillaBlock):
    """Two 3x3 convolutions beside a shortcut; arguments as of `VanillaBlock`.

    Source: He et al., Deep Residual Learning (2016), figure 5, left.
    """

    def _build(
        self, norm: Any, activation: Activation, bottleneck: float, group_width: int, se: float
    ) -> None:
        convs = self._convs(bottleneck, group_width)
        # the paper's ratio is of the channels that enter the block, not those of the bottleneck
        hidden = round(self.in_channels * se) if len(convs) == 3 else 0
        self.f = _Branch(convs, norm, activation, hidden)
        if self.in_channels != self.out_channels or self.stride != 1:
            shortcut = _Conv("proj", 1, self.in_channels, self.out_channels, self.stride)
            _add_conv(self, shortcut, norm, "bn")
        self.af = activation()

    def _convs(self, bottleneck: float, group_width: int) -> list[_Conv]:
        del bottleneck, group_width
        return [
            _Conv("a", 3, self.in_channels, self.out_channels, self.stride),
            _Conv("b", 3, self.out_channels, self.out_channels),
        ]

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, w_out, H / stride, W / stride) for (N, w_in, H, W)."""
        shortcut = self.bn(self.proj(x)) if hasattr(self, "proj") else x  # type: ignore[operator]
        return self.af(shortcut + self.f(x))


class ResBottleneckBlock(ResBasicBlock):
    """The X and Y block: 1x1, grouped 3x3 and 1x1 convolutions beside a shortcut.

    Args:
        w_in: channels of the input.
        w_out: channels of the output.
        stride: of the 3x3 convolution.
        norm: as `d2kit.layers.get_norm` takes it.
        activation_class: makes the activations; None for ReLU.
        bottleneck_ratio: channels of the 3x3 convolution over those of the output.
        group_width: channels of each of its groups.
        se_ratio: hidden channels of squeeze-and-excitation over `w_in`; 0 for none.

    Source: Radosavovic et al. (2020), figure 4.
    """

    def _convs(self, bottleneck: float, group_width: int) -> list[_Conv]:
        inner = round(self.out_channels * bottleneck)
        if inner % group_width:
            raise ValueError(
                f"ResBottleneckBlock: {inner} channels of the 3x3 convolution are no multiple of "
                f"group_width {group_width}; take other widths (RegNet rounds them by itself)."
            )
        return [
            _Conv("a", 1, self.in_channels, inner),
            _Conv("b", 3, inner, inner, self.stride, inner // group_width),
            _Conv("c", 1, inner, self.out_channels),
        ]
