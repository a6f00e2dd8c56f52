"""A CUDA device that is not there: what CUDA refuses and what it waits for, seen on the CPU.

    with pretend_cuda() as gpu:
        model.to("cuda")
        with gpu.counted() as step:
            model(batch)
    print(step.waits, step.launches, step.places)

A `Fake` is a tensor that says "cuda:0" and holds its numbers as a CPU tensor; a dispatch mode does
every operation on those numbers. Refused: tensors of both devices in one operation (a CPU scalar is
let through), `.numpy()`. Counted: waits of the host, and operations that would launch a kernel, at
one each. A captured graph refuses waits, and counts as one launch when it is replayed. Nothing is
said about time, memory, streams or digits. Torch's autograd engine asks the
CUDA driver for streams, so `_Engine` calls the nodes of the graph in its place.
"""

import contextlib
import heapq
import importlib
import itertools
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA = torch.device("cuda", 0)
ROOT = str(Path(__file__).parents[2] / "d2kit")
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive"}
WAITS |= {"unique_dim", "equal", "bincount", "nms"}
NO_KERNEL = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach"}
NO_KERNEL |= {"lift_fresh", "alias", "_local_scalar_dense", "_unsafe_view", "_assert_async"}
BY_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


class Fake(Tensor):
    """A tensor "on cuda:0"; `held` has its numbers."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, real, requires_grad=False):
        made = Tensor._make_wrapper_subclass(
            cls,
            real.size(),
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device=CUDA,
            requires_grad=requires_grad,
        )
        made.held = real
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _ACTIVE[-1].do(func, args, kwargs or {})

    def __tensor_flatten__(self):  # `Module.to` then makes new parameters
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner, *_):
        return Fake(inner["held"])

    def tolist(self):
        _ACTIVE[-1].wait("tolist")
        return self.held.tolist()

    def numpy(self, *, force=False):
        if force:
            return self.cpu().numpy()
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __array__(self, *_):
        return self.numpy()

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            memo[id(self)] = copy = Fake(self.held.detach().clone(), self.requires_grad)
            copy._is_param = getattr(self, "_is_param", False)
        return memo[id(self)]


class Counts:
    """Waits and launches of a part of a program, and the places of the waits."""

    def __init__(self):
        self.waits, self.launches, self.places = 0, 0, Counter()

    def __repr__(self):
        lines = [f"{self.waits} waits, {self.launches} launches"]
        return "\n".join(lines + [f"{n:5d} {place}" for place, n in self.places.most_common()])


class Gpu(TorchDispatchMode):
    """Does the operations on fakes, and counts."""

    def __init__(self):
        super().__init__()
        self.open = []
        self.graph = None  # that is being captured

    @contextlib.contextmanager
    def counted(self) -> Iterator[Counts]:
        counts = Counts()
        self.open.append(counts)
        try:
            yield counts
        finally:
            self.open.remove(counts)

    def wait(self, what):
        if self.graph is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {what}")
        frame = sys._getframe(1)
        while frame is not None and not frame.f_code.co_filename.startswith(ROOT):
            frame = frame.f_back
        place = "elsewhere"
        if frame is not None:
            place = f"{frame.f_code.co_filename[len(ROOT) + 1 :]}:{frame.f_lineno}"
        for counts in self.open:
            counts.waits += 1
            counts.places[f"{what} {place}"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.do(func, args, kwargs or {})

    def do(self, func, args, kwargs):
        leaves = tree_leaves((args, kwargs))
        fakes = [x for x in leaves if isinstance(x, Fake)]
        device = next((x for x in leaves if isinstance(x, torch.device)), None)
        on_gpu = device is not None and device.type == "cuda"
        if not fakes and not on_gpu:
            return func(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), COMPOSITE):
            with self:  # in inference mode; its parts come here
                return func._op_dk(COMPOSITE, *args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if name in ("_to_copy", "copy_"):
            self._copy(args, kwargs, on_gpu)
        else:
            self._check(name, args, kwargs)
        if name in WAITS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self.wait(name)
        if not func.is_view and name not in NO_KERNEL:
            for counts in self.open:
                counts.launches += 1
        if torch.Tag.inplace_view in func.tags:  # the fake changes its shape too
            with no_dispatch():
                func(*args, **kwargs)
        return self._compute(func, args, kwargs, fakes, stays=on_gpu or device is None)

    def _compute(self, func, args, kwargs, fakes, stays):
        known = {id(x.held): x for x in fakes}
        plain = {name: value for name, value in kwargs.items() if name != "pin_memory"}
        plain = tree_map_only(torch.device, lambda _: torch.device("cpu"), plain)
        real_args, real_kwargs = tree_map_only(Fake, lambda x: x.held, (args, plain))
        out = func(*real_args, **real_kwargs)
        if self.graph is not None and not func.is_view:
            self.graph.steps.append((func, real_args, real_kwargs, out))
        # a view of a tensor from outside of inference mode is none of inference mode either
        ordinary = func.is_view and fakes and not fakes[0].is_inference()
        with torch.inference_mode(False) if ordinary else contextlib.nullcontext():
            return tree_map_only(Tensor, lambda x: known.get(id(x), Fake(x) if stays else x), out)

    def _copy(self, args, kwargs, on_gpu):
        """A copy between the devices is a wait, unless it is non_blocking and pinned."""
        target, source = args[0], args[-1] if isinstance(args[-1], Tensor) else args[0]
        if isinstance(args[1] if len(args) > 1 else None, Tensor):  # copy_
            source = args[1]
            crosses = isinstance(target, Fake) is not isinstance(source, Fake)
        else:
            crosses = kwargs.get("device") is not None and isinstance(source, Fake) is not on_gpu
        quick = kwargs.get("non_blocking", len(args) > 2 and args[2])
        quick = quick and (isinstance(source, Fake) or hasattr(source, "pinned"))
        if crosses and source.numel() and not quick:
            self.wait("copy")

    def _check(self, name, args, kwargs):
        """Refuse what CUDA would, and count the indexing that waits."""
        rest = (args, kwargs)
        if name in BY_INDEX:
            rest = (args[0], args[2:3])
            fills = len(args) > 2 and args[2].numel() == 1  # masked_fill
            for index in args[1]:
                if isinstance(index, Fake) and not isinstance(args[0], Fake):
                    raise RuntimeError("indices should be on the device of the indexed tensor")
                if index is not None and not isinstance(index, Fake):
                    self.wait("cpu index")
                elif index is not None and index.dtype is torch.bool and not fills:
                    self.wait("mask as index")
        tensors = [x for x in tree_leaves(rest) if isinstance(x, Tensor)]
        if any(isinstance(x, Fake) for x in tensors):
            for x in tensors:
                if not isinstance(x, Fake) and x.dim() > 0:
                    raise RuntimeError(
                        f"Expected all tensors to be on the same device, found cuda:0 and cpu "
                        f"({name}, shape {tuple(x.shape)})"
                    )


class _Engine:
    """`torch.autograd._engine_run_backward`: each node once all its gradients are there."""

    def __call__(self, roots, grads, retain, create, inputs, *_, **__):
        edge = torch.autograd.graph.get_gradient_edge
        wanted = {edge(x)[:2]: place for place, x in enumerate(inputs)}
        found = [None] * len(inputs)
        missing, seen = Counter(), set()
        pending = [edge(x).node for x in roots]
        while pending:
            node = pending.pop()
            if node not in seen:
                seen.add(node)
                nexts = [after for after, _ in node.next_functions if after is not None]
                missing.update(nexts)
                pending += nexts
        sums = defaultdict(dict)
        for root, grad in zip(roots, grads, strict=True):
            self._add(sums, *edge(root)[:2], torch.ones_like(root) if grad is None else grad)
        number = itertools.count()
        ready = [(-n._sequence_nr(), next(number), n) for n in list(sums) if not missing[n]]
        heapq.heapify(ready)
        with torch.set_grad_enabled(create):
            while ready:
                node = heapq.heappop(ready)[2]
                values = sums.pop(node, {})
                for slot, grad in values.items():
                    if (node, slot) in wanted:
                        found[wanted[node, slot]] = grad
                outs = self._call(node, values, leaves=not inputs)
                for (after, slot), grad in zip(node.next_functions, outs, strict=False):
                    if after is None:
                        continue
                    if grad is not None:
                        meta = after._input_metadata[slot]
                        same = grad.shape == meta.shape
                        fitting = grad if same else grad.sum_to_size(meta.shape)
                        self._add(sums, after, slot, fitting.to(meta.dtype))
                    missing[after] -= 1
                    if not missing[after]:
                        heapq.heappush(ready, (-after._sequence_nr(), next(number), after))
        return tuple(found)

    @staticmethod
    def _add(sums, node, slot, grad):
        sums[node][slot] = sums[node][slot] + grad if slot in sums[node] else grad

    @staticmethod
    def _call(node, values, leaves):
        if not values:
            return [None] * len(node.next_functions)
        if hasattr(node, "variable"):  # a leaf
            leaf = node.variable
            if leaves:
                leaf.grad = values[0].clone() if leaf.grad is None else leaf.grad + values[0]
            return ()
        metas = node._input_metadata
        given = [values.get(slot) for slot in range(len(metas))]
        if not isinstance(node, BackwardCFunction):
            outs = node(*given)
            return outs if isinstance(outs, tuple) else (outs,)
        given = [
            torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device) if x is None else x
            for x, meta in zip(given, metas, strict=True)
        ]
        outs = node.apply(*given)
        outs = iter(
            x
            for x, needed in zip(
                outs if isinstance(outs, tuple) else (outs,), node.needs_input_grad, strict=False
            )
            if needed
        )
        return [None if after is None else next(outs, None) for after, _ in node.next_functions]


class _Now:
    """A `torch.cuda.Event` or `Stream` of a device that is never behind."""

    cuda_stream, device = 0, CUDA

    def __init__(self, *_, **__):
        pass

    def record(self, *_):
        return None

    wait_stream = wait_event = wait = record

    def query(self):
        return True

    def synchronize(self):
        _ACTIVE[-1].wait("synchronize")


class _CudaGraph:
    """A `torch.cuda.CUDAGraph`: does what was captured again, in the same memory."""

    def __init__(self, *_, **__):
        self.steps = []

    def replay(self):
        for counts in _ACTIVE[-1].open:
            counts.launches += 1
        for func, args, kwargs, out in self.steps:
            again = tree_leaves(func(*args, **kwargs))
            for old, new in zip(tree_leaves(out), again, strict=True):
                if old is not new and isinstance(old, Tensor):
                    old.copy_(new)


@contextlib.contextmanager
def _capture(graph, pool=None):
    del pool
    _ACTIVE[-1].graph = graph
    try:
        yield
    finally:
        _ACTIVE[-1].graph = None


_ACTIVE: list[Gpu] = []
_GENERATOR = torch.Generator


def _generator(device="cpu"):
    """A generator of any device has the CPU's numbers."""
    del device
    return _GENERATOR()


def _pinned(tensor, *_):
    if isinstance(tensor, Fake):
        raise RuntimeError("cannot pin a CUDA tensor")
    copy = tensor.clone()
    copy.pinned = True
    return copy


def _patches(gpu):
    def to(value):
        return lambda *_, **__: value

    properties = SimpleNamespace(name="pretended", total_memory=1 << 36, major=9, minor=0)
    memory = [f"{most}memory_{what}" for most in ("", "max_") for what in ("allocated", "reserved")]
    setters = ["_lazy_init", "init", "set_device", "manual_seed", "manual_seed_all"]
    setters += ["reset_peak_memory_stats", "empty_cache"]
    state = torch.get_rng_state()
    cuda = {
        **dict.fromkeys(["is_available", "is_initialized", "is_bf16_supported"], to(True)),
        **dict.fromkeys([*setters, "set_rng_state", "set_rng_state_all"], to(None)),
        **dict.fromkeys([*memory, "current_device"], to(0)),
        **dict.fromkeys(["Event", "Stream", "current_stream", "default_stream"], _Now),
        **dict.fromkeys(["device", "stream"], to(contextlib.nullcontext())),
        "device_count": to(1),
        "CUDAGraph": _CudaGraph,
        "graph": _capture,
        "graph_pool_handle": to((0, 0)),
        "synchronize": lambda *_: gpu.wait("synchronize"),
        "get_device_name": to(properties.name),
        "get_device_properties": to(properties),
        "get_device_capability": to((9, 0)),
        "get_rng_state": to(state),
        "get_rng_state_all": to([state]),
    }
    return [
        mock.patch.multiple(torch.cuda, **cuda),
        mock.patch.multiple(torch.accelerator, is_available=to(True), current_accelerator=to(CUDA)),
        mock.patch.object(torch.autograd, "_engine_run_backward", _Engine()),
        mock.patch.object(torch, "Generator", _generator),
        mock.patch.object(Tensor, "pin_memory", _pinned),
        torch.backends.cudnn.flags(enabled=False),
    ]


@contextlib.contextmanager
def pretend_cuda() -> Iterator[Gpu]:
    """Let torch find one CUDA device meanwhile; its random numbers are the CPU's."""
    torch._C._ensureCUDADeviceGuardSet()
    gpu = Gpu()
    with contextlib.ExitStack() as stack:
        for patch in _patches(gpu):
            stack.enter_context(patch)
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) is a copy
        for name in ("torch.optim.optimizer", "torch.utils._foreach_utils"):
            supported = importlib.import_module(name)._foreach_supported_types
            supported.append(Fake)
            stack.callback(supported.remove, Fake)
        _ACTIVE.append(gpu)
        stack.callback(_ACTIVE.remove, gpu)
        stack.enter_context(gpu)
        yield gpu
