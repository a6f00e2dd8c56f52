"""A class for every pixel: semantic segmentation, and with instances Panoptic FPN.

Source: Kirillov et al., Panoptic Feature Pyramid Networks (2019); the head: section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2kit.config import CfgNode, configurable
from d2kit.layers import Conv2d, ShapeSpec, get_norm
from d2kit.layers.blocks import msra_fill
from d2kit.layers.wrappers import region_shape, shapes_of
from d2kit.modeling.backbone import Backbone, build_backbone
from d2kit.modeling.meta_arch.build import META_ARCH_REGISTRY
from d2kit.modeling.meta_arch.common import ImageNormalizer, semantic_targets
from d2kit.modeling.meta_arch.rcnn import GeneralizedRCNN
from d2kit.modeling.postprocessing import sem_seg_postprocess
from d2kit.structures import Instances, ROIMasks
from d2kit.utils import comm
from d2kit.utils.registry import Registry

__all__ = [
    "SEM_SEG_HEADS_REGISTRY",
    "PanopticFPN",
    "SemSegFPNHead",
    "SemanticSegmentor",
    "build_sem_seg_head",
    "combine_semantic_and_instance_outputs",
]


SEM_SEG_HEADS_REGISTRY = Registry("SEM_SEG_HEADS")
"""Segmentation heads: called with ``(cfg, input_shape: dict[str, ShapeSpec])``.

The module has `ignore_value` and maps features and, in training, labels (N, H, W) to a pair: in
training (None, losses), else (scores (N, K, H, W), {}).
"""


def build_sem_seg_head(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> nn.Module:
    """Build the segmentation head that ``cfg.MODEL.SEM_SEG_HEAD.NAME`` names.

    Args:
        cfg: the config.
        input_shape: feature name -> its shape.

    Returns:
        The head.

    Raises:
        KeyError: no head of that name is registered.
    """
    found: nn.Module = SEM_SEG_HEADS_REGISTRY.get(cfg.MODEL.SEM_SEG_HEAD.NAME)(cfg, input_shape)
    return found


@META_ARCH_REGISTRY.register()
class SemanticSegmentor(ImageNormalizer):
    """Image -> features -> segmentation head.

    Args:
        backbone: images (N, C, H, W) -> name -> features.
        sem_seg_head: see `SEM_SEG_HEADS_REGISTRY`.
        pixel_mean: per channel, in the order of the input, values in 0..255.
        pixel_std: per channel.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        sem_seg_head: nn.Module,
        pixel_mean: tuple[float, ...],
        pixel_std: tuple[float, ...],
    ) -> None:
        super().__init__(pixel_mean=pixel_mean, pixel_std=pixel_std)
        self.backbone = backbone
        self.sem_seg_head = sem_seg_head

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg`."""
        backbone = build_backbone(cfg)
        return {
            "backbone": backbone,
            "sem_seg_head": build_sem_seg_head(cfg, backbone.output_shape()),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Compute the losses in training mode, or the scores of every pixel.

        Args:
            batched_inputs: per image a dict with

                * `image`: (C, H, W), values in 0..255.
                * `sem_seg`: int64 (H, W), the class of each pixel, or the ignored value; in
                  training.
                * `height`, `width`: size of the wanted result, by default the image's.

        Returns:
            In training, name -> 0-dim loss. Else per image ``{"sem_seg": (K, height, width)}``:
            logits, the class is their argmax.
        """
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        if self.training:
            targets = semantic_targets(batched_inputs, self.backbone, self.sem_seg_head)
            return self.sem_seg_head(features, targets)[1]
        scores, _ = self.sem_seg_head(features)
        results = []
        for score, item, size in zip(scores, batched_inputs, images.image_sizes, strict=True):
            height, width = item.get("height", size[0]), item.get("width", size[1])
            results.append({"sem_seg": sem_seg_postprocess(score, size, height, width)})
        return results


@SEM_SEG_HEADS_REGISTRY.register()
class SemSegFPNHead(nn.Module):
    """Bring all levels to one stride by convolutions and upsampling, add them, classify.

    Args:
        input_shape: feature name -> its shape; all are used.
        num_classes: K.
        conv_dims: channels of the convolutions.
        common_stride: at which the levels are added, in pixels.
        loss_weight: factor of the loss.
        norm: after each convolution, as `d2kit.layers.get_norm` takes it.
        ignore_value: label of pixels without loss.

    Raises:
        ValueError: a stride that is no power of two times `common_stride`.

    Source: Kirillov et al. (2019), figure 3.
    """

    not_deterministic_on_cuda = "cross_entropy of maps (nll_loss2d)"

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        num_classes: int,
        conv_dims: int,
        common_stride: int,
        loss_weight: float = 1.0,
        norm: str | Callable[[int], nn.Module] | None = None,
        ignore_value: int = -1,
    ) -> None:
        super().__init__()
        levels = sorted(input_shape.items(), key=lambda item: item[1].stride or 0)
        if not levels:
            raise ValueError("SemSegFPNHead needs at least one feature (SEM_SEG_HEAD.IN_FEATURES)")
        self.in_features = [name for name, _ in levels]
        self.num_classes = num_classes
        self.common_stride = common_stride
        self.loss_weight = loss_weight
        self.ignore_value = ignore_value
        for name, shape in levels:
            doublings = _doublings(name, shape.stride or 0, common_stride)
            channels, _, _ = region_shape(shape, name)
            self.add_module(name, _upsampling_head(channels, conv_dims, doublings, norm))
        self.predictor = Conv2d(conv_dims, num_classes, kernel_size=1)
        msra_fill(self.predictor)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg` and the backbone's output shapes."""
        node = cfg.MODEL.SEM_SEG_HEAD
        shapes = shapes_of(node.IN_FEATURES, input_shape, "MODEL.SEM_SEG_HEAD.IN_FEATURES")
        return {
            "input_shape": dict(zip(node.IN_FEATURES, shapes, strict=True)),
            "num_classes": node.NUM_CLASSES,
            "conv_dims": node.CONVS_DIM,
            "common_stride": node.COMMON_STRIDE,
            "loss_weight": node.LOSS_WEIGHT,
            "norm": node.NORM,
            "ignore_value": node.IGNORE_VALUE,
        }

    def forward(
        self, features: dict[str, Tensor], targets: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Compute the losses in training mode, or the scores of every pixel.

        Args:
            features: name -> (N, C, Hi, Wi).
            targets: int64 (N, H, W), in training.

        Returns:
            In training None and the losses; else logits (N, K, H, W) and an empty dict.

        Raises:
            ValueError: in training without `targets`.
        """
        scores = self.layers(features)
        if self.training:
            if targets is None:
                raise ValueError("SemSegFPNHead needs targets in training mode, got None")
            return None, self.losses(scores, targets)
        return self._upsampled(scores), {}

    @property
    def scale_heads(self) -> list[nn.Module]:
        """The layers of each level, in the order of `in_features`."""
        return [self.get_submodule(name) for name in self.in_features]

    def layers(self, features: dict[str, Tensor]) -> Tensor:
        """Return logits (N, K, H / common_stride, W / common_stride).

        Args:
            features: name -> (N, C, Hi, Wi).
        """
        merged: Any = 0
        for name, head in zip(self.in_features, self.scale_heads, strict=True):
            merged = merged + head(features[name])
        found: Tensor = self.predictor(merged)
        return found

    def losses(self, predictions: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the mean cross entropy of the pixels that are not ignored.

        Args:
            predictions: logits (N, K, H / common_stride, W / common_stride).
            targets: int64 (N, H, W).

        Returns:
            ``loss_sem_seg``; 0 where every pixel is ignored.
        """
        scores = self._upsampled(predictions.float())
        total = F.cross_entropy(scores, targets, reduction="sum", ignore_index=self.ignore_value)
        count = comm.mean_over_ranks((targets != self.ignore_value).sum()).clamp(min=1)
        return {"loss_sem_seg": total / count * self.loss_weight}

    def _upsampled(self, scores: Tensor) -> Tensor:
        """Return the logits at the size of the image."""
        factor = float(self.common_stride)
        return F.interpolate(scores, scale_factor=factor, mode="bilinear", align_corners=False)


def _doublings(name: str, stride: int, common_stride: int) -> int:
    """Return how often a level is upsampled by 2."""
    ratio = stride / common_stride
    if ratio < 1 or not math.log2(ratio).is_integer():
        raise ValueError(
            f"feature '{name}' (MODEL.SEM_SEG_HEAD.IN_FEATURES) has stride {stride}; it must be "
            f"COMMON_STRIDE, {common_stride}, times a power of 2"
        )
    return int(math.log2(ratio))


def _upsampling_head(
    channels: int,
    conv_dims: int,
    doublings: int,
    norm: str | Callable[[int], nn.Module] | None,
) -> nn.Sequential:
    """Make a convolution for each doubling, and one where there is none."""
    steps = nn.Sequential()
    for before in [channels] + [conv_dims] * (doublings - 1):
        conv = Conv2d(
            before,
            conv_dims,
            kernel_size=3,
            padding=1,
            bias=not norm,
            norm=get_norm(norm, conv_dims),
            activation=F.relu,
        )
        msra_fill(conv)
        steps.append(conv)
        if doublings > 0:
            steps.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
    return steps


def combine_semantic_and_instance_outputs(
    instance_results: Instances,
    semantic_results: Tensor,
    overlap_threshold: float,
    stuff_area_thresh: float,
    instances_score_thresh: float,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Lay instances over each other, best first, and fill what is left with stuff.

    Args:
        instance_results: of the image, with `scores`, `pred_classes` and `pred_masks`: (R, H, W)
            bool, or `ROIMasks`, which then need `pred_boxes`.
        semantic_results: int64 (H, W), class of each pixel; 0 stands for all things, and for what
            is not labelled, and makes no segment.
        overlap_threshold: an instance goes where better ones cover more than this share of it.
        stuff_area_thresh: stuff of fewer pixels goes.
        instances_score_thresh: instances of a lower score go.

    Returns:
        The id of each pixel's segment, int32 (H, W), 0 for none; and for each segment, in order of
        ids from 1, a dict: ``id``; ``isthing``; ``category_id``, counted among things or among
        stuff; for things ``score`` and ``instance_id``, the row of `instance_results`; for stuff
        ``area`` in pixels.

    Source: Kirillov et al., Panoptic Feature Pyramid Networks (2019), section 3.2, after Panoptic
    Segmentation (2019), section 7.
    """
    device = semantic_results.device
    rows = instance_results.scores.argsort(descending=True, stable=True)
    rows = rows[instance_results.scores[rows] >= instances_score_thresh]
    height, width = semantic_results.shape
    masks = _masks(instance_results[rows], height, width).to(device)
    segments = torch.zeros_like(semantic_results, dtype=torch.int32)
    free = torch.ones_like(segments, dtype=torch.bool)
    kept = []
    for i, mask in enumerate(masks):  # no step waits for the device: ids are ranks for now
        visible = mask & free
        area, left = mask.count_nonzero(), visible.count_nonzero()
        keep = (left > 0) & ((area - left) / area <= overlap_threshold)
        visible &= keep
        segments.add_(visible, alpha=i + 1)  # 0 there; masked_fill takes 7 ms at 800x1333, this 0.2
        free ^= visible
        kept.append(keep)
    pixels = torch.bincount(semantic_results[free].long())
    things = torch.stack(kept).nonzero().flatten().cpu() if kept else torch.zeros(0).long()
    stuff = [(k, n) for k, n in enumerate(pixels.tolist()) if k > 0 and n > 0]
    stuff = [(k, n) for k, n in stuff if n >= stuff_area_thresh]

    # rank of an instance -> its id; class of stuff -> its id
    thing_ids = torch.zeros(len(masks) + 1, dtype=torch.int32)
    thing_ids[things + 1] = torch.arange(1, len(things) + 1, dtype=torch.int32)
    stuff_ids = torch.zeros(max(len(pixels), 1), dtype=torch.int32)
    for offset, (category, _) in enumerate(stuff):
        stuff_ids[category] = len(things) + 1 + offset
    of_stuff = stuff_ids.to(device)[semantic_results.long().clamp(max=len(stuff_ids) - 1)]
    ids = torch.where(segments > 0, thing_ids.to(device)[segments.long()], of_stuff)
    chosen = instance_results[rows[things.to(rows.device)]]
    return ids, _infos(chosen, rows.cpu()[things].tolist(), stuff)


def _masks(instances: Instances, height: int, width: int) -> Tensor:
    """Return the masks (R, H, W), bool."""
    masks = instances.pred_masks
    if isinstance(masks, ROIMasks):
        return masks.to_bitmasks(instances.pred_boxes, height, width).tensor
    found: Tensor = masks.bool()
    return found


def _infos(
    instances: Instances, rows: list[int], stuff: list[tuple[int, int]]
) -> list[dict[str, Any]]:
    """Describe the segments: instances first, then stuff as (class, area)."""
    classes, scores = instances.pred_classes.tolist(), instances.scores.tolist()
    infos: list[dict[str, Any]] = [
        {"id": i, "isthing": True, "score": score, "category_id": category, "instance_id": row}
        for i, (row, category, score) in enumerate(zip(rows, classes, scores, strict=True), 1)
    ]
    for category, area in stuff:
        number = len(infos) + 1
        infos.append({"id": number, "isthing": False, "category_id": category, "area": area})
    return infos


@META_ARCH_REGISTRY.register()
class PanopticFPN(GeneralizedRCNN):
    """A `GeneralizedRCNN` with a segmentation head beside the per-region heads.

    Args:
        sem_seg_head: see `SEM_SEG_HEADS_REGISTRY`.
        combine_overlap_thresh: see `combine_semantic_and_instance_outputs`.
        combine_stuff_area_thresh: see there, pixels.
        combine_instances_score_thresh: see there.
        combine: whether instances and pixels are merged at inference.
        instance_loss_weight: factor of the losses of the per-region heads.
        **kwargs: as of `GeneralizedRCNN`.

    Source: Kirillov et al. (2019), section 3.
    """

    @configurable
    def __init__(
        self,
        *,
        sem_seg_head: nn.Module,
        combine_overlap_thresh: float = 0.5,
        combine_stuff_area_thresh: float = 4096,
        combine_instances_score_thresh: float = 0.5,
        combine: bool = True,
        instance_loss_weight: float = 1.0,
        **kwargs: object,
    ) -> None:
        super().__init__(**kwargs)
        self.sem_seg_head = sem_seg_head
        self.combine_overlap_thresh = combine_overlap_thresh
        self.combine_stuff_area_thresh = combine_stuff_area_thresh
        self.combine_instances_score_thresh = combine_instances_score_thresh
        self.combine = combine
        self.instance_loss_weight = instance_loss_weight

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg`."""
        arguments = super().from_config(cfg)
        node = cfg.MODEL.PANOPTIC_FPN
        return {
            **arguments,
            "sem_seg_head": build_sem_seg_head(cfg, arguments["backbone"].output_shape()),
            "combine_overlap_thresh": node.COMBINE.OVERLAP_THRESH,
            "combine_stuff_area_thresh": node.COMBINE.STUFF_AREA_LIMIT,
            "combine_instances_score_thresh": node.COMBINE.INSTANCES_CONFIDENCE_THRESH,
            "combine": node.COMBINE.ENABLED,
            "instance_loss_weight": node.INSTANCE_LOSS_WEIGHT,
        }

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Compute the losses in training mode, or the results.

        Args:
            batched_inputs: as of `GeneralizedRCNN.forward`; in training also

                * `sem_seg`: int64 (H, W), the class of each pixel, or the ignored value.

        Returns:
            In training, name -> 0-dim loss. Else per image a dict of

                * `instances`: see `GeneralizedRCNN.forward`.
                * `sem_seg`: logits (K, height, width).
                * `panoptic_seg`: see `combine_semantic_and_instance_outputs`.
        """
        if not self.training:
            return self.inference(batched_inputs)
        images = self.preprocess_image(batched_inputs)
        labels = semantic_targets(batched_inputs, self.backbone, self.sem_seg_head)
        features = self.backbone(images.tensor)
        _, losses = self.sem_seg_head(features, labels)
        return {**losses, **self._losses(batched_inputs, images, features)}

    def _losses(self, *args: Any) -> dict[str, Tensor]:
        """Weigh the losses of the per-region heads (section 3.2), not those of the proposals."""
        weight = self.instance_loss_weight
        losses = super()._losses(*args)
        return {k: v if k.startswith("loss_rpn") else v * weight for k, v in losses.items()}

    def inference(  # type: ignore[override]
        self, batched_inputs: list[dict[str, Any]], do_postprocess: bool = True
    ) -> Any:
        """Detect and segment.

        Args:
            batched_inputs: see `forward`.
            do_postprocess: scale the results to `height` and `width`, paste the masks and merge.

        Returns:
            As `forward` at inference; without post-processing the `Instances` of each image and
            the logits (N, K, H, W) of the padded batch.

        Raises:
            ValueError: in training mode.
        """
        if self.training:
            raise ValueError("PanopticFPN.inference needs evaluation mode: call model.eval()")
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        scores, _ = self.sem_seg_head(features)
        detections = self._detect(batched_inputs, images, features)
        if not do_postprocess:
            return detections, scores
        results = self._to_input_size(detections, batched_inputs, images.image_sizes)
        for result, score, size in zip(results, scores, images.image_sizes, strict=True):
            instances = result["instances"]
            result["sem_seg"] = sem_seg_postprocess(score, size, *instances.image_size)
            if self.combine:
                result["panoptic_seg"] = combine_semantic_and_instance_outputs(
                    instances,
                    result["sem_seg"].argmax(dim=0),
                    self.combine_overlap_thresh,
                    self.combine_stuff_area_thresh,
                    self.combine_instances_score_thresh,
                )
        return results
