r"""Run a model on images or folders: overlay pictures and COCO JSON.

d2kit predict --config-file run/config.yaml --input a.jpg folder/ [--output predictions] \
              [--confidence-threshold 0.5] [--tile 800] MODEL.WEIGHTS run/model_final.pth
d2kit predict --config-file exported/ --input a.jpg    # a folder of d2kit export
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
from tabulate import tabulate
from tqdm import tqdm

from d2kit.engine import user_errors
from d2kit.export import is_exported, read_config
from d2kit.modeling.facts import build_facts
from d2kit.predict import Predictor
from d2kit.predict.run import predict_files, write_coco
from d2kit.utils.file_io import find_image_files
from d2kit.utils.text import one_line

KEY = re.compile(r"[A-Z0-9_]+(\.[A-Z0-9_]+)+")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="d2kit predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", required=True, help="YAML file, or folder of an export")
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
def main(argv: list[str] | None = None, register: Callable[[], None] | None = None) -> None:
    """Predict every image; write ``overlays/*.jpg`` and ``predictions.json``.

    A run that was stopped goes on where it was, when it is called again with the same options.

    Args:
        argv: the command line; None: that of the process.
        register: makes datasets known by name, e.g. those of a checkout.

    Raises:
        SystemExit: with code 1, at the end, if an input could not be predicted.
    """
    args = parse(argv)
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
    predictor = Predictor(cfg, batch_size=args.batch_size, tile=args.tile, confidence=confidence)
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
