"""Multiscale vision transformer, version 2.

Parameter names are those of the published checkpoints (`blocks.0.attn.pool_q.weight`, ...).

Source: Fan et al., Multiscale Vision Transformers (2021), section 3; Li et al., MViTv2: Improved
Multiscale Vision Transformers for Classification and Detection (2022), sections 4 and 4.3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2kit.modeling.backbone.backbone import Backbone
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

__all__ = ["MViT", "MultiScaleAttention", "MultiScaleBlock"]


class MultiScaleAttention(nn.Module):
    """Attention whose queries, keys and values are pooled by depthwise convolutions.

    Args:
        dim: channels of the input.
        dim_out: channels of the output.
        num_heads: heads, a divisor of `dim_out`.
        qkv_bias: whether queries, keys and values have a bias.
        norm_layer: makes a norm over the channels of a head.
        pool_kernel: of the convolutions.
        stride_q: of the pooling of queries; the output is smaller by it.
        stride_kv: of the pooling of keys and values.
        residual_pooling: add the pooled queries to the result.
        window_size: side of the windows that attention is confined to, in tokens of the input; 0
            for none. Pooling knows no windows.
        use_rel_pos: add decomposed relative positions.
        rel_pos_zero_init: start them at 0 instead of at random.
        input_size: rows and columns of the input that the tables are made for.

    Raises:
        ValueError: heads or strides that do not divide channels or windows.

    Source: Li et al., MViTv2 (2022), section 4.1, figure 2 and equations 1 to 6.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        num_heads: int,
        qkv_bias: bool = True,
        norm_layer: Norm = nn.LayerNorm,
        pool_kernel: tuple[int, int] = (3, 3),
        stride_q: int = 1,
        stride_kv: int = 1,
        residual_pooling: bool = True,
        window_size: int = 0,
        use_rel_pos: bool = False,
        rel_pos_zero_init: bool = True,
        input_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if dim_out % num_heads or window_size % stride_q or window_size % stride_kv:
            raise ValueError(
                f"MViT: num_heads {num_heads} must divide the channels ({dim_out}), and the "
                f"strides of queries and keys ({stride_q}, {stride_kv}) the side of a window "
                f"({window_size})"
            )
        self.num_heads = num_heads
        self.residual_pooling = residual_pooling
        self.query_window = window_size // stride_q
        self.key_window = window_size // stride_kv
        self.qkv = nn.Linear(dim, 3 * dim_out, bias=qkv_bias)
        self.proj = nn.Linear(dim_out, dim_out)
        channels = dim_out // num_heads
        for name, stride in (("q", stride_q), ("k", stride_kv), ("v", stride_kv)):
            pool = nn.Conv2d(
                channels,
                channels,
                pool_kernel,
                stride=stride,
                padding=(pool_kernel[0] // 2, pool_kernel[1] // 2),
                groups=channels,
                bias=False,
            )
            self.add_module(f"pool_{name}", pool)
            self.add_module(f"norm_{name}", norm_layer(channels))
        self.use_rel_pos = use_rel_pos
        if use_rel_pos:
            size = (window_size, window_size) if window_size else input_size
            if size is None:
                raise ValueError("MViT: use_rel_pos needs input_size, (rows, columns)")
            finer = [max(side // stride_q, side // stride_kv) for side in size]
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * finer[0] - 1, channels))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * finer[1] - 1, channels))
            if not rel_pos_zero_init:
                nn.init.trunc_normal_(self.rel_pos_h, std=0.02)
                nn.init.trunc_normal_(self.rel_pos_w, std=0.02)

    def _pooled(self, x: Tensor, name: str) -> Tensor:
        """Pool `x` (N * heads, C, H, W) and normalise it; (N * heads, H', W', C)."""
        pooled = getattr(self, f"pool_{name}")(x).permute(0, 2, 3, 1)
        found: Tensor = getattr(self, f"norm_{name}")(pooled)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (N, H, W, dim) to (N, H / stride_q, W / stride_q, dim_out), rounded up."""
        heads = self.qkv(x).unflatten(3, (3, self.num_heads, -1))
        by_head = heads.permute(3, 0, 4, 5, 1, 2).flatten(1, 2)  # (3, N * heads, C, H, W)
        q, k, v = (self._pooled(part, name) for part, name in zip(by_head, "qkv", strict=True))
        size = (q.shape[1], q.shape[2])
        pooled = q
        if self.query_window:
            q = split_windows(q, (self.query_window, self.query_window))
            window = (self.key_window, self.key_window)
            k, v = split_windows(k, window), split_windows(v, window)
        grid, key_grid = (q.shape[1], q.shape[2]), (k.shape[1], k.shape[2])
        q, k, v = (part.flatten(1, 2).unsqueeze(1) for part in (q, k, v))
        bias = None
        if self.use_rel_pos:
            bias = decomposed_bias(q, (self.rel_pos_h, self.rel_pos_w), grid, key_grid)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)[:, 0].unflatten(1, grid)
        if self.query_window:
            mixed = join_windows(mixed, size)
        if self.residual_pooling:
            mixed = mixed + pooled
        found: Tensor = self.proj(
            mixed.unflatten(0, (len(x), -1)).permute(0, 2, 3, 1, 4).flatten(3)
        )
        return found


class MultiScaleBlock(nn.Module):
    """Pooling attention and an MLP, each behind a norm and beside a (pooled) shortcut.

    Args:
        dim: channels of the input.
        dim_out: channels of the output.
        num_heads: heads.
        mlp_ratio: hidden over outer channels of the MLP.
        qkv_bias: see `MultiScaleAttention`.
        drop_path: probability that a branch is dropped in training.
        norm_layer: makes a norm over channels.
        act_layer: makes the activation of the MLP.
        qkv_pool_kernel: see `MultiScaleAttention.pool_kernel`.
        stride_q: see `MultiScaleAttention`.
        stride_kv: see `MultiScaleAttention`.
        residual_pooling: see `MultiScaleAttention`.
        window_size: see `MultiScaleAttention`.
        use_rel_pos: see `MultiScaleAttention`.
        rel_pos_zero_init: see `MultiScaleAttention`.
        input_size: see `MultiScaleAttention`.

    Source: Fan et al. (2021), section 3.1; the channels change within the attention: Li et al.
    (2022), section 4.1.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        norm_layer: Norm = nn.LayerNorm,
        act_layer: Activation = nn.GELU,
        qkv_pool_kernel: tuple[int, int] = (3, 3),
        stride_q: int = 1,
        stride_kv: int = 1,
        residual_pooling: bool = True,
        window_size: int = 0,
        use_rel_pos: bool = False,
        rel_pos_zero_init: bool = True,
        input_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = MultiScaleAttention(
            dim,
            dim_out,
            num_heads,
            qkv_bias,
            norm_layer,
            qkv_pool_kernel,
            stride_q,
            stride_kv,
            residual_pooling,
            window_size,
            use_rel_pos,
            rel_pos_zero_init,
            input_size,
        )
        self.drop_path = _drop_path(drop_path)
        self.norm2 = norm_layer(dim_out)
        self.mlp = Mlp(dim_out, int(dim_out * mlp_ratio), act_layer)
        self.proj = nn.Linear(dim, dim_out) if dim != dim_out else None
        self.pool_skip = (
            nn.MaxPool2d(stride_q + 1, stride_q, (stride_q + 1) // 2) if stride_q > 1 else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (N, H, W, dim) to (N, H / stride_q, W / stride_q, dim_out), rounded up."""
        attended = self._beside(self.attn, self.norm1(x), x)
        found: Tensor = attended + self.drop_path(self.mlp(self.norm2(attended)))
        return found

    def _beside(self, attention: nn.Module, normed: Tensor, x: Tensor) -> Tensor:
        """Add what attention makes of the tokens to those that pass it by.

        Tokens change their channels and their number in the attention: those beside it follow by a
        linear map of the normalised ones and by max-pooling (MViTv2, section 4.1).
        """
        passed = self.proj(normed) if self.proj is not None else x
        if self.pool_skip is not None:
            grid = self.pool_skip(passed.movedim(3, 1))
            passed = grid.movedim(1, 3)
        found: Tensor = passed + self.drop_path(attention(normed))
        return found


_drop_path = drop_path  # `MultiScaleBlock` has an argument of that name


class MViT(Backbone):
    """A transformer in stages: each halves the map and doubles the channels.

    Args:
        img_size: side of the images that relative positions are made for, in pixels.
        patch_kernel: of the convolution that makes tokens, (height, width) in pixels.
        patch_stride: of that convolution.
        patch_padding: of that convolution.
        in_chans: channels of the images.
        embed_dim: channels of the first stage.
        depth: number of blocks.
        num_heads: heads of the first stage; doubled from one to the next.
        last_block_indexes: the last block of each stage.
        qkv_pool_kernel: of the pooling of queries, keys and values.
        adaptive_kv_stride: stride of the pooling of keys and values in the first stage; halved
            from one to the next.
        adaptive_window_size: side of the windows of the first stage, in tokens; halved from one to
            the next. The last blocks of all stages but the first look at the whole map. 0: all do.
        residual_pooling: add the pooled queries to the attention's result.
        mlp_ratio: hidden over outer channels of the MLPs.
        qkv_bias: whether queries, keys and values have a bias.
        drop_path_rate: probability that a branch of the last block is dropped in training; it
            grows linearly from 0 at the first one.
        norm_layer: makes a norm over channels.
        act_layer: makes an activation.
        use_abs_pos: add a learnt position to each token.
        use_rel_pos: add decomposed relative positions to the attention.
        rel_pos_zero_init: start them at 0.
        use_act_checkpoint: compute activations again in the backward pass, to save memory.
        pretrain_img_size: side of the images of the pretraining: the size of `pos_embed`.
        pretrain_use_cls_token: whether `pos_embed` has a position for a class token.
        out_features: stages to return, of `scale2`, `scale3`, ...
        freeze_at: leading parts that are not trained: 0 none, 1 patches and positions, 2 also the
            first stage, and so on.

    Raises:
        ValueError: unknown outputs, or last blocks that do not ascend to the last one.

    Source: Li et al., MViTv2 (2022), sections 4.1 to 4.3 and table 1.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_kernel: tuple[int, int] = (7, 7),
        patch_stride: tuple[int, int] = (4, 4),
        patch_padding: tuple[int, int] = (3, 3),
        in_chans: int = 3,
        embed_dim: int = 96,
        depth: int = 16,
        num_heads: int = 1,
        last_block_indexes: Sequence[int] = (0, 2, 11, 15),
        qkv_pool_kernel: tuple[int, int] = (3, 3),
        adaptive_kv_stride: int = 4,
        adaptive_window_size: int = 56,
        residual_pooling: bool = True,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        norm_layer: Norm = nn.LayerNorm,
        act_layer: Activation = nn.GELU,
        use_abs_pos: bool = False,
        use_rel_pos: bool = True,
        rel_pos_zero_init: bool = True,
        use_act_checkpoint: bool = False,
        pretrain_img_size: int = 224,
        pretrain_use_cls_token: bool = True,
        out_features: Sequence[str] = ("scale2", "scale3", "scale4", "scale5"),
        freeze_at: int = 0,
    ) -> None:
        super().__init__()
        self._stage_ends = _check_stages(last_block_indexes, depth, out_features)
        self.pretrain_use_cls_token = pretrain_use_cls_token
        self.use_act_checkpoint = use_act_checkpoint
        patch = (patch_kernel, patch_stride, patch_padding)
        self.patch_embed = PatchEmbed(*patch, in_chans, embed_dim)
        self.pos_embed: nn.Parameter | None = None
        if use_abs_pos:
            positions = math.prod(pretrain_img_size // stride for stride in patch_stride)
            positions += int(pretrain_use_cls_token)
            self.pos_embed = learnt_positions(1, positions, embed_dim)
        self.blocks = nn.ModuleList()
        for i, rate in enumerate(drop_path_rates(drop_path_rate, depth)):
            scales = _Scales(i, last_block_indexes)
            block = MultiScaleBlock(
                **scales.sizes(embed_dim, num_heads, adaptive_kv_stride, adaptive_window_size),
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                drop_path=rate,
                norm_layer=norm_layer,
                act_layer=act_layer,
                qkv_pool_kernel=qkv_pool_kernel,
                residual_pooling=residual_pooling,
                use_rel_pos=use_rel_pos,
                rel_pos_zero_init=rel_pos_zero_init,
                input_size=scales.grid(img_size, patch_stride),
            )
            self.blocks.append(block)
        self._add_outputs(out_features, embed_dim, patch_stride[0], norm_layer)
        self.apply(self._init_weights)
        self._freeze(freeze_at)

    def _add_outputs(
        self, out_features: Sequence[str], embed_dim: int, stride: int, norm_layer: Norm
    ) -> None:
        """Add the norms of the returned maps and state their shapes."""
        self._out_features = list(out_features)
        self._out_feature_channels = {}
        self._out_feature_strides = {}
        for stage, name in enumerate(self._stage_ends.values()):
            if name in out_features:
                self._out_feature_channels[name] = embed_dim * 2**stage
                self._out_feature_strides[name] = stride * 2**stage
                self.add_module(f"{name}_norm", norm_layer(embed_dim * 2**stage))
        self._size_divisibility = stride * 2 ** (len(self._stage_ends) - 1)

    def _init_weights(self, m: nn.Module) -> None:
        """Initialise one layer; user classes override it."""
        init_transformer_weights(m)

    def _freeze(self, freeze_at: int) -> None:
        if freeze_at >= 1:
            freeze_module(self.patch_embed)
            if self.pos_embed is not None:
                freeze_module(self.pos_embed)
        if freeze_at >= 2:
            last = list(self._stage_ends)[min(freeze_at - 2, len(self._stage_ends) - 1)]
            for block in self.blocks[: last + 1]:
                freeze_module(block)

    @property
    def _last_block_indexes(self) -> tuple[int, ...]:
        return tuple(self._stage_ends)

    @property
    def size_divisibility(self) -> int:
        """What H and W should be multiples of, in pixels, for maps that double in size."""
        return int(self._size_divisibility)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the maps of an image batch.

        Args:
            x: float (N, in_chans, H, W).

        Returns:
            `scale2`, ... to (N, C, H / stride, W / stride), rounded up.
        """
        tokens = self.patch_embed(x)
        if self.pos_embed is not None:
            grid = (tokens.shape[1], tokens.shape[2])
            tokens = tokens + positions_for(self.pos_embed, grid, self.pretrain_use_cls_token)
        maps = dict.fromkeys(self._out_features, tokens)  # in the order that was asked for
        first = 0
        for last, name in self._stage_ends.items():
            for block in self.blocks[first : last + 1]:
                tokens = run_block(block, tokens, self.use_act_checkpoint)
            first = last + 1
            if name in maps:
                norm = self.get_submodule(f"{name}_norm")
                maps[name] = norm(tokens).movedim(3, 1).contiguous()
        return maps


class _Scales:
    """Where block `i` stands: its stage, and whether it leads from one to the next."""

    def __init__(self, i: int, last_blocks: Sequence[int]) -> None:
        self.stage = sum(last < i for last in last_blocks)
        self.starts_stage = i - 1 in last_blocks
        self.of_input = self.stage - int(self.starts_stage)
        self._looks_far = i in last_blocks[1:3]
        self._sees_all = i in last_blocks[1:]

    def grid(self, img_size: int, patch_stride: tuple[int, int]) -> tuple[int, int]:
        """Return rows and columns of the tokens that enter the block, for a square image."""
        stride_y, stride_x = (stride * 2**self.of_input for stride in patch_stride)
        return img_size // stride_y, img_size // stride_x

    def sizes(self, dim: int, heads: int, kv_stride: int, window: int) -> dict[str, int]:
        """Return the arguments of the block that depend on its place.

        The last blocks of the second and third stage look at a whole large map: their keys and
        values are pooled by twice the stride of their stage.

        Args:
            dim: channels of the first stage.
            heads: its heads.
            kv_stride: its stride of keys and values.
            window: side of its windows.
        """
        return {
            "dim": dim * 2**self.of_input,
            "dim_out": dim * 2**self.stage,
            "num_heads": heads * 2**self.stage,
            "stride_q": 2 if self.starts_stage else 1,
            "stride_kv": max(kv_stride // 2**self.stage, 1) * (2 if self._looks_far else 1),
            "window_size": 0 if self._sees_all else window // 2**self.of_input,
        }


def _check_stages(
    last_blocks: Sequence[int], depth: int, out_features: Sequence[str]
) -> dict[int, str]:
    """Return the names of stages by the index of their last blocks."""
    if list(last_blocks) != sorted(set(last_blocks)) or not last_blocks or depth < 1:
        raise ValueError(f"MViT last_block_indexes must ascend, got {list(last_blocks)}.")
    if last_blocks[0] < 0 or last_blocks[-1] != depth - 1:
        raise ValueError(
            f"MViT last_block_indexes must end with the last block, {depth - 1}, got "
            f"{list(last_blocks)}."
        )
    ends = {last: f"scale{stage + 2}" for stage, last in enumerate(last_blocks)}
    unknown = [name for name in out_features if name not in ends.values()]
    if unknown or not out_features:
        raise ValueError(
            f"MViT out_features must be some of {list(ends.values())}, got {list(out_features)}."
        )
    return ends
