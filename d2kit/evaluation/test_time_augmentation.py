"""Detection on several versions of an image, joined: test-time augmentation.

It needs both the transforms of the data and a model, so that it lies above them; user code
imports it from `d2kit.modeling`, as in Detectron2.

Source: Faster R-CNN on ResNet (He et al. 2016), appendix B, "Box refinement" and "Multi-scale
testing"; for masks: Mask R-CNN (He et al. 2017), appendix A, "Test-time augmentation".
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from d2kit.config import CfgNode, configurable
from d2kit.data.dataset_mapper import image_to_tensor
from d2kit.data.detection_utils import read_image
from d2kit.data.transforms import (
    HFlipTransform,
    NoOpTransform,
    ResizeShortestEdge,
    ResizeTransform,
    Transform,
    TransformList,
)
from d2kit.modeling.facts import build_facts
from d2kit.modeling.meta_arch import GeneralizedRCNN
from d2kit.modeling.postprocessing import detector_postprocess
from d2kit.modeling.roi_heads.detections import suppress
from d2kit.structures import Boxes, Instances
from d2kit.utils import comm

__all__ = ["DatasetMapperTTA", "GeneralizedRCNNWithTTA"]

Input = dict[str, Any]


class DatasetMapperTTA:
    """Makes the versions of an image: each size, plain and mirrored.

    Args:
        min_sizes: lengths of the short side, pixels.
        max_size: largest long side, pixels.
        flip: also mirror each of them.
    """

    @configurable
    def __init__(self, min_sizes: Sequence[int], max_size: int, flip: bool) -> None:
        self.min_sizes = list(min_sizes)
        self.max_size = max_size
        self.flip = flip

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg`."""
        node = cfg.TEST.AUG
        return {"min_sizes": node.MIN_SIZES, "max_size": node.MAX_SIZE, "flip": node.FLIP}

    def __call__(self, dataset_dict: Mapping[str, Any]) -> list[Input]:
        """Return the versions of one image.

        Args:
            dataset_dict: with `image` (C, H, W), values in 0..255, and where the image was resized
                already, `height` and `width` of the original.

        Returns:
            Copies with another `image`, and with `transforms`: the `TransformList` that leads from
            the original's coordinates to those of this version.
        """
        image = dataset_dict["image"].permute(1, 2, 0).numpy()
        size = image.shape[:2]
        original = (dataset_dict.get("height", size[0]), dataset_dict.get("width", size[1]))
        before = NoOpTransform() if size == original else ResizeTransform(*original, *size)
        versions = []
        for min_size in self.min_sizes:
            resize = ResizeShortestEdge(min_size, self.max_size).get_transform(image)
            resized = resize.apply_image(image.copy())
            versions.append(self._version(dataset_dict, resized, [before, resize]))
            if self.flip:
                mirror = HFlipTransform(resized.shape[1])
                mirrored = mirror.apply_image(resized)
                versions.append(self._version(dataset_dict, mirrored, [before, resize, mirror]))
        return versions

    @staticmethod
    def _version(item: Mapping[str, Any], image: Any, steps: list[Transform]) -> Input:
        made = {key: copy.copy(value) for key, value in item.items() if key != "image"}
        return {**made, "image": image_to_tensor(image), "transforms": TransformList(steps)}


def build_tta_settings(cfg: CfgNode) -> dict[str, Any]:
    """Return what `GeneralizedRCNNWithTTA` takes from a config.

    Raises:
        ValueError: if the model predicts keypoints or is given proposals.
    """
    for key in ("KEYPOINT_ON", "LOAD_PROPOSALS"):
        if cfg.MODEL[key]:
            raise ValueError(
                f"MODEL.{key} True: test-time augmentation is for boxes and masks that the model "
                "finds by itself; set TEST.AUG.ENABLED False"
            )
    return {
        "image_format": cfg.INPUT.FORMAT,
        "nms_thresh": build_facts(cfg).nms_threshold,
        "topk": cfg.TEST.DETECTIONS_PER_IMAGE,
    }


class GeneralizedRCNNWithTTA(nn.Module):
    """A `GeneralizedRCNN` that looks at several versions of each image.

    The boxes of all versions are joined and suppressed once more; the masks of the boxes that are
    left are predicted in every version and averaged. Called like the model itself, at inference.

    Args:
        cfg: the config; what suppression, image format and `DatasetMapperTTA` need.
        model: the model, or a `DistributedDataParallel` of it.
        tta_mapper: makes the versions of an image; default: ``DatasetMapperTTA(cfg)``.
        batch_size: versions that go through the model at once.

    Raises:
        TypeError: for another kind of model.
        ValueError: if the model predicts keypoints or is given proposals.
    """

    model: Any

    def __init__(
        self,
        cfg: CfgNode,
        model: nn.Module,
        tta_mapper: Callable[[Mapping[str, Any]], list[Input]] | None = None,
        batch_size: int = 3,
    ) -> None:
        super().__init__()
        model = comm.unwrap_model(model)
        if not isinstance(model, GeneralizedRCNN):
            raise TypeError(
                "GeneralizedRCNNWithTTA needs a GeneralizedRCNN (MODEL.META_ARCHITECTURE), got "
                f"{type(model).__name__}"
            )
        settings = build_tta_settings(cfg)
        self.cfg = cfg.clone()
        self.model = model
        self.tta_mapper = DatasetMapperTTA(cfg) if tta_mapper is None else tta_mapper
        self.batch_size = batch_size
        self.image_format: str = settings["image_format"]
        self.nms_thresh: float = settings["nms_thresh"]
        self.topk: int = settings["topk"]
        self.train(model.training)

    @torch.no_grad()
    def forward(self, batched_inputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Instances]]:
        """Detect.

        Args:
            batched_inputs: as `GeneralizedRCNN.forward`; an input without `image` is read from its
                `file_name`.

        Returns:
            Per image ``{"instances": Instances}`` in the size of `height` and `width`.
        """
        return [self._detect(self._with_image(item)) for item in batched_inputs]

    def _with_image(self, item: Mapping[str, Any]) -> Input:
        """Return a copy of an input that has the image and the size of the original."""
        found = dict(item)
        if "image" not in found:
            found["image"] = image_to_tensor(read_image(found["file_name"], self.image_format))
        found.setdefault("height", found["image"].shape[1])
        found.setdefault("width", found["image"].shape[2])
        return found

    def _detect(self, item: Input) -> dict[str, Instances]:
        versions = self.tta_mapper(item)
        transforms = [version.pop("transforms") for version in versions]
        size = (item["height"], item["width"])
        merged = self._merged_boxes(versions, transforms, size)
        if getattr(self.model.roi_heads, "mask_on", False):
            merged.pred_masks = self._mean_masks(versions, transforms, merged)
        return {"instances": detector_postprocess(merged, *size)}

    def _run(self, versions: Sequence[Input], given: list[Instances] | None) -> list[Instances]:
        """Run the model on all versions, a few at a time."""
        results: list[Instances] = []
        for start in range(0, len(versions), self.batch_size):
            part = slice(start, start + self.batch_size)
            results += self.model.inference(
                list(versions[part]), None if given is None else given[part], do_postprocess=False
            )
        return results

    def _merged_boxes(
        self, versions: Sequence[Input], transforms: Sequence[Transform], size: tuple[int, int]
    ) -> Instances:
        """Return the boxes, scores and classes of all versions, in the original's coordinates."""
        with _boxes_only(self.model.roi_heads):
            found = self._run(versions, None)
        boxes = torch.cat(
            [
                _moved(one.pred_boxes, transform.inverse()).tensor
                for one, transform in zip(found, transforms, strict=True)
            ]
        )
        scores = torch.cat([one.scores for one in found])
        merged, _ = suppress(
            boxes,
            scores,
            torch.cat([one.pred_classes for one in found]),
            torch.arange(len(scores), device=scores.device),
            size,
            nms_thresh=self.nms_thresh,
            topk=self.topk,
        )
        return merged

    def _mean_masks(
        self, versions: Sequence[Input], transforms: Sequence[Transform], merged: Instances
    ) -> Tensor:
        """Return the mean over all versions of the masks of given boxes (R, 1, M, M)."""
        if len(merged) == 0:
            return merged.scores.new_zeros(0, 1, 1, 1)
        given = [
            Instances(
                (version["image"].shape[1], version["image"].shape[2]),
                pred_boxes=_moved(merged.pred_boxes, transform),
                pred_classes=merged.pred_classes,
                scores=merged.scores,
            )
            for version, transform in zip(versions, transforms, strict=True)
        ]
        masks = [
            one.pred_masks.flip(3) if _is_mirrored(transform) else one.pred_masks
            for one, transform in zip(self._run(versions, given), transforms, strict=True)
        ]
        return torch.stack(masks).mean(dim=0)


@contextmanager
def _boxes_only(roi_heads: Any) -> Iterator[None]:
    """Let the heads predict no masks inside the ``with`` block."""
    had_masks = getattr(roi_heads, "mask_on", False)
    roi_heads.mask_on = False
    try:
        yield
    finally:
        roi_heads.mask_on = had_masks


def _moved(boxes: Boxes, transform: Transform) -> Boxes:
    """Apply a transform to boxes."""
    tensor = boxes.tensor
    moved = torch.from_numpy(transform.apply_box(tensor.cpu().double().numpy()))
    return Boxes(moved.to(dtype=tensor.dtype, device=tensor.device))


def _is_mirrored(transform: TransformList) -> bool:
    flips = sum(isinstance(step, HFlipTransform) for step in transform.transforms)
    return flips % 2 == 1
