"""AP of each video (or other group) with bootstrap confidence intervals.

d2kit evaluate-groups --dataset test.json --results run/inference/coco_instances_results.json
    [--group video|folder|FIELD] [--iou-type bbox|segm] [--samples 1000] [--json out.json]
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from d2kit.data.records import read_coco
from d2kit.engine import user_errors
from d2kit.evaluation.groups import ap_by_group, table_of_groups
from d2kit.utils.file_io import atomic_write


def main(argv: list[str] | None = None) -> None:
    """Print the table; write the figures where asked to."""
    parser = argparse.ArgumentParser(
        prog="d2kit evaluate-groups",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dataset", type=Path, required=True, help="COCO JSON with annotations")
    parser.add_argument("--results", type=Path, required=True, help="COCO results JSON")
    parser.add_argument("--group", default="video")
    parser.add_argument("--iou-type", choices=["bbox", "segm"], default="bbox")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    with user_errors():
        figures = ap_by_group(
            read_coco(args.dataset),
            json.loads(args.results.read_text()),
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
