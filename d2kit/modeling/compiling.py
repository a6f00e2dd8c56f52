"""Models under torch.compile, or replayed as CUDA graphs: `MODEL.COMPILE`.

Taken are the parts whose work depends on nothing but the sizes of their inputs: backbone with its
pyramid, RPN head, head of a one-stage detector. What follows chooses boxes, whose number changes
from image to image; Faster and Mask R-CNN can do that with padded tensors (`fixed_shapes` of
`utils.devices`), and are then one graph from the images to their detections.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
import shlex
import shutil
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from d2kit.utils.devices import is_symbolic

__all__ = [
    "MODES",
    "choose_compile_mode",
    "compile_trunk",
]


logger = logging.getLogger(__name__)

MODES = ("none", "trunk", "graph")

_PARTS = ("backbone", "proposal_generator.rpn_head", "head")
_MOST_GRAPHS = 16
_WORDS = 30  # of an error in a log line
_WARM_UPS = 3  # torch's notes on CUDA graphs: libraries choose their algorithms meanwhile

_INSIDE: ContextVar[bool] = ContextVar("inside", default=False)


def choose_compile_mode(
    name: str | None, device: torch.device, *, deterministic: bool = False
) -> tuple[str, str]:
    """Return the mode that a machine can do, and in words why it is not the one asked for.

    Args:
        name: ``none``, ``trunk`` or ``graph`` (MODEL.COMPILE); None is ``none``.
        device: of the model.
        deterministic: whether only kernels may run that give the same digits in every run.

    Returns:
        The mode; why it is ``none`` although another was asked for, else empty.

    Raises:
        ValueError: for another name.
    """
    mode = "none" if name is None else str(name).lower()
    if mode not in MODES:
        raise ValueError(f"MODEL.COMPILE: expected none, trunk or graph, got {name!r}")
    why = ""
    if mode == "trunk":
        why = _why_no_compiler(device)
        if not why and deterministic and device.type == "cuda":
            why = "DETERMINISTIC takes no generated kernels on CUDA"
    elif mode == "graph" and device.type != "cuda":
        why = f"graphs are CUDA's, and the model is on {device.type}"
    return ("none", why) if why else (mode, "")


def _why_no_compiler(device: torch.device) -> str:
    """Say what torch.compile lacks for a device; empty: nothing."""
    if device.type == "cuda":
        found = importlib.util.find_spec("triton") is not None
        return "" if found else "torch.compile needs the package triton for CUDA"
    if device.type != "cpu":
        return f"torch.compile is tried for cpu and cuda only, and the model is on {device.type}"
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    command = shlex.split(os.environ.get("CXX") or usual)
    if shutil.which(command[0]):
        return ""
    return f"torch.compile needs a C++ compiler, and there is no {command[0]} (see CXX)"


def compile_trunk(model: nn.Module, mode: str | None, *, deterministic: bool = False) -> list[str]:
    """Let the dense parts of a model run compiled, or as CUDA graphs, in place.

    Nothing else changes: modules, names of weights, hooks, copies (they compile anew), checkpoints.
    A part runs as it is written while something records it (export), while a module inside it has
    hooks, and from then on where it cannot be compiled, with a line in the log.

    * ``trunk``: torch.compile. At inference sizes are variables: one program for all. In training
      each size of the padded batch has its own, the first 8 (torch's limit); batches of other sizes
      run as written. The first step of each kind takes minutes.
    * ``graph``: at inference on CUDA one graph for each size of the padded batch from its second
      time on, the last 16 of them; training runs as it is written. The results are copied out. A
      model that has `detect_padded` is one graph as a whole, for each size of image and batch.

    Args:
        model: of any kind; user classes name their parts in `dense_parts`, a tuple of dotted names.
        mode: see `choose_compile_mode`; what the machine cannot do is one line in the log.
        deterministic: see there.

    Returns:
        Names of the parts that are taken.

    Raises:
        ValueError: for another mode.
    """
    device = next((x.device for x in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    usable, why = choose_compile_mode(mode, device, deterministic=deterministic)
    if why:
        logger.warning("MODEL.COMPILE %s: %s. The model runs as it is written.", mode, why)
    if usable == "none":
        return []
    kind = _Compiled if usable == "trunk" else _Graphed
    taken = []
    for name in getattr(model, "dense_parts", _PARTS):
        try:
            part = attrgetter(name)(model)
        except AttributeError:
            continue
        if isinstance(part, nn.Module) and "forward" not in vars(part):
            part.forward = kind(part, name)  # type: ignore[method-assign]
            taken.append(name)
    if usable == "graph" and getattr(model, "can_detect_padded", False):
        model.replayed = Replayed(model)  # type: ignore[assignment]
        taken.append("the whole inference")
    logger.info("MODEL.COMPILE %s: %s", usable, ", ".join(taken) or "no part of this model")
    return taken


class _Replaced:
    """Takes the place of a module's `forward`; a copy of the module gets its own, fresh one.

    Args:
        module: whose `forward` it is.
        name: of the module, for messages.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self._start()

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "name": self.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def __call__(self, *args: object) -> Any:
        if is_symbolic() or _INSIDE.get() or _watched(self.module):
            return type(self.module).forward(self.module, *args)
        return self._fast(*args)

    def _start(self) -> None:
        raise NotImplementedError

    def _fast(self, *args: object) -> Any:
        raise NotImplementedError


def _watched(module: nn.Module) -> bool:
    """Tell whether a module inside has hooks: compiled code would pass by those that come later."""
    return any(
        part._forward_hooks
        or part._forward_pre_hooks
        or part._backward_hooks
        or part._backward_pre_hooks
        for part in module.modules()
        if part is not module
    )


class _Compiled(_Replaced):
    """Runs a module under torch.compile, with one program for gradients and one without."""

    def _start(self) -> None:
        self._runs: dict[bool, Callable[..., Any]] = {}

    def _fast(self, *args: object) -> Any:
        written, gradients = type(self.module).forward, torch.is_grad_enabled()
        if gradients not in self._runs:
            logger.info("Compiling %s: the first step of each kind takes long", self.name)
            known = inspect.signature(torch.compile).parameters
            # else all models of a process share the number of programs that a method may have
            more: Any = {"isolate_recompiles": True} if "isolate_recompiles" in known else {}
            # torch fixes most sizes in the gradients of convolutions all the same (2.14)
            self._runs[gradients] = torch.compile(written, dynamic=not gradients, **more)
        try:
            return self._runs[gradients](self.module, *args)
        except RuntimeError as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            words = " ".join(str(error).split()[:_WORDS]) or type(error).__name__
            logger.warning(
                "MODEL.COMPILE trunk: %s cannot be compiled (%s). It runs as it is written.",
                self.name,
                words,
            )
            self._runs = dict.fromkeys((False, True), written)
            return written(self.module, *args)


@contextmanager
def _inside() -> Iterator[None]:
    """Let the parts of what is captured run as they are written."""
    token = _INSIDE.set(True)
    try:
        yield
    finally:
        _INSIDE.reset(token)


class _Graph:
    """One captured run: fixed inputs, the graph, its outputs, and what it reads besides.

    Args:
        run: inputs -> outputs, and tensors that must live as long as the graph.
        args: tensors, or lists of them.
        pool: memory of the graph, shared with others that never run at the same time.
    """

    def __init__(self, run: Callable[..., tuple[Any, Any]], args: object, pool: Any) -> None:
        with torch.inference_mode(mode=False), torch.no_grad(), _inside():
            self.inputs = _each(args, torch.clone)
            # the casts of weights stand in the graph: a cache of them ends with its context
            cast = torch.autocast(
                "cuda",
                dtype=torch.get_autocast_dtype("cuda"),
                enabled=torch.is_autocast_enabled("cuda"),
                cache_enabled=False,
            )
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside), cast:
                for _ in range(_WARM_UPS):
                    run(*self.inputs)
            torch.cuda.current_stream().wait_stream(beside)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=pool), cast:
                self.outputs, self.read = run(*self.inputs)

    def __call__(self, args: object) -> Any:
        with torch.no_grad():
            for mine, given in zip(_leaves(self.inputs), _leaves(args), strict=True):
                mine.copy_(given)
            self.graph.replay()
            return _each(self.outputs, torch.clone)


class _Graphs:
    """The graphs of one module, the least recently used of them thrown away."""

    def __init__(self) -> None:
        self._graphs: OrderedDict[Any, _Graph | None] = OrderedDict()
        self._weights: list[tuple[int, int, int]] = []
        self._pools: dict[int, Any] = {}
        self._lock = threading.Lock()

    def replay(
        self, module: nn.Module, run: Callable[..., tuple[Any, Any]], args: object, *also: object
    ) -> Any:
        """Return the outputs of `run`; None where the module is to run as it is written.

        Args:
            module: its mode and weights count.
            run: see `_Graph`.
            args: inputs of `run`, tensors or lists of them.
            *also: what else the run depends on.
        """
        inputs = _leaves(args)
        if module.training or torch.is_grad_enabled() or not all(x.is_cuda for x in inputs):
            if module.training:
                self._graphs.clear()  # their weights are about to change
            return None
        stream = int(torch.cuda.current_stream().cuda_stream)
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        facts = ((x.shape, x.stride(), x.dtype, x.device) for x in inputs)
        key = (stream, autocast, also, *facts)
        with self._lock:
            weights = _identity(module)
            if weights != self._weights:
                self._graphs.clear()
                self._weights = weights
            if key not in self._graphs:  # a size that never comes again is not worth a graph
                self._graphs[key] = None
                while len(self._graphs) > _MOST_GRAPHS:
                    self._graphs.popitem(last=False)
                return None
            self._graphs.move_to_end(key)
            graph = self._graphs[key]
            if graph is None:
                if stream not in self._pools:
                    self._pools[stream] = torch.cuda.graph_pool_handle()
                graph = self._graphs[key] = _Graph(run, args, self._pools[stream])
            return graph(args)


class _Graphed(_Replaced):
    """Replays a module at inference on CUDA."""

    def _start(self) -> None:
        self._graphs = _Graphs()

    def _fast(self, *args: object) -> Any:
        written = type(self.module).forward
        outputs = self._graphs.replay(
            self.module, lambda *inputs: (written(self.module, *inputs), None), args
        )
        return written(self.module, *args) if outputs is None else outputs


class Replayed:
    """The whole inference of a model as one graph; copies of the model get a fresh one.

    Args:
        model: with `detect_padded`: (images (N, C, H, W), (height, width) per image) -> padded
            tensors, and the tensors that are read on the way.
    """

    def __init__(self, model: nn.Module) -> None:
        # in a tuple, or the model would be a part of itself
        self._model, self._graphs = (model,), _Graphs()

    def __getstate__(self) -> tuple[nn.Module]:
        return self._model

    def __setstate__(self, state: tuple[nn.Module]) -> None:
        self._model, self._graphs = state, _Graphs()

    def __call__(self, images: Tensor, image_sizes: list[tuple[int, int]]) -> Any:
        """Return what `detect_padded` gives; None where the model is to run as it is written."""
        (model,) = self._model
        if is_symbolic() or _watched(model):
            return None
        detect: Any = model.detect_padded
        sizes = tuple(image_sizes)
        return self._graphs.replay(model, lambda x: detect(x, list(sizes)), (images,), sizes)


def _identity(module: nn.Module) -> list[tuple[int, int, int]]:
    """Return what changes when a weight is replaced, moved or written: a graph has read them."""
    return [
        (id(x), x.data_ptr(), -1 if x.is_inference() else x._version)
        for x in (*module.parameters(), *module.buffers())
    ]


def _leaves(value: Any) -> list[Tensor]:
    """Return the tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value
    return [x for part in parts for x in _leaves(part)]


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return nested lists, tuples and dicts with each tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _each(part, change) for name, part in value.items()}
    return type(value)(_each(part, change) for part in value)
