"""The blocks of MViT. Public names are re-exported by `mvit`.

Source: Fan et al., Multiscale Vision Transformers (2021), section 3; Li et al., MViTv2: Improved
Multiscale Vision Transformers for Classification and Detection (2022), section 4.1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2kit.modeling.backbone._transformer import (
    Activation,
    Mlp,
    Norm,
    decomposed_bias,
    drop_path,
    join_windows,
    split_windows,
)


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
        return getattr(self, f"norm_{name}")(pooled)

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
        return self.proj(mixed.unflatten(0, (len(x), -1)).permute(0, 2, 3, 1, 4).flatten(3))


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
        normed = self.norm1(x)
        shortcut = x if self.proj is None else self.proj(normed)
        if self.pool_skip is not None:
            shortcut = self.pool_skip(shortcut.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = shortcut + self.drop_path(self.attn(normed))
        return x + self.drop_path(self.mlp(self.norm2(x)))


_drop_path = drop_path  # `MultiScaleBlock` has an argument of that name
