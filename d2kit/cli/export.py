"""Export a model to TorchScript, ONNX, torch.export or OpenVINO, checked against the original.

d2kit export --config-file run/config.yaml --format onnx --image street.jpg --output exported \
             MODEL.WEIGHTS run/model_final.pth
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d2kit.checkpoint import DetectionCheckpointer
from d2kit.config import CfgNode, get_cfg
from d2kit.engine import user_errors
from d2kit.export.backends import FILES, RUNNERS
from d2kit.export.folder import export_model

__all__ = ["build_metadata_of", "drawn_picture", "export_config", "main", "parser"]


CALIBRATION = 32
"""Most pictures by which the ranges of activations are measured."""


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    made = argparse.ArgumentParser(
        prog="d2kit export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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


def main(argv: list[str] | None = None) -> None:
    """Export one model; print what was written and how far it is from the original."""
    args, rest = parser().parse_known_args(argv)
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

    cfg = get_cfg()
    cfg.merge_from_file(name if Path(name).is_file() else model_zoo.get_config_file(name))
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
    from d2kit.modeling import build_model

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
    model = build_model(cfg).eval()
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
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
