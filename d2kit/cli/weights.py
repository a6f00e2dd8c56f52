"""Files of models: converted, exported, and published ones evaluated."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

from d2kit import __version__
from d2kit.checkpoint import DetectionCheckpointer
from d2kit.checkpoint.c2_model_loading import LIBRARIES, convert_file
from d2kit.checkpoint.catalog import ZOO_URL, find_weights
from d2kit.cli import verb_parser
from d2kit.config import CfgNode, get_cfg
from d2kit.engine import user_errors
from d2kit.export.backends import FILES, METADATA, RUNNERS, is_exported, read_config, sha256
from d2kit.export.folder import export_model
from d2kit.modeling import build_model
from d2kit.utils.file_io import atomic_write, load_json
from d2kit.utils.names import nearest_names

ABOUT_CONVERT_WEIGHTS = r"""Convert weights between Detectron2, torchvision, MMDetection and d2kit.

d2kit convert-weights model_final.pkl mask_rcnn.pth --to torchvision
d2kit convert-weights mmdet.pth mask_rcnn.safetensors    # d2kit's names, which are Detectron2's
d2kit convert-weights run/model_final.pth served --to d2kit-folder --config-file run/config.yaml

The source is a file, a URL, or a name such as torchvision://maskrcnn_resnet50_fpn; whose names it
has is recognised. The suffix of the target decides its format: .pth, .safetensors or .pkl.
"""


def parse_convert_weights(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line."""
    parser = verb_parser("convert-weights", ABOUT_CONVERT_WEIGHTS)
    parser.add_argument("source")
    parser.add_argument("target", type=Path)
    parser.add_argument("--to", choices=(*LIBRARIES, "d2kit-folder"), default="d2kit")
    parser.add_argument("--config-file", help="of d2kit-folder: the config of the training")
    return parser.parse_args(argv)


@user_errors()
def convert_weights_main(argv: list[str] | None = None) -> None:
    """Convert one file."""
    args = parse_convert_weights(argv)
    if args.to == "d2kit-folder":
        if args.config_file is None:
            raise ValueError("--to d2kit-folder needs --config-file, the config of the training")
        print(write_folder(Path(args.config_file), args.source, args.target))
        return
    print(convert_file(find_weights(args.source), args.target, args.to))


def write_folder(config: Path, weights: str, target: Path) -> str:
    """Write config, weights and metadata of a model that was trained elsewhere into one folder.

    Args:
        config: ``config.yaml`` of the training, also one that Detectron2 dumped.
        weights: file, URL or zoo name; Detectron2's, torchvision's and MMDetection's are read.
        target: folder to write: ``config.yaml``, ``model_final.pth``, ``metadata.json``.

    Returns:
        A sentence on what was done.

    Raises:
        FileNotFoundError: if config or weights cannot be found.
        ValueError: if weights are missing or of another shape than the config's model, or pixel
            statistics and channels do not fit each other.
    """
    if not config.is_file():
        raise FileNotFoundError(f"{config}: no such config")
    cfg = get_cfg()
    cfg.merge_from_file(str(config))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", weights])
    _check_pixels(cfg)
    model = build_model(cfg).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.fill_(float("nan"))  # what the file does not fill stays so
    DetectionCheckpointer(model).load(weights)
    state = model.state_dict()
    unfilled = [n for n, v in state.items() if v.is_floating_point() and bool(v.isnan().all())]
    unfilled = [n for n in unfilled if state[n].numel() and "cell_anchors" not in n]
    if unfilled:
        raise ValueError(
            f"{weights} lacks {len(unfilled)} weights of the model of {config}, or has them in "
            f"another shape, e.g. {', '.join(unfilled[:3])}: is it the config of this training?"
        )
    for name, value in state.items():
        if "cell_anchors" in name:
            value.copy_(before[name])
    target.mkdir(parents=True, exist_ok=True)
    file = target / FILES["d2kit"]
    with atomic_write(file) as stream:
        torch.save({"model": state, "__author__": "d2kit"}, stream)
    cfg.merge_from_list(["MODEL.WEIGHTS", str(file.resolve())])
    metadata = {
        **build_metadata_of(cfg),
        "format": "d2kit",
        "d2kit": __version__,
        "stride_in_1x1": cfg.MODEL.RESNETS.STRIDE_IN_1X1,
        "sha256": {file.name: sha256(file)},
    }
    with atomic_write(target / "config.yaml", "w") as stream:
        stream.write(cfg.dump())
    with atomic_write(target / METADATA, "w") as stream:
        json.dump(metadata, stream, indent=1)
    return f"{target}: config.yaml, {file.name} with {len(state)} weights, {METADATA}"


def _check_pixels(cfg: CfgNode) -> None:
    """Refuse pixel statistics that contradict the channel order or each other."""
    mean, std = list(cfg.MODEL.PIXEL_MEAN), list(cfg.MODEL.PIXEL_STD)
    order = cfg.INPUT.FORMAT
    if order not in ("BGR", "RGB") or len(mean) != 3 or len(std) != 3:
        raise ValueError(
            f"INPUT.FORMAT '{order}' with {len(mean)} values in MODEL.PIXEL_MEAN and {len(std)} in "
            "MODEL.PIXEL_STD: expected BGR or RGB and three values each"
        )
    if min(std) <= 0:
        raise ValueError(f"MODEL.PIXEL_STD: expected positive values, got {std}")
    # ImageNet's mean is 123.7 for red and 103.5 for blue: the wrong order costs some AP silently
    blue, red = (mean[0], mean[2]) if order == "BGR" else (mean[2], mean[0])
    if abs(blue - 123.675) < 1 and abs(red - 103.53) < 1:
        raise ValueError(
            f"MODEL.PIXEL_MEAN {mean} is ImageNet's in the other order than INPUT.FORMAT {order}"
        )


ABOUT_EXPORT = r"""Export to TorchScript, ONNX, torch.export or OpenVINO, checked against the model.

d2kit export --config-file run/ --format onnx --image street.jpg --output exported
d2kit export --config-file run/config.yaml --format onnx --image street.jpg --output exported \
             MODEL.WEIGHTS run/model_final.pth
"""


CALIBRATION = 32
"""Most pictures by which the ranges of activations are measured."""


def export_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    made = verb_parser("export", ABOUT_EXPORT)
    made.add_argument("--config-file", required=True, help="YAML file or name of the model zoo")
    made.add_argument("--format", choices=RUNNERS, default="onnx")
    made.add_argument("--image", type=Path, help="picture with objects; default: a drawn one")
    made.add_argument(
        "--size",
        nargs="+",
        metavar="PIXELS",
        default=["dynamic"],
        help="MIN MAX: sides to resize pictures to; dynamic: those of INPUT.*_SIZE_TEST",
    )
    made.add_argument("--half", action="store_true", help="store weights in 16 bits")
    made.add_argument(
        "--int8",
        type=Path,
        metavar="FOLDER",
        help="compute in 8 bits, by the ranges of activations on the pictures of this folder (32 "
        "are enough); it differs from the model, which is reported and not refused",
    )
    made.add_argument("--output", type=Path, default=Path("output/export"))
    made.add_argument("opts", nargs="*", default=[], metavar="KEY VALUE", help="config keys")
    return made


def export_main(argv: list[str] | None = None) -> None:
    """Export one model; print what was written and how far it is from the original."""
    args, rest = export_parser().parse_known_args(argv)
    size, opts = _split_size(args.size, [*args.opts, *rest])
    with user_errors():
        cfg = _config(args.config_file, size, opts)
        report = export_config(
            cfg,
            args.format,
            args.output,
            image_file=args.image,
            half=args.half,
            int8_folder=args.int8,
        )
    apart = ", ".join(f"{name} {value:.2g}" for name, value in report["worst"].items())
    print(
        f"{args.output / FILES[args.format]}: {len(report['pictures'])} pictures, at most {apart}"
    )
    if args.int8:
        print(
            "8 bits: what they cost tells d2kit train --eval-only --config-file "
            f"{args.output} DATASETS.TEST \"('NAME',)\""
        )
    if not report["detections"] and "sem_seg" not in report["worst"]:
        print("warning: nothing was detected in them: check again with --image and objects in it")


def _split_size(words: list[str], opts: list[str]) -> tuple[tuple[int, int] | None, list[str]]:
    """Return the sides that ``--size`` names, and the KEY VALUE words that followed it."""
    if words[0] == "dynamic":
        return None, [*words[1:], *opts]
    if len(words) < 2 or not all(word.isdigit() for word in words[:2]):
        raise SystemExit(f"error: --size: expected MIN MAX in pixels or dynamic, got {words[:2]}")
    return (int(words[0]), int(words[1])), [*words[2:], *opts]


def _config(name: str, size: tuple[int, int] | None, opts: list[str]) -> CfgNode:
    from d2kit import model_zoo

    cfg = read_config(name if Path(name).exists() else model_zoo.get_config_file(name))
    if is_exported(cfg.MODEL.WEIGHTS):
        raise ValueError(f"{name} is an export already: export the model that it was made of")
    if size is not None:
        cfg.merge_from_list(["INPUT.MIN_SIZE_TEST", size[0], "INPUT.MAX_SIZE_TEST", size[1]])
    cfg.merge_from_list(opts)
    return cfg


def export_config(
    cfg: CfgNode,
    kind: str,
    output: Path,
    *,
    image_file: Path | None = None,
    half: bool = False,
    int8_folder: Path | None = None,
) -> dict[str, Any]:
    """Build the model of a config, load its weights and export it.

    Args:
        cfg: the config; its MODEL.WEIGHTS are loaded.
        kind: of `export_model`.
        output: folder to write; ``config.yaml`` is put beside the model.
        image_file: picture with objects; None: one is drawn.
        half: store weights in 16 bits.
        int8_folder: pictures by which activations are measured, to compute in 8 bits; None: 32.

    Returns:
        See `export_model`.

    Raises:
        ValueError: see `export_model`.
        FileNotFoundError: if picture or weights cannot be found.
    """
    from d2kit.data.detection_utils import build_augmentation, read_image
    from d2kit.predict.predictor import build_loaded_model, check_loaded

    resize = build_augmentation(cfg, is_train=False)[0]

    def to_input(image: np.ndarray) -> torch.Tensor:
        resized = resize.get_transform(image).apply_image(image)
        return torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1), np.float32))

    image = drawn_picture() if image_file is None else read_image(str(image_file), cfg.INPUT.FORMAT)
    calibration: list[np.ndarray] = []
    if int8_folder is not None:
        from d2kit.predict import find_images

        files = find_images([int8_folder])
        chosen = files[:: -(-len(files) // CALIBRATION)]  # spread over the folder
        calibration = [read_image(str(file), cfg.INPUT.FORMAT) for file in chosen]
    model = build_loaded_model(cfg)
    check_loaded(model, cfg.MODEL.WEIGHTS)
    metadata = build_metadata_of(cfg)
    return export_model(
        model,
        kind,
        output,
        image,
        to_input,
        metadata=metadata,
        config=cfg.dump(),
        half=half,
        calibration=calibration,
    )


def build_metadata_of(cfg: CfgNode) -> dict[str, Any]:
    """Return what a user of the exported file needs to know of the config."""
    from d2kit.predict.predictor import build_class_names

    dense = {"RetinaNet": "RETINANET", "FCOS": "FCOS"}.get(cfg.MODEL.META_ARCHITECTURE)
    node = cfg.MODEL[dense] if dense else cfg.MODEL.ROI_HEADS
    proposals = cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork"
    return {
        "meta_architecture": cfg.MODEL.META_ARCHITECTURE,
        "classes": build_class_names(cfg),
        "input_format": cfg.INPUT.FORMAT,
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
        "pixel_mean": list(cfg.MODEL.PIXEL_MEAN),
        "pixel_std": list(cfg.MODEL.PIXEL_STD),
        "score_threshold": None if proposals else node.SCORE_THRESH_TEST,
        "nms_threshold": cfg.MODEL.RPN.NMS_THRESH if proposals else node.NMS_THRESH_TEST,
        "detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
    }


def drawn_picture(height: int = 480, width: int = 640) -> np.ndarray:
    """Return a picture (H, W, 3) uint8 of rectangles, for models whose objects are unknown."""
    random = np.random.default_rng(0)
    image = np.tile(np.linspace(0, 120, width, dtype=np.uint8)[None, :, None], (height, 1, 3))
    for _ in range(20):
        x, y, w, h = random.random(4) * (width * 7 / 8, height * 5 / 6, width / 4, height * 0.3)
        rows, columns = slice(int(y), int(y + h) + 10), slice(int(x), int(x + w) + 10)
        image[rows, columns] = random.integers(0, 255, 3, dtype=np.uint8)
    return image


ABOUT_VERIFY_ZOO = """\
Evaluate published models and put their AP beside the published one.

d2kit verify-zoo COCO-Detection/faster_rcnn_R_50_FPN_1x --data datasets/coco [--images 500]
d2kit verify-zoo --data datasets/coco                      # all that have a published AP

The folder is COCO's: annotations/instances_val2017.json (person_keypoints_val2017.json) and
val2017/. Finished models are kept in verify_zoo.json and not evaluated again.
"""


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


def verify_zoo_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    made = verb_parser("verify-zoo", ABOUT_VERIFY_ZOO)
    made.add_argument("names", nargs="*", help="of the model zoo; default: all with a known AP")
    made.add_argument("--data", type=Path, required=True, help="folder of COCO 2017")
    made.add_argument("--images", type=int, help="only the first N pictures")
    made.add_argument("--output", type=Path, default=Path("output/verify_zoo"))
    made.add_argument("--mirror", default=ZOO_URL, help="where the weights lie instead")
    made.add_argument("--tolerance", type=float, default=0.1, help="AP points; default 0.1")
    made.add_argument("--opts", nargs="*", default=[], metavar="KEY VALUE", help="config keys")
    return made


def verify_zoo_main(argv: list[str] | None = None) -> None:
    """Evaluate each model; write verify_zoo.json and verify_zoo.md; exit 1 where one differs."""
    args = verify_zoo_parser().parse_args(argv)
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
