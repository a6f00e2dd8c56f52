"""Datasets: check and repair, convert, split."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from d2kit.cli import verb_parser
from d2kit.curate.checking import Finding, ImageFile, check_dataset, repair_coco, survey_images
from d2kit.curate.conversion import CVAT_MARK, READERS, WRITERS
from d2kit.curate.splitting import METHODS, find_leaks, shared_groups, split_coco
from d2kit.data.datasets.validate import read_json
from d2kit.data.records import read_coco
from d2kit.engine import user_errors
from d2kit.evaluation.groups import ground_truth_ap
from d2kit.utils.file_io import OwnFiles, atomic_write, load_json
from d2kit.utils.text import one_line

ABOUT_CHECK = """\
Check a dataset in COCO format; write a repaired copy; feed the truth to its own evaluation.

d2kit check JSON [--images FOLDER] [--fix OUT.json] [--ground-truth-ap]

Each finding is one line with file, annotation (or image, category) and field. The exit code is 1
where something is wrong; with --fix, where something is wrong with the repaired copy. With --images
it also finds files whose entries have other folders (absolute ones), backslashes or capitals.
"""


MADE_BY = "made by d2kit split"
"""Key of "info" of the files that this tool wrote, and may write again."""

MADE_BY_CHECK = "made by d2kit check --fix"
MADE_BY_CONVERT = "made by d2kit convert"
OTHERWISE = "give another output, or --overwrite"
NOT_OURS = f"was not made by this tool: {OTHERWISE}"


def check_target(path: Path, source: Path | None, overwrite: bool, mark: str) -> None:
    """Refuse to replace the file that is read, and one that this tool did not write.

    Args:
        path: of the output.
        source: that is read.
        overwrite: files of others may be replaced, but for `source`.
        mark: key of "info" of the files that this tool wrote, and may write again.

    Raises:
        ValueError: with the file's name, and what to do.
    """
    if source is not None and path.exists() and path.resolve() == source.resolve():
        raise ValueError(
            f"'{path}' is the file that is read, and would be replaced: {OTHERS[mark]}"
        )
    if not path.exists() or overwrite:
        return
    try:
        info = load_json(path).get("info")
    except (ValueError, AttributeError):
        info = None
    if not (isinstance(info, dict) and mark in info):
        raise ValueError(f"'{path}' exists and {NOT_OURS}")


OTHERS = {
    MADE_BY: "give the parts other names (--parts), or --output FOLDER",
    MADE_BY_CHECK: "give --fix another name",
}


def marked(info: object, mark: str) -> dict[str, Any]:
    """Return the entry "info" of a file, with the mark of a tool."""
    return {**(info if isinstance(info, dict) else {}), mark: True}


LISTED = 20
"""Lines of one kind that are printed one by one."""

ENOUGH = 99.995
"""AP in percent from which rounding alone explains what is missing to 100."""


def parse_check(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line."""
    parser = verb_parser("check", ABOUT_CHECK)
    parser.add_argument("json", type=Path, help="COCO annotations")
    parser.add_argument("--images", type=Path, help="image folder: every image is decoded")
    parser.add_argument("--fix", type=Path, metavar="OUT.json", help="write a repaired copy")
    parser.add_argument("--overwrite", action="store_true", help="--fix may replace others' files")
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
        lines = [one_line(line, None, shown=True) for line in grouped(group)]
        print("".join(f"{prefix}{line}\n" for line in lines[:limit]), end="")
        if len(lines) > limit:
            print(f"{prefix}... and {len(lines) - limit} more")
    return len(errors)


@user_errors()
def check_main(argv: list[str] | None = None) -> int:
    """Return 1 where something is wrong with the file, or with its repaired copy."""
    args = parse_check(argv)
    if args.fix:
        check_target(args.fix, args.json, args.overwrite, MADE_BY_CHECK)
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
            fixed["info"] = marked(fixed.get("info"), MADE_BY_CHECK)
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


ABOUT_CONVERT = """\
Convert annotations between COCO JSON, Pascal VOC, YOLO, labelme, CVAT and mask PNGs.

d2kit convert --from labelme --to coco INPUT OUTPUT [--images FOLDER]

INPUT and OUTPUT are a file for coco (.json) and cvat (.xml), else a folder; exports of VIA and
Label Studio, CSV and a folder per class are read only. Images stay where they are: their names are
relative to --images. What the target cannot hold is counted; docs/own_data.md has the layouts.
"""


def convert_main(argv: list[str] | None = None) -> None:
    """Read, write, and tell what was lost."""
    parser = verb_parser("convert", ABOUT_CONVERT)
    parser.add_argument("--from", dest="source", choices=READERS, required=True)
    parser.add_argument("--to", dest="target", choices=WRITERS, required=True)
    parser.add_argument("--images", type=Path, help="image folder: names are relative to it")
    parser.add_argument("--overwrite", action="store_true", help="also files of others")
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args(argv)
    with user_errors():
        if not args.input.exists():
            raise FileNotFoundError(f"'{args.input}' does not exist")
        if args.target != "coco" and args.output.is_file() and args.output.suffix != ".xml":
            raise ValueError(f"'{args.output}' is a file; {args.target} needs a folder")
        if args.target == "coco" and args.output.is_dir():
            raise ValueError(f"'{args.output}' is a folder; coco needs a .json file")
        same = args.output.exists() and args.output.resolve() == args.input.resolve()
        if same and args.source in ("coco", "cvat"):
            raise ValueError(f"'{args.output}' is the input itself; give another output")
        if args.images and not args.images.is_dir():
            raise FileNotFoundError(f"--images {args.images}: no such folder")
        lost: Counter[str] = Counter()
        coco = READERS[args.source](args.input, args.images, lost)
        lost += write_converted(coco, args.target, args.output, overwrite=args.overwrite)
        counts = [f"{len(coco[k])} {k}" for k in ("images", "annotations", "categories")]
        print(f"{args.output}: {', '.join(counts)}")
        for what, count in sorted(lost.items()):
            print(f"not kept: {count} {one_line(what)}")


def write_converted(
    coco: dict[str, Any], target: str, output: Path, *, overwrite: bool
) -> Counter[str]:
    """Write in another format: all files or none, and none of an earlier conversion stays.

    Args:
        coco: what was read.
        target: name of the format.
        output: a file for coco and cvat, else a folder.
        overwrite: files of others may be replaced.

    Returns:
        What the format cannot hold, counted.

    Raises:
        ValueError: a file of others would be replaced.
        OSError: the disk is full; the earlier files are as they were.
    """
    if target == "coco":
        check_target(output, None, overwrite, MADE_BY_CONVERT)
        coco = {**coco, "info": marked(coco.get("info"), MADE_BY_CONVERT)}
        return WRITERS[target](coco, output)
    single = output if output.suffix == ".xml" else None
    folder = output.parent if single and target == "cvat" else output
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=folder) as hidden:
        made = Path(hidden, single.name) if single and target == "cvat" else Path(hidden)
        with named_in(folder, hidden):
            lost = WRITERS[target](coco, made)
        found = sorted(p for p in Path(hidden).rglob("*") if p.is_file())
        names = [p.relative_to(hidden).as_posix() for p in found]
        if single and target == "cvat":
            if single.exists() and not overwrite and CVAT_MARK not in single.read_bytes()[:2000]:
                raise ValueError(f"'{single}' exists and {NOT_OURS}")
            os.replace(made, single)
            return lost
        own = OwnFiles(folder, OTHERWISE, overwrite=overwrite)
        own.check(names)
        own.clear()
        for name, path in zip(names, found, strict=True):
            place = own.claim(name)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)
    return lost


@contextmanager
def named_in(folder: Path, hidden: str) -> Iterator[None]:
    """Let an error of writing name the file by the name that it would have got."""
    try:
        yield
    except OSError as error:
        if error.filename and str(error.filename).startswith(hidden):
            error.filename = str(folder / os.path.relpath(str(error.filename), hidden))
        raise


ABOUT_SPLIT = """\
Split a COCO JSON file into parts, and look for leaks between them.

d2kit split all.json --parts train=0.7 val=0.15 test=0.15 [--method random|stratified]
d2kit split all.json --parts train=0.8 test=0.2 --group video   # no video on both sides
d2kit split --check train.json test.json --images FOLDER [--group video]
"""


def table(parts: dict[str, dict[str, Any]]) -> str:
    """Return images and instances per class of each part."""
    names = {c["id"]: c["name"] for part in parts.values() for c in part["categories"]}
    rows = []
    for name, part in parts.items():
        classes = [a["category_id"] for a in part["annotations"]]
        rows.append([one_line(name), len(part["images"]), *(classes.count(c) for c in names)])
    titles = ["part", "images", *map(one_line, names.values())]
    return tabulate(rows, titles, tablefmt="github")


def check_leaks(
    parts: dict[str, dict[str, Any]], images: Path | None, group: str, threshold: float
) -> int:
    """Print what is on both sides of the split; return how much."""
    shared = shared_groups(parts, group)
    if group == "video":
        shared.pop(".", None)  # images without video and without folder are no video
    for name, owners in list(shared.items())[:20]:
        print(f"{one_line(group)} '{one_line(name)}' is in {one_line(' and '.join(owners))}")
    leaks = []
    if images is not None:
        files = {
            name: [images / im["file_name"] for im in p["images"]] for name, p in parts.items()
        }
        with tqdm(
            desc="comparing images", unit="image", total=sum(map(len, files.values()))
        ) as bar:
            leaks = find_leaks(files, threshold=threshold, progress=bar.update)
        for leak in leaks[:20]:
            both = f"{one_line(leak.first)} {one_line(leak.second)}"
            print(f"look the same ({leak.distance:.1%} of the bits): {both}")
    print(f"\n{len(shared)} groups and {len(leaks)} pairs of images on both sides of a split")
    return len(shared) + len(leaks)


def parse_split(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line."""
    parser = verb_parser("split", ABOUT_SPLIT)
    parser.add_argument("json", type=Path, nargs="?", help="COCO JSON to split")
    parser.add_argument("--parts", nargs="+", default=["train=0.8", "test=0.2"])
    parser.add_argument("--method", choices=METHODS, help="default: stratified; group with --group")
    parser.add_argument("--group", help="video, folder, or a field of the images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder; default: that of the JSON file")
    parser.add_argument("--overwrite", action="store_true", help="also files of others")
    parser.add_argument("--check", nargs="+", type=Path, metavar="JSON", help="only look for leaks")
    parser.add_argument("--images", type=Path, help="image folder, to find near-duplicates")
    parser.add_argument("--threshold", type=float, default=0.1, help="share of differing bits")
    args = parser.parse_args(argv)
    if (args.json is None) == (args.check is None):
        parser.error("give either a JSON file to split, or --check with the parts")
    return args


@user_errors()
def split_main(argv: list[str] | None = None) -> int:
    """Split or check; return 1 where a check found something."""
    args = parse_split(argv)
    if args.check:
        parts = {path.stem: read_coco(path) for path in args.check}
        print(table(parts))
        return int(check_leaks(parts, args.images, args.group or "video", args.threshold) > 0)
    shares = {}
    for text in args.parts:
        name, _, share = text.partition("=")
        if not share.replace(".", "", 1).isdigit():
            raise ValueError(f"--parts {text}: expected NAME=SHARE, e.g. train=0.8")
        shares[name] = float(share)
    method = args.method or ("group" if args.group else "stratified")
    coco = read_coco(args.json)
    parts = split_coco(coco, shares, method=method, group=args.group, seed=args.seed)
    folder = args.output or args.json.parent
    for name in parts:
        check_target(folder / f"{name}.json", args.json, args.overwrite, MADE_BY)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:  # all parts or none: an old one beside a new one would be a leak
        for name, part in parts.items():
            part["info"] = marked(part.get("info"), MADE_BY)
            file = stack.enter_context(atomic_write(folder / f"{name}.json", "w"))
            json.dump(part, file)
            file.flush()
            os.fsync(file.fileno())
    print(table(parts) + "\n")
    found = check_leaks(parts, args.images, args.group or "video", args.threshold)
    if found and method != "group":
        print("--group video keeps the frames of a video together")
    written = ", ".join(one_line(folder / f"{name}.json") for name in parts)
    print(f"written: {written}")
    return 0
