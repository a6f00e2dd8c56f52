"""Evaluate published models and put their AP beside the published one.

d2kit verify-zoo COCO-Detection/faster_rcnn_R_50_FPN_1x --data datasets/coco [--images 500]
d2kit verify-zoo --data datasets/coco                      # all that have a published AP

The folder is COCO's: annotations/instances_val2017.json (person_keypoints_val2017.json) and
val2017/. Finished models are kept in verify_zoo.json and not evaluated again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tabulate import tabulate

from d2kit.checkpoint import DetectionCheckpointer
from d2kit.checkpoint.catalog import ZOO_URL
from d2kit.engine import user_errors
from d2kit.utils.file_io import atomic_write, load_json
from d2kit.utils.registry import nearest_names

__all__ = ["PUBLISHED", "main", "parser"]

_BOX = {
    "faster_rcnn_R_50_C4_1x": 35.7,
    "faster_rcnn_R_50_DC5_1x": 37.3,
    "faster_rcnn_R_50_FPN_1x": 37.9,
    "faster_rcnn_R_50_C4_3x": 38.4,
    "faster_rcnn_R_50_DC5_3x": 39.0,
    "faster_rcnn_R_50_FPN_3x": 40.2,
    "faster_rcnn_R_101_C4_3x": 41.1,
    "faster_rcnn_R_101_DC5_3x": 40.6,
    "faster_rcnn_R_101_FPN_3x": 42.0,
    "faster_rcnn_X_101_32x8d_FPN_3x": 43.0,
    "retinanet_R_50_FPN_1x": 37.4,
    "retinanet_R_50_FPN_3x": 38.7,
    "retinanet_R_101_FPN_3x": 40.4,
}
_BOX_SEGM = {
    "mask_rcnn_R_50_C4_1x": (36.8, 32.2),
    "mask_rcnn_R_50_DC5_1x": (38.3, 34.2),
    "mask_rcnn_R_50_FPN_1x": (38.6, 35.2),
    "mask_rcnn_R_50_C4_3x": (39.8, 34.4),
    "mask_rcnn_R_50_DC5_3x": (40.0, 35.9),
    "mask_rcnn_R_50_FPN_3x": (41.0, 37.2),
    "mask_rcnn_R_101_C4_3x": (42.6, 36.7),
    "mask_rcnn_R_101_DC5_3x": (41.9, 37.3),
    "mask_rcnn_R_101_FPN_3x": (42.9, 38.6),
    "mask_rcnn_X_101_32x8d_FPN_3x": (44.3, 39.5),
}
_BOX_KEYPOINTS = {
    "keypoint_rcnn_R_50_FPN_1x": (53.6, 64.0),
    "keypoint_rcnn_R_50_FPN_3x": (55.4, 65.5),
    "keypoint_rcnn_R_101_FPN_3x": (56.4, 66.1),
    "keypoint_rcnn_X_101_32x8d_FPN_3x": (57.3, 66.0),
}
PUBLISHED: dict[str, dict[str, float]] = {
    **{f"COCO-Detection/{name}": {"bbox": ap} for name, ap in _BOX.items()},
    **{
        f"COCO-InstanceSegmentation/{name}": {"bbox": box, "segm": segm}
        for name, (box, segm) in _BOX_SEGM.items()
    },
    **{
        f"COCO-Keypoints/{name}": {"bbox": box, "keypoints": points}
        for name, (box, points) in _BOX_KEYPOINTS.items()
    },
}
"""Published AP on val2017 in percent, by name and task (Detectron2's MODEL_ZOO.md)."""

TORCHVISION = (
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2",
    "keypointrcnn_resnet50_fpn",
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
)
"""Torchvision's models, verified as ``torchvision/<name>``; its weights say their AP."""

RESULTS = "verify_zoo.json"


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    made = argparse.ArgumentParser(
        prog="d2kit verify-zoo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("names", nargs="*", help="of the model zoo; default: all with a known AP")
    made.add_argument("--data", type=Path, required=True, help="folder of COCO 2017")
    made.add_argument("--images", type=int, help="only the first N pictures")
    made.add_argument("--output", type=Path, default=Path("output/verify_zoo"))
    made.add_argument("--mirror", default=ZOO_URL, help="where the weights lie instead")
    made.add_argument("--tolerance", type=float, default=0.1, help="AP points; default 0.1")
    made.add_argument("--opts", nargs="*", default=[], metavar="KEY VALUE", help="config keys")
    return made


def main(argv: list[str] | None = None) -> None:
    """Evaluate each model; write verify_zoo.json and verify_zoo.md; exit 1 where one differs."""
    args = parser().parse_args(argv)
    with user_errors():
        names = [_known(name) for name in args.names] or list(PUBLISHED)
        args.output.mkdir(parents=True, exist_ok=True)
        file = args.output / RESULTS
        done = load_json(file) if file.is_file() else {}
        settings = {
            "images": args.images,
            "data": str(args.data),
            "opts": list(map(str, args.opts)),
        }
        for name in names:
            if done.get(name, {}).get("settings") != settings or "error" in done[name]:
                done[name] = {"settings": settings, **_verify(name, args)}
                with atomic_write(file, "w") as stream:
                    json.dump(done, stream, indent=1)
            print(_line(name, done[name]), flush=True)
        table = _table({name: done[name] for name in names})
        with atomic_write(args.output / "verify_zoo.md", "w") as stream:
            stream.write(table + "\n")
    print(table)
    if any(done[name]["verdict"] in ("differs", "failed") for name in names):
        raise SystemExit(1)


def _known(name: str) -> str:
    name = name.removesuffix(".yaml")
    known = [*PUBLISHED, *(f"torchvision/{model}" for model in TORCHVISION)]
    if name not in known:
        near = nearest_names(name, known) or known[:3]
        raise KeyError(f"no published AP is known for '{name}'; nearest: {', '.join(near)}")
    return name


def _published(name: str) -> dict[str, float]:
    """Return the published AP of each task in percent."""
    folder, _, model = name.partition("/")
    if folder != "torchvision":
        return PUBLISHED[name]
    from torchvision import models

    [metrics] = models.get_model_weights(model).DEFAULT.meta["_metrics"].values()  # type: ignore[attr-defined]
    tasks = {"box_map": "bbox", "mask_map": "segm", "kp_map": "keypoints"}
    return {tasks[key]: float(value) for key, value in metrics.items() if key in tasks}


def _verify(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate one model; a failure is a result too, so that the others are still evaluated."""
    try:
        found = _evaluate(name, args)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        return {"verdict": "failed", "error": f"{type(error).__name__}: {error}"}
    tasks = {
        task: {"published": ap, "found": found[task], "difference": found[task] - ap}
        for task, ap in _published(name).items()
    }
    near = all(abs(task["difference"]) <= args.tolerance for task in tasks.values())
    verdict = "subset" if args.images else "reproduced" if near else "differs"
    return {"verdict": verdict, "tasks": tasks}


def _evaluate(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Download, load and evaluate; return the AP of each task in percent."""
    from d2kit import model_zoo
    from d2kit.engine import DefaultTrainer
    from d2kit.modeling import build_model

    cfg: Any = model_zoo.get_config(f"{name}.yaml", trained=not name.startswith("torchvision/"))
    weights = cfg.MODEL.WEIGHTS.replace(ZOO_URL, args.mirror.rstrip("/") + "/")
    folder = args.output / name.replace("/", "_")
    dataset = _register(
        args.data, "person_keypoints" if cfg.MODEL.KEYPOINT_ON else "instances", args.images, folder
    )
    cfg.merge_from_list(
        ["MODEL.WEIGHTS", weights, "OUTPUT_DIR", str(folder), "DATASETS.TEST", (dataset,)]
    )
    cfg.merge_from_list(args.opts)
    model = build_model(cfg).eval()
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    results = DefaultTrainer.test(cfg, model)
    return {task: float(results[task]["AP"]) for task in _published(name)}


def _register(data: Path, kind: str, images: int | None, folder: Path) -> str:
    """Register val2017, or its first pictures, under a name of its own; return the name."""
    from d2kit.data import DatasetCatalog, MetadataCatalog
    from d2kit.data.datasets import register_coco_instances

    file = data / "annotations" / f"{kind}_val2017.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: --data is the folder of COCO 2017")
    folder.mkdir(parents=True, exist_ok=True)
    if images is not None:
        whole = load_json(file)
        kept = sorted(whole["images"], key=lambda image: image["id"])[:images]
        ids = {image["id"] for image in kept}
        of_them = [a for a in whole["annotations"] if a["image_id"] in ids]
        file = folder / "annotations.json"
        with atomic_write(file, "w") as stream:
            json.dump({**whole, "images": kept, "annotations": of_them}, stream)
    name = f"verify_zoo_{kind}_{images or 'all'}_{data.resolve()}"
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    metadata = {}
    if kind == "person_keypoints":
        known = MetadataCatalog.get("keypoints_coco_2017_val")
        keys = ("keypoint_names", "keypoint_flip_map", "keypoint_connection_rules")
        metadata = {key: known.get(key) for key in keys}
    register_coco_instances(name, metadata, str(file), str(data / "val2017"))
    return name


def _line(name: str, result: dict[str, Any]) -> str:
    if "error" in result:
        return f"{name}: failed: {result['error']}"
    aps = ", ".join(
        f"{task} {x['found']:.2f} (published {x['published']:.1f}, {x['difference']:+.2f})"
        for task, x in result["tasks"].items()
    )
    return f"{name}: {aps}: {result['verdict']}"


def _table(results: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, result in results.items():
        if "error" in result:
            rows.append([name, "", None, None, None, result["verdict"]])
        for task, x in result.get("tasks", {}).items():
            ap = x["published"], round(x["found"], 2), round(x["difference"], 2)
            rows.append([name, task, *ap, result["verdict"]])
    header = ["model", "task", "published AP", "AP here", "difference", "verdict"]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)
