"""What the transformers share: patches, windows, positions, the MLP, stochastic depth.

Maps of tokens are (N, H, W, C) throughout.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

Norm = Callable[[int], nn.Module]
Activation = Callable[[], nn.Module]


class PatchEmbed(nn.Module):
    """Cuts an image into patches and maps each linearly to a token.

    Args:
        kernel_size: of the patches, (height, width) in pixels.
        stride: from one patch to the next.
        padding: zeros around the image.
        in_chans: channels of the image.
        embed_dim: channels of a token.

    Source: Dosovitskiy et al., An Image Is Worth 16x16 Words (2021), equation 1.
    """

    def __init__(
        self,
        kernel_size: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int] = (0, 0),
        in_chans: int = 3,
        embed_dim: int = 768,
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size, stride=stride, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (N, H', W', embed_dim) of images (N, in_chans, H, W)."""
        found: Tensor = self.proj(x).permute(0, 2, 3, 1)
        return found


class Mlp(nn.Module):
    """Two linear layers with an activation between them.

    Args:
        dim: channels in and out.
        hidden: channels between.
        act_layer: makes the activation.
        drop: probability that a channel is zeroed after either layer, in training.
    """

    def __init__(self, dim: int, hidden: int, act_layer: Activation, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` (..., dim)."""
        found: Tensor = self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))
        return found


def drop_path(probability: float) -> nn.Module:
    """Return what drops a residual branch, image by image, with a probability, in training.

    Source: Huang et al., Deep Networks with Stochastic Depth (2016), section 3.
    """
    return StochasticDepth(probability, mode="row") if probability > 0 else nn.Identity()


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Return the rate of each of `depth` blocks, growing linearly from 0 to `last`."""
    return [last * i / max(depth - 1, 1) for i in range(depth)]


def init_transformer_weights(module: nn.Module) -> None:
    """Draw linear weights from a normal of deviation 0.02, cut at 2; biases 0. For `apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def run_block(block: nn.Module, x: Tensor, recompute: bool) -> Tensor:
    """Call `block`; with `recompute` its activations are computed again in the backward pass."""
    again = recompute and torch.is_grad_enabled()
    found: Tensor = checkpoint(block, x, use_reentrant=False) if again else block(x)
    return found


def split_windows(x: Tensor, window: tuple[int, int]) -> Tensor:
    """Cut maps into windows, after padding with zeros at the right and the bottom.

    Args:
        x: (N, H, W, C).
        window: height and width of a window.

    Returns:
        (N * windows, height, width, C): image by image, row by row.
    """
    height, width = window
    pad_h, pad_w = -x.shape[1] % height, -x.shape[2] % width
    if pad_h or pad_w:
        x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h))
    tiles = x.unflatten(1, (-1, height)).unflatten(3, (-1, width))
    found: Tensor = tiles.transpose(2, 3).flatten(0, 2)
    return found


def join_windows(windows: Tensor, size: tuple[int, int]) -> Tensor:
    """Undo `split_windows`.

    Args:
        windows: (N * windows, height, width, C).
        size: H and W of the maps without padding.

    Returns:
        (N, H, W, C).
    """
    _, height, width, _ = windows.shape
    rows, columns = -(-size[0] // height), -(-size[1] // width)
    tiles = windows.unflatten(0, (-1, rows, columns)).transpose(2, 3)
    found: Tensor = tiles.flatten(3, 4).flatten(1, 2)[:, : size[0], : size[1]]
    return found


def learnt_positions(*shape: int) -> nn.Parameter:
    """Return positions drawn from a normal of deviation 0.02, cut at 2."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02))


def positions_for(pos_embed: Tensor, size: tuple[int, int], with_cls_token: bool) -> Tensor:
    """Resize learnt positions of a square map to another size.

    Args:
        pos_embed: (1, S * S, C), or (1, 1 + S * S, C) with a class token in front.
        size: H and W of the tokens.
        with_cls_token: whether there is that token; it is left out.

    Returns:
        (1, H, W, C), bicubic.

    Raises:
        ValueError: the number of positions is no square.

    Source: Dosovitskiy et al. (2021), section 3.2.
    """
    grid = pos_embed[:, 1:] if with_cls_token else pos_embed
    side = math.isqrt(grid.shape[1])
    if side * side != grid.shape[1]:
        raise ValueError(
            f"pos_embed has {grid.shape[1]} positions (class token not counted: "
            f"pretrain_use_cls_token={with_cls_token}), which is no square number"
        )
    square: Tensor = grid.unflatten(1, (side, side))
    if (side, side) == tuple(size):
        return square
    resized = F.interpolate(
        square.permute(0, 3, 1, 2), size=size, mode="bicubic", align_corners=False
    )
    return resized.permute(0, 2, 3, 1)


def relative_positions(table: Tensor, queries: int, keys: int) -> Tensor:
    """Look the embedding of each pair of positions along one axis up.

    Where there are fewer keys than queries or the reverse, both cover the same stretch, and the
    distance is counted in steps of the finer of the two.

    Args:
        table: (L, C), from the most negative distance to the most positive; resized linearly
            where L is not 2 * max(queries, keys) - 1.
        queries: positions of queries.
        keys: positions of keys.

    Returns:
        (queries, keys, C).

    Source: Li et al., MViTv2 (2022), section 4.1, equation 4.
    """
    finer = max(queries, keys)
    if len(table) != 2 * finer - 1:
        rows = F.interpolate(table.t().unsqueeze(0), size=2 * finer - 1, mode="linear")
        table = rows[0].t()
    where_q = torch.arange(queries, device=table.device) * (finer / queries)
    where_k = torch.arange(keys, device=table.device) * (finer / keys)
    distance = where_q[:, None] - where_k[None, :]
    zero = (keys - 1) * (finer / keys)  # the row of the last key's distance to query 0 is 0
    return table[(distance + zero).long()]


def decomposed_bias(
    q: Tensor,
    tables: tuple[Tensor, Tensor],
    query_size: tuple[int, int],
    key_size: tuple[int, int],
) -> Tensor:
    """Return what relative positions add to the attention: a term by rows plus one by columns.

    Args:
        q: (B, heads, query_size[0] * query_size[1], C), not scaled.
        tables: of the rows and of the columns, see `relative_positions`.
        query_size: rows and columns of the queries.
        key_size: rows and columns of the keys.

    Returns:
        (B, heads, queries, keys).

    Source: Li et al., MViTv2 (2022), section 4.1, equation 4.
    """
    grid = q.unflatten(2, query_size)
    by_row = relative_positions(tables[0], query_size[0], key_size[0]).to(q.dtype)
    by_column = relative_positions(tables[1], query_size[1], key_size[1]).to(q.dtype)
    rows = torch.einsum("bnyxc,ykc->bnyxk", grid, by_row)
    columns = torch.einsum("bnyxc,xkc->bnyxk", grid, by_column)
    return (rows.unsqueeze(-1) + columns.unsqueeze(-2)).flatten(4).flatten(2, 3)


def freeze_module(module: nn.Module | nn.Parameter) -> None:
    """Stop training of a parameter, or of a module's; nothing inside is dropped any more."""
    module.requires_grad_(False)
    if isinstance(module, nn.Module):
        for part in module.modules():
            if isinstance(part, (nn.Dropout, StochasticDepth)):
                part.p = 0.0
