"""One-stage detectors: a class and a box at every place of every level, no proposals."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2kit.modeling._metrics import picture_due
from d2kit.modeling.backbone import Backbone
from d2kit.modeling.meta_arch._common import ImageNormalizer, show_detections, to_input_size
from d2kit.structures import ImageList, Instances

__all__ = ["DenseDetector", "permute_to_N_HWA_K"]


def permute_to_N_HWA_K(tensor: Tensor, K: int) -> Tensor:  # noqa: N802, N803
    """Bring the output of a convolutional head into one row per anchor.

    Args:
        tensor: (N, A * K, H, W), anchor-major.
        K: numbers per anchor.

    Returns:
        (N, H * W * A, K), in the order of the anchor generators.
    """
    if tensor.dim() != 4:
        raise ValueError(f"expected a tensor (N, A * K, H, W), got shape {tuple(tensor.shape)}")
    return tensor.permute(0, 2, 3, 1).reshape(tensor.shape[0], -1, K)


class DenseDetector(ImageNormalizer):
    """Image -> features -> head -> losses or detections; base of `RetinaNet` and `FCOS`.

    Subclasses write `forward_training` and `forward_inference`.

    Args:
        backbone: images (N, C, H, W) -> name -> features.
        head: list of features -> for each kind of prediction a list with one tensor
            (N, A * numbers, Hi, Wi) per level.
        head_in_features: names of the levels, fine to coarse; by default all of the backbone's.
        pixel_mean: per channel, in the order of the input, values in 0..255.
        pixel_std: per channel.
    """

    vis_period = 0
    input_format = "BGR"

    def __init__(
        self,
        backbone: Backbone,
        head: nn.Module,
        head_in_features: list[str] | None = None,
        *,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        super().__init__(pixel_mean=pixel_mean, pixel_std=pixel_std)
        self.backbone = backbone
        self.head = head
        if head_in_features is None:
            shapes = backbone.output_shape()
            head_in_features = sorted(shapes, key=lambda name: shapes[name].stride or 0)
        self.head_in_features = list(head_in_features)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Compute the losses in training mode, or the detections.

        Args:
            batched_inputs: per image a dict with

                * `image`: (C, H, W), values in 0..255.
                * `instances`: ground truth with `gt_boxes`, `gt_classes`; in training.
                * `height`, `width`: size of the wanted result, by default the image's.

        Returns:
            In training, name -> 0-dim loss. Else per image ``{"instances": Instances}`` with
            `pred_boxes`, `scores`, `pred_classes`, best first.
        """
        images = self.preprocess_image(batched_inputs)
        targets = self.ground_truth(batched_inputs) if self.training else None
        features = self.backbone(images.tensor)
        levels = [features[name] for name in self.head_in_features]
        predictions = self.head(levels)
        if targets is None:
            results = self.forward_inference(images, levels, predictions)
            return to_input_size(results, batched_inputs, images.image_sizes)
        if picture_due(self.vis_period):
            with torch.no_grad():
                results = self.forward_inference(images, levels, predictions)
            self.visualize_training(batched_inputs, results)
        return self.forward_training(images, levels, predictions, targets)

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: list[list[Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        """Compute the losses; written by subclasses.

        Args:
            images: the batch.
            features: per level (N, C, Hi, Wi).
            predictions: what the head gave.
            gt_instances: per image, with `gt_boxes` and `gt_classes`.

        Returns:
            Name -> 0-dim loss.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement forward_training")

    def forward_inference(
        self, images: ImageList, features: list[Tensor], predictions: list[list[Tensor]]
    ) -> list[Instances]:
        """Detect; written by subclasses.

        Args:
            images: the batch.
            features: per level (N, C, Hi, Wi).
            predictions: what the head gave.

        Returns:
            Per image `pred_boxes`, `scores`, `pred_classes`, in the size the network saw.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement forward_inference")

    def visualize_training(
        self, batched_inputs: list[dict[str, Any]], results: list[Instances]
    ) -> None:
        """Publish the first image with its ground truths and with its best detections.

        Args:
            batched_inputs: see `forward`.
            results: per image, as `forward_inference` gives them.
        """
        show_detections(batched_inputs, results, self.input_format)
