"""Turns nested inputs and outputs of models into tuples of tensors and back, for tracing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2kit.structures import (
    BitMasks,
    Boxes,
    ImageList,
    Instances,
    Keypoints,
    ROIMasks,
    RotatedBoxes,
)
from d2kit.utils.devices import is_symbolic, stacked_sizes
from d2kit.utils.file_io import atomic_write

__all__ = [
    "Schema",
    "TracingAdapter",
    "dump_torchscript_IR",
    "flatten_to_tuple",
]


WRAPPERS: dict[type, Callable[[Tensor], Any]] = {
    Boxes: Boxes,
    RotatedBoxes: RotatedBoxes,
    BitMasks: BitMasks,
    Keypoints: Keypoints,
}
PLAIN = (str, bytes, int, float, bool, type(None))


@dataclass(frozen=True)
class Schema:
    """How a nested object is made of a flat tuple.

    Attributes:
        kind: type of the object; None for a tensor, which is a leaf.
        children: schemas of its parts, in order.
        names: keys or field names of the parts, where they have some.
        constant: what is not a tensor: the object itself, or how `ROIMasks` are pasted.
    """

    kind: type | None
    children: tuple[Schema, ...] = ()
    names: tuple[Any, ...] = ()
    constant: Any = None

    def __call__(self, values: tuple[Any, ...]) -> Any:
        """Return the object made of the leaves `values`, in the order of `flatten_to_tuple`.

        Raises:
            ValueError: if there are too few or too many.
        """
        left = iter(values)
        try:
            result = self._build(left)
        except StopIteration:
            raise ValueError(f"the schema needs more than {len(values)} values") from None
        if next(left, None) is not None:
            raise ValueError(f"the schema needs fewer than {len(values)} values")
        return result

    def _build(self, left: Iterator[Any]) -> Any:
        if self.kind is None:
            return next(left)
        parts = [child._build(left) for child in self.children]
        if self.kind in (list, tuple):
            return self.kind(parts)
        if self.kind is dict:
            return self._named(parts)
        if self.kind is Instances:
            return Instances(_size_of(parts[-1]), **self._named(parts[:-1]))
        if self.kind is ImageList:
            return ImageList(parts[0], [_size_of(size) for size in parts[1].unbind()])
        if self.kind is ROIMasks:
            return ROIMasks(parts[0], whole_pixels=self.constant)
        if self.kind in WRAPPERS:
            return WRAPPERS[self.kind](parts[0])
        return self.constant

    def _named(self, parts: list[Any]) -> dict[Any, Any]:
        """Return the parts, which come in the order of their names, in the object's own order."""
        found = dict(zip(_ordered(self.names), parts, strict=True))
        return {name: found[name] for name in self.names}


def _ordered(names: Iterable[Any]) -> list[Any]:
    """Return names as Detectron2 puts the parts: sorted, where they are text."""
    names = list(names)
    return sorted(names) if all(isinstance(name, str) for name in names) else names


def _size_of(sizes: Tensor) -> tuple[Any, Any]:
    """Return (height, width) of a tensor (2,): numbers, or what a trace records."""
    height, width = sizes.unbind() if is_symbolic() else sizes.tolist()
    return height, width


def flatten_to_tuple(obj: Any) -> tuple[tuple[Any, ...], Schema]:
    """Take an object apart into tensors.

    Args:
        obj: tensors, lists, tuples, dictionaries, `Instances`, `Boxes` and the other structures of
            d2kit, nested; strings, numbers and None become part of the schema.

    Returns:
        The leaves, and the schema that makes an equal object of them. Dictionaries and `Instances`
        come in the order of their names; the image size of `Instances` follows its fields, those of
        an `ImageList` its pixels: they are leaves, so that they may depend on the input.

    Raises:
        ValueError: for an object of another type.
    """
    if isinstance(obj, Tensor):
        return (obj,), Schema(None)
    if isinstance(obj, PLAIN):
        return (), Schema(type(obj), constant=obj)
    if isinstance(obj, list | tuple):
        return _join(list(obj), list if isinstance(obj, list) else tuple)
    if isinstance(obj, dict):
        return _join([obj[name] for name in _ordered(obj)], dict, names=tuple(obj))
    if isinstance(obj, Instances):
        fields = obj.get_fields()
        parts = [fields[name] for name in _ordered(fields)]
        parts.append(stacked_sizes(obj.image_size))
        return _join(parts, Instances, names=tuple(fields))
    if isinstance(obj, ImageList):
        sizes = torch.stack([stacked_sizes(size) for size in obj.image_sizes])
        return _join([obj.tensor, sizes], ImageList)
    if isinstance(obj, ROIMasks):
        return _join([obj.tensor], ROIMasks, constant=obj.whole_pixels)
    if type(obj) in WRAPPERS:
        return _join([obj.tensor], type(obj))
    raise ValueError(
        f"cannot flatten an object of type {type(obj).__name__}; expected tensors, lists, tuples, "
        "dictionaries and structures of d2kit"
    )


def _join(
    parts: list[Any], kind: type, names: tuple[Any, ...] = (), constant: object = None
) -> tuple[tuple[Any, ...], Schema]:
    flat = [flatten_to_tuple(part) for part in parts]
    leaves = tuple(leaf for values, _ in flat for leaf in values)
    return leaves, Schema(kind, tuple(schema for _, schema in flat), names, constant)


class TracingAdapter(nn.Module):
    """Makes any model callable with tensors and returning tensors, so that it can be traced.

    Args:
        model: a model.
        inputs: its inputs, as one argument or a tuple of several.
        inference_func: called as ``inference_func(model, *inputs)``; by default the model itself,
            in d2kit's detectors without the pasting of masks into full-size images.
        allow_non_tensor: keep strings and numbers in the inputs and outputs, as constants. Without
            it, they are an error.

    Attributes:
        flattened_inputs: tuple of tensors to trace with.
        inputs_schema: makes the model's inputs of such a tuple.
        outputs_schema: makes the model's outputs of what `forward` returned; known after a call.

    Raises:
        ValueError: if the inputs hold no tensor, or something else without `allow_non_tensor`.

    Example:
        >>> adapter = TracingAdapter(model, [{"image": image}])  # doctest: +SKIP
        >>> traced = torch.jit.trace(adapter, adapter.flattened_inputs)  # doctest: +SKIP
        >>> detections = adapter.outputs_schema(traced(image2))  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: object,
        inference_func: Callable[..., Any] | None = None,
        allow_non_tensor: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        self.inference_func = inference_func or _call
        self.non_tensor = allow_non_tensor
        self.flattened_inputs, self.inputs_schema = flatten_to_tuple(self.inputs)
        if not self.flattened_inputs:
            raise ValueError("TracingAdapter: the inputs hold no tensor")
        if not allow_non_tensor:
            self._refuse_constants(self.inputs_schema, "inputs")
        self.outputs_schema: Schema | None = None

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        """Run the model.

        Args:
            *args: tensors in the order of `flattened_inputs`.

        Returns:
            The outputs' tensors; `outputs_schema` makes the outputs of them.
        """
        with torch.no_grad():
            outputs = self.inference_func(self.model, *self.inputs_schema(args))
        flat, schema = flatten_to_tuple(outputs)
        if not self.non_tensor:
            self._refuse_constants(schema, "outputs")
        self.outputs_schema = schema
        return flat

    @staticmethod
    def _refuse_constants(schema: Schema, what: str) -> None:
        waiting = [schema]
        while waiting:
            part = waiting.pop()
            if part.kind in PLAIN:
                raise ValueError(
                    f"TracingAdapter: the {what} hold {part.constant!r}, which a trace would make "
                    "a constant; leave it out, or pass allow_non_tensor=True"
                )
            waiting += part.children


def _call(model: nn.Module, *inputs: object) -> Any:
    inference: Any = getattr(model, "inference", None)
    if hasattr(model, "roi_heads") and inference is not None:
        return inference(*inputs, do_postprocess=False)
    return model(*inputs)


def dump_torchscript_IR(model: torch.nn.Module, dir: str) -> None:  # noqa: N802 - Detectron2's name
    """Write code and graph of a TorchScript model as text.

    Args:
        model: what ``torch.jit.trace`` returned.
        dir: folder for ``model_ts_code.txt``, ``model_ts_IR.txt``, ``model_ts_IR_inlined.txt`` and
            ``model.txt``.
    """
    folder = Path(dir)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "model_ts_code.txt": "\n\n".join(
            f"# {name or type(part).__name__}\n{part.code}"
            for name, part in model.named_modules()
            if hasattr(part, "code")
        ),
        "model_ts_IR.txt": str(model.graph),
        "model_ts_IR_inlined.txt": str(model.inlined_graph),
        "model.txt": str(model),
    }
    for name, text in texts.items():
        with atomic_write(folder / name, "w") as file:
            file.write(text)
