"""Plain vision transformers for detection, and the pyramid made from their last map.

Parameter names are those of the published checkpoints (`blocks.0.attn.qkv.weight`, ...).

Source: Dosovitskiy et al., An Image Is Worth 16x16 Words (2021); Li et al., Exploring Plain Vision
Transformer Backbones for Object Detection (2022), "ViTDet"; relative positions: Li et al., MViTv2
(2022), section 4.1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2kit.layers import CNNBlockBase, Conv2d, get_norm
from d2kit.layers.blocks import msra_fill
from d2kit.modeling.backbone.backbone import Backbone
from d2kit.modeling.backbone.fpn import _assert_strides_are_log2_contiguous
from d2kit.modeling.backbone.transformer import (
    Activation,
    Mlp,
    Norm,
    PatchEmbed,
    decomposed_bias,
    drop_path,
    drop_path_rates,
    freeze_module,
    init_transformer_weights,
    join_windows,
    learnt_positions,
    positions_for,
    run_block,
    split_windows,
)
from d2kit.utils.registry import nearest_names

__all__ = [
    "Attention",
    "Block",
    "ResBottleneckBlock",
    "SimpleFeaturePyramid",
    "ViT",
    "get_vit_lr_decay_rate",
]


def _rescale(channels: int, factor: float, norm: Any) -> tuple[list[nn.Module], int]:
    """Return layers that rescale a map by 4, 2, 1 or 1/2, and the channels they leave."""
    if factor == 4.0:
        half, quarter = channels // 2, channels // 4
        up = [
            nn.ConvTranspose2d(channels, half, 2, stride=2),
            get_norm(norm, half) or nn.Identity(),
            nn.GELU(),
            nn.ConvTranspose2d(half, quarter, 2, stride=2),
        ]
        return up, quarter
    if factor == 2.0:
        return [nn.ConvTranspose2d(channels, channels // 2, 2, stride=2)], channels // 2
    if factor == 1.0:
        return [], channels
    if factor == 0.5:
        return [nn.MaxPool2d(2, stride=2)], channels
    raise ValueError(f"SimpleFeaturePyramid scale_factors must be of 4, 2, 1, 0.5, got {factor}.")


class SimpleFeaturePyramid(Backbone):
    """Levels made from one map of another backbone by (transposed) convolutions.

    Args:
        net: the backbone below.
        in_feature: name of its map.
        out_channels: channels of every level.
        scale_factors: of 4, 2, 1 and 0.5, fine to coarse: size of each level over that of the map.
        top_block: module that adds coarser levels; has `num_levels` and `in_feature`, the name of
            a feature of `net` or of this network.
        norm: as `d2kit.layers.get_norm` takes it; "" is none, with bias.
        square_pad: where positive, batches are padded to a square of that side, in pixels.

    Raises:
        ValueError: an unknown feature, other factors, or levels whose strides do not double.

    Source: Li et al., ViTDet (2022), section 3, "Simple feature pyramid".
    """

    def __init__(
        self,
        net: Backbone,
        in_feature: str,
        out_channels: int,
        scale_factors: Sequence[float],
        top_block: nn.Module | None = None,
        norm: object = "LN",
        square_pad: int = 0,
    ) -> None:
        super().__init__()
        shapes = net.output_shape()
        if in_feature not in shapes:
            raise ValueError(
                f"SimpleFeaturePyramid in_feature: the network below has no output {in_feature!r}, "
                f"it has {list(shapes)}; nearest: {nearest_names(in_feature, shapes)}."
            )
        stride, channels = shapes[in_feature].stride or 0, shapes[in_feature].channels or 0
        layers = [_rescale(channels, factor, norm) for factor in scale_factors]
        strides = [int(stride / factor) for factor in scale_factors]
        _assert_strides_are_log2_contiguous(strides)
        self.net, self.in_feature, self.top_block = net, in_feature, top_block
        self.scale_factors = list(scale_factors)
        self._square_pad = square_pad
        self._size_divisibility = strides[-1]
        self._stages = [int(math.log2(s)) for s in strides]
        for stage, (rescaling, width) in zip(self._stages, layers, strict=True):
            level = nn.Sequential(
                *rescaling,
                _conv(width, out_channels, 1, norm),
                _conv(out_channels, out_channels, 3, norm),
            )
            self.add_module(f"simfp_{stage}", level)
        coarser = 0 if top_block is None else int(top_block.num_levels)  # type: ignore[arg-type]
        levels = range(self._stages[0], self._stages[-1] + 1 + coarser)
        self._out_features = [f"p{level}" for level in levels]
        self._out_feature_strides = {f"p{level}": 2**level for level in levels}
        self._out_feature_channels = dict.fromkeys(self._out_features, out_channels)

    @property
    def stages(self) -> list[nn.Module]:
        """The layers of each level, fine to coarse, without those of `top_block`."""
        return [getattr(self, f"simfp_{stage}") for stage in self._stages]

    @property
    def size_divisibility(self) -> int:
        """What H and W must be multiples of, in pixels: the coarsest stride of the levels."""
        return self._size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        """What batches are padded to: multiples of a size and, where positive, a square."""
        return {"size_divisibility": self._size_divisibility, "square_size": self._square_pad}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the levels of an image batch.

        Args:
            x: float (N, C, H, W), H and W multiples of `size_divisibility`.

        Returns:
            `p2`, `p3`, ..., fine to coarse, each (N, out_channels, H / stride, W / stride).
        """
        below = self.net(x)
        levels = {
            f"p{stage}": layers(below[self.in_feature])
            for stage, layers in zip(self._stages, self.stages, strict=True)
        }
        if self.top_block is not None:
            source = str(self.top_block.in_feature)
            coarser = self.top_block(below[source] if source in below else levels[source])
            levels.update(zip(self._out_features[len(levels) :], coarser, strict=True))
        return levels


def _conv(in_channels: int, out_channels: int, kernel: int, norm: Any) -> Conv2d:
    return Conv2d(
        in_channels,
        out_channels,
        kernel,
        padding=kernel // 2,
        bias=norm == "",
        norm=get_norm(norm, out_channels),
    )


class Attention(nn.Module):
    """Multi-head self-attention over a map of tokens.

    Args:
        dim: channels.
        num_heads: heads, a divisor of `dim`.
        qkv_bias: whether queries, keys and values have a bias.
        use_rel_pos: add decomposed relative positions.
        rel_pos_zero_init: start them at 0 instead of at random.
        input_size: rows and columns that the tables of relative positions are made for.

    Source: Vaswani et al., Attention Is All You Need (2017), section 3.2.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        use_rel_pos: bool = False,
        rel_pos_zero_init: bool = True,
        input_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"attention: {dim} channels cannot be split into {num_heads} heads")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.use_rel_pos = use_rel_pos
        if use_rel_pos:
            if input_size is None:
                raise ValueError("attention: use_rel_pos needs input_size, (rows, columns)")
            channels = dim // num_heads
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * input_size[0] - 1, channels))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * input_size[1] - 1, channels))
            if not rel_pos_zero_init:
                nn.init.trunc_normal_(self.rel_pos_h, std=0.02)
                nn.init.trunc_normal_(self.rel_pos_w, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Let the tokens of each map (N, H, W, C) attend to each other; the same shape."""
        size = (x.shape[1], x.shape[2])
        heads = self.qkv(x).flatten(1, 2).unflatten(2, (3, self.num_heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)  # (N, heads, H * W, C / heads)
        bias = None
        if self.use_rel_pos:
            bias = decomposed_bias(q, (self.rel_pos_h, self.rel_pos_w), size, size)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        found: Tensor = self.proj(mixed.transpose(1, 2).flatten(2)).unflatten(1, size)
        return found


class ResBottleneckBlock(CNNBlockBase):
    """1x1, 3x3 and 1x1 convolutions with norms beside a shortcut; starts as the identity.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, the same.
        bottleneck_channels: channels of the 3x3 convolution.
        norm: as `d2kit.layers.get_norm` takes it.
        act_layer: makes the activations.

    Source: ViTDet (2022), section 3, "Backbone adaptation": convolutional propagation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bottleneck_channels: int,
        norm: Any = "LN",
        act_layer: Activation = nn.GELU,
    ) -> None:
        super().__init__(in_channels, out_channels, 1)
        if in_channels != out_channels:
            raise ValueError(
                f"this block has no projection: in_channels {in_channels} must be out_channels "
                f"{out_channels}"
            )
        inner = bottleneck_channels
        self.conv1 = Conv2d(in_channels, inner, 1, bias=False)
        self.norm1 = get_norm(norm, inner) or nn.Identity()
        self.act1 = act_layer()
        self.conv2 = Conv2d(inner, inner, 3, padding=1, bias=False)
        self.norm2 = get_norm(norm, inner) or nn.Identity()
        self.act2 = act_layer()
        self.conv3 = Conv2d(inner, out_channels, 1, bias=False)
        self.norm3 = get_norm(norm, out_channels) or nn.Identity()
        for conv in (self.conv1, self.conv2, self.conv3):
            msra_fill(conv)
        nn.init.zeros_(getattr(self.norm3, "weight", self.conv3.weight))

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` (N, C, H, W) to the same shape."""
        inner = self.act1(self.norm1(self.conv1(x)))
        inner = self.act2(self.norm2(self.conv2(inner)))
        found: Tensor = x + self.norm3(self.conv3(inner))
        return found


class Block(nn.Module):
    """Attention and an MLP, each behind a norm and beside a shortcut.

    Args:
        dim: channels.
        num_heads: heads.
        mlp_ratio: hidden over outer channels of the MLP.
        qkv_bias: see `Attention`.
        drop_path: probability that a branch is dropped in training.
        norm_layer: makes a norm over channels.
        act_layer: makes the activation of the MLP.
        use_rel_pos: see `Attention`.
        rel_pos_zero_init: see `Attention`.
        window_size: side of the windows that attention is confined to, in tokens; 0 for none.
        use_residual_block: put a `ResBottleneckBlock` behind.
        input_size: rows and columns of the map that the tables are made for.

    Source: Dosovitskiy et al. (2021), equations 2 and 3; ViTDet (2022), section 3.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        norm_layer: Norm = nn.LayerNorm,
        act_layer: Activation = nn.GELU,
        use_rel_pos: bool = False,
        rel_pos_zero_init: bool = True,
        window_size: int = 0,
        use_residual_block: bool = False,
        input_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.norm1 = norm_layer(dim)
        self.attn = Attention(
            dim,
            num_heads,
            qkv_bias,
            use_rel_pos,
            rel_pos_zero_init,
            (window_size, window_size) if window_size else input_size,
        )
        self.drop_path = _drop_path(drop_path)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer)
        self.use_residual_block = use_residual_block
        if use_residual_block:
            self.residual = ResBottleneckBlock(dim, dim, dim // 2, "LN", act_layer)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (N, H, W, C) to the same shape."""
        y = self.norm1(x)
        if self.window_size:
            # the norm comes first: tokens of the padding are 0, and take part in the attention
            windows = split_windows(y, (self.window_size, self.window_size))
            y = join_windows(self.attn(windows), (x.shape[1], x.shape[2]))
        else:
            y = self.attn(y)
        x = x + self.drop_path(y)
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        if self.use_residual_block:
            x = self.residual(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x


_drop_path = drop_path  # `Block` has an argument of that name


class ViT(Backbone):
    """A plain vision transformer; one map of stride `patch_size`.

    Args:
        img_size: side of the images that relative positions are made for, in pixels.
        patch_size: side of a patch, in pixels.
        in_chans: channels of the images.
        embed_dim: channels of a token.
        depth: number of blocks.
        num_heads: heads of each.
        mlp_ratio: hidden over outer channels of the MLPs.
        qkv_bias: whether queries, keys and values have a bias.
        drop_path_rate: probability that a branch of the last block is dropped in training; it
            grows linearly from 0 at the first one.
        norm_layer: makes a norm over channels.
        act_layer: makes an activation.
        use_abs_pos: add a learnt position to each token.
        use_rel_pos: add decomposed relative positions to the attention.
        rel_pos_zero_init: start them at 0.
        window_size: side of the windows of the blocks in `window_block_indexes`, in tokens.
        window_block_indexes: blocks whose attention stays within windows.
        residual_block_indexes: blocks with a convolutional block behind.
        use_act_checkpoint: compute activations again in the backward pass, to save memory.
        pretrain_img_size: side of the images of the pretraining: the size of `pos_embed`.
        pretrain_use_cls_token: whether `pos_embed` has a position for a class token.
        out_feature: name of the map.
        freeze_at: leading parts that are not trained: 0 none, 1 patches and positions, 2 also the
            first block, and so on.

    Source: ViTDet (2022), section 3.
    """

    def __init__(
        self,
        img_size: int = 1024,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        norm_layer: Norm = nn.LayerNorm,
        act_layer: Activation = nn.GELU,
        use_abs_pos: bool = True,
        use_rel_pos: bool = False,
        rel_pos_zero_init: bool = True,
        window_size: int = 0,
        window_block_indexes: Collection[int] = (),
        residual_block_indexes: Collection[int] = (),
        use_act_checkpoint: bool = False,
        pretrain_img_size: int = 224,
        pretrain_use_cls_token: bool = True,
        out_feature: str = "last_feat",
        freeze_at: int = 0,
    ) -> None:
        super().__init__()
        self.pretrain_use_cls_token = pretrain_use_cls_token
        self.use_act_checkpoint = use_act_checkpoint
        patch = (patch_size, patch_size)
        self.patch_embed = PatchEmbed(patch, patch, in_chans=in_chans, embed_dim=embed_dim)
        self.pos_embed: nn.Parameter | None = None
        if use_abs_pos:
            positions = (pretrain_img_size // patch_size) ** 2 + int(pretrain_use_cls_token)
            self.pos_embed = learnt_positions(1, positions, embed_dim)
        rates = drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias,
                rates[i],
                norm_layer,
                act_layer,
                use_rel_pos,
                rel_pos_zero_init,
                window_size if i in window_block_indexes else 0,
                i in residual_block_indexes,
                (img_size // patch_size, img_size // patch_size),
            )
            for i in range(depth)
        )
        self._out_features = [out_feature]
        self._out_feature_channels = {out_feature: embed_dim}
        self._out_feature_strides = {out_feature: patch_size}
        self.apply(self._init_weights)
        self._freeze(freeze_at)

    def _init_weights(self, m: nn.Module) -> None:
        """Initialise one layer; user classes override it."""
        init_transformer_weights(m)

    def _freeze(self, freeze_at: int) -> None:
        if freeze_at >= 1:
            freeze_module(self.patch_embed)
            if self.pos_embed is not None:
                freeze_module(self.pos_embed)
        for block in self.blocks[: max(freeze_at - 1, 0)]:
            freeze_module(block)

    @property
    def size_divisibility(self) -> int:
        """What H and W must be multiples of: the side of a patch, in pixels."""
        return self._out_feature_strides[self._out_features[0]]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the map of an image batch.

        Args:
            x: float (N, in_chans, H, W), H and W multiples of the patch.

        Returns:
            `out_feature` to (N, embed_dim, H / patch_size, W / patch_size).
        """
        x = self.patch_embed(x)
        if self.pos_embed is not None:
            size = (x.shape[1], x.shape[2])
            x = x + positions_for(self.pos_embed, size, self.pretrain_use_cls_token)
        for block in self.blocks:
            x = run_block(block, x, self.use_act_checkpoint)
        return {self._out_features[0]: x.permute(0, 3, 1, 2)}


def get_vit_lr_decay_rate(name: str, lr_decay_rate: float = 1.0, num_layers: int = 12) -> float:
    """Return the factor of the learning rate of a parameter: the deeper, the larger.

    Args:
        name: of the parameter in the whole model (`backbone.net.blocks.3.attn.qkv.weight`).
        lr_decay_rate: factor from one block to the one before.
        num_layers: blocks of the transformer.

    Returns:
        1 for what is not in the transformer's blocks (heads, pyramid, `residual` blocks);
        `lr_decay_rate` for the last block, ..., its power `num_layers` for the first one, and
        `num_layers + 1` for patches and positions.

    Source: ViTDet (2022), appendix A.2; Clark et al., ELECTRA (2020), appendix A.
    """
    behind = 0  # how many layers before the heads
    if name.startswith("backbone"):
        block = re.search(r"\.blocks\.(\d+)\.", name)
        if re.search(r"\.(pos_embed|patch_embed)", name):
            behind = num_layers + 1
        elif block and ".residual." not in name:
            behind = num_layers - int(block[1])
    return lr_decay_rate**behind
