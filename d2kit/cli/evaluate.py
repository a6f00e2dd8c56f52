"""Judge results: the page of a run, AP of each group, tracks."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

from tabulate import tabulate

from d2kit.cli import verb_parser
from d2kit.data.records import read_coco
from d2kit.engine import user_errors
from d2kit.evaluation.coco_results import read_coco_results
from d2kit.evaluation.evaluator import stale_results
from d2kit.evaluation.groups import ap_by_group, table_of_groups
from d2kit.evaluation.track_evaluation import METRICS, evaluate_tracks
from d2kit.utils.file_io import atomic_write


def report_parser() -> argparse.ArgumentParser:
    """Return the parser of the verb."""
    found = argparse.ArgumentParser(
        prog="d2kit report",
        description="Write the results page of a run (report.html and README.md in its folder), or "
        "compare two runs on the same test images by paired bootstrap.",
    )
    found.add_argument("run", type=Path, help="OUTPUT_DIR of a training, or folder of an export")
    found.add_argument("other", type=Path, nargs="?", help="of another, to be compared with it")
    found.add_argument("--output", type=Path, metavar="FILE.html", help="where the page goes")
    found.add_argument("--samples", type=int, default=1000, help="of the paired bootstrap")
    return found


def results_of(folder: Path) -> Path:
    """Return the folder with the results: of an export, what its evaluation wrote.

    Raises:
        FileNotFoundError: the export was not evaluated.
    """
    from d2kit.export.backends import EVALUATION, is_exported

    if not is_exported(folder):
        return folder
    if not (folder / EVALUATION).is_dir():
        raise FileNotFoundError(
            f"{folder} is an exported model without results: evaluate it first, d2kit train "
            f"--eval-only --config-file {folder}"
        )
    return folder / EVALUATION


def report_main(argv: list[str] | None = None) -> None:
    """Write the page or print the comparison."""
    args = report_parser().parse_args(argv)
    from d2kit.engine import user_errors
    from d2kit.evaluation.report import compare_runs, write_page, write_report

    with user_errors():
        run = results_of(args.run)
        if args.other is None:
            print(write_report(run, args.output))
            return
        found = compare_runs(run, results_of(args.other), samples=args.samples)
        print(found.text())
        if args.output:
            write_page(args.output, found.page())
            print(args.output)


ABOUT_EVALUATE_GROUPS = """\
AP of each video (or other group) with bootstrap confidence intervals.

d2kit evaluate-groups --dataset test.json --results run/inference/coco_instances_results.json
    [--group video|folder|FIELD] [--iou-type bbox|segm] [--samples 1000] [--json out.json]
"""


def evaluate_groups_main(argv: list[str] | None = None) -> None:
    """Print the table; write the figures where asked to."""
    parser = verb_parser("evaluate-groups", ABOUT_EVALUATE_GROUPS)
    parser.add_argument("--dataset", type=Path, required=True, help="COCO JSON with annotations")
    parser.add_argument("--results", type=Path, required=True, help="COCO results JSON")
    parser.add_argument("--group", default="video")
    parser.add_argument("--iou-type", choices=["bbox", "segm"], default="bbox")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    with user_errors():
        stale = stale_results(args.results, args.dataset)
        if stale:
            print(f"warning: {stale}", file=sys.stderr)
        figures = ap_by_group(
            read_coco(args.dataset),
            read_coco_results(args.results),
            group=args.group,
            iou_type=args.iou_type,
            samples=args.samples,
            confidence=args.confidence,
        )
        print(table_of_groups(figures, args.confidence))
        if args.json:
            plain = {
                name: {k: v if math.isfinite(v) else None for k, v in group.items()}
                for name, group in figures.items()
            }
            with atomic_write(args.json, "w") as f:
                json.dump(plain, f, indent=1)


ABOUT_EVALUATE_TRACKS = """\
HOTA, IDF1, MOTA and identity switches of tracks, per video and overall.

d2kit evaluate-tracks --ground-truth tracks/video14.json --results output/ward \
                      [--classes patient staff] [--output metrics.json]
"""


@user_errors()
def evaluate_tracks_main(argv: list[str] | None = None) -> None:
    """Evaluate, print a table, write JSON."""
    parser = verb_parser("evaluate-tracks", ABOUT_EVALUATE_TRACKS)
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
