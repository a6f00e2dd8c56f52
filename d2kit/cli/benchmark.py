"""How fast d2kit is, and how much memory it takes, beside torchvision and pycocotools.

Everything is measured in turn in one process, so that a figure is a ratio of the same minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from tabulate import tabulate
from torch import Tensor

from d2kit import model_zoo
from d2kit.cli import verb_parser
from d2kit.cli.weights import drawn_picture
from d2kit.config import get_cfg
from d2kit.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from d2kit.export import load_exported, read_config
from d2kit.export.backends import CONFIG
from d2kit.modeling import build_model, computing_in, optimize_for_inference
from d2kit.predict.predictor import build_loaded_model
from d2kit.structures import BitMasks, Boxes, Instances, ROIMasks
from d2kit.utils.devices import computes_bfloat16

ABOUT_BENCHMARK = """\
Measure d2kit beside torchvision and pycocotools, in turn; every figure comes with its ratio.

d2kit benchmark --task inference [--size 800 1216] [--threads 2] [--repeats 7] [--device cpu cuda]
d2kit benchmark --task train --size 320 416 --threads 1   # steps of 2 images
d2kit benchmark --task evaluate [--images 100]            # 100 detections each, to the table
d2kit benchmark --task data                               # a picture from its file to the model
d2kit benchmark --task import
d2kit benchmark --exports onnx/ openvino/ --size 800 1088   # beside the model they were made of
"""


MODELS = {
    "Faster R-CNN": ("COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml", "fasterrcnn_resnet50_fpn"),
    "Mask R-CNN": ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml", "maskrcnn_resnet50_fpn"),
}
PROPOSALS, DETECTIONS = 1000, 100
MASKS = ("", "bool", "28 x 28")  # of the image; in the boxes, as models give them to evaluators
IMPORTS = {
    "torch, torchvision": "import torch, torchvision",
    "and d2kit.engine": "import torch, torchvision, d2kit.engine",
    "nothing": "",
    "d2kit": "import d2kit",
}


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
    model: torch.nn.Module = torchvision.models.get_model(
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


def counted_proposals(module: torch.nn.Module, position: int) -> list[int]:
    """Return a list that gets the number of the first image's proposals at each call of heads."""
    counts: list[int] = []
    module.register_forward_pre_hook(lambda _, args: counts.append(len(args[position][0])))
    return counts


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
    boxes = first.pred_boxes.tensor, second.pred_boxes.tensor
    for x, y in (boxes, (first.scores, second.scores)):
        worst = max(worst, float(((x - y).abs() / x.abs().clamp(min=1)).max()))
    if first.has("pred_masks"):
        worst = max(worst, float((first.pred_masks != second.pred_masks).float().mean()))
    return worst


def compare(task: str, args: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """Time one pair of models on a device and return the rows of its table."""
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
    heads = [model.get_submodule("roi_heads") for model in (theirs, fast)]
    counters = counted_proposals(heads[0], 1), counted_proposals(heads[1], 2)
    runs: dict[str, Callable[[], Any]] = {
        "torchvision": partial(theirs, [image]),
        "d2kit plain": partial(plain, ours_input),
        "d2kit": partial(fast, ours_input),
    }
    if computes_bfloat16(torch.device(device)):
        runs["d2kit, bfloat16"] = partial(in_bfloat16, fast, ours_input)
    with torch.inference_mode():
        first = {key: run() for key, run in runs.items()}
        times = in_turn(runs, args.repeats, device)
        peaks = {key: f"{peak_memory(run, device):.0f}" for key, run in runs.items()}
    extra: dict[str, dict[str, Any]] = {
        key: {"peak MiB": peaks[key], "proposals": counters[key != "torchvision"][-1]}
        for key in runs
    }
    for key, result in first.items():
        ours = key != "torchvision"
        extra[key]["found"] = len(result[0]["instances"] if ours else result[0]["scores"])
    rows = show(times, "s / image", extra, model=task, device=device)
    changed = difference(first["d2kit plain"], first["d2kit"])
    print(f"largest relative difference of our outputs by the optimisation: {changed:.1e}")
    return rows


def in_bfloat16(model: torch.nn.Module, inputs: list[Any]) -> object:
    """Call a model as TEST.DTYPE bfloat16 does."""
    with computing_in(model, torch.bfloat16):
        return model(inputs)


def why_not(device: str) -> str:
    """Return why a device cannot be used here; "" if it can."""
    if device == "cpu":
        return ""
    if not torch.cuda.is_available():
        return "no GPU here"
    index = torch.device(device).index or 0
    return "" if index < torch.cuda.device_count() else f"only {torch.cuda.device_count()} GPUs"


def inference(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare inference for Faster and Mask R-CNN R50-FPN, a table for each model and device."""
    rows = []
    for device in args.device:
        if reason := why_not(device):
            print(f"{device}: {reason}")
            continue
        for task in MODELS:
            rows += compare(task, args, device)
    return rows


def exports(args: argparse.Namespace) -> list[dict[str, Any]]:
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
    runs = {name: partial(model, inputs) for name, model in models.items()}
    with torch.inference_mode():
        first = {name: run() for name, run in runs.items()}
        times = in_turn(runs, args.repeats)
    extra = {
        name: {
            "found": len(first[name][0]["instances"]),
            "difference": f"{difference(first['d2kit plain'], first[name]):.0e}",
        }
        for name in models
    }
    return show(times, "s / image", extra)


def in_turn(
    runs: Mapping[str, Callable[[], object]], repeats: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Return the wall times in seconds of each run, after one that warms up."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run, device))
    return times


def show(
    times: Mapping[str, list[float]],
    unit: str,
    extra: Mapping[str, Mapping[str, object]] | None = None,
    **first: object,
) -> list[dict[str, Any]]:
    """Print a table with a row for each run, and return it; ratios are to the first."""
    median = {name: statistics.median(found) for name, found in times.items()}
    base = next(iter(median.values()))
    rows = [
        {
            **first,
            "library": name,
            unit: f"{median[name]:.4g}",
            "times as fast": f"{base / median[name]:.2f}",
            "fastest run": f"{min(times[name]):.4g}",
            **(extra or {}).get(name, {}),
        }
        for name in times
    ]
    print(tabulate(rows, "keys", tablefmt="github", disable_numparse=True), flush=True)
    return rows


def rectangles(count: int, size: tuple[int, int], random: torch.Generator) -> Instances:
    """Draw ground truths of random classes whose masks are rectangles of at least 24 pixels."""
    height, width = size
    corners = torch.rand(count, 2, 2, generator=random).sort(dim=1).values
    boxes = (corners * torch.tensor([width - 24, height - 24])).flatten(1)
    boxes[:, 2:] += 24
    masks = torch.zeros(count, height, width, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = True
    found = Instances(size, gt_boxes=Boxes(boxes), gt_masks=BitMasks(masks))
    found.gt_classes = torch.randint(0, 80, (count,), generator=random)
    return found


def training(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare steps of 2 images by SGD, with the settings of the zoo."""
    size = tuple(args.size)
    random = torch.Generator().manual_seed(0)
    truths = [rectangles(6, size, random) for _ in range(2)]
    pictures = [torch.rand(3, *size, generator=random) for _ in truths]
    ours_input = [
        {"image": (picture * 255).round(), "instances": truth}
        for picture, truth in zip(pictures, truths, strict=True)
    ]
    targets = [
        {
            "boxes": truth.gt_boxes.tensor,
            "labels": truth.gt_classes + 1,
            "masks": truth.gt_masks.tensor.byte(),
        }
        for truth in truths
    ]
    results = []
    for name, (config, _) in MODELS.items():
        ours, theirs = build_ours(config, "cpu").train(), trained_theirs(name, size).train()
        calm(ours)
        calm(theirs)
        runs = {
            "torchvision": partial(step, partial(theirs, pictures, targets), still_sgd(theirs)),
            "d2kit": partial(step, partial(ours, ours_input), still_sgd(ours)),
        }
        times = in_turn(runs, args.repeats)
        peaks = {key: {"peak MiB": f"{peak_memory(run, 'cpu'):.0f}"} for key, run in runs.items()}
        results += show(times, "s / step", peaks, model=name)
    return results


def still_sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer of rate 0: random weights do not run away over the repeats."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.0, 0.9)


def trained_theirs(name: str, size: tuple[int, int]) -> torch.nn.Module:
    """Return torchvision's model as it is trained on: frozen as ours, with as many proposals."""
    from torchvision.models.detection import FasterRCNN, MaskRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops import FrozenBatchNorm2d

    backbone = resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3
    )
    kind: type[torch.nn.Module] = MaskRCNN if name.startswith("Mask") else FasterRCNN
    sides = {"min_size": min(size), "max_size": max(size)}
    return kind(backbone, 81, rpn_post_nms_top_n_train=1000, **sides)


def step(losses: Callable[[], Mapping[str, Tensor]], optimizer: torch.optim.Optimizer) -> None:
    """Do one iteration."""
    found = losses()
    optimizer.zero_grad()
    torch.stack(list(found.values())).sum().backward()
    optimizer.step()


def evaluation(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare the way from `Instances` to the table of AP with pycocotools, object by object."""
    from d2kit.evaluation import COCOEvaluator

    size = (480, 640)
    random = torch.Generator().manual_seed(0)
    drawn = [rectangles(100, size, random) for _ in range(min(args.images, 20))]  # 30 MB each
    images = [drawn[i % len(drawn)] for i in range(args.images)]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "truth.json"
        path.write_text(json.dumps(coco_truth(images)))
        name = f"benchmark_{os.getpid()}"
        DatasetCatalog.register(name, list)
        MetadataCatalog.get(name).set(
            json_file=str(path),
            thing_classes=[f"class {i}" for i in range(80)],
            thing_dataset_id_to_contiguous_id={i: i for i in range(80)},
        )
        for masks in MASKS:
            tasks = ("bbox", "segm") if masks else ("bbox",)
            outputs = [
                ({"image_id": i}, {"instances": detections(truth, masks, random)})
                for i, truth in enumerate(images)
            ]

            def ours(tasks: tuple[str, ...] = tasks, outputs: list[Any] = outputs) -> None:
                evaluator = COCOEvaluator(name, tasks=tasks, distributed=False)
                evaluator.reset()
                for sample, output in outputs:
                    evaluator.process([sample], [output])
                evaluator.evaluate()

            theirs = partial(pycocotools_way, path, outputs, tasks)
            with contextlib.redirect_stdout(io.StringIO()):
                times = in_turn({"pycocotools": theirs, "d2kit": ours}, args.repeats)
            unit = f"s / {args.images} images"
            rows += show(times, unit, tasks=" and ".join(tasks), masks=masks)
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    return rows


def detections(truth: Instances, masks: str, random: torch.Generator) -> Instances:
    """Return the objects as detections of random scores, their masks as `MASKS` says."""
    found = Instances(truth.image_size, pred_boxes=truth.gt_boxes, pred_classes=truth.gt_classes)
    found.scores = torch.rand(len(truth), generator=random)
    if masks:
        small = ROIMasks(torch.ones(len(truth), 28, 28), whole_pixels=True)
        found.pred_masks = truth.gt_masks.tensor if masks == "bool" else small
    return found


def coco_truth(images: list[Instances]) -> dict[str, Any]:
    """Return the first 10 objects of each image as COCO's dictionary."""
    annotations: list[dict[str, Any]] = []
    for i, truth in enumerate(images):
        rows = zip(truth.gt_boxes.tensor[:10].tolist(), truth.gt_classes.tolist(), strict=False)
        for (left, top, right, bottom), label in rows:
            one = {"id": len(annotations) + 1, "image_id": i, "category_id": label, "iscrowd": 0}
            one["bbox"] = [left, top, right - left, bottom - top]
            one["area"] = (right - left) * (bottom - top)
            one["segmentation"] = [[left, top, right, top, right, bottom, left, bottom]]
            annotations.append(one)
    height, width = images[0].image_size
    sides = {"height": height, "width": width}
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", **sides} for i in range(len(images))],
        "categories": [{"id": i, "name": f"class {i}"} for i in range(80)],
        "annotations": annotations,
    }


def pycocotools_way(path: Path, outputs: list[Any], tasks: tuple[str, ...]) -> None:
    """Paste (by torchvision) and encode every mask, and score with pycocotools."""
    from pycocotools import mask as rle
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    rows = []
    for sample, output in outputs:
        found = output["instances"]
        masks = found.pred_masks if "segm" in tasks else None
        if isinstance(masks, ROIMasks):
            boxes = found.pred_boxes.tensor
            masks = paste_masks_in_image(masks.tensor[:, None], boxes, found.image_size)[:, 0] > 0.5
        for j, (left, top, right, bottom) in enumerate(found.pred_boxes.tensor.tolist()):
            row = {
                "image_id": sample["image_id"],
                "category_id": int(found.pred_classes[j]),
                "bbox": [left, top, right - left, bottom - top],
                "score": float(found.scores[j]),
            }
            if masks is not None:
                encoded = rle.encode(np.asfortranarray(masks[j].numpy().astype(np.uint8)))
                row["segmentation"] = {
                    "size": encoded["size"],
                    "counts": encoded["counts"].decode(),
                }
            rows.append(row)
    truth = COCO(str(path))
    for task in tasks:
        given = rows
        if task == "segm":  # without boxes: areas are those of the masks
            given = [{k: v for k, v in row.items() if k != "bbox"} for row in rows]
        scored = COCOeval(truth, truth.loadRes(given), task)
        scored.evaluate()
        scored.accumulate()
        scored.summarize()


def data(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare reading, resizing to a short side of 800, flipping and masks from polygons."""
    from pycocotools import mask as rle
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    height, width = 400, 500
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.MASK_ON", True, "INPUT.MASK_FORMAT", "bitmask"])
    cfg.merge_from_list(["INPUT.MIN_SIZE_TRAIN", (800,)])
    mapper = DatasetMapper(cfg, is_train=True)
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    annotations: list[dict[str, Any]] = []
    for x, y, radius in ((120, 110, 80), (300, 200, 100), (400, 300, 60)):
        polygon = np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], 1)
        box = [x - radius, y - radius, x + radius, y + radius]
        one = {"bbox": box, "bbox_mode": 0, "category_id": 0}
        annotations.append({**one, "segmentation": [polygon.reshape(-1).tolist()]})
    change = v2.Compose([v2.Resize(800, antialias=True), v2.RandomHorizontalFlip()])
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "picture.jpg")
        Image.fromarray(drawn_picture(height, width)).save(path, quality=95)
        record = {"file_name": path, "height": height, "width": width, "annotations": annotations}

        def object_by_object() -> None:  # as Detectron2 does it
            picture = np.asarray(Image.open(path).resize((1000, 800), Image.Resampling.BILINEAR))
            torch.as_tensor(np.ascontiguousarray(picture[:, ::-1].transpose(2, 0, 1)))
            for one in annotations:
                polygons = [np.asarray(p) * 2 for p in one["segmentation"]]
                encoded = rle.frPyObjects([p.tolist() for p in polygons], 800, 1000)
                torch.from_numpy(np.ascontiguousarray(rle.decode(rle.merge(encoded))[:, ::-1]))

        def theirs() -> None:
            picture = tv_tensors.Image(v2.functional.pil_to_tensor(Image.open(path)))
            drawn = [
                rle.decode(rle.merge(rle.frPyObjects(one["segmentation"], height, width)))
                for one in annotations
            ]
            masks = tv_tensors.Mask(torch.from_numpy(np.stack(drawn)))
            corners = torch.tensor([one["bbox"] for one in annotations], dtype=torch.float32)
            canvas = (height, width)
            boxes = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=canvas)
            change(picture, {"boxes": boxes, "masks": masks})

        runs = {
            "Pillow, pycocotools": object_by_object,
            "torchvision": theirs,
            "d2kit": lambda: mapper(record),
        }
        times = in_turn(runs, 10 * args.repeats)
    return show(times, "s / picture")


def imports(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare whole processes that import and end."""
    calls = {
        name: partial(subprocess.run, [sys.executable, "-c", code], check=True)
        for name, code in IMPORTS.items()
    }
    return show(in_turn(calls, args.repeats), "s / process")


def rates() -> str:
    """Return what the machine reaches at all."""
    a = torch.rand(2048, 2048)
    b, c = torch.empty_like(a), torch.rand(64 << 20)
    d = torch.empty_like(c)
    multiply = min(in_turn({"": lambda: torch.mm(a, a, out=b)}, 5)[""])
    copy = min(in_turn({"": lambda: d.copy_(c)}, 5)[""])
    return (
        f"this machine multiplies matrices at {2048**3 / multiply / 1e9:.0f} G multiply-adds / s "
        f"and copies {c.numel() * 8 / copy / 1e9:.1f} GB / s, read and written; instructions: "
        f"{torch.backends.cpu.get_cpu_capability()}"
    )


def machine(args: argparse.Namespace) -> str:
    """Return one line that says where and on what the figures were taken."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    models = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    cpu = models[0].split(":")[1].strip() if models else platform.processor()
    used = [one for one in args.device if not why_not(one)]
    names = [cpu if one == "cpu" else torch.cuda.get_device_name(one) for one in used]
    return (
        f"{', '.join(names) or 'nothing measured'}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"size {args.size[0]} x {args.size[1]}, median of {args.repeats}, commit {commit or '?'}"
    )


BENCHMARKS: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
    "inference": inference,
    "train": training,
    "evaluate": evaluation,
    "data": data,
    "import": imports,
}


def benchmark_main(argv: list[str] | None = None) -> None:
    """Run the chosen task."""
    parser = verb_parser("benchmark", ABOUT_BENCHMARK)
    parser.add_argument("--task", choices=tuple(BENCHMARKS), default="inference")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1216), metavar=("H", "W"))
    parser.add_argument("--images", type=int, default=100, help="that --task evaluate scores")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", nargs="+", default=["cpu"], help="e.g. cpu cuda")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--exports", type=Path, nargs="+", default=[], metavar="FOLDER")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    results = exports(args) if args.exports else BENCHMARKS[args.task](args)
    print(f"{machine(args)}\n{rates()}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
