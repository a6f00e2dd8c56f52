"""Run a model: on pictures and folders, and on a video, in which it follows objects."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
from tabulate import tabulate
from tqdm import tqdm

from d2kit.cli import verb_parser
from d2kit.config import CfgNode
from d2kit.engine import user_errors
from d2kit.export import is_exported, read_config
from d2kit.modeling.facts import build_facts
from d2kit.predict import Predictor
from d2kit.predict.predictor import check_loaded
from d2kit.predict.run import check_results_file, predict_files, write_coco
from d2kit.utils.file_io import find_image_files
from d2kit.utils.text import one_line
from d2kit.video import (
    BLUR_MODES,
    COMPLETE,
    DAMAGED,
    INTERRUPTED,
    PRESETS,
    TRACKERS,
    Selection,
    VideoOptions,
    start_score,
    track_video,
)

ABOUT_PREDICT = r"""Run a model on images or folders: overlay pictures and COCO JSON.

d2kit predict --config-file run/ --input a.jpg folder/   # a training's folder, its best weights
d2kit predict --config-file run/config.yaml --input a.jpg folder/ [--output predictions] \
              [--confidence-threshold 0.5] [--tile 800] MODEL.WEIGHTS run/model_final.pth
d2kit predict --config-file exported/ --input a.jpg    # a folder of d2kit export
"""


KEY = re.compile(r"[A-Z0-9_]+(\.[A-Z0-9_]+)+")


def parse_predict(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line."""
    parser = verb_parser("predict", ABOUT_PREDICT)
    parser.add_argument(
        "--config-file", required=True, help="YAML file, folder of a training or export"
    )
    parser.add_argument("--input", nargs="+", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("output/predictions"))
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        help="least score of a detection (0.5, or the config key of the model's family in opts)",
    )
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--tile", type=int, help="side in pixels of tiles, for large images")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs")
    args = parser.parse_args(argv)
    # argparse takes all words behind --input for images, also the KEY VALUE pairs
    is_key = [bool(KEY.fullmatch(str(path))) and not os.path.exists(path) for path in args.input]
    first = is_key.index(True) if True in is_key else len(is_key)
    args.opts = [*map(str, args.input[first:]), *args.opts]
    args.input = args.input[:first]
    return args


@user_errors()
def predict_main(argv: list[str] | None = None, register: Callable[[], None] | None = None) -> None:
    """Predict every image; write ``overlays/*.jpg`` and ``predictions.json``.

    A run that was stopped goes on where it was, when it is called again with the same options.

    Args:
        argv: the command line; None: that of the process.
        register: makes datasets known by name, e.g. those of a checkout.

    Raises:
        SystemExit: with code 1, at the end, if an input could not be predicted.
    """
    args = parse_predict(argv)
    cv2.setNumThreads(0)
    if register is not None:
        register()
    cfg = read_config(args.config_file)
    cfg.merge_from_list(args.opts)
    inputs = find_image_files(args.input)
    if not inputs.files:
        reasons = [f"{path}: {reason}" for path, reason in inputs.bad]
        reasons.append(inputs.describe_left_out() or "no image in the inputs")
        raise FileNotFoundError("; ".join(map(one_line, reasons)))
    confidence = args.confidence_threshold
    facts = build_facts(cfg)
    if confidence is None and facts.score_key not in args.opts:
        # what an exported model leaves out cannot come back
        exported = is_exported(cfg.MODEL.WEIGHTS)
        confidence = max(0.5, (facts.score_threshold or 0.0) if exported else 0.0)
    check_results_file(args.output / "predictions.json")
    predictor = Predictor(cfg, batch_size=args.batch_size, tile=args.tile, confidence=confidence)
    check_loaded(predictor.model, cfg.MODEL.WEIGHTS)
    names = predictor.class_names
    stream = predict_files(predictor, inputs.files, args.output)
    results = list(tqdm(stream, desc="predicting", unit="image", total=len(inputs.files)))
    write_coco(results, names, args.output / "predictions.json")
    rows = []
    for result in (result for result in results if not result.error):
        counts = [names[row["category_id"] - 1] for row in result.found]
        summary = ", ".join(f"{counts.count(n)} {one_line(n)}" for n in dict.fromkeys(counts))
        best = max((row["score"] for row in result.found), default=0)
        rows.append([one_line(result.file.name), summary or "nothing", best])
    print(tabulate(rows[:40], ["image", "found", "best score"], floatfmt=".3f"))
    if len(rows) > 40:
        print(f"... and {len(rows) - 40} more images")
    print(f"\noverlays: {args.output / 'overlays'}")
    print(f"COCO JSON: {args.output / 'predictions.json'}")
    if inputs.left_out:
        print(f"\n{one_line(inputs.describe_left_out())}")
        print(f"  {one_line(', '.join(path.name for path in inputs.left_out))}")
    bad = [*inputs.bad, *((r.file, r.error) for r in results if r.error)]
    if bad:
        print(f"\n{len(bad)} inputs without a result:", file=sys.stderr)
        for path, reason in bad:
            print(f"  {one_line(path)}: {one_line(reason)}", file=sys.stderr)
        raise SystemExit(1)


ABOUT_TRACK = r"""Follow everybody through a video: annotated video, tracks, measurements.

d2kit track --config-file output/run/config.yaml --input ward.mp4 --output output/ward \
            MODEL.WEIGHTS output/run/model_final.pth

Again with another tracker, without detecting again:

d2kit track --config-file ... --input ward.mp4 --output output/ward --from-detections \
            --tracker hungarian TRACKER_HEADS.ASSOCIATION mask

Exit codes: 0 all frames; 1 a mistake in the command or a video that cannot be read at all; 3 the
video is damaged, what could be read is tracked; 130 interrupted, what was read is tracked, the same
command goes on.
"""


EXIT_CODES = {COMPLETE: 0, DAMAGED: 3, INTERRUPTED: 130}


def parse_track(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line."""
    parser = verb_parser("track", ABOUT_TRACK)
    add = parser.add_argument
    add("--config-file", required=True, help="YAML file, or folder of an export")
    add("--input", default="", help="video, folder of pictures, or number of a camera")
    add("--output", type=Path, required=True, help="folder for the results")
    add("--tracker", choices=sorted(TRACKERS), help="default: TRACKER_HEADS.TRACKER_NAME")
    add("--stride", type=int, default=1, help="every N-th frame")
    add("--start", type=float, default=0.0, help="seconds of the file's own clock")
    add("--end", type=float, help="seconds of the file's own clock")
    add("--fps", type=float, default=25.0, help="of a folder of pictures")
    add("--batch-size", type=int, default=4, help="frames that are detected at a time")
    add("--from-detections", action="store_true", help="use the stored detections, never detect")
    add("--detections", type=Path, help="the stored detections, if not in --output")
    add("--no-video", action="store_true", help="do not draw: tracks only")
    add("--blur", choices=BLUR_MODES, help="whom to make unrecognisable")
    add("--subject", type=int, help="identity that stays visible with --blur bystanders")
    add("--blur-class", action="append", default=[], help="a class of people; may be repeated")
    add("--keep-frames", action="store_true", help="keep the frames, blurred where --blur says so")
    add("--preset", default="veryfast", choices=PRESETS, help="of x264", metavar="PRESET")
    add("--crf", type=int, default=23, help="of x264: 18 looks lossless, 28 is small")
    add("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs")
    return parser.parse_args(argv)


def build_cfg(args: argparse.Namespace) -> CfgNode:
    """Return the config of a command line."""
    cfg = read_config(args.config_file)
    cfg.merge_from_list(args.opts)
    if args.tracker:
        cfg.TRACKER_HEADS.TRACKER_NAME = TRACKERS[args.tracker]
    return cfg


def options(args: argparse.Namespace) -> VideoOptions:
    """Return the options of a command line."""
    return VideoOptions(
        input=args.input,
        output=args.output,
        selection=Selection(args.stride, args.start, args.end),
        from_detections=args.from_detections or args.detections is not None,
        detections=args.detections,
        batch_size=args.batch_size,
        video=not args.no_video,
        blur=args.blur,
        subject=args.subject,
        blur_classes=tuple(args.blur_class),
        keep_frames=args.keep_frames,
        fps=args.fps,
        preset=args.preset,
        crf=args.crf,
    )


def why_nobody(summary: dict[str, Any], cfg: CfgNode) -> str:
    """Return the sentence that explains 0 identities: what was found, and what a track needs."""
    node = cfg.TRACKER_HEADS
    if not summary["detections"]:
        return (
            "0 identities: the detector found nothing in any frame. A lower score threshold of the "
            "model (MODEL.ROI_HEADS.SCORE_THRESH_TEST), or other weights?"
        )
    start = start_score(cfg)
    keys = f"TRACKER_HEADS.SCORE_THRESH ({node.SCORE_THRESH:g})"
    if start > node.SCORE_THRESH:
        keys += f" and the start of {node.TRACKER_NAME}, in TRACKER_HEADS.PARAMS"
    reason = f"0 identities: the best score of {summary['detections']} detections is "
    reason += f"{summary['best_score']:.4f}; {node.TRACKER_NAME} starts a track at score {start:g}"
    if summary["best_score"] < start:
        return f"{reason}: lower {keys}, or train longer"
    return (
        f"{reason}, and a track needs {node.MIN_TRACK_LENGTH} detections "
        "(TRACKER_HEADS.MIN_TRACK_LENGTH) that overlap from frame to frame"
    )


def report(summary: dict[str, Any], output: Path, cfg: CfgNode) -> None:
    """Print what came out."""
    columns = ["id", "class_name", "first_time_s", "last_time_s", "frames", "mean_score"]
    shown = [track | {"class_name": one_line(track["class_name"])} for track in summary["tracks"]]
    rows = [[track[c] for c in columns] for track in shown[:30]]
    print(tabulate(rows, columns))
    if summary["identities"] > 30:
        print(f"... and {summary['identities'] - 30} more identities")
    print(
        f"\n{summary['frames']} frames ({summary['frames_detected']} detected, "
        f"{summary['frames_from_store']} from the store), {summary['identities']} identities, "
        f"{summary['seconds']:.1f} s: {summary['frames_per_second']:.1f} frames per second\n"
        f"{output}"
    )
    if not summary["identities"]:
        print(why_nobody(summary, cfg))
    if summary["status"] != COMPLETE:
        reasons = [summary["problem"]]
        if summary["damaged_places"]:
            reasons.append(f"{summary['damaged_places']} places could not be decoded")
        why = "; ".join(reason for reason in reasons if reason)
        print(f"{summary['status']}{': ' + why if why else ''}", file=sys.stderr)


def end(stop: threading.Event) -> None:
    """End the run after the frames at hand; at once, when asked again."""
    if stop.is_set():
        raise KeyboardInterrupt
    stop.set()


@user_errors()
def track_main(argv: list[str] | None = None, register: Callable[[], None] | None = None) -> int:
    """Track, print a summary, return the exit code.

    Args:
        argv: the command line; None: that of the process.
        register: makes datasets known by name, e.g. those of a checkout.
    """
    args = parse_track(argv)
    cv2.setNumThreads(0)
    if register is not None:
        register()
    stop = threading.Event()
    numbers = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
    for number in (n for n in numbers if n is not None):
        if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGINT:  # nohup
            signal.signal(number, lambda *_: end(stop))
    cfg = build_cfg(args)
    summary = track_video(cfg, options(args), stop=stop)
    report(summary, args.output, cfg)
    return EXIT_CODES[summary["status"]]
