"""HOTA, IDF1, MOTA and identity switches of tracks, per video and overall.

d2kit evaluate-tracks --ground-truth tracks/video14.json --results output/ward \
                      [--classes patient staff] [--output metrics.json]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tabulate import tabulate

from d2kit.engine import user_errors
from d2kit.evaluation.track_evaluation import METRICS, evaluate_tracks
from d2kit.utils.file_io import atomic_write


@user_errors()
def main(argv: list[str] | None = None) -> None:
    """Evaluate, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        prog="d2kit evaluate-tracks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--ground-truth", type=Path, required=True, help="MOT text, COCO-video JSON, or a folder")
    add("--results", type=Path, required=True, help="tracks.json, MOT text, or a folder")
    add("--classes", nargs="+", default=[], help="classes that count; default: all")
    add("--iou-threshold", type=float, default=0.5, help="least IoU of a match")
    add("--output", type=Path, help="JSON file")
    args = parser.parse_args(argv)
    result = evaluate_tracks(
        args.ground_truth, args.results, classes=args.classes, threshold=args.iou_threshold
    )
    rows = [[name, *values.values()] for name, values in result["videos"].items()]
    rows.append(["overall", *result["overall"].values()])
    print(tabulate(rows, ["video", *METRICS], floatfmt=".1f"))
    if args.output:
        with atomic_write(args.output, "w") as file:
            json.dump(result, file, indent=1)
