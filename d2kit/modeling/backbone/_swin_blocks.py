"""The blocks of the Swin transformer. Public names are re-exported by `swin`.

Source: Liu et al., Swin Transformer: Hierarchical Vision Transformer using Shifted Windows (2021).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2kit.modeling.backbone._transformer import (
    Mlp,
    Norm,
    drop_path,
    join_windows,
    split_windows,
)


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
        return self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2)))


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
        return x + self.drop_path(self.mlp(self.norm2(x)))

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
        return self.reduction(self.norm(cells.flatten(3)))
