"""A detector as a function from one picture to named tensors, for exporters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from d2kit.export.flatten import flatten_to_tuple
from d2kit.modeling import (
    DenseDetector,
    GeneralizedRCNN,
    PanopticFPN,
    ProposalNetwork,
    SemanticSegmentor,
    optimize_for_inference,
)
from d2kit.structures import Instances

__all__ = ["DetectorGraph", "detector_graph"]


class DetectorGraph(nn.Module):
    """One picture in, tensors out: normalisation, padding and suppression are inside.

    Resizing before it, and scaling to the size of the picture after it, are not: see
    `d2kit.export.ExportedModel`.

    Args:
        model: a detector in evaluation mode; used, not copied.

    Attributes:
        output_names: of what `forward` returns, in order; known after a call.

    Raises:
        ValueError: if `model` is of no kind that can be exported.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.output_names: tuple[str, ...] = ()
        self._kind()

    def _kind(self) -> Any:
        for kind, method in (
            (PanopticFPN, self._panoptic),
            (GeneralizedRCNN, self._two_stage),
            (DenseDetector, self._dense),
            (ProposalNetwork, self._proposals),
            (SemanticSegmentor, self._semantic),
        ):
            if isinstance(self.model, kind):
                return method
        raise ValueError(
            f"cannot export a {type(self.model).__name__} (MODEL.META_ARCHITECTURE): expected "
            "GeneralizedRCNN, PanopticFPN, ProposalNetwork, RetinaNet, FCOS or SemanticSegmentor"
        )

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Detect in one picture.

        Args:
            image: float32 (C, H, W), values in 0..255, channels in the order of INPUT.FORMAT.

        Returns:
            Tensors as `output_names` says, R detections, in pixels of `image`: `pred_boxes` (R, 4)
            XYXY, `scores` (R,), `pred_classes` (R,) int64, `pred_masks` (R, M, M) probabilities
            inside the box, `pred_keypoint_heatmaps` (R, K, S, S) logits inside the box;
            `proposal_boxes` and `objectness_logits`; `sem_seg` (K, H, W) logits.
        """
        with torch.no_grad():
            found = self._kind()(image)
        self.output_names = tuple(found)
        return tuple(found.values())

    def _two_stage(self, image: Tensor) -> dict[str, Tensor]:
        model: Any = self.model
        return _fields(model.inference([{"image": image}], do_postprocess=False)[0])

    def _panoptic(self, image: Tensor) -> dict[str, Tensor]:
        model: Any = self.model
        found, scores = model.inference([{"image": image}], do_postprocess=False)
        return {**_fields(found[0]), "sem_seg": _cropped(scores, image)}

    def _dense(self, image: Tensor) -> dict[str, Tensor]:
        model: Any = self.model
        images = model.preprocess_image([{"image": image}])
        features = model.backbone(images.tensor)
        levels = [features[name] for name in model.head_in_features]
        return _fields(model.forward_inference(images, levels, model.head(levels))[0])

    def _proposals(self, image: Tensor) -> dict[str, Tensor]:
        model: Any = self.model
        images = model.preprocess_image([{"image": image}])
        features = model.backbone(images.tensor)
        return _fields(model.proposal_generator(images, features)[0][0])

    def _semantic(self, image: Tensor) -> dict[str, Tensor]:
        model: Any = self.model
        images = model.preprocess_image([{"image": image}])
        scores, _ = model.sem_seg_head(model.backbone(images.tensor))
        return {"sem_seg": _cropped(scores, image)}


def _cropped(scores: Tensor, image: Tensor) -> Tensor:
    """Cut the padding off the scores (1, K, H', W') of an image (C, H, W)."""
    return scores[0, :, : image.shape[1], : image.shape[2]]


def _fields(found: Instances) -> dict[str, Tensor]:
    """Return the tensors of instances, masks as (R, M, M)."""
    tensors = {name: flatten_to_tuple(value)[0][0] for name, value in found.get_fields().items()}
    if "pred_masks" in tensors:
        tensors["pred_masks"] = tensors["pred_masks"].squeeze(1)
    return tensors


class _HeatMaps(nn.Module):
    """A keypoint head that stops at its heat maps: the best positions need a loop over boxes."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Any, instances: list[Instances]) -> list[Instances]:
        """Set `pred_keypoint_heatmaps` of the one image's instances."""
        head: Any = self.head
        [of_image] = instances
        of_image.pred_keypoint_heatmaps = head.layers(x)
        return instances


def detector_graph(model: nn.Module) -> DetectorGraph:
    """Return the graph of a model, which stays as it is.

    Args:
        model: what `d2kit.modeling.build_model` builds, with weights loaded.

    Returns:
        The graph of a copy on the CPU, with normalisation folded into convolutions.

    Raises:
        ValueError: if `model` is of no kind that can be exported.
    """
    graph = DetectorGraph(optimize_for_inference(model).cpu())
    heads: Any = getattr(graph.model, "roi_heads", None)
    if getattr(heads, "keypoint_on", False):
        heads.keypoint_head = _HeatMaps(heads.keypoint_head)
    return graph.eval()
