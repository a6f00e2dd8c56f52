"""What whole models share: pixels in, results out, the place in the stream, pictures."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from d2kit.layers import move_device_like
from d2kit.layers.blocks import fold_batch_norm
from d2kit.modeling.box_regression import check_classes, outlines_of
from d2kit.modeling.postprocessing import detector_postprocess
from d2kit.modeling.sampling import per_image_seeds
from d2kit.structures import Boxes, ImageList, Instances
from d2kit.utils.devices import upload
from d2kit.utils.events import put_image

_SHOWN_BOXES = 20


class ImageNormalizer(nn.Module):
    """Base of models that take images in 0..255: mean, deviation, device, batching.

    Args:
        pixel_mean: per channel, in the order of the input.
        pixel_std: per channel.

    Raises:
        ValueError: if the two are not of one length.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, *, pixel_mean: Sequence[float], pixel_std: Sequence[float]) -> None:
        super().__init__()
        mean = torch.tensor(pixel_mean, dtype=torch.float32).view(-1, 1, 1)
        std = torch.tensor(pixel_std, dtype=torch.float32).view(-1, 1, 1)
        if mean.shape != std.shape:
            raise ValueError(
                "MODEL.PIXEL_MEAN and MODEL.PIXEL_STD need one value per channel each, got "
                f"{list(pixel_mean)} and {list(pixel_std)}"
            )
        self.register_buffer("pixel_mean", mean, persistent=False)
        self.register_buffer("pixel_std", std, persistent=False)

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.pixel_mean.device

    def _move_to_current_device(self, x: Tensor) -> Tensor:
        """Return a tensor on the model's device; `preprocess_image` of subclasses asks it too."""
        return move_device_like(x, self.pixel_mean)

    def preprocess_image(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """Move the images to the model's device, normalise them, and pad them to one size.

        Args:
            batched_inputs: each with `image` (C, H, W), values in 0..255.

        Returns:
            The batch (N, C, H, W), zero-padded at the right and at the bottom.

        Raises:
            ValueError: if an image is missing or not of this shape.
        """
        images = []
        for i, item in enumerate(batched_inputs):
            image = item.get("image")
            if not isinstance(image, Tensor) or image.dim() != 3:
                got = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
                raise ValueError(
                    f"input {i} of the batch needs 'image', a tensor (C, H, W), got {got}"
                )
            image = self._move_to_current_device(image)
            images.append((image - self.pixel_mean) / self.pixel_std)
        backbone: Any = self.backbone
        return ImageList.from_tensors(
            images,
            backbone.size_divisibility,
            padding_constraints=backbone.padding_constraints,
        )

    def ground_truth(self, batched_inputs: list[dict[str, Any]]) -> list[Instances]:
        """Return each image's `instances`, on the model's device.

        Classes are checked before the upload: on a device a class that does not exist would train
        silently as background, and a look at it would make the host wait.

        Raises:
            ValueError: if one is missing, or has a class that the model does not have.
        """
        num_classes = getattr(getattr(self, "roi_heads", self), "num_classes", None)
        for i, item in enumerate(batched_inputs):
            if "instances" not in item:
                raise ValueError(
                    f"training needs 'instances' in every input; input {i} of the batch "
                    f"({item.get('file_name', 'no file name')}) has {sorted(item)}"
                )
            if num_classes is not None and item["instances"].has("gt_classes"):
                check_classes(item["instances"].gt_classes, num_classes, f"input {i} of the batch")
        return [item["instances"].to(self.device) for item in batched_inputs]


@contextmanager
def seeded_by_sample(batched_inputs: list[dict[str, Any]]) -> Iterator[None]:
    """Make the random choices inside depend on each image's `sample_seed`, where all have one."""
    all_have_one = all(item.get("sample_seed") is not None for item in batched_inputs)
    with per_image_seeds(
        [item["sample_seed"] for item in batched_inputs] if all_have_one else None
    ):
        yield


def to_input_size(
    results: list[Instances],
    batched_inputs: list[dict[str, Any]],
    image_sizes: Sequence[tuple[int, int]],
    field: str = "instances",
) -> list[dict[str, Instances]]:
    """Scale results to the size each input asks for, and paste their masks.

    Args:
        results: per image, in the size the network saw.
        batched_inputs: each with `height` and `width` of the wanted result, by default the
            network's.
        image_sizes: (height, width) the network saw.
        field: name under which the results are returned.

    Returns:
        Per image ``{field: Instances}``.
    """
    processed = []
    for result, item, (height, width) in zip(results, batched_inputs, image_sizes, strict=True):
        size = item.get("height", height), item.get("width", width)
        processed.append({field: detector_postprocess(result, *size)})
    return processed


def semantic_targets(
    batched_inputs: list[dict[str, Any]], backbone: Any, sem_seg_head: Any
) -> Tensor:
    """Batch each image's `sem_seg` as the images are batched, on the device of the head.

    Args:
        batched_inputs: each with `sem_seg` (H, W), the class of each pixel.
        backbone: states how batches are padded.
        sem_seg_head: its `ignore_value` fills the padding.

    Returns:
        int64 (N, H, W).

    Raises:
        ValueError: if one is missing, or has a label that is no class.
    """
    ignore = sem_seg_head.ignore_value
    num_classes = getattr(sem_seg_head, "num_classes", None)
    device = next(sem_seg_head.parameters()).device
    labels = []
    for i, item in enumerate(batched_inputs):
        name = item.get("file_name", "no file name")
        if "sem_seg" not in item:
            raise ValueError(
                f"training a segmentation head needs 'sem_seg' in every input; input {i} of the "
                f"batch ({name}) has {sorted(item)}: the dataset needs sem_seg_file_name"
            )
        label = item["sem_seg"]
        if num_classes is not None and label.device.type == "cpu":  # elsewhere the loss stops
            wrong = label[((label < 0) | (label >= num_classes)) & (label != ignore)]
            if len(wrong):
                raise ValueError(
                    f"the labels of input {i} of the batch ({name}) hold {int(wrong[0])}; expected "
                    f"0 to {num_classes - 1} (MODEL.SEM_SEG_HEAD.NUM_CLASSES {num_classes}) or "
                    f"{ignore} (IGNORE_VALUE)"
                )
        labels.append(upload(label, device))
    return ImageList.from_tensors(
        labels,
        backbone.size_divisibility,
        float(ignore),
        padding_constraints=backbone.padding_constraints,
    ).tensor


def show_boxes(
    batched_inputs: list[dict[str, Any]], proposals: list[Instances], input_format: str
) -> None:
    """Publish the first image twice: with its ground truths, and with its best proposals.

    Args:
        batched_inputs: with `image` (C, H, W) in 0..255 and `instances`.
        proposals: per image, with `proposal_boxes`, best first.
        input_format: ``BGR`` or ``RGB``, the channel order of the images.
    """
    panes = _panes(batched_inputs[0], proposals[0].proposal_boxes, input_format)
    put_image("Left: GT bounding boxes;  Right: Predicted proposals", torch.cat(panes, dim=2))


def show_detections(
    batched_inputs: list[dict[str, Any]], results: list[Instances], input_format: str
) -> None:
    """Publish the first image twice: with its ground truths, and with its best detections.

    Args:
        batched_inputs: see `show_boxes`.
        results: per image, with `pred_boxes`, best first.
        input_format: ``BGR`` or ``RGB``, the channel order of the images.
    """
    panes = _panes(batched_inputs[0], results[0].pred_boxes, input_format)
    name = f"Top: GT bounding boxes; Bottom: {_SHOWN_BOXES} Highest Scoring Results"
    put_image(name, torch.cat(panes, dim=1))


def _panes(item: dict[str, Any], best: Boxes, input_format: str) -> list[Tensor]:
    """Draw the ground truths and the first of `best` of one image: two uint8 (3, H, W), RGB."""
    from torchvision.utils import draw_bounding_boxes

    picture = item["image"].detach().cpu().clamp(0, 255).to(torch.uint8)
    if input_format == "BGR":
        picture = picture.flip(0)
    panes = []
    for boxes, colour in ((item["instances"].gt_boxes, "lime"), (best[:_SHOWN_BOXES], "orange")):
        usable = outlines_of(boxes[boxes.nonempty()].tensor.detach().cpu())
        panes.append(
            draw_bounding_boxes(picture, usable, colors=colour, width=2) if len(usable) else picture
        )
    return panes


@contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let calls of a model inside compute in `dtype` what bears it, by autocast.

    Scores, boxes and masks are still computed in float32, from the last layers' numbers. What
    surrounds the calls, such as an evaluator, is not touched.

    Args:
        model: any.
        dtype: float32 changes nothing.
    """
    if dtype is torch.float32:
        yield
        return
    kind = next((p.device.type for p in model.parameters()), "cpu")
    entered: list[torch.autocast] = []

    def enter(*_: object) -> None:
        entered.append(torch.autocast(kind, dtype))
        entered[-1].__enter__()

    def leave(*_: object) -> None:
        entered.pop().__exit__(None, None, None)

    handles = [
        model.register_forward_pre_hook(enter),
        model.register_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


_Model = TypeVar("_Model", bound=nn.Module)


def optimize_for_inference(model: _Model) -> _Model:
    """Return a faster copy of `model` for inference, with equal outputs.

    Batch normalisation with fixed statistics is folded into the convolutions before it, and the
    weights take the channels-last layout, which CPU and GPU convolutions like best. Differences
    in the outputs are those of rounding (features within 1e-4 relative).

    Args:
        model: any model; it stays as it is.

    Returns:
        The copy, in evaluation mode, on the same device, without gradients. Its state dict lacks
        what was folded: keep the original to save or to train.
    """
    if any(module.training for module in model.modules()):
        model = copy.deepcopy(model).eval()
    fast = fold_batch_norm(model).requires_grad_(False)
    return fast.to(memory_format=torch.channels_last)  # type: ignore[return-value,call-overload]
