"""What a model costs: operations, activations and parameters."""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from fvcore.nn import flop_count_table
from tabulate import tabulate
from torch import nn

from d2kit import model_zoo
from d2kit.checkpoint import DetectionCheckpointer
from d2kit.cli import verb_parser
from d2kit.config import CfgNode, get_cfg
from d2kit.data import build_detection_test_loader
from d2kit.engine import user_errors
from d2kit.modeling import build_model
from d2kit.structures import Boxes, Instances
from d2kit.utils.analysis import (
    FlopCountAnalysis,
    activation_count_operators,
    parameter_count_table,
)

ABOUT_ANALYZE = """\
Count what a model costs: operations, activations, parameters; or print its structure.

d2kit analyze --config-file COCO-Detection/retinanet_R_50_FPN_1x.yaml --tasks flop parameter
d2kit analyze --config-file mine.yaml --tasks flop --inputs dataset -n 20 [KEY VALUE ...]

The config is a file or a name of the model zoo. Weights are random unless they are named in the
options: only what comes after the proposals depends on them.
"""


def random_inputs(cfg: CfgNode, size: tuple[int, int]) -> Iterator[list[dict[str, Any]]]:
    """Yield batches of one random image, with random proposals for a model without its own."""
    random = torch.Generator().manual_seed(0)
    height, width = size
    while True:
        image = torch.randint(0, 256, (3, height, width), generator=random).float()
        sample = {"image": image, "height": height, "width": width}
        if cfg.MODEL.LOAD_PROPOSALS:
            corners = torch.rand(1000, 2, 2, generator=random).sort(dim=1).values
            boxes = (corners * torch.tensor([width, height])).flatten(1)
            logits = torch.randn(1000, generator=random)
            sample["proposals"] = Instances(
                size, proposal_boxes=Boxes(boxes), objectness_logits=logits
            )
        yield [sample]


def mean_of(count: Callable[[Any], Mapping[str, float]], inputs: list[Any], unit: str) -> str:
    """Return a table of a count by operator: mean over the inputs, and its deviation in total."""
    counts = [Counter(count(batch)) for batch in inputs]
    totals = [sum(c.values()) for c in counts]
    names = sorted({name for c in counts for name in c})
    rows = [[name, statistics.fmean(c[name] for c in counts)] for name in names]
    rows.append(["total", statistics.fmean(totals)])
    spread = f", deviation of the total {statistics.pstdev(totals):.4g}"
    return f"mean over {len(inputs)} inputs{spread}\n" + tabulate(
        rows, headers=["operator", unit], floatfmt=".4f"
    )


def flops(model: nn.Module, inputs: list[Any]) -> str:
    """Return the table by operator, then that by module of the last input."""
    analyses: list[FlopCountAnalysis] = []

    def count(batch: object) -> dict[str, float]:
        analyses[:] = [FlopCountAnalysis(model, batch)]
        return {name: n / 1e9 for name, n in analyses[0].by_operator().items()}

    table = mean_of(count, inputs, "10^9 multiply-adds")
    by_module = flop_count_table(analyses[0], max_depth=4, show_param_shapes=False)
    return f"{table}\n\nlast input, {tuple(inputs[-1][0]['image'].shape)}:\n{by_module}"


TASKS: dict[str, Callable[[nn.Module, list[Any]], str]] = {
    "flop": flops,
    "activation": lambda model, inputs: mean_of(
        lambda batch: activation_count_operators(model, batch), inputs, "10^6 elements"
    ),
    "parameter": lambda model, _: parameter_count_table(model, max_depth=5),
    "structure": lambda model, _: str(model),
}


def parse_analyze(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments."""
    parser = verb_parser("analyze", ABOUT_ANALYZE)
    parser.add_argument("--config-file", required=True, help="a file, or a name of the model zoo")
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=list(TASKS),
        default=["parameter"],
        help="before another option, where KEY VALUE follows",
    )
    parser.add_argument("--inputs", choices=["random", "dataset"], default="random")
    parser.add_argument("-n", "--num-inputs", type=int, default=1)
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1216), metavar=("H", "W"))
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ... of the config")
    return parser.parse_args(argv)


@user_errors()
def analyze_main(argv: list[str] | None = None, register: Callable[[], None] | None = None) -> None:
    """Do the tasks one after the other.

    Args:
        argv: the command line; None: that of the process.
        register: makes datasets known by name, e.g. those of a checkout.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # of its tracer
    args = parse_analyze(argv)
    if register is not None:
        register()
    cfg = get_cfg()
    local = Path(args.config_file).is_file()
    cfg.merge_from_file(args.config_file if local else model_zoo.get_config_file(args.config_file))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *args.opts])
    model = build_model(cfg).eval()
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    inputs: list[Any] = []
    if {"flop", "activation"} & set(args.tasks):
        if args.inputs == "dataset":
            batches = iter(build_detection_test_loader(cfg, cfg.DATASETS.TEST[0]))
        else:
            batches = random_inputs(cfg, tuple(args.size))
        inputs = list(islice(batches, max(1, args.num_inputs)))
    for task in args.tasks:
        with torch.no_grad():
            print(f"== {task}\n{TASKS[task](model, inputs)}\n", flush=True)
