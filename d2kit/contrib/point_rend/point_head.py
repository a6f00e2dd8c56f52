"""Points of PointRend: its config keys, the choice and features of points, and their heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2kit.config import configurable
from d2kit.config.cfg_node import CfgNode, add_keys
from d2kit.layers import Conv2d, ShapeSpec
from d2kit.layers.blocks import msra_fill, normal_fill
from d2kit.layers.wrappers import region_shape
from d2kit.modeling.roi_heads.box_head import add_fcs, own_class
from d2kit.modeling.roi_heads.fast_rcnn import region_count
from d2kit.modeling.sampling import generator_for
from d2kit.structures import Boxes, Instances
from d2kit.utils.events import put_scalars
from d2kit.utils.registry import Registry

POINTREND_KEYS: dict[str, tuple[Any, str]] = {
    "INPUT.COLOR_AUG_SSD": (False, "Photometric augmentation of SSD, in training."),
    "MODEL.ROI_MASK_HEAD.IN_FEATURES": ((), "Features of the coarse mask head."),
    "MODEL.ROI_MASK_HEAD.FC_DIM": (1024, "Width of its fully connected layers."),
    "MODEL.ROI_MASK_HEAD.NUM_FC": (2, "Number of its fully connected layers."),
    "MODEL.ROI_MASK_HEAD.OUTPUT_SIDE_RESOLUTION": (7, "Side of the coarse mask, in cells."),
    "MODEL.ROI_MASK_HEAD.POINT_HEAD_ON": (False, "Refine the coarse mask by a point head."),
    "MODEL.POINT_HEAD.NAME": ("StandardPointHead", "Class in POINT_HEAD."),
    "MODEL.POINT_HEAD.NUM_CLASSES": (80, "As MODEL.ROI_HEADS.NUM_CLASSES."),
    "MODEL.POINT_HEAD.IN_FEATURES": ((), "Features that points are sampled from."),
    "MODEL.POINT_HEAD.TRAIN_NUM_POINTS": (14 * 14, "Points per object in training."),
    "MODEL.POINT_HEAD.OVERSAMPLE_RATIO": (3, "Candidates per point, in training."),
    "MODEL.POINT_HEAD.IMPORTANCE_SAMPLE_RATIO": (
        0.75,
        "Share of the points chosen for being uncertain, in training.",
    ),
    "MODEL.POINT_HEAD.SUBDIVISION_STEPS": (5, "Doublings of the mask's side at inference."),
    "MODEL.POINT_HEAD.SUBDIVISION_NUM_POINTS": (28 * 28, "Points predicted at each doubling."),
    "MODEL.POINT_HEAD.FC_DIM": (256, "Width of the hidden layers."),
    "MODEL.POINT_HEAD.NUM_FC": (3, "Number of hidden layers."),
    "MODEL.POINT_HEAD.CLS_AGNOSTIC_MASK": (False, "One mask for all classes."),
    "MODEL.POINT_HEAD.COARSE_PRED_EACH_LAYER": (
        True,
        "Give the coarse prediction to every layer, not to the first alone.",
    ),
    "MODEL.POINT_HEAD.COARSE_SEM_SEG_HEAD_NAME": (
        "SemSegFPNHead",
        "Coarse head of semantic segmentation; not used by the mask head.",
    ),
    "MODEL.IMPLICIT_POINTREND.IMAGE_FEATURE_ENABLED": (
        True,
        "Give the image's features to the points of ImplicitPointRendMaskHead.",
    ),
    "MODEL.IMPLICIT_POINTREND.POS_ENC_ENABLED": (True, "Give them their encoded positions."),
    "MODEL.IMPLICIT_POINTREND.PARAMS_L2_REGULARIZER": (
        0.00001,
        "Factor of the squared size of the predicted parameters, in the loss.",
    ),
}


def add_pointrend_config(cfg: CfgNode) -> None:
    """Add the keys of PointRend's heads to a config, in place; call it before files are merged.

    Args:
        cfg: not frozen.
    """
    add_keys(cfg, POINTREND_KEYS)


def point_sample(input: Tensor, point_coords: Tensor, **kwargs: Any) -> Tensor:
    """Sample maps bilinearly at points.

    Args:
        input: (N, C, H, W).
        point_coords: (N, P, 2) or (N, Hg, Wg, 2), x and y in [0, 1] of the map; outside is 0.
        **kwargs: of `torch.nn.functional.grid_sample`; ``align_corners`` is False by default.

    Returns:
        (N, C, P) or (N, C, Hg, Wg).
    """
    flat = point_coords.dim() == 3
    grid = 2 * (point_coords.unsqueeze(2) if flat else point_coords) - 1
    if grid.numel() == 0:  # grid_sample wants at least one point
        return input.new_zeros(*input.shape[:2], *point_coords.shape[1:-1]) + 0 * input.sum()
    kwargs.setdefault("align_corners", False)
    sampled = F.grid_sample(input, grid.to(input.dtype), **kwargs)
    return sampled.squeeze(3) if flat else sampled


def generate_regular_grid_point_coords(
    R: int, side_size: int, device: torch.device | str
) -> Tensor:
    """Return the centres of the cells of a square grid over each region.

    Args:
        R: number of regions.
        side_size: S cells per side.
        device: of the result.

    Returns:
        (R, S * S, 2), row by row.
    """
    ticks = (torch.arange(side_size, device=device) + 0.5) / side_size
    grid = torch.cartesian_prod(ticks, ticks).flip(1)
    return grid.expand(R, -1, -1)


def uniform_points(
    regions: int,
    points: int,
    device: torch.device | str,
    regions_per_image: Sequence[int] | None,
    stage: str,
) -> Tensor:
    """Draw points (R, P, 2) in [0, 1].

    Args:
        regions: R.
        points: P.
        device: of the result.
        regions_per_image: how the R regions are spread over the images of the batch; then each
            image draws from its own generator, see `d2kit.modeling.sampling`. None: torch's.
        stage: names the choice.
    """
    if regions_per_image is None:
        return torch.rand(regions, points, 2, device=device)
    return torch.cat(
        [
            torch.rand(count, points, 2, device=device, generator=generator_for(i, stage, device))
            for i, count in enumerate(regions_per_image)
        ]
    )


@torch.no_grad()
def get_uncertain_point_coords_with_randomness(
    coarse_logits: Tensor,
    uncertainty_func: Callable[[Tensor], Tensor],
    num_points: int,
    oversample_ratio: float,
    importance_sample_ratio: float,
    *,
    regions_per_image: Sequence[int] | None = None,
) -> Tensor:
    """Choose points to train on: the most uncertain of many, and some more by chance.

    Args:
        coarse_logits: (R, C, H, W), the prediction to be refined.
        uncertainty_func: maps logits at points (R, C, P) to uncertainties (R, 1, P).
        num_points: P.
        oversample_ratio: k, at least 1: the uncertain ones are chosen among k * P.
        importance_sample_ratio: share of P, in [0, 1], that is chosen for being uncertain.
        regions_per_image: see `uniform_points`.

    Returns:
        (R, P, 2).

    Raises:
        ValueError: a ratio outside its range.

    Source: PointRend, section 3.1, "Training".
    """
    if oversample_ratio < 1 or not 0 <= importance_sample_ratio <= 1:
        raise ValueError(
            "points to train on: oversample_ratio must be at least 1 and importance_sample_ratio "
            f"in [0, 1], got {oversample_ratio} and {importance_sample_ratio}"
        )
    regions, device = len(coarse_logits), coarse_logits.device
    many = int(num_points * oversample_ratio)
    candidates = uniform_points(regions, many, device, regions_per_image, "point_candidates")
    uncertain = int(num_points * importance_sample_ratio)
    uncertainty = uncertainty_func(point_sample(coarse_logits, candidates)).reshape(regions, many)
    best = uncertainty.topk(uncertain, dim=1).indices
    chosen = candidates.gather(1, best.unsqueeze(2).expand(-1, -1, 2))
    others = uniform_points(
        regions, num_points - uncertain, device, regions_per_image, "point_others"
    )
    return torch.cat([chosen, others], dim=1)


def get_uncertain_point_coords_on_grid(
    uncertainty_map: Tensor, num_points: int
) -> tuple[Tensor, Tensor]:
    """Choose the most uncertain cells of each map.

    Args:
        uncertainty_map: (R, 1, H, W).
        num_points: how many; all cells where there are fewer.

    Returns:
        Indices y * W + x (R, P) int64, and the cells' centres (R, P, 2).

    Source: PointRend, section 3.1, "Inference".
    """
    regions, _, height, width = uncertainty_map.shape
    points = min(num_points, height * width)
    index = uncertainty_map.reshape(regions, height * width).topk(points, dim=1).indices
    x = (index % width + 0.5) / width
    y = (index.div(width, rounding_mode="floor") + 0.5) / height
    return index, torch.stack([x, y], dim=2).to(uncertainty_map.dtype)


def get_point_coords_wrt_image(boxes_coords: Tensor, point_coords: Tensor) -> Tensor:
    """Convert points of boxes to pixels.

    Args:
        boxes_coords: (R, 4) XYXY, absolute pixels.
        point_coords: (R, P, 2) in [0, 1] of the boxes.

    Returns:
        (R, P, 2), absolute pixels.
    """
    start, end = boxes_coords[:, None, :2], boxes_coords[:, None, 2:]
    return start + point_coords * (end - start)


def point_sample_fine_grained_features(
    features_list: Sequence[Tensor],
    feature_scales: Sequence[float],
    boxes: Sequence[Boxes],
    point_coords: Tensor,
) -> tuple[Tensor, Tensor]:
    """Sample feature maps at points of boxes; the channels of all maps are joined.

    Args:
        features_list: L maps (N, C_l, H_l, W_l).
        feature_scales: for each map 1 / stride.
        boxes: per image, XYXY in absolute pixels; R in all.
        point_coords: (R, P, 2) in [0, 1] of the boxes.

    Returns:
        Features (R, sum of C_l, P), and the points in absolute pixels (R, P, 2).
    """
    places = get_point_coords_wrt_image(torch.cat([b.tensor for b in boxes]), point_coords)
    by_image = places.split([len(b) for b in boxes])
    joined = []
    for features, scale in zip(features_list, feature_scales, strict=True):
        height, width = features.shape[-2:]
        size = places.new_tensor([width / scale, height / scale])
        sampled = [
            point_sample(features[i : i + 1], (points / size).unsqueeze(0))
            for i, points in enumerate(by_image)
        ]
        joined.append(torch.cat([s.squeeze(0).transpose(0, 1) for s in sampled]))
    return torch.cat(joined, dim=1), places


def sample_bitmaps(bitmaps: Tensor, index: Tensor, points: Tensor) -> Tensor:
    """Sample bitmaps bilinearly, each shared by any number of regions.

    Args:
        bitmaps: (G, H, W) bool.
        index: (R,) int64, the bitmap of each region.
        points: (R, P, 2) x and y in pixels; the centre of the first pixel is (0.5, 0.5).

    Returns:
        (R, P) float32 in [0, 1]; outside of the image is 0.
    """
    height, width = bitmaps.shape[-2:]
    corner = (points - 0.5).floor()
    weight = points - 0.5 - corner
    corner = corner.long()
    total = points.new_zeros(points.shape[:2], dtype=torch.float32)
    for dx in (0, 1):
        for dy in (0, 1):
            x, y = corner[..., 0] + dx, corner[..., 1] + dy
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            value = bitmaps[index[:, None], y.clamp(0, height - 1), x.clamp(0, width - 1)]
            share = (weight[..., 0] - (1 - dx)).abs() * (weight[..., 1] - (1 - dy)).abs()
            total += share * (value & inside)
    return total


POINT_HEAD_REGISTRY = Registry("POINT_HEAD")
"""Point heads: called with ``(cfg, input_shape: ShapeSpec)``; see `StandardPointHead`."""


def build_point_head(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
    """Build the point head that ``cfg.MODEL.POINT_HEAD.NAME`` names.

    Args:
        cfg: the config, with the keys of `add_pointrend_config`.
        input_shape: channels of the fine-grained features.

    Returns:
        The head.
    """
    found: nn.Module = POINT_HEAD_REGISTRY.get(cfg.MODEL.POINT_HEAD.NAME)(cfg, input_shape)
    return found


def roi_mask_point_loss(
    mask_logits: Tensor, instances: list[Instances], point_labels: Tensor
) -> Tensor:
    """Mean binary cross-entropy over the points of the foreground regions' own classes.

    Args:
        mask_logits: (R, K, P), or (R, 1, P); R over the regions of all images in order.
        instances: per image, with `gt_classes`.
        point_labels: (R, P) in [0, 1], the ground truth at the points.

    Returns:
        0-dim loss; 0 (with a graph) without regions. Across processes the mean is taken over the
        regions of all of them.

    Source: PointRend, section 3.3.
    """
    count = region_count(mask_logits)
    filled = [x for x in instances if len(x)]
    if not filled:
        return mask_logits.sum() * 0
    logits = own_class(mask_logits, torch.cat([x.gt_classes for x in filled]))[:, 0].float()
    wrong = (logits.detach() > 0) != (point_labels > 0.5)
    put_scalars("point", accuracy=1 - wrong.float().mean())
    total = F.binary_cross_entropy_with_logits(logits, point_labels, reduction="sum")
    return total / (count * mask_logits.shape[2])


class ConvFCHead(nn.Module):
    """A convolution that halves the side, fully connected layers, and all numbers of a region.

    Args:
        input_shape: channels and side of a pooled region.
        output_shape: of the result of one region, for example (K, M, M) for coarse masks.
        conv_dim: channels of the convolutions; a 1x1 convolution leads to them from more.
        fc_dims: width of each fully connected layer.

    Source: PointRend, section 4.1: "a lightweight version of the box head".
    """

    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        output_shape: Sequence[int],
        conv_dim: int,
        fc_dims: Sequence[int],
    ) -> None:
        super().__init__()
        channels, height, width = region_shape(input_shape, "ConvFCHead")
        self.output_shape = tuple(output_shape)
        self.reduce_channel_dim_conv: nn.Module = nn.Identity()
        if channels > conv_dim:
            conv = Conv2d(channels, conv_dim, kernel_size=1, activation=nn.ReLU())
            msra_fill(conv)
            self.reduce_channel_dim_conv = conv
            channels = conv_dim
        self.reduce_spatial_dim_conv = Conv2d(
            channels, conv_dim, kernel_size=2, stride=2, activation=nn.ReLU()
        )
        msra_fill(self.reduce_spatial_dim_conv)
        size = conv_dim * (height // 2) * (width // 2)
        self.fc_names = add_fcs(self, size, fc_dims)
        self.prediction = nn.Linear([size, *fc_dims][-1], math.prod(self.output_shape))
        normal_fill(self.prediction, std=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """Map pooled features (R, C, H, W) to (R, *output_shape)."""
        x = self.reduce_spatial_dim_conv(self.reduce_channel_dim_conv(x)).flatten(1)
        for name in self.fc_names:
            x = F.relu(getattr(self, name)(x))
        found: Tensor = self.prediction(x).view(-1, *self.output_shape)
        return found


@POINT_HEAD_REGISTRY.register()
class StandardPointHead(nn.Module):
    """The same small network for every point, on its features and its coarse prediction.

    Args:
        input_channels: of the fine-grained features.
        coarse_channels: of the coarse prediction.
        num_classes: K, or 1 for masks that do not depend on the class.
        fc_dims: width of each hidden layer.
        coarse_pred_each_layer: give the coarse prediction to every layer, not to the first alone.

    Source: PointRend, section 3.3; the coarse prediction at every layer: section 4.1.
    """

    @configurable
    def __init__(
        self,
        *,
        input_channels: int,
        coarse_channels: int,
        num_classes: int,
        fc_dims: Sequence[int],
        coarse_pred_each_layer: bool = True,
    ) -> None:
        super().__init__()
        self.coarse_pred_each_layer = coarse_pred_each_layer
        size = input_channels + coarse_channels
        self.fc_names = []
        for k, dim in enumerate(fc_dims, start=1):
            fc = nn.Conv1d(size, dim, kernel_size=1)
            msra_fill(fc)
            self.add_module(f"fc{k}", fc)
            self.fc_names.append(f"fc{k}")
            size = dim + (coarse_channels if coarse_pred_each_layer else 0)
        self.predictor = nn.Conv1d(size, num_classes, kernel_size=1)
        normal_fill(self.predictor, std=0.001)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg`."""
        node, classes = cfg.MODEL.POINT_HEAD, cfg.MODEL.POINT_HEAD.NUM_CLASSES
        return {
            "input_channels": region_shape(input_shape, "StandardPointHead")[0],
            "coarse_channels": 1 if cfg.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK else classes,
            "num_classes": 1 if node.CLS_AGNOSTIC_MASK else classes,
            "fc_dims": [node.FC_DIM] * node.NUM_FC,
            "coarse_pred_each_layer": node.COARSE_PRED_EACH_LAYER,
        }

    def forward(self, fine_grained_features: Tensor, coarse_features: Tensor) -> Tensor:
        """Map features (R, C, P) and coarse logits (R, K, P) to logits (R, K, P)."""
        x = torch.cat([fine_grained_features, coarse_features], dim=1)
        for name in self.fc_names:
            x = F.relu(getattr(self, name)(x))
            if self.coarse_pred_each_layer:
                x = torch.cat([x, coarse_features], dim=1)
        found: Tensor = self.predictor(x)
        return found


@POINT_HEAD_REGISTRY.register()
class ImplicitPointHead(nn.Module):
    """A network for points without weights of its own: they are given for each region.

    Args:
        input_channels: C of the features of a point; even.
        num_classes: K, or 1 for masks that do not depend on the class.
        fc_dims: width of each hidden layer.
        image_feature_enabled: whether a point is described by its features.
        positional_encoding_enabled: whether it is described by its place in the box; with both,
            the two are added.

    Raises:
        ValueError: if a point is described by nothing, or C is odd.

    Source: Cheng et al. 2022, section 5; the encoding: Fourier Features (Tancik et al. 2020),
    section 6.1, Gaussian.
    """

    positional_encoding_gaussian_matrix: Tensor

    @configurable
    def __init__(
        self,
        *,
        input_channels: int,
        num_classes: int,
        fc_dims: Sequence[int],
        image_feature_enabled: bool = True,
        positional_encoding_enabled: bool = True,
    ) -> None:
        super().__init__()
        if not (image_feature_enabled or positional_encoding_enabled) or input_channels % 2:
            raise ValueError(
                "ImplicitPointHead needs image features or encoded positions, of an even number "
                f"of channels, got {image_feature_enabled}, {positional_encoding_enabled} and "
                f"{input_channels}"
            )
        self.image_feature_enabled = image_feature_enabled
        self.positional_encoding_enabled = positional_encoding_enabled
        if positional_encoding_enabled:
            directions = torch.randn(2, input_channels // 2)
            self.register_buffer("positional_encoding_gaussian_matrix", directions)
        self.layer_shapes = list(pairwise([input_channels, *fc_dims, num_classes]))
        self.num_params = sum((size + 1) * width for size, width in self.layer_shapes)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg`."""
        node, implicit = cfg.MODEL.POINT_HEAD, cfg.MODEL.IMPLICIT_POINTREND
        return {
            "input_channels": region_shape(input_shape, "ImplicitPointHead")[0],
            "num_classes": 1 if node.CLS_AGNOSTIC_MASK else node.NUM_CLASSES,
            "fc_dims": [node.FC_DIM] * node.NUM_FC,
            "image_feature_enabled": implicit.IMAGE_FEATURE_ENABLED,
            "positional_encoding_enabled": implicit.POS_ENC_ENABLED,
        }

    def forward(
        self, fine_grained_features: Tensor, point_coords: Tensor, parameters: Tensor
    ) -> Tensor:
        """Compute the logits of points.

        Args:
            fine_grained_features: (R, C, P).
            point_coords: (R, P, 2) in [0, 1] of the boxes.
            parameters: (R, num_params), the weights and biases of all layers in order.

        Returns:
            (R, K, P).
        """
        x = fine_grained_features if self.image_feature_enabled else 0 * fine_grained_features
        if self.positional_encoding_enabled:
            x = x + self._encoded(point_coords).to(x.dtype)
        sizes = [n for size, width in self.layer_shapes for n in (size * width, width)]
        parts = parameters.split(sizes, dim=1)
        last = len(self.layer_shapes) - 1
        for i, (size, width) in enumerate(self.layer_shapes):
            weight, bias = parts[2 * i].view(-1, width, size), parts[2 * i + 1].unsqueeze(2)
            x = torch.baddbmm(bias, weight, x)
            x = x if i == last else x.relu()
        return x

    def _encoded(self, point_coords: Tensor) -> Tensor:
        """Return sines and cosines of places (R, C, P)."""
        angle = 2 * math.pi * (2 * point_coords - 1) @ self.positional_encoding_gaussian_matrix
        return torch.cat([angle.sin(), angle.cos()], dim=2).transpose(1, 2)
