"""A detector as a function from a picture to tensors, and writing it in each format."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = [
    "ONNX_OPSET",
    "WRITERS",
    "DetectorGraph",
    "detector_graph",
]


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

    def _kind(self) -> Callable[[Tensor], dict[str, Tensor]]:
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
        found = _fields(model.proposal_generator(images, features)[0][0])
        # torch.export takes no stretch without gradients that ends in no tensor of its own
        return {name: value.clone() for name, value in found.items()}

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

    def forward(self, x: object, instances: list[Instances]) -> list[Instances]:
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


ONNX_OPSET = 20
"""Opset of the ONNX files: the newest that the trace-based exporter writes."""

_HALF_FROM = 1024  # weights with fewer numbers stay in 32 bits


def write_torchscript(
    graph: DetectorGraph, image: Tensor, file: Path, half: bool, seen: Sequence[Tensor]
) -> None:
    """Trace the graph on `image` (C, H, W) and save it."""
    _only_whole(half, seen, "torchscript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes in checks, which decide nothing
        torch.jit.trace(graph, (image,), check_trace=False).save(str(file))


def write_torch_export(
    graph: DetectorGraph, image: Tensor, file: Path, half: bool, seen: Sequence[Tensor]
) -> None:
    """Export the graph as an ExportedProgram and save it."""
    import torchvision  # noqa: F401 - registers the shapes of its operators

    _only_whole(half, seen, "torch_export")
    size = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        graph, (image,), dynamic_shapes={"image": {1: size, 2: size}}, strict=False
    )
    torch.export.save(program, str(file))


class _GroupNormOfRows(nn.Module):
    """A group norm that also takes no rows at all.

    torch writes it for ONNX as a reshape to (N, groups, -1), which has no answer for N = 0.

    Args:
        norm: whose numbers it gives.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (N, C, H, W)."""
        norm, shape = self.norm, x.shape
        groups = (norm.num_groups, norm.num_channels // norm.num_groups)
        x = x.reshape(shape[0], *groups, shape[2], shape[3])
        x = x - x.mean((2, 3, 4), keepdim=True)
        x = x * (x.square().mean((2, 3, 4), keepdim=True) + norm.eps).rsqrt()
        x = x.reshape(shape)
        return (
            x if norm.weight is None else x * norm.weight[:, None, None] + norm.bias[:, None, None]
        )


@contextlib.contextmanager
def _norms_of_rows(graph: DetectorGraph) -> Iterator[None]:
    """Have group norms behind the pooling take no rows meanwhile: a picture without objects."""
    heads: Any = getattr(graph.model, "roi_heads", None)
    parts = list(heads.modules()) if heads is not None else []
    norms = [(m, k, c) for m in parts for k, c in m.named_children() if type(c) is nn.GroupNorm]
    for parent, name, norm in norms:
        setattr(parent, name, _GroupNormOfRows(norm))
    try:
        yield
    finally:
        for parent, name, norm in norms:
            setattr(parent, name, norm)


def write_onnx(
    graph: DetectorGraph, image: Tensor, file: Path, half: bool, seen: Sequence[Tensor]
) -> None:
    """Export the graph in ONNX's own operators; in 8 bits where pictures to measure are given."""
    try:
        import onnx
    except ImportError as error:
        raise ImportError(f"ONNX needs its package: pip install 'd2kit[onnx]' ({error})") from error
    graph(image)
    names = list(graph.output_names)
    axes = {name: {0: "detections"} for name in names if name != "sem_seg"}
    if "sem_seg" in names:
        axes["sem_seg"] = {1: "height", 2: "width"}
    axes["image"] = {1: "height", 2: "width"}
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), _norms_of_rows(graph):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                graph,
                (image,),
                str(file),
                dynamo=False,
                opset_version=ONNX_OPSET,
                input_names=["image"],
                output_names=names,
                dynamic_axes=axes,
            )
    finally:
        logger.setLevel(level)
    if seen:
        _store_int8(file, seen)
    model = onnx.load(str(file))
    onnx.checker.check_model(model)
    if half:
        _store_half(model)
        onnx.save(model, str(file))
    foreign = {node.op_type for node in model.graph.node if node.domain not in ("", "ai.onnx")}
    if foreign:
        raise ValueError(f"the graph needs operators that ONNX does not have: {sorted(foreign)}")


def write_openvino(
    graph: DetectorGraph, image: Tensor, file: Path, half: bool, seen: Sequence[Tensor]
) -> None:
    """Export the graph as OpenVINO's model.xml and model.bin, through ONNX."""
    try:
        import openvino
    except ImportError as error:
        raise ImportError(
            f"OpenVINO needs its package: pip install 'd2kit[openvino]' ({error})"
        ) from error
    between = file.with_suffix(".onnx")
    try:
        write_onnx(graph, image, between, False, seen)
        model = openvino.convert_model(str(between))
        openvino.save_model(model, str(file), compress_to_fp16=half)
    finally:
        between.unlink(missing_ok=True)


def _only_whole(half: bool, seen: Sequence[Tensor], kind: str) -> None:
    if half or seen:
        raise ValueError(
            "--half and --int8 store weights in 16 and 8 bits, which onnx and openvino can; "
            f"{kind} cannot"
        )


def _store_int8(file: Path, seen: Sequence[Tensor]) -> None:
    """Quantise convolutions and matrices of an ONNX file after training, by onnxruntime.

    Weights per channel with sign, activations per tensor by the range that they have on `seen`.
    """
    try:
        from onnxruntime import quantization
    except ImportError as error:
        raise ImportError(
            f"8 bits need onnxruntime: pip install 'd2kit[onnx]' ({error})"
        ) from error

    class Pictures(quantization.CalibrationDataReader):  # type: ignore[misc]
        left = iter(seen)

        def get_next(self) -> dict[str, Any] | None:
            image = next(self.left, None)
            return None if image is None else {"image": image.numpy()}

    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)  # it advises a step that is not needed here
    try:
        quantization.quantize_static(
            str(file),
            str(file),
            Pictures(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "ConvTranspose", "Gemm", "MatMul"],
            per_channel=True,
            reduce_range=True,  # 7 bits: without VNNI a sum of two products overflows 16 bits
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
    finally:
        logging.getLogger().setLevel(level)


def _store_half(model: ModelProto) -> None:
    """Store the large weights of an ONNX model in 16 bits; the arithmetic stays in 32."""
    import numpy as np
    import onnx
    from onnx import numpy_helper

    casts = []
    for weight in list(model.graph.initializer):
        values = numpy_helper.to_array(weight)
        if values.dtype != np.float32 or values.size < _HALF_FROM:
            continue
        name = weight.name
        limit = np.finfo(np.float16).max
        small = values.clip(-limit, limit).astype(np.float16)
        weight.CopyFrom(numpy_helper.from_array(small, f"{name}_half"))
        casts.append(
            onnx.helper.make_node("Cast", [f"{name}_half"], [name], to=onnx.TensorProto.FLOAT)
        )
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


WRITERS: dict[str, Callable[[DetectorGraph, Tensor, Path, bool, Sequence[Tensor]], None]] = {
    "torchscript": write_torchscript,
    "onnx": write_onnx,
    "torch_export": write_torch_export,
    "openvino": write_openvino,
}
