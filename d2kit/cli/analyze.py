"""What a model costs: operations and parameters, and speed beside torchvision."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torchvision
from fvcore.nn import flop_count_table
from tabulate import tabulate
from torch import nn

from d2kit import model_zoo
from d2kit.checkpoint import DetectionCheckpointer
from d2kit.cli.weights import drawn_picture
from d2kit.config import CfgNode, get_cfg
from d2kit.data import build_detection_test_loader
from d2kit.engine import user_errors
from d2kit.export import load_exported, read_config
from d2kit.export.backends import CONFIG
from d2kit.modeling import build_model, optimize_for_inference
from d2kit.predict.predictor import build_loaded_model
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

    def count(batch: Any) -> dict[str, float]:
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
    parser = argparse.ArgumentParser(
        prog="d2kit analyze",
        description=ABOUT_ANALYZE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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


ABOUT_BENCHMARK = """\
Measure d2kit beside torchvision, in turn in one process; every figure comes with its ratio.

d2kit benchmark --task inference [--size 800 1216] [--threads 2] [--repeats 7] [--device cpu cuda]
d2kit benchmark --exports onnx/ openvino/ --size 800 1088   # beside the model they were made of
"""


MODELS = {
    "Faster R-CNN": ("COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml", "fasterrcnn_resnet50_fpn"),
    "Mask R-CNN": ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml", "maskrcnn_resnet50_fpn"),
}
PROPOSALS, DETECTIONS = 1000, 100


def build_ours(config: str, device: str) -> torch.nn.Module:
    """Return our model: random weights, no score threshold, torchvision's sampling ratio."""
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file(config))
    settings = {
        "MODEL.DEVICE": device,
        "MODEL.WEIGHTS": "",
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
        "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 2,
        "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": 2,
        "MODEL.RPN.PRE_NMS_TOPK_TEST": PROPOSALS,
        "MODEL.RPN.POST_NMS_TOPK_TEST": PROPOSALS,
        "TEST.DETECTIONS_PER_IMAGE": DETECTIONS,
    }
    cfg.merge_from_list([x for pair in settings.items() for x in pair])
    return build_model(cfg).eval()


def build_theirs(name: str, size: tuple[int, int], device: str) -> torch.nn.Module:
    """Return torchvision's model with random weights, for images that it does not resize."""
    model = torchvision.models.get_model(
        name,
        weights=None,
        weights_backbone=None,
        min_size=min(size),
        max_size=max(size),
        box_score_thresh=0.0,
        box_detections_per_img=DETECTIONS,
        rpn_pre_nms_top_n_test=PROPOSALS,
        rpn_post_nms_top_n_test=PROPOSALS,
    )
    return model.to(device).eval()


def calm(model: torch.nn.Module) -> None:
    """Scale frozen norms as training would, so that random weights keep features near 1."""
    for name, buffer in model.named_buffers():
        if name.endswith(("conv3.norm.weight", "bn3.weight")):
            buffer.fill_(0.2)
        elif name.endswith("stem.conv1.norm.weight"):  # ours takes pixels of 0..255
            buffer.fill_(0.02)


class ProposalCounter:
    """Counts the proposals that reach a model's RoI heads."""

    def __init__(self, module: Any, position: int) -> None:
        self.count = 0
        self.position = position
        module.register_forward_pre_hook(self)

    def __call__(self, _module: torch.nn.Module, args: tuple) -> None:
        """Note the number of proposals of the first image."""
        self.count = len(args[self.position][0])


def peak_memory(run: Callable[[], object], device: str) -> float:
    """Return the memory in MiB that `run` adds at its peak.

    On the CPU resident memory, by the kernel's high-water mark; on a GPU what PyTorch allocates.
    """
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        at_start = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - at_start) / 2**20

    def status(field: str) -> float:
        line = next(x for x in open("/proc/self/status") if x.startswith(field))  # noqa: SIM115
        return int(line.split()[1]) / 1024

    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def seconds(run: Callable[[], object], device: str) -> float:
    """Return the wall time of one call."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def difference(a: object, b: object) -> float:
    """Return the largest relative difference of boxes and scores of two results of ours."""
    first, second = a[0]["instances"], b[0]["instances"]  # type: ignore[index]
    if len(first) != len(second):
        return float("inf")
    worst = 0.0
    for x, y in (
        (first.pred_boxes.tensor, second.pred_boxes.tensor),
        (first.scores, second.scores),
    ):
        worst = max(worst, float(((x - y).abs() / x.abs().clamp(min=1)).max()))
    if first.has("pred_masks"):
        flipped = (first.pred_masks != second.pred_masks).float().mean()
        worst = max(worst, float(flipped))
    return worst


def compare(task: str, args: argparse.Namespace, device: str) -> dict:
    """Time one pair of models on a device and return the figures."""
    config, name = MODELS[task]
    size = tuple(args.size)
    torch.manual_seed(0)
    plain = build_ours(config, device)
    theirs = build_theirs(name, size, device)
    calm(plain)
    calm(theirs)
    fast = optimize_for_inference(plain)
    image = torch.rand(3, *size, device=device)
    ours_input = [{"image": (image * 255).round(), "height": size[0], "width": size[1]}]
    ours_count, theirs_count = (
        ProposalCounter(fast.roi_heads, 2),
        ProposalCounter(theirs.roi_heads, 1),
    )
    with torch.inference_mode():
        runs = {
            "torchvision": lambda: theirs([image]),
            "d2kit plain": lambda: plain(ours_input),
            "d2kit": lambda: fast(ours_input),
        }
        first = {key: run() for key, run in runs.items()}  # also warms up
        times: dict[str, list[float]] = {k: [] for k in runs}
        for _ in range(args.repeats):
            for key, run in runs.items():
                times[key].append(seconds(run, device))
        memory = {key: peak_memory(run, device) for key, run in runs.items()}
    median = {k: statistics.median(v) for k, v in times.items()}
    return {
        "model": task,
        "device": device,
        "seconds": median,
        "ratio": median["torchvision"] / median["d2kit"],
        "ratio of the fastest runs": min(times["torchvision"]) / min(times["d2kit"]),
        "memory": memory,
        "proposals": {"torchvision": theirs_count.count, "d2kit": ours_count.count},
        "detections": {
            "torchvision": len(first["torchvision"][0]["scores"]),
            "d2kit": len(first["d2kit"][0]["instances"]),
        },
        "before/after optimisation": difference(first["d2kit plain"], first["d2kit"]),
    }


def why_not(device: str) -> str:
    """Return why a device cannot be used here; "" if it can."""
    if device == "cpu":
        return ""
    if not torch.cuda.is_available():
        return "no GPU here"
    index = torch.device(device).index or 0
    return "" if index < torch.cuda.device_count() else f"only {torch.cuda.device_count()} GPUs"


def inference(args: argparse.Namespace) -> list[dict]:
    """Compare inference for Faster and Mask R-CNN R50-FPN, and print one table of all devices."""
    results = [
        compare(task, args, device) for device in args.device if not why_not(device)
        for task in MODELS
    ]  # fmt: skip
    table: dict[tuple[str, str], dict[str, object]] = {}
    for device in args.device:
        missing = {device: why_not(device)} if why_not(device) else {}
        for task in MODELS:
            r = next((r for r in results if (r["model"], r["device"]) == (task, device)), None)
            for key in ("torchvision", "d2kit plain", "d2kit"):
                row = table.setdefault((task, key), {"model": task, "library": key})
                row.update(missing if r is None else columns(r, key))
    print(tabulate(list(table.values()), "keys", tablefmt="github", disable_numparse=True))
    for device in args.device:
        found = [r for r in results if r["device"] == device]
        for r in found:
            print(
                f"{r['model']}, {device}: largest relative difference between our outputs before "
                f"and after optimisation: {r['before/after optimisation']:.1e}"
            )
        if found:
            times, peaks = ([r[k]["d2kit"] for r in found] for k in ("seconds", "memory"))
            print(
                f"Mask R-CNN beside Faster R-CNN, d2kit, {device}: {times[1] / times[0]:.2f} times "
                f"the time, {peaks[1] - peaks[0]:+.0f} MiB"
            )
    return results


def exports(args: argparse.Namespace) -> list[dict]:
    """Time exported folders beside the model that the first was made of, on a drawn picture.

    The config of the first folder names the weights of the model. Every row has a difference from
    the plain model: largest of boxes, relative, and of scores, or share of pixels of masks.
    """
    cfg = read_config(args.exports[0])
    stored = get_cfg()
    stored.merge_from_file(str(args.exports[0] / CONFIG))
    cfg.merge_from_list(["MODEL.WEIGHTS", stored.MODEL.WEIGHTS, "MODEL.DEVICE", "cpu"])
    plain = build_loaded_model(cfg)
    models: dict[str, Any] = {"d2kit plain": plain, "d2kit": optimize_for_inference(plain)}
    for folder in args.exports:
        models[str(folder)] = load_exported(folder, threads=args.threads)
    picture = torch.from_numpy(drawn_picture(*args.size).transpose(2, 0, 1).copy())
    inputs = [{"image": picture, "height": args.size[0], "width": args.size[1]}]
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        first = {name: model(inputs) for name, model in models.items()}  # also warms up
        for _ in range(args.repeats):
            for name, model in models.items():
                times[name].append(seconds(partial(model, inputs), "cpu"))
    median = {name: statistics.median(values) for name, values in times.items()}
    rows = [
        {
            "model": name,
            "s / image": round(median[name], 3),
            "times as fast": round(median["d2kit plain"] / median[name], 2),
            "fastest run": round(min(times[name]), 3),
            "found": len(first[name][0]["instances"]),
            "difference": f"{difference(first['d2kit plain'], first[name]):.0e}",
        }
        for name in models
    ]
    print(tabulate(rows, "keys", tablefmt="github", disable_numparse=True))
    return rows


def columns(result: dict, key: str) -> dict[str, object]:
    """Return what the table shows of one library on one device."""
    base = "d2kit" if key == "d2kit plain" else key
    times, device = result["seconds"], result["device"]
    return {
        f"{device}: s / image": f"{times[key]:.3f}",
        f"{device}: times as fast": f"{times['torchvision'] / times[key]:.2f}",
        f"{device}: peak MiB": f"{result['memory'][key]:.0f}",
        f"{device}: proposals": result["proposals"][base],
        f"{device}: found": result["detections"][base],
    }


def machine(args: argparse.Namespace) -> str:
    """Return one line that says where and on what the figures were taken."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    models = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    cpu = models[0].split(":")[1].strip() if models else platform.processor()
    used = [device for device in args.device if not why_not(device)]
    names = [cpu if device == "cpu" else torch.cuda.get_device_name(device) for device in used]
    return (
        f"{', '.join(names) or 'nothing measured'}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}, image {args.size[0]} x {args.size[1]}, "
        f"median of {args.repeats}, commit {commit or 'unknown'}"
    )


def benchmark_main(argv: list[str] | None = None) -> None:
    """Run the chosen task."""
    parser = argparse.ArgumentParser(
        prog="d2kit benchmark",
        description=ABOUT_BENCHMARK,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--task", choices=("inference",), default="inference")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1216), metavar=("H", "W"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", nargs="+", default=["cpu"], help="e.g. cpu cuda")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--exports", type=Path, nargs="+", default=[], metavar="FOLDER")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    results = exports(args) if args.exports else inference(args)
    print(machine(args))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
