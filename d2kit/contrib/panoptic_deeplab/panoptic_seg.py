"""Panoptic-DeepLab: classes of pixels, and instances by centres and offsets.

Source: Cheng et al., Panoptic-DeepLab: A Simple, Strong, and Fast Baseline for Bottom-Up Panoptic
Segmentation (2020).
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2kit.config import CfgNode, configurable
from d2kit.contrib.panoptic_deeplab.heads import (
    INS_EMBED_BRANCHES_REGISTRY,
    PanopticDeepLabInsEmbedHead,
    PanopticDeepLabSemSegHead,
    build_ins_embed_branch,
)
from d2kit.contrib.panoptic_deeplab.post_processing import get_panoptic_segmentation
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
    "build_ins_embed_branch",
]

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
