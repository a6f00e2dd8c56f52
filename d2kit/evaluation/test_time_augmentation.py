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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from d2kit.config import CfgNode, configurable
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
from d2kit.modeling.proposal_generator.proposal_utils import suppress
from d2kit.structures import Boxes, Instances
from d2kit.structures.image_list import image_to_tensor
from d2kit.utils import comm

if TYPE_CHECKING:
    import numpy as np

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
    def _version(item: Mapping[str, Any], image: np.ndarray, steps: list[Transform]) -> Input:
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
        return [self._inference_one_image(self._with_image(item)) for item in batched_inputs]

    def _with_image(self, item: Mapping[str, Any]) -> Input:
        """Return a copy of an input that has the image and the size of the original."""
        found = dict(item)
        if "image" not in found:
            found["image"] = image_to_tensor(read_image(found["file_name"], self.image_format))
        found.setdefault("height", found["image"].shape[1])
        found.setdefault("width", found["image"].shape[2])
        return found

    def _inference_one_image(self, input: Input) -> dict[str, Instances]:  # noqa: A002 its name
        """Detect on one image; the steps below may be replaced one by one by user classes.

        Args:
            input: with `image`, `height` and `width`.

        Returns:
            ``{"instances": Instances}`` in the size of `height` and `width`.
        """
        size = (input["height"], input["width"])
        versions, transforms = self._get_augmented_inputs(input)
        with self._turn_off_roi_heads(["mask_on", "keypoint_on"]):
            boxes, scores, classes = self._get_augmented_boxes(versions, transforms)
        merged = self._merge_detections(boxes, scores, classes, size)
        if getattr(self.model.roi_heads, "mask_on", False):
            merged.pred_masks = self._mean_masks(versions, transforms, merged)
        return {"instances": detector_postprocess(merged, *size)}

    @contextmanager
    def _turn_off_roi_heads(self, attrs: Sequence[str]) -> Iterator[None]:
        """Let the heads work without some of their branches inside the ``with`` block.

        Args:
            attrs: switches of `roi_heads` (``"mask_on"``, ``"keypoint_on"``); those it lacks are
                passed by.
        """
        heads = self.model.roi_heads
        before = {name: getattr(heads, name) for name in attrs if hasattr(heads, name)}
        for name in before:
            setattr(heads, name, False)
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(heads, name, value)

    def _get_augmented_inputs(self, input: Input) -> tuple[list[Input], list[Transform]]:  # noqa: A002
        """Return the versions of an image, and the transform that leads to each."""
        versions = self.tta_mapper(input)
        return versions, [version.pop("transforms") for version in versions]

    def _batch_inference(
        self,
        batched_inputs: Sequence[Input],
        detected_instances: Sequence[Instances | None] | None = None,
    ) -> list[Instances]:
        """Run the model on all versions, a few at a time.

        Args:
            batched_inputs: the versions.
            detected_instances: boxes and classes to refine, per version; None: detect.

        Returns:
            Per version, in its own coordinates.
        """
        results: list[Instances] = []
        for start in range(0, len(batched_inputs), self.batch_size):
            part = slice(start, start + self.batch_size)
            given = None if detected_instances is None else list(detected_instances[part])
            known = given if given and given[0] is not None else None
            results += self.model.inference(list(batched_inputs[part]), known, do_postprocess=False)
        return results

    def _get_augmented_boxes(
        self, augmented_inputs: Sequence[Input], tfms: Sequence[Transform]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes (R, 4), scores, classes (R,) of all versions, in the original's pixels."""
        found = self._batch_inference(augmented_inputs)
        boxes = [
            _moved(one.pred_boxes, transform.inverse()).tensor
            for one, transform in zip(found, tfms, strict=True)
        ]
        scores = torch.cat([one.scores for one in found])
        return torch.cat(boxes), scores, torch.cat([one.pred_classes for one in found])

    def _merge_detections(
        self, all_boxes: object, all_scores: object, all_classes: object, shape_hw: tuple[int, int]
    ) -> Instances:
        """Suppress the detections of all versions once more.

        Args:
            all_boxes: (R, 4) XYXY.
            all_scores: (R,), or a list of numbers.
            all_classes: (R,), or a list of numbers.
            shape_hw: (height, width).
        """
        boxes = torch.as_tensor(all_boxes)
        scores = torch.as_tensor(all_scores, dtype=boxes.dtype, device=boxes.device)
        merged, _ = suppress(
            boxes,
            scores,
            torch.as_tensor(all_classes, dtype=torch.int64, device=boxes.device),
            torch.arange(len(scores), device=scores.device),
            shape_hw,
            nms_thresh=self.nms_thresh,
            topk=self.topk,
        )
        return merged

    def _rescale_detected_boxes(
        self,
        augmented_inputs: Sequence[Input],
        merged_instances: Instances,
        tfms: Sequence[Transform],
    ) -> list[Instances]:
        """Return the merged boxes in the coordinates of each version."""
        return [
            Instances(
                (version["image"].shape[1], version["image"].shape[2]),
                pred_boxes=_moved(merged_instances.pred_boxes, transform),
                pred_classes=merged_instances.pred_classes,
                scores=merged_instances.scores,
            )
            for version, transform in zip(augmented_inputs, tfms, strict=True)
        ]

    def _reduce_pred_masks(self, outputs: Sequence[Instances], tfms: Sequence[Transform]) -> Tensor:
        """Return the mean of the versions' masks (R, 1, M, M), mirrored back."""
        masks = [
            one.pred_masks.flip(3) if _is_mirrored(transform) else one.pred_masks
            for one, transform in zip(outputs, tfms, strict=True)
        ]
        return torch.stack(masks).mean(dim=0)

    def _mean_masks(
        self, versions: Sequence[Input], transforms: Sequence[Transform], merged: Instances
    ) -> Tensor:
        """Return the mean over all versions of the masks of given boxes (R, 1, M, M)."""
        if len(merged) == 0:
            found: Tensor = merged.scores.new_zeros(0, 1, 1, 1)
            return found
        given = self._rescale_detected_boxes(versions, merged, transforms)
        return self._reduce_pred_masks(self._batch_inference(versions, given), transforms)


def _moved(boxes: Boxes, transform: Transform) -> Boxes:
    """Apply a transform to boxes."""
    tensor = boxes.tensor
    moved = torch.from_numpy(transform.apply_box(tensor.cpu().double().numpy()))
    return Boxes(moved.to(dtype=tensor.dtype, device=tensor.device))


def _is_mirrored(transform: Any) -> bool:
    flips = sum(isinstance(step, HFlipTransform) for step in transform.transforms)
    return flips % 2 == 1
