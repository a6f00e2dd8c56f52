"""Networks of MMDetection 3 as backbones and detectors.

MMDetection is not a dependency: install ``mmdet`` and ``mmcv`` as its own pages say.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2kit.layers import ShapeSpec
from d2kit.modeling.backbone.backbone import Backbone
from d2kit.modeling.meta_arch.common import ImageNormalizer
from d2kit.modeling.metrics import put_scalars
from d2kit.structures import BitMasks, Boxes, ImageList, Instances, PolygonMasks

__all__ = ["MMDetBackbone", "MMDetDetector"]


def _built(network: nn.Module | Mapping[str, Any]) -> Any:
    """Return a network, built by MMDetection where it is given as its config."""
    if isinstance(network, nn.Module):
        return network
    try:
        from mmdet.registry import MODELS
    except ImportError as error:
        raise ImportError(
            f"a network given as a config ({dict(network).get('type')!r}) is built by MMDetection "
            "3, which is not installed: install mmdet and mmcv, or give the module itself"
        ) from error
    return MODELS.build(dict(network))


class MMDetBackbone(Backbone):
    """A backbone of MMDetection, with a neck if wanted.

    Args:
        backbone: module, or its config, from images (N, 3, H, W) to a tuple of maps.
        neck: module, or its config, from that tuple to another one; None for none.
        output_shapes: channels and stride of each map.
        output_names: their names; by default `out0`, `out1`, ...

    Raises:
        ImportError: a config is given and MMDetection is not installed.
        ValueError: other numbers of names than of shapes.
    """

    def __init__(
        self,
        backbone: nn.Module | Mapping[str, Any],
        neck: nn.Module | Mapping[str, Any] | None = None,
        *,
        output_shapes: list[ShapeSpec],
        output_names: list[str] | None = None,
    ) -> None:
        super().__init__()
        names = output_names or [f"out{i}" for i in range(len(output_shapes))]
        if len(names) != len(output_shapes):
            raise ValueError(
                f"MMDetBackbone: {len(names)} output_names {names} for {len(output_shapes)} "
                "output_shapes; give one each"
            )
        self.backbone = _built(backbone)
        self.neck = None if neck is None else _built(neck)
        for part in (self.backbone, self.neck):
            initialise = getattr(part, "init_weights", None)
            if initialise is not None:
                initialise()
        self._shapes = dict(zip(names, output_shapes, strict=True))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the maps of an image batch.

        Args:
            x: float (N, 3, H, W).

        Returns:
            Name to (N, C_f, H / stride, W / stride).

        Raises:
            ValueError: the network gives another number of maps than stated.
        """
        maps = self.backbone(x)
        if self.neck is not None:
            maps = self.neck(maps)
        if not isinstance(maps, (list, tuple)) or len(maps) != len(self._shapes):
            got = len(maps) if isinstance(maps, (list, tuple)) else type(maps).__name__
            raise ValueError(
                f"MMDetBackbone: the network gives {got}, output_shapes state "
                f"{len(self._shapes)} maps {list(self._shapes)}"
            )
        return dict(zip(self._shapes, maps, strict=True))

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return channels and stride of every map, by name."""
        return dict(self._shapes)


class MMDetDetector(ImageNormalizer):
    """A detector of MMDetection 3 that takes and gives what the models here do.

    Args:
        detector: module, or its config; its `loss` and `predict` are called.
        size_divisibility: images are padded to multiples of it, in pixels.
        pixel_mean: per channel, in the order of the images.
        pixel_std: per channel.

    Raises:
        ImportError: a config is given and MMDetection is not installed.
    """

    def __init__(
        self,
        detector: nn.Module | Mapping[str, Any],
        *,
        size_divisibility: int = 32,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        super().__init__(pixel_mean=pixel_mean, pixel_std=pixel_std)
        self.detector = _built(detector)
        self.size_divisibility = size_divisibility

    def preprocess_image(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """Move the images to the model's device, normalise them, and pad them to one size.

        Args:
            batched_inputs: each with `image` (C, H, W), values in 0..255.
        """
        images = [
            (item["image"].to(self.device) - self.pixel_mean) / self.pixel_std
            for item in batched_inputs
        ]
        return ImageList.from_tensors(images, self.size_divisibility)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Compute losses in training, detections otherwise.

        Args:
            batched_inputs: each with `image` (C, H, W), values in 0..255; `instances` in training;
                `height` and `width` of the wanted result, by default the image's.

        Returns:
            In training a dict of losses; otherwise per image ``{"instances": Instances}`` with
            `pred_boxes`, `scores`, `pred_classes` and, where predicted, `pred_masks`.

        Raises:
            ImportError: MMDetection is not installed.
        """
        images = self.preprocess_image(batched_inputs)
        targets = self.ground_truth(batched_inputs) if self.training else [None] * len(images)
        samples = [
            _data_sample(item, size, images.tensor.shape[-2:], target)
            for item, size, target in zip(batched_inputs, images.image_sizes, targets, strict=True)
        ]
        if self.training:
            return _split_losses(self.detector.loss(images.tensor, samples))
        found = self.detector.predict(images.tensor, samples, rescale=True)
        return [{"instances": _to_instances(sample)} for sample in found]


def _data_sample(
    item: dict[str, Any],
    size: tuple[int, int],
    padded: torch.Size,
    target: Instances | None,
) -> Any:
    """Describe one image as MMDetection does."""
    try:
        from mmdet.structures import DetDataSample
        from mmengine.structures import InstanceData
    except ImportError as error:
        raise ImportError(
            "MMDetDetector talks to MMDetection 3, which is not installed: install mmdet and mmcv"
        ) from error
    height, width = int(item.get("height", size[0])), int(item.get("width", size[1]))
    sample = DetDataSample(
        metainfo={
            "img_shape": size,
            "ori_shape": (height, width),
            "pad_shape": tuple(padded),
            "batch_input_shape": tuple(padded),
            "scale_factor": (size[1] / width, size[0] / height),
        }
    )
    if target is not None:
        truth = {"bboxes": target.gt_boxes.tensor, "labels": target.gt_classes}
        if target.has("gt_masks"):
            truth["masks"] = _bitmaps(target.gt_masks, size)
        sample.gt_instances = InstanceData(**truth)
    return sample


def _bitmaps(masks: BitMasks | PolygonMasks, size: tuple[int, int]) -> Any:
    """Turn masks into MMDetection's."""
    from mmdet.structures.mask import BitmapMasks

    if isinstance(masks, PolygonMasks):
        masks = BitMasks.from_polygon_masks(masks, *size)
    return BitmapMasks(masks.tensor.cpu().numpy().astype("uint8"), *size)


def _split_losses(result: Mapping[str, Any]) -> dict[str, Tensor]:
    """Sum each loss over its parts; what is no loss (accuracies) goes to the log."""
    losses = {}
    for name, value in result.items():
        total = value if isinstance(value, Tensor) else torch.stack([v.mean() for v in value]).sum()
        if "loss" in name:
            losses[name] = total.mean()
        else:
            put_scalars("mmdet", **{name: total.detach().mean()})
    return losses


def _to_instances(sample: Any) -> Instances:
    """Turn one image's detections into `Instances` of the size that was asked for."""
    found = sample.pred_instances
    height, width = sample.ori_shape
    result = Instances((int(height), int(width)))
    result.pred_boxes = Boxes(found.bboxes)
    result.scores = found.scores
    result.pred_classes = found.labels
    if getattr(found, "masks", None) is not None:
        result.pred_masks = torch.as_tensor(found.masks).bool()
    return result
