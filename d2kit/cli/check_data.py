"""Check a dataset in COCO format; write a repaired copy; feed the truth to its own evaluation.

d2kit check JSON [--images FOLDER] [--fix OUT.json] [--ground-truth-ap]

Each finding is one line with file, annotation (or image, category) and field. The exit code is 1
where something is wrong; with --fix, where something is wrong with the repaired copy. With --images
it also finds files whose entries have other folders (absolute ones), backslashes or capitals.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from d2kit.curate.checking import Finding, ImageFile, check_dataset, repair_coco, survey_images
from d2kit.data.datasets.validate import read_json
from d2kit.engine import user_errors
from d2kit.evaluation.groups import ground_truth_ap
from d2kit.utils.file_io import atomic_write

LISTED = 20
"""Lines of one kind that are printed one by one."""

ENOUGH = 99.995
"""AP in percent from which rounding alone explains what is missing to 100."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="d2kit check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("json", type=Path, help="COCO annotations")
    parser.add_argument("--images", type=Path, help="image folder: every image is decoded")
    parser.add_argument("--fix", type=Path, metavar="OUT.json", help="write a repaired copy")
    parser.add_argument("--ground-truth-ap", action="store_true", help="must be 100")
    parser.add_argument("--max-lines", type=int, default=1000, help="of a list (default 1000)")
    return parser.parse_args(argv)


def survey(args: argparse.Namespace) -> dict[str, ImageFile] | None:
    """Decode the images, where their folder is given."""
    if args.images is None:
        return None
    if not args.images.is_dir():
        raise FileNotFoundError(f"--images {args.images}: no such folder")
    images = read_json(str(args.json), str(args.json)).get("images")
    images = images if isinstance(images, list) else []
    with tqdm(desc="decoding images", unit="image", total=len(images), disable=None) as bar:
        return survey_images(images, args.images, bar.update)


def grouped(found: Sequence[Finding]) -> list[str]:
    """Return the lines; of many of one field and kind the first ones, and their number."""
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for f in found:
        kind = f.where.partition(" ")[0]
        # numbers and names differ from line to line, the words are the cause
        cause = " ".join(w for w in f.what.split() if w.isalpha())
        groups.setdefault((kind, f.field, cause), []).append(f)
    lines: list[str] = []
    for (kind, field, _), members in groups.items():
        lines += map(str, members[:LISTED])
        if len(members) > LISTED:
            more = len(members) - LISTED
            lines.append(f"... and {more} more of this kind ({len(members)} {kind}s: {field})")
    return lines


def show(found: Sequence[Finding], limit: int) -> int:
    """Print findings, errors first; return the number of errors."""
    errors = [f for f in found if f.level == "error"]
    notes = [f for f in found if f.level != "error"]
    for group, prefix in ((errors, ""), (notes, "note: ")):
        lines = grouped(group)
        print("".join(f"{prefix}{line}\n" for line in lines[:limit]), end="")
        if len(lines) > limit:
            print(f"{prefix}... and {len(lines) - limit} more")
    return len(errors)


@user_errors()
def main(argv: list[str] | None = None) -> int:
    """Return 1 where something is wrong with the file, or with its repaired copy."""
    args = parse(argv)
    files = survey(args)
    found = check_dataset(args.json, args.images, survey=files)
    wrong = show(found, args.max_lines)
    print(f"{args.json}: {wrong} errors, {len(found) - wrong} notes")
    checked = args.json
    if args.fix:
        data = read_json(str(args.json), str(args.json))
        fixed, done = repair_coco(data, str(args.json), files, args.images)
        print("\nrepairs:")
        show(done, args.max_lines)
        with atomic_write(args.fix, "w") as file:
            json.dump(fixed, file, allow_nan=False)
        counts = ", ".join(f"{len(fixed[k])} {k}" for k in ("images", "annotations", "categories"))
        print(f"{args.fix}: {counts}; {len(done)} repairs\n")
        wrong = show(check_dataset(args.fix, args.images, survey=files), args.max_lines)
        print(f"{args.fix}: {wrong} errors")
        checked = args.fix
    if args.ground_truth_ap:
        for kind, ap in ground_truth_ap(checked).items():
            print(f"ground truth as prediction: {kind} AP {ap:.2f}")
            if not ap >= ENOUGH:
                print(
                    f"{checked}: {kind}: expected AP 100, got {ap:.2f}: look for equal or empty "
                    "objects among the lines above"
                )
                wrong += 1
    return int(wrong > 0)
