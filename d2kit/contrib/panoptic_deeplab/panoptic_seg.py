"""Panoptic-DeepLab: its config keys, its network, and the way from its outputs to segments.

Source: Cheng et al., Panoptic-DeepLab (2020); the segments: section 3.3.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2kit.config import CfgNode, configurable
from d2kit.config.cfg_node import add_keys
from d2kit.contrib.deeplab.config import add_deeplab_config
from d2kit.contrib.panoptic_deeplab.heads import (
    INS_EMBED_BRANCHES_REGISTRY,
    PanopticDeepLabInsEmbedHead,
    PanopticDeepLabSemSegHead,
    build_ins_embed_branch,
)
from d2kit.data import MetadataCatalog
from d2kit.modeling import META_ARCH_REGISTRY, build_backbone, build_sem_seg_head
from d2kit.modeling.backbone import Backbone
from d2kit.modeling.meta_arch.common import ImageNormalizer
from d2kit.modeling.postprocessing import sem_seg_postprocess
from d2kit.structures import BitMasks, ImageList, Instances

__all__ = [
    "INS_EMBED_BRANCHES_REGISTRY",
    "PanopticDeepLab",
    "PanopticDeepLabInsEmbedHead",
    "PanopticDeepLabSemSegHead",
    "add_panoptic_deeplab_config",
    "build_ins_embed_branch",
    "find_instance_center",
    "get_instance_segmentation",
    "get_panoptic_segmentation",
    "group_pixels",
    "merge_semantic_and_instance",
]


_INSTANCES = "MODEL.INS_EMBED_HEAD"
_MERGE = "MODEL.PANOPTIC_DEEPLAB"

PANOPTIC_DEEPLAB_KEYS: dict[str, tuple[Any, str]] = {
    "INPUT.GAUSSIAN_SIGMA": (10, "Deviation of the Gaussian of a centre, in pixels."),
    "INPUT.IGNORE_STUFF_IN_OFFSET": (True, "Offsets have no loss in stuff."),
    "INPUT.SMALL_INSTANCE_AREA": (4096, "Instances below this area are small, in pixels."),
    "INPUT.SMALL_INSTANCE_WEIGHT": (3, "Weight of their pixels in the semantic loss."),
    "INPUT.IGNORE_CROWD_IN_SEMANTIC": (False, "Crowds have no semantic label."),
    "SOLVER.OPTIMIZER": ("ADAM", "SGD, Adam or AdamW."),
    "MODEL.SEM_SEG_HEAD.HEAD_CHANNELS": (256, "Channels before the classifier."),
    "MODEL.SEM_SEG_HEAD.LOSS_TOP_K": (0.2, "Share of the pixels in hard pixel mining, in (0, 1]."),
    f"{_INSTANCES}.NAME": ("PanopticDeepLabInsEmbedHead", "Head of centres and offsets."),
    f"{_INSTANCES}.IN_FEATURES": (["res2", "res3", "res5"], "Features that it uses."),
    f"{_INSTANCES}.PROJECT_FEATURES": (["res2", "res3"], "The finer ones of them."),
    f"{_INSTANCES}.PROJECT_CHANNELS": ([32, 64], "Channels that each of these is reduced to."),
    f"{_INSTANCES}.ASPP_CHANNELS": (256, "Channels of the pyramid pooling."),
    f"{_INSTANCES}.ASPP_DILATIONS": ([6, 12, 18], "Its dilations, in pixels of the feature."),
    f"{_INSTANCES}.ASPP_DROPOUT": (0.1, "Probability of zeroing one of its outputs."),
    f"{_INSTANCES}.HEAD_CHANNELS": (32, "Channels before the predictors."),
    f"{_INSTANCES}.CONVS_DIM": (128, "Channels of the decoder."),
    f"{_INSTANCES}.COMMON_STRIDE": (4, "Stride of the finest feature, in pixels."),
    f"{_INSTANCES}.NORM": ("SyncBN", "Normalisation."),
    f"{_INSTANCES}.CENTER_LOSS_WEIGHT": (200.0, "Factor of the squared error of the heat map."),
    f"{_INSTANCES}.OFFSET_LOSS_WEIGHT": (0.01, "Factor of the absolute error of the offsets."),
    f"{_MERGE}.STUFF_AREA": (2048, "Least area of stuff in results, in pixels."),
    f"{_MERGE}.CENTER_THRESHOLD": (0.1, "Least value of a centre in the heat map, 0..1."),
    f"{_MERGE}.NMS_KERNEL": (7, "Side of the window in which one centre is kept, in pixels."),
    f"{_MERGE}.TOP_K_INSTANCE": (200, "Most centres of an image."),
    f"{_MERGE}.PREDICT_INSTANCES": (True, "Also return instances."),
    f"{_MERGE}.USE_DEPTHWISE_SEPARABLE_CONV": (False, "Depthwise separable convolutions."),
    f"{_MERGE}.SIZE_DIVISIBILITY": (-1, "Images are padded to multiples of it; -1: not."),
    f"{_MERGE}.BENCHMARK_NETWORK_SPEED": (False, "Leave the merging out."),
}
"""Full name -> (default, meaning)."""


def add_panoptic_deeplab_config(cfg: CfgNode) -> None:
    """Add the keys of Panoptic-DeepLab and DeepLab to a config, in place, before files are merged.

    Args:
        cfg: not frozen. Its ``SOLVER.OPTIMIZER`` becomes ADAM.
    """
    add_deeplab_config(cfg)
    add_keys(cfg, PANOPTIC_DEEPLAB_KEYS)


_PIXELS_AT_ONCE = 2**16  # distances to 200 centres in 52 MB


def find_instance_center(
    center_heatmap: Tensor, threshold: float = 0.1, nms_kernel: int = 3, top_k: int | None = None
) -> Tensor:
    """Return the peaks of the heat map of one image.

    Args:
        center_heatmap: (1, H, W) in 0..1.
        threshold: least value of a peak.
        nms_kernel: side of the window in which one peak is kept, odd, in pixels.
        top_k: at most so many of the highest; None: all.

    Returns:
        (K, 2) int64 (y, x), row by row of the image; with `top_k`, the highest.
    """
    heat = center_heatmap.reshape(1, 1, *center_heatmap.shape[-2:])
    highest = F.max_pool2d(heat, nms_kernel, stride=1, padding=(nms_kernel - 1) // 2)
    peak = (heat == highest) & (heat > threshold)
    values = heat[peak]
    places = peak[0, 0].nonzero()
    if top_k is not None and len(places) > top_k:
        places = places[values >= values.topk(top_k).values[-1]][:top_k]
    return places


def group_pixels(center_points: Tensor, offsets: Tensor) -> Tensor:
    """Give every pixel the centre nearest to where its offset leads.

    Args:
        center_points: (K, 2) (y, x), K >= 1.
        offsets: (2, H, W) (y, x) in pixels.

    Returns:
        (1, H, W) int64, from 1.
    """
    height, width = offsets.shape[1:]
    ys = torch.arange(height, device=offsets.device).view(-1, 1)
    xs = torch.arange(width, device=offsets.device).view(1, -1)
    aims = torch.stack([offsets[0] + ys, offsets[1] + xs], dim=-1).flatten(0, 1)
    centers = center_points.to(aims.dtype)
    nearest = [torch.cdist(p, centers).argmin(dim=1) for p in aims.split(_PIXELS_AT_ONCE)]
    return torch.cat(nearest).view(1, height, width) + 1


def get_instance_segmentation(
    sem_seg: Tensor,
    center_heatmap: Tensor,
    offsets: Tensor,
    thing_seg: Tensor,
    thing_ids: Collection[int],
    threshold: float = 0.1,
    nms_kernel: int = 3,
    top_k: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the instance of each pixel of a thing, and the centres.

    Args:
        sem_seg: (1, H, W) classes; not used where `thing_seg` says which pixels are things.
        center_heatmap: (1, H, W).
        offsets: (2, H, W).
        thing_seg: bool (1, H, W).
        thing_ids: classes of things; not used.
        threshold: see `find_instance_center`, as the next two.
        nms_kernel: pixels.
        top_k: count.

    Returns:
        (1, H, W) int64, 0 outside of things; centres (1, K, 2).
    """
    del thing_ids
    centers = find_instance_center(center_heatmap, threshold, nms_kernel, top_k)
    if len(centers) == 0:
        return torch.zeros_like(sem_seg), centers.unsqueeze(0)
    return thing_seg * group_pixels(centers, offsets), centers.unsqueeze(0)


def merge_semantic_and_instance(
    sem_seg: Tensor,
    ins_seg: Tensor,
    semantic_thing_seg: Tensor,
    label_divisor: int,
    thing_ids: Collection[int],
    stuff_area: int,
    void_label: int,
) -> Tensor:
    """Join classes and instances: an instance is of the class that most of its pixels have.

    Args:
        sem_seg: (1, H, W) int64 classes.
        ins_seg: (1, H, W) int64 instances, 0: none.
        semantic_thing_seg: bool (1, H, W), pixels of things.
        label_divisor: a segment's label is its class times this plus the number among its class.
        thing_ids: classes of things.
        stuff_area: stuff of fewer pixels is void.
        void_label: label of pixels without a segment.

    Returns:
        (1, H, W) int64.
    """
    merged = torch.full_like(sem_seg, void_label)
    things = (ins_seg > 0) & semantic_thing_seg
    numbers: dict[int, int] = {}
    for instance in ins_seg[things].unique().tolist():
        mask = things & (ins_seg == instance)
        label = int(sem_seg[mask].mode().values)
        numbers[label] = numbers.get(label, 0) + 1
        merged[mask] = label * label_divisor + numbers[label]
    for label in sem_seg.unique().tolist():
        mask = (sem_seg == label) & ~things
        if label not in thing_ids and int(mask.sum()) >= stuff_area:
            merged[mask] = label * label_divisor
    return merged


def get_panoptic_segmentation(
    sem_seg: Tensor,
    center_heatmap: Tensor,
    offsets: Tensor,
    thing_ids: Collection[int],
    label_divisor: int,
    stuff_area: int,
    void_label: int,
    threshold: float = 0.1,
    nms_kernel: int = 7,
    top_k: int = 200,
    foreground_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the segments of one image.

    Args:
        sem_seg: (1, H, W) int64 classes.
        center_heatmap: (1, H, W) in 0..1.
        offsets: (2, H, W) (y, x) in pixels.
        thing_ids: classes of things.
        label_divisor: see `merge_semantic_and_instance`, as the next two.
        stuff_area: pixels.
        void_label: for example -1.
        threshold: see `find_instance_center`, as the next two.
        nms_kernel: pixels.
        top_k: count.
        foreground_mask: bool (1, H, W), which pixels are things; None: those whose class is one.

    Returns:
        (1, H, W) int64 labels, and the centres (1, K, 2).

    Raises:
        ValueError: an input of another shape.
    """
    for name, tensor, channels in (
        ("sem_seg", sem_seg, 1),
        ("center_heatmap", center_heatmap, 1),
        ("offsets", offsets, 2),
    ):
        if tensor.dim() != 3 or tensor.shape[0] != channels:
            raise ValueError(f"{name}: expected ({channels}, H, W), got {tuple(tensor.shape)}")
    things = foreground_mask
    if things is None:
        things = torch.isin(sem_seg, torch.tensor(sorted(thing_ids), device=sem_seg.device))
    instances, centers = get_instance_segmentation(
        sem_seg, center_heatmap, offsets, things, thing_ids, threshold, nms_kernel, top_k
    )
    merged = merge_semantic_and_instance(
        sem_seg, instances, things.bool(), label_divisor, thing_ids, stuff_area, void_label
    )
    return merged, centers


_VOID = -1  # label of pixels without a segment


@META_ARCH_REGISTRY.register()
class PanopticDeepLab(ImageNormalizer):
    """A backbone, a head of classes, a head of centres and offsets, and their merging.

    Args:
        backbone: images (N, C, H, W) -> name -> features.
        sem_seg_head: see `PanopticDeepLabSemSegHead`.
        ins_embed_head: see `PanopticDeepLabInsEmbedHead`.
        thing_ids: classes of things.
        label_divisor: a segment's label is its class times this plus the number among its class.
        stuff_area: stuff of fewer pixels is void.
        threshold: least value of a centre, in 0..1.
        nms_kernel: side of the window in which one centre is kept, in pixels.
        top_k: most centres of an image.
        predict_instances: also return instances.
        use_depthwise_separable_conv: whether the heads are separable; for information.
        size_divisibility: images are padded to multiples of it; below 1: the backbone's.
        benchmark_network_speed: leave the merging out.
        pixel_mean: per channel, in the order of the input, values in 0..255.
        pixel_std: per channel.

    Source: Cheng et al. (2020), section 3.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        sem_seg_head: nn.Module,
        ins_embed_head: nn.Module,
        thing_ids: Collection[int],
        label_divisor: int,
        stuff_area: int = 2048,
        threshold: float = 0.1,
        nms_kernel: int = 7,
        top_k: int = 200,
        predict_instances: bool = True,
        use_depthwise_separable_conv: bool = False,
        size_divisibility: int = -1,
        benchmark_network_speed: bool = False,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        super().__init__(pixel_mean=pixel_mean, pixel_std=pixel_std)
        self.backbone = backbone
        self.sem_seg_head = sem_seg_head
        self.ins_embed_head = ins_embed_head
        self.thing_ids = sorted(thing_ids)
        self.label_divisor = label_divisor
        self.stuff_area = stuff_area
        self.threshold = threshold
        self.nms_kernel = nms_kernel
        self.top_k = top_k
        self.predict_instances = predict_instances
        self.use_depthwise_separable_conv = use_depthwise_separable_conv
        self.size_divisibility = size_divisibility
        self.benchmark_network_speed = benchmark_network_speed

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg`, for its first training set.

        Raises:
            ValueError: keys are missing, or there is no training set.
        """
        if "PANOPTIC_DEEPLAB" not in cfg.MODEL or not cfg.DATASETS.TRAIN:
            raise ValueError(
                "PanopticDeepLab needs the keys of add_panoptic_deeplab_config(cfg), and a dataset "
                "in DATASETS.TRAIN, whose metadata say which classes are things"
            )
        node = cfg.MODEL.PANOPTIC_DEEPLAB
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
        return {
            "backbone": backbone,
            "sem_seg_head": build_sem_seg_head(cfg, shapes),
            "ins_embed_head": build_ins_embed_branch(cfg, shapes),
            "thing_ids": list(metadata.thing_dataset_id_to_contiguous_id.values()),
            "label_divisor": metadata.label_divisor,
            "stuff_area": node.STUFF_AREA,
            "threshold": node.CENTER_THRESHOLD,
            "nms_kernel": node.NMS_KERNEL,
            "top_k": node.TOP_K_INSTANCE,
            "predict_instances": node.PREDICT_INSTANCES,
            "use_depthwise_separable_conv": node.USE_DEPTHWISE_SEPARABLE_CONV,
            "size_divisibility": node.SIZE_DIVISIBILITY,
            "benchmark_network_speed": node.BENCHMARK_NETWORK_SPEED,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Compute the losses in training mode, or the results.

        Args:
            batched_inputs: per image a dict with `image` (C, H, W) in 0..255; in training the
                targets of `PanopticDeepLabTargetGenerator`; `height` and `width` of the wanted
                result, by default the image's.

        Returns:
            In training, name -> 0-dim loss. Else per image a dict with

            * `sem_seg`: logits (K, H, W).
            * `panoptic_seg`: int (H, W), class * label_divisor + number, -1 void; and None.
            * `instances`: `Instances` with `pred_masks`, `pred_boxes`, `scores`, `pred_classes`.
        """
        images = self._batch(batched_inputs)
        features = self.backbone(images.tensor)
        if self.training:
            return self._losses(features, batched_inputs, images)
        scores, _ = self.sem_seg_head(features)
        centers, offsets, _, _ = self.ins_embed_head(features)
        if self.benchmark_network_speed:
            return []
        parts = zip(scores, centers, offsets, batched_inputs, images.image_sizes, strict=True)
        return [self._result(*part) for part in parts]

    def _batch(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        if self.size_divisibility < 1:
            return self.preprocess_image(batched_inputs)
        images = [
            (item["image"].to(self.device) - self.pixel_mean) / self.pixel_std
            for item in batched_inputs
        ]
        return ImageList.from_tensors(images, self.size_divisibility)

    def _losses(
        self,
        features: dict[str, Tensor],
        batched_inputs: list[dict[str, Any]],
        images: ImageList,
    ) -> dict[str, Tensor]:
        if "sem_seg" not in batched_inputs[0]:
            raise ValueError(
                "training of PanopticDeepLab needs the targets of PanopticDeeplabDatasetMapper in "
                f"every input; the first has {sorted(batched_inputs[0])}"
            )
        head: Any = self.sem_seg_head
        height, width = images.tensor.shape[-2:]

        def padded(name: str, value: float = 0.0) -> Tensor | None:
            if any(name not in item for item in batched_inputs):
                return None
            rows = [item[name].to(self.device) for item in batched_inputs]
            return torch.stack(
                [
                    nn.functional.pad(
                        x, (0, width - x.shape[-1], 0, height - x.shape[-2]), value=value
                    )
                    for x in rows
                ]
            )

        center = padded("center")
        _, losses = head(features, padded("sem_seg", head.ignore_value), padded("sem_seg_weights"))
        _, _, of_centers, of_offsets = self.ins_embed_head(
            features,
            None if center is None else center.unsqueeze(1),
            padded("center_weights"),
            padded("offset"),
            padded("offset_weights"),
        )
        return {**losses, **of_centers, **of_offsets}

    def _result(
        self,
        scores: Tensor,
        center: Tensor,
        offset: Tensor,
        item: dict[str, Any],
        image_size: tuple[int, int],
    ) -> dict[str, Any]:
        height, width = item.get("height", image_size[0]), item.get("width", image_size[1])
        scores, center, offset = (
            sem_seg_postprocess(x, image_size, height, width) for x in (scores, center, offset)
        )
        # offsets are lengths: they grow with the image
        offset = offset * offset.new_tensor([height / image_size[0], width / image_size[1]]).view(
            2, 1, 1
        )
        segments, _ = get_panoptic_segmentation(
            scores.argmax(dim=0, keepdim=True),
            center,
            offset,
            thing_ids=self.thing_ids,
            label_divisor=self.label_divisor,
            stuff_area=self.stuff_area,
            void_label=_VOID,
            threshold=self.threshold,
            nms_kernel=self.nms_kernel,
            top_k=self.top_k,
        )
        result: dict[str, Any] = {"sem_seg": scores, "panoptic_seg": (segments[0], None)}
        if self.predict_instances:
            result["instances"] = self._instances(segments[0], scores, center[0])
        return result

    def _instances(self, segments: Tensor, scores: Tensor, center: Tensor) -> Instances:
        """Return the segments of things, with class score times value of the heat map (R,)."""
        labels = [
            label
            for label in segments.unique().tolist()
            if label != _VOID and label // self.label_divisor in self.thing_ids
        ]
        masks = [segments == label for label in labels]
        classes = [label // self.label_divisor for label in labels]
        probabilities = scores.softmax(dim=0)
        values = []
        for mask, category in zip(masks, classes, strict=True):
            ys, xs = mask.nonzero(as_tuple=True)
            peak = center[int(ys.float().mean()), int(xs.float().mean())]
            values.append(probabilities[category][mask].mean() * peak)
        bits = torch.stack(masks) if masks else segments.new_zeros(0, *segments.shape).bool()
        return Instances(
            (segments.shape[0], segments.shape[1]),
            pred_masks=bits,
            pred_boxes=BitMasks(bits).get_bounding_boxes(),
            scores=torch.stack(values) if values else scores.new_zeros(0),
            pred_classes=torch.tensor(classes, dtype=torch.int64, device=segments.device),
        )
