#!/usr/bin/env python3
"""Measure d2kit beside torchvision, in turn in one process; every figure comes with its ratio.

benchmark.py --task inference [--size 800 1216] [--threads 2] [--repeats 7] [--device cpu]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from tabulate import tabulate

from d2kit.config import get_cfg
from d2kit.modeling import build_model, optimize_for_inference

CONFIGS = Path(__file__).parents[1] / "configs"
MODELS = {
    "Faster R-CNN": ("COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml", "fasterrcnn_resnet50_fpn"),
    "Mask R-CNN": ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml", "maskrcnn_resnet50_fpn"),
}
PROPOSALS, DETECTIONS = 1000, 100


def build_ours(config: str, device: str) -> torch.nn.Module:
    """Return our model: random weights, no score threshold, torchvision's sampling ratio."""
    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIGS / config))
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


class Counter:
    """Counts the proposals that reach a model's RoI heads."""

    def __init__(self, module: torch.nn.Module, position: int) -> None:
        self.count = 0
        self.position = position
        module.register_forward_pre_hook(self)

    def __call__(self, _module: torch.nn.Module, args: tuple) -> None:
        """Note the number of proposals of the first image."""
        self.count = len(args[self.position][0])


def peak_memory(run: Callable[[], object]) -> float:
    """Return the peak resident memory in MiB that `run` adds, by the kernel's high-water mark."""

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


def compare(task: str, args: argparse.Namespace) -> dict:
    """Time one pair of models and return the figures."""
    config, name = MODELS[task]
    size = tuple(args.size)
    torch.manual_seed(0)
    plain = build_ours(config, args.device)
    theirs = build_theirs(name, size, args.device)
    calm(plain)
    calm(theirs)
    fast = optimize_for_inference(plain)
    image = torch.rand(3, *size, device=args.device)
    ours_input = [{"image": (image * 255).round(), "height": size[0], "width": size[1]}]
    ours_count, theirs_count = Counter(fast.roi_heads, 2), Counter(theirs.roi_heads, 1)
    with torch.inference_mode():
        runs = {
            "torchvision": lambda: theirs([image]),
            "d2kit plain": lambda: plain(ours_input),
            "d2kit": lambda: fast(ours_input),
        }
        difference_before_after = difference(runs["d2kit plain"](), runs["d2kit"]())
        detections = {
            "torchvision": len(runs["torchvision"]()[0]["scores"]),
            "d2kit": len(runs["d2kit"]()[0]["instances"]),
        }
        times: dict[str, list[float]] = {k: [] for k in runs}
        for _ in range(args.repeats):
            for key, run in runs.items():
                times[key].append(seconds(run, args.device))
        memory = {k: peak_memory(run) if args.device == "cpu" else 0.0 for k, run in runs.items()}
    median = {k: statistics.median(v) for k, v in times.items()}
    return {
        "model": task,
        "seconds": median,
        "ratio": median["torchvision"] / median["d2kit"],
        "ratio of the fastest runs": min(times["torchvision"]) / min(times["d2kit"]),
        "memory": memory,
        "proposals": {"torchvision": theirs_count.count, "d2kit": ours_count.count},
        "detections": detections,
        "before/after optimisation": difference_before_after,
    }


def inference(args: argparse.Namespace) -> list[dict]:
    """Compare inference for Faster and Mask R-CNN R50-FPN, and print the table."""
    rows, results = [], []
    for task in MODELS:
        r = compare(task, args)
        results.append(r)
        for key in r["seconds"]:
            base = "d2kit" if key == "d2kit plain" else key
            rows.append(
                [
                    task,
                    key,
                    f"{r['seconds'][key]:.3f}",
                    f"{r['seconds']['torchvision'] / r['seconds'][key]:.2f}",
                    f"{r['memory'][key]:.0f}",
                    r["proposals"][base],
                    r["detections"][base],
                ]
            )
    headers = ["model", "library", "s / image", "times as fast", "peak MiB", "proposals", "found"]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))
    for r in results:
        print(
            f"{r['model']}: largest relative difference between our outputs before and after "
            f"optimisation: {r['before/after optimisation']:.1e}"
        )
    return results


def machine(args: argparse.Namespace) -> str:
    """Return one line that says where and on what the figures were taken."""
    git = ["git", "-C", str(CONFIGS), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    models = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    cpu = models[0].split(":")[1].strip() if models else platform.processor()
    device = cpu if args.device == "cpu" else torch.cuda.get_device_name()
    return (
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}, image {args.size[0]} x {args.size[1]}, "
        f"median of {args.repeats}, commit {commit or 'unknown'}"
    )


def main() -> None:
    """Run the chosen task."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=("inference",), default="inference")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1216), metavar=("H", "W"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = inference(args)
    print(machine(args))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
