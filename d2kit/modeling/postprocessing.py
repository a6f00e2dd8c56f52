"""From the size of the network's input to the size of the image that the user gave."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from d2kit.structures import Instances, ROIMasks
from d2kit.utils.devices import is_symbolic

__all__ = ["detector_postprocess", "roi_masks_kept", "sem_seg_postprocess"]

_PASTE = ContextVar("paste_masks", default=True)


@contextmanager
def roi_masks_kept() -> Iterator[None]:
    """Let models return `ROIMasks` inside the ``with`` block, in place of full-size masks.

    For callers that encode masks anyway, such as an evaluator: no (R, H, W) tensor is made.
    """
    token = _PASTE.set(False)
    try:
        yield
    finally:
        _PASTE.reset(token)


def detector_postprocess(
    results: Instances,
    output_height: int,
    output_width: int,
    mask_threshold: float = 0.5,
    *,
    paste_masks: bool | None = None,
) -> Instances:
    """Scale detections to another image size, clip them, drop empty boxes and paste the masks.

    Args:
        results: detections on an image of `results.image_size` (height, width). `pred_boxes` or
            `proposal_boxes` are boxes in pixels; `pred_masks`, where present, are probabilities
            (R, 1, M, M) inside the boxes, or `ROIMasks`; `pred_keypoints`, where present, are
            (R, keypoints, 3): x, y, score. Not changed.
        output_height: height to scale to, in pixels.
        output_width: width to scale to, in pixels.
        mask_threshold: pixels with at least this probability belong to the mask.
        paste_masks: whether `pred_masks` become bool (R, output_height, output_width); otherwise
            they become `ROIMasks`, which take 1/1000 of the memory and can be pasted later.
            None: pasted, unless inside `roi_masks_kept`.

    Returns:
        New instances of image size (output_height, output_width), without empty boxes.

    Raises:
        ValueError: `results` has no boxes.
    """
    fields = results.get_fields()
    name = next((n for n in ("pred_boxes", "proposal_boxes") if n in fields), None)
    if name is None:
        raise ValueError(
            "detector_postprocess needs the field pred_boxes or proposal_boxes, got "
            f"{list(fields)}."
        )
    size = (output_height, output_width)
    if not is_symbolic():
        size = (int(output_height), int(output_width))
    height, width = results.image_size
    factors = output_width / width, output_height / height
    boxes = fields[name].clone()
    boxes.scale(*factors)
    boxes.clip(size)
    moved: dict[str, Any] = {name: boxes}
    if "pred_keypoints" in fields:
        points = fields["pred_keypoints"]
        if is_symbolic():
            scaled = [points[..., axis] * factors[axis] for axis in (0, 1)]
            moved["pred_keypoints"] = torch.stack([*scaled, *points.unbind(2)[2:]], dim=2)
        else:
            moved["pred_keypoints"] = points * points.new_tensor([*factors, 1.0])
    if "pred_masks" in fields:
        masks = fields["pred_masks"]
        moved["pred_masks"] = masks if isinstance(masks, ROIMasks) else ROIMasks(masks[:, 0])
    output = Instances(size, **{**fields, **moved})[boxes.nonempty()]
    paste = _PASTE.get() if paste_masks is None else paste_masks
    if paste and output.has("pred_masks"):
        pasted = output.pred_masks.to_bitmasks(output.get(name), *size, mask_threshold)
        output.pred_masks = pasted.tensor
    return output


def sem_seg_postprocess(
    result: Tensor, img_size: tuple[int, int], output_height: int, output_width: int
) -> Tensor:
    """Cut the padding off per-pixel scores and resize them.

    Args:
        result: float (C, H, W), scores of a padded image.
        img_size: height and width of the image without padding, in pixels of `result`.
        output_height: height to resize to, in pixels.
        output_width: width to resize to, in pixels.

    Returns:
        Float (C, output_height, output_width), bilinear.
    """
    cropped = result[None, :, : img_size[0], : img_size[1]]
    size = (output_height, output_width)
    return F.interpolate(cropped, size=size, mode="bilinear", align_corners=False)[0]
