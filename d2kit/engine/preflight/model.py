"""How well the anchors of a model fit the boxes that it is trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from d2kit.engine.preflight.data import pick_evenly
from d2kit.solver.build import LRMultiplier
from d2kit.structures import BoxMode

MIN_IOU = 0.5
SIZE_NAMES = ("small", "medium", "large")
SIZE_LIMITS = (32.0**2, 96.0**2)  # COCO's, here in pixels of the resized image
MAX_BOXES = 20_000
CHUNK = 2_000
GAIN = 0.02  # less is no reason to change a config
FACTORS = tuple(2.0 ** (step / 2) for step in range(-6, 7))


class ResizedBoxes(NamedTuple):
    """Ground-truth boxes as the model sees them.

    Args:
        boxes: (N, 4) float32, XYXY, pixels of the resized image.
        sizes: (N, 2) float32, width and height of the resized image of each.
    """

    boxes: Tensor
    sizes: Tensor


class AnchorFit(NamedTuple):
    """Share of the boxes whose best anchor overlaps them by an IoU below 0.5.

    Args:
        boxes: number of boxes.
        poor: share of them, in [0, 1].
        by_size: small, medium or large (resized area, limits 32^2 and 96^2) -> (boxes, share).
        hint: sizes of each feature map that fit better, and their share; None: these will do.
    """

    boxes: int
    poor: float
    by_size: dict[str, tuple[int, float]]
    hint: tuple[list[list[int]], float] | None


def resized_boxes(
    records: Sequence[Any], output_shape: Callable[[int, int], tuple[int, int]], limit: int = 0
) -> ResizedBoxes:
    """Resize the boxes of a dataset as the images are.

    Args:
        records: in the standard format; those without a size and rotated boxes are left out.
        output_shape: (height, width) -> (height, width) of the resized image.
        limit: most images to look at, evenly spread; 0: all.
    """
    rows: list[list[float]] = []
    for index in pick_evenly(len(records), limit):
        record = records[index]
        if "height" not in record or "width" not in record:
            continue
        height, width = output_shape(record["height"], record["width"])
        across, down = width / record["width"], height / record["height"]
        for annotation in record.get("annotations", ()):
            if annotation.get("iscrowd", 0) or annotation["bbox_mode"] == BoxMode.XYWHA_ABS:
                continue
            x0, y0, x1, y1 = BoxMode.convert(
                list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYXY_ABS
            )
            rows.append([x0 * across, y0 * down, x1 * across, y1 * down, width, height])
    chosen = [rows[i] for i in pick_evenly(len(rows), MAX_BOXES)]
    table = torch.tensor(chosen, dtype=torch.float32).reshape(-1, 6)  # boxes may be numpy's float64
    return ResizedBoxes(table[:, :4], table[:, 4:])


def best_anchor_iou(
    found: ResizedBoxes, cells: Sequence[Tensor], strides: Sequence[int], offset: float
) -> Tensor:
    """Return the IoU of each box with the best of all anchors of its image.

    Of the anchors of one shape the nearest overlaps most, in x and in y, so that one cell of each
    feature map is looked at for each box.

    Args:
        found: the boxes.
        cells: for each feature map (A, 4) float32, XYXY, anchors of a cell around (0, 0).
        strides: of the feature maps, in pixels.
        offset: centre of the first cell as a fraction of the stride.

    Returns:
        (N,) float32, in [0, 1].
    """
    boxes = found.boxes
    best = boxes.new_zeros(len(boxes))
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    area = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=1)
    for cell, stride in zip(cells, strides, strict=True):
        last = (found.sizes / stride).ceil() - 1
        index = (centres / stride - offset).round().clamp(min=0).minimum(last)
        place = ((index + offset) * stride).repeat(1, 2)
        for start in range(0, len(boxes), CHUNK):
            part = slice(start, start + CHUNK)
            anchors = place[part, None] + cell[None]
            low = torch.maximum(boxes[part, None, :2], anchors[..., :2])
            high = torch.minimum(boxes[part, None, 2:], anchors[..., 2:])
            shared = (high - low).clamp(min=0).prod(dim=2)
            own = (anchors[..., 2:] - anchors[..., :2]).prod(dim=2)
            iou = shared / (own + area[part, None] - shared).clamp(min=1e-9)
            best[part] = torch.maximum(best[part], iou.amax(dim=1))
    return best


def measure_anchor_fit(
    found: ResizedBoxes, cells: Sequence[Tensor], strides: Sequence[int], offset: float
) -> AnchorFit:
    """Compare the anchors with the boxes, and look for sizes that fit better.

    Args:
        found: as in `best_anchor_iou`; at least one box.
        cells: likewise.
        strides: likewise.
        offset: likewise.
    """

    def poor_boxes(of_cells: Sequence[Tensor]) -> Tensor:
        return best_anchor_iou(found, of_cells, strides, offset) < MIN_IOU

    poor = poor_boxes(cells)
    area = (found.boxes[:, 2:] - found.boxes[:, :2]).clamp(min=0).prod(dim=1)
    group = torch.bucketize(area, torch.tensor(SIZE_LIMITS), right=True)
    by_size = {}
    for number, name in enumerate(SIZE_NAMES):
        chosen = poor[group == number]
        by_size[name] = (len(chosen), _share(chosen))
    hint = None
    best = _share(poor) - GAIN
    for candidate in _candidates(cells, area.sqrt()):
        share = _share(poor_boxes(candidate))
        if share < best:
            hint, best = (_sizes(candidate), share), share
    return AnchorFit(len(poor), _share(poor), by_size, hint)


def _share(mask: Tensor) -> float:
    return mask.float().mean().item() if len(mask) else 0.0


def _candidates(cells: Sequence[Tensor], sides: Tensor) -> list[list[Tensor]]:
    """Return the anchors grown and shrunk, and with the sizes that the boxes have."""
    grown = [[cell * factor for cell in cells] for factor in FACTORS if factor != 1.0]
    places = (torch.arange(len(cells)) + 0.5) / len(cells)
    wanted = torch.quantile(sides, places).clamp(min=1)
    own = [_areas(cell).sqrt().log().mean().exp() for cell in cells]
    fitted = [cell * (w / o) for cell, w, o in zip(cells, wanted, own, strict=True)]
    # whole pixels, so that the share is that of the sizes which are printed
    return [[_rounded(cell) for cell in candidate] for candidate in (*grown, fitted)]


def _areas(cell: Tensor) -> Tensor:
    return (cell[:, 2:] - cell[:, :2]).prod(dim=1)


def _rounded(cell: Tensor) -> Tensor:
    sides = _areas(cell).sqrt()
    return cell * (sides.round().clamp(min=1) / sides)[:, None]


def _sizes(cells: Sequence[Tensor]) -> list[list[int]]:
    return [sorted({math.floor(s + 0.5) for s in _areas(cell).sqrt().tolist()}) for cell in cells]


SPARKS = "▁▂▃▄▅▆▇█"


class ModuleParameters(NamedTuple):
    """Parameters of a part of a model.

    Args:
        name: of the part.
        trained: number of values that the optimizer may change.
        frozen: number of the others.
    """

    name: str
    trained: int
    frozen: int


class Memory(NamedTuple):
    """Bytes on the device of one process, activations left out.

    Args:
        weights: parameters and buffers.
        gradients: of the trained parameters.
        optimizer: its state; None: an optimizer that we do not know.
        average: the moving average of the weights.
        autocast: copies of the trained weights in half precision, which live from forward to
            backward.
        buckets: in which gradients travel between processes.
    """

    weights: int
    gradients: int
    optimizer: int | None
    average: int = 0
    autocast: int = 0
    buckets: int = 0

    def total(self) -> int:
        """Return the sum, without what is not known."""
        return sum(part or 0 for part in self)


def parameters_by_module(model: nn.Module) -> list[ModuleParameters]:
    """Count the parameters of the children; one that is frozen in part is opened up.

    Args:
        model: not wrapped; a parameter that is shared counts where it comes first.

    Returns:
        One entry for each part that has parameters, in the order of the model; the model's or an
        opened part's own parameters have a name that ends with ``(own)``.
    """
    seen: set[int] = set()
    rows: list[ModuleParameters] = []

    def count(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
        totals = [0, 0]
        for parameter in parameters:
            if id(parameter) not in seen:
                seen.add(id(parameter))
                totals[not parameter.requires_grad] += parameter.numel()
        return totals[0], totals[1]

    def add(name: str, parameters: Iterable[nn.Parameter]) -> None:
        trained, frozen = count(parameters)
        if trained or frozen:
            rows.append(ModuleParameters(name, trained, frozen))

    def open_up(name: str, module: nn.Module) -> None:
        add(f"{name} (own)".strip(), module.parameters(recurse=False))
        for key, child in module.named_children():
            inner = f"{name}.{key}" if name else key
            kinds = {p.requires_grad for p in child.parameters() if id(p) not in seen}
            if len(kinds) == 2 and next(child.children(), None) is not None:
                open_up(inner, child)
            else:
                add(inner, child.parameters())

    open_up("", model)
    return rows


def estimate_memory(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    average: bool = False,
    autocast: bool = False,
    processes: int = 1,
) -> Memory:
    """Add up what training holds besides activations.

    Gradients that are accumulated over the parts of a batch take no more than those of one part.

    Args:
        model: the model, not wrapped.
        average: whether a moving average of all weights and statistics is kept (SOLVER.EMA).
        autocast: whether the forward pass is in mixed precision, 2 bytes a value.
        processes: number of them; several have buckets.
        optimizer: of it; SGD keeps one value per trained one with momentum, Adam and AdamW two
            (three with ``amsgrad``).
    """
    tensors = [*model.parameters(), *model.buffers()]
    trained = [p for p in model.parameters() if p.requires_grad]
    state: int | None = 0
    for group in optimizer.param_groups:
        copies = _copies(optimizer, group)
        if copies is None or state is None:
            state = None
            break
        state += copies * _bytes(p for p in group["params"] if p.requires_grad)
    gradients = _bytes(trained)
    half = 2 * sum(p.numel() for p in trained if p.dtype == torch.float32) if autocast else 0
    kept = _bytes(model.state_dict().values()) if average else 0
    return Memory(_bytes(tensors), gradients, state, kept, half, gradients if processes > 1 else 0)


def _copies(optimizer: Optimizer, group: dict[str, object]) -> int | None:
    """Return how many values per parameter an optimizer keeps."""
    if isinstance(optimizer, torch.optim.SGD):
        return 1 if group["momentum"] else 0
    if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        return 3 if group["amsgrad"] else 2
    return None


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def learning_rates(scheduler: LRScheduler, iterations: Sequence[int]) -> list[float] | None:
    """Return the largest learning rate of all groups at some iterations.

    Args:
        scheduler: the real one; not changed.
        iterations: indices from 0.

    Returns:
        One rate for each; None for a schedule that is known only by running it.
    """
    if not isinstance(scheduler, LRMultiplier):
        return None
    base = max(float(rate) for rate in scheduler.base_lrs)
    return [base * scheduler._multiplier(i / scheduler._max_iter) for i in iterations]


def spark_line(values: Sequence[float]) -> str:
    """Draw values, 0 to the largest, one character each."""
    top = max(values, default=0.0)
    steps = len(SPARKS) - 1
    return "".join(SPARKS[round(steps * value / top) if top > 0 else 0] for value in values)
