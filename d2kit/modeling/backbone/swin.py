"""Swin transformer.

Parameter names are those of the published checkpoints
(`layers.0.blocks.0.attn.relative_position_bias_table`, ...).

Source: Liu et al., Swin Transformer: Hierarchical Vision Transformer using Shifted Windows (2021).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2kit.modeling.backbone.backbone import Backbone
from d2kit.modeling.backbone.transformer import (
    Mlp,
    Norm,
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
from d2kit.modeling.backbone.transformer import PatchEmbed as _Patches

__all__ = [
    "PatchEmbed",
    "PatchMerging",
    "SwinTransformer",
    "SwinTransformerBlock",
    "WindowAttention",
]


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows, with a learnt bias for each relative position.

    Args:
        dim: channels.
        window_size: rows and columns of a window, in tokens.
        num_heads: heads, a divisor of `dim`.
        qkv_bias: whether queries, keys and values have a bias.
        qk_scale: factor of the products of queries and keys; None for 1 / sqrt(dim / heads).
        attn_drop: probability that an attention weight is dropped in training.
        proj_drop: probability that a channel of the result is.

    Source: Liu et al. (2021), section 3.2, equation 4.
    """

    relative_position_index: Tensor

    def __init__(
        self,
        dim: int,
        window_size: tuple[int, int],
        num_heads: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"Swin: {dim} channels cannot be split into {num_heads} heads")
        self.window_size = window_size
        self.num_heads = num_heads
        self.qk_scale = qk_scale
        rows, columns = window_size
        distances = (2 * rows - 1) * (2 * columns - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(distances, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        y = torch.arange(rows).repeat_interleave(columns)
        x = torch.arange(columns).repeat(rows)
        down = y[:, None] - y[None, :] + rows - 1
        right = x[:, None] - x[None, :] + columns - 1
        self.register_buffer("relative_position_index", down * (2 * columns - 1) + right)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Let the tokens of each window attend to each other.

        Args:
            x: (N * windows, T, C), T tokens of a window, row by row.
            mask: bool (windows, T, T), which tokens (second) each token (first) may look at; None
                for all.

        Returns:
            The same shape as `x`.
        """
        tokens = x.shape[1]
        heads = self.qkv(x).unflatten(2, (3, self.num_heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)  # (N * windows, heads, T, C / heads)
        index = self.relative_position_index.flatten()
        bias = self.relative_position_bias_table[index].view(tokens, tokens, -1).permute(2, 0, 1)
        bias = bias.to(q.dtype).unsqueeze(0)
        if mask is not None:
            bias = bias.masked_fill(~mask.unsqueeze(1), float("-inf"))
            bias = bias.repeat(len(x) // len(mask), 1, 1, 1)
        mixed = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=bias,
            dropout_p=self.attn_drop.p if self.training else 0.0,
            scale=self.qk_scale,
        )
        found: Tensor = self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2)))
        return found


class SwinTransformerBlock(nn.Module):
    """Attention within (shifted) windows and an MLP, each behind a norm and beside a shortcut.

    Args:
        dim: channels.
        num_heads: heads.
        window_size: side of a window, in tokens.
        shift_size: tokens by which the grid of windows is shifted; in [0, window_size).
        mlp_ratio: hidden over outer channels of the MLP.
        qkv_bias: see `WindowAttention`.
        qk_scale: see `WindowAttention`.
        drop: probability that a channel is dropped after each linear layer, in training.
        attn_drop: see `WindowAttention`.
        drop_path: probability that a branch is dropped in training.
        norm_layer: makes a norm over channels.

    Raises:
        ValueError: another shift.

    Source: Liu et al. (2021), section 3.2, equation 3 and figure 4.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int = 7,
        shift_size: int = 0,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer: Norm = nn.LayerNorm,
    ) -> None:
        super().__init__()
        if not 0 <= shift_size < window_size:
            raise ValueError(f"Swin: shift_size must be in [0, {window_size}), got {shift_size}")
        self.window_size, self.shift_size = window_size, shift_size
        self.norm1 = norm_layer(dim)
        window = (window_size, window_size)
        self.attn = WindowAttention(dim, window, num_heads, qkv_bias, qk_scale, attn_drop, drop)
        self.drop_path = _drop_path(drop_path)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), nn.GELU, drop)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (N, H, W, C) to the same shape."""
        x = x + self.drop_path(self._attend(self.norm1(x)))
        found: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return found

    def _attend(self, x: Tensor) -> Tensor:
        side, shift = self.window_size, self.shift_size
        height, width = x.shape[1:3]
        if shift == 0:
            windows = split_windows(x, (side, side))
            mixed = self.attn(windows.flatten(1, 2))
            return join_windows(mixed.view_as(windows), (height, width))
        # the padding is part of the ring that is rolled, so it comes before
        x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
        padded = (x.shape[1], x.shape[2])
        windows = split_windows(x.roll((-shift, -shift), dims=(1, 2)), (side, side))
        mixed = self.attn(windows.flatten(1, 2), self._mask(padded, x.device))
        joined = join_windows(mixed.view_as(windows), padded)
        return joined.roll((shift, shift), dims=(1, 2))[:, :height, :width]

    def _mask(self, size: tuple[int, int], device: torch.device) -> Tensor:
        """Tell which tokens of a window were neighbours before the roll, (windows, T, T) bool.

        Rolled maps have a seam `shift` tokens before the end of each axis; nobody looks across.
        """
        beyond = [torch.arange(n, device=device) >= n - self.shift_size for n in size]
        part = beyond[0].int()[:, None] * 2 + beyond[1].int()[None, :]
        window = (self.window_size, self.window_size)
        parts = split_windows(part[None, :, :, None], window).flatten(1)
        return parts[:, :, None] == parts[:, None, :]


_drop_path = drop_path  # `SwinTransformerBlock` has an argument of that name


class PatchMerging(nn.Module):
    """Joins 2x2 tokens into one of twice the channels.

    Args:
        dim: channels of the input.
        norm_layer: makes a norm over channels.

    Source: Liu et al. (2021), section 3.1.
    """

    def __init__(self, dim: int, norm_layer: Norm = nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm_layer(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (N, H, W, C) to (N, H / 2, W / 2, 2 C), rounded up."""
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        # the published weights take the four tokens column by column
        cells = x.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).permute(0, 1, 3, 4, 2, 5)
        found: Tensor = self.reduction(self.norm(cells.flatten(3)))
        return found


class _Stage(nn.Module):
    """Blocks of one resolution, every second one shifted; `downsample` leads to the next stage."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


class PatchEmbed(_Patches):
    """Cuts an image into patches, padded to whole ones, maps them to tokens and normalises them.

    Args:
        patch_size: side of a patch, in pixels.
        in_chans: channels of the image.
        embed_dim: channels of a token.
        norm_layer: makes a norm over channels; None for none.

    Source: Liu et al. (2021), section 3.1.
    """

    def __init__(
        self,
        patch_size: int = 4,
        in_chans: int = 3,
        embed_dim: int = 96,
        norm_layer: Norm | None = None,
    ) -> None:
        patch = (patch_size, patch_size)
        super().__init__(patch, patch, in_chans=in_chans, embed_dim=embed_dim)
        self.patch_size = patch_size
        self.norm = None if norm_layer is None else norm_layer(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (N, H', W', embed_dim) of images (N, in_chans, H, W)."""
        size = self.patch_size
        tokens = super().forward(F.pad(x, (0, -x.shape[3] % size, 0, -x.shape[2] % size)))
        return tokens if self.norm is None else self.norm(tokens)


class SwinTransformer(Backbone):
    """Four stages of shifted-window transformers: `p0` to `p3`, of strides 4 to 32.

    Args:
        pretrain_img_size: side of the images of the pretraining, in pixels, for `ape`.
        patch_size: side of a patch, in pixels.
        in_chans: channels of the images.
        embed_dim: channels of the first stage; doubled from one to the next.
        depths: blocks of each stage.
        num_heads: heads of each stage.
        window_size: side of a window, in tokens.
        mlp_ratio: hidden over outer channels of the MLPs.
        qkv_bias: whether queries, keys and values have a bias.
        qk_scale: factor of the products of queries and keys; None for 1 / sqrt(dim / heads).
        drop_rate: probability that a channel is dropped after each linear layer, in training.
        attn_drop_rate: probability that an attention weight is.
        drop_path_rate: probability that a branch of the last block is; it grows linearly from 0.
        norm_layer: makes a norm over channels.
        ape: add a learnt position to each token.
        patch_norm: put a norm behind the patches.
        out_indices: stages to return.
        frozen_stages: leading parts that are not trained: 0 or 1 the patches (1: and the
            positions), 2 also the first stage, 3 the second, ...; -1 none.
        use_checkpoint: compute activations again in the backward pass, to save memory.

    Raises:
        ValueError: stages that do not exist, or other numbers of heads than of stages.

    Source: Liu et al. (2021), section 3; as a backbone of detectors: section 4.2.
    """

    def __init__(
        self,
        pretrain_img_size: int = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        norm_layer: Norm = nn.LayerNorm,
        ape: bool = False,
        patch_norm: bool = True,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        stages = len(depths)
        if len(num_heads) != stages or not set(out_indices) <= set(range(stages)):
            raise ValueError(
                "SwinTransformer: num_heads needs one entry for each stage, and out_indices must "
                f"be in [0, {stages}), got depths {list(depths)}, num_heads {list(num_heads)}, "
                f"out_indices {list(out_indices)}."
            )
        self.use_checkpoint, self.out_indices = use_checkpoint, tuple(out_indices)
        self.ape, self.patch_norm, self.frozen_stages = ape, patch_norm, frozen_stages
        self.patch_embed = PatchEmbed(
            patch_size, in_chans, embed_dim, norm_layer if patch_norm else None
        )
        side = pretrain_img_size // patch_size
        self.absolute_pos_embed = learnt_positions(1, embed_dim, side, side) if ape else None
        self.pos_drop = nn.Dropout(drop_rate)
        options = (mlp_ratio, qkv_bias, qk_scale, drop_rate, attn_drop_rate)
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        widths = [embed_dim * 2**i for i in range(stages)]
        self.layers = nn.ModuleList()
        for i, (depth, heads, width) in enumerate(zip(depths, num_heads, widths, strict=True)):
            blocks = [
                SwinTransformerBlock(
                    width,
                    heads,
                    window_size,
                    j % 2 * (window_size // 2),
                    *options,
                    next(rates),
                    norm_layer,
                )
                for j in range(depth)
            ]
            merging = PatchMerging(width, norm_layer) if i < stages - 1 else None
            self.layers.append(_Stage(blocks, merging))
        self._add_outputs(widths, patch_size, norm_layer)
        self.apply(self._init_weights)
        self._freeze_stages()

    def _add_outputs(self, widths: Sequence[int], patch_size: int, norm_layer: Norm) -> None:
        """Add the norms of the returned maps and state their shapes."""
        self.num_features, self.num_layers, self.embed_dim = list(widths), len(widths), widths[0]
        for i in self.out_indices:
            self.add_module(f"norm{i}", norm_layer(widths[i]))
        self._out_features = [f"p{i}" for i in self.out_indices]
        self._out_feature_channels = {f"p{i}": widths[i] for i in self.out_indices}
        self._out_feature_strides = {f"p{i}": patch_size * 2**i for i in self.out_indices}
        self._size_divisibility = patch_size * 2 ** (len(widths) - 1)

    def _init_weights(self, m: nn.Module) -> None:
        """Initialise one layer; user classes override it."""
        init_transformer_weights(m)

    def _freeze_stages(self) -> None:
        """Freeze the leading parts that `frozen_stages` names; user classes call or override it."""
        if self.frozen_stages >= 0:
            freeze_module(self.patch_embed)
        if self.frozen_stages >= 1 and self.absolute_pos_embed is not None:
            freeze_module(self.absolute_pos_embed)
        if self.frozen_stages >= 2:
            freeze_module(self.pos_drop)
        for stage in self.layers[: max(self.frozen_stages - 1, 0)]:
            freeze_module(stage)

    @property
    def size_divisibility(self) -> int:
        """What H and W should be multiples of, in pixels, for maps that double in size."""
        return int(self._size_divisibility)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the maps of an image batch.

        Args:
            x: float (N, in_chans, H, W), of any size.

        Returns:
            `p0`, `p1`, ... to (N, embed_dim * 2**i, H / stride, W / stride), rounded up.

        Raises:
            ValueError: `x` has not four dimensions.
        """
        if x.dim() != 4:
            raise ValueError(f"SwinTransformer: expected (N, C, H, W), got {tuple(x.shape)}.")
        x = self.patch_embed(x)
        if self.absolute_pos_embed is not None:
            positions = self.absolute_pos_embed.flatten(2).transpose(1, 2)
            x = x + positions_for(positions, (x.shape[1], x.shape[2]), with_cls_token=False)
        x = self.pos_drop(x)
        maps = {}
        for i, stage in enumerate(self.layers):
            for block in stage.blocks:  # type: ignore[union-attr]
                x = run_block(block, x, self.use_checkpoint)
            if i in self.out_indices:
                maps[f"p{i}"] = getattr(self, f"norm{i}")(x).permute(0, 3, 1, 2).contiguous()
            if stage.downsample is not None:
                x = stage.downsample(x)  # type: ignore[operator]
        return {name: maps[name] for name in self._out_features}
