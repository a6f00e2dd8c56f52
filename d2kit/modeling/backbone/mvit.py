"""Multiscale vision transformer, version 2.

Parameter names are those of the published checkpoints (`blocks.0.attn.pool_q.weight`, ...).

Source: Fan et al., Multiscale Vision Transformers (2021), section 3; Li et al., MViTv2: Improved
Multiscale Vision Transformers for Classification and Detection (2022), sections 4 and 4.3.
"""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from d2kit.modeling.backbone._mvit_blocks import MultiScaleAttention, MultiScaleBlock
from d2kit.modeling.backbone._transformer import (
    Activation,
    Norm,
    PatchEmbed,
    drop_path_rates,
    freeze_module,
    init_transformer_weights,
    learnt_positions,
    positions_for,
    run_block,
)
from d2kit.modeling.backbone.backbone import Backbone

__all__ = ["MViT", "MultiScaleAttention", "MultiScaleBlock"]


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
        self.apply(init_transformer_weights)
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
    def size_divisibility(self) -> int:
        """What H and W should be multiples of, in pixels, for maps that double in size."""
        return self._size_divisibility

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the maps of an image batch.

        Args:
            x: float (N, in_chans, H, W).

        Returns:
            `scale2`, ... to (N, C, H / stride, W / stride), rounded up.
        """
        x = self.patch_embed(x)
        if self.pos_embed is not None:
            size = (x.shape[1], x.shape[2])
            x = x + positions_for(self.pos_embed, size, self.pretrain_use_cls_token)
        maps = {}
        for i, block in enumerate(self.blocks):
            x = run_block(block, x, self.use_act_checkpoint)
            name = self._stage_ends.get(i)
            if name in self._out_features:
                maps[name] = getattr(self, f"{name}_norm")(x).permute(0, 3, 1, 2).contiguous()
        return {name: maps[name] for name in self._out_features}


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
