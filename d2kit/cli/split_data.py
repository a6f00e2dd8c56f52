"""Split a COCO JSON file into parts, and look for leaks between them.

d2kit split all.json --parts train=0.7 val=0.15 test=0.15 [--method random|stratified]
d2kit split all.json --parts train=0.8 test=0.2 --group video   # no video on both sides
d2kit split --check train.json test.json --images FOLDER [--group video]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tabulate import tabulate
from tqdm import tqdm

from d2kit.curate.splitting import METHODS, find_leaks, shared_groups, split_coco
from d2kit.data.records import read_coco
from d2kit.engine import user_errors
from d2kit.utils.file_io import atomic_write

MADE_BY = "made by d2kit split"
"""Key of "info" of the files that this tool wrote, and may write again."""


def check_target(path: Path, source: Path, overwrite: bool) -> None:
    """Refuse to replace the file that is split, and one that this tool did not write.

    Raises:
        ValueError: with the file's name, and what to do.
    """
    if path.exists() and path.resolve() == source.resolve():
        raise ValueError(
            f"'{path}' is the file to split, and a part has its name: give the parts other names "
            "(--parts), or --output FOLDER"
        )
    if not path.exists() or overwrite:
        return
    try:
        info = read_coco(path).get("info")
    except ValueError:
        info = None
    if not (isinstance(info, dict) and MADE_BY in info):
        raise ValueError(
            f"'{path}' exists and was not made by this tool: give --output FOLDER, or --overwrite"
        )


def table(parts: dict[str, dict]) -> str:
    """Return images and instances per class of each part."""
    names = {c["id"]: c["name"] for part in parts.values() for c in part["categories"]}
    rows = []
    for name, part in parts.items():
        classes = [a["category_id"] for a in part["annotations"]]
        rows.append([name, len(part["images"]), *(classes.count(c) for c in names)])
    return tabulate(rows, ["part", "images", *names.values()], tablefmt="github")


def check(parts: dict[str, dict], images: Path | None, group: str, threshold: float) -> int:
    """Print what is on both sides of the split; return how much."""
    shared = shared_groups(parts, group)
    if group == "video":
        shared.pop(".", None)  # images without video and without folder are no video
    for name, owners in list(shared.items())[:20]:
        print(f"{group} '{name}' is in {' and '.join(owners)}")
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
            print(f"look the same ({leak.distance:.1%} of the bits): {leak.first} {leak.second}")
    print(f"\n{len(shared)} groups and {len(leaks)} pairs of images on both sides of a split")
    return len(shared) + len(leaks)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="d2kit split",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
def main(argv: list[str] | None = None) -> int:
    """Split or check; return 1 where a check found something."""
    args = parse(argv)
    if args.check:
        parts = {path.stem: read_coco(path) for path in args.check}
        print(table(parts))
        return int(check(parts, args.images, args.group or "video", args.threshold) > 0)
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
        check_target(folder / f"{name}.json", args.json, args.overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        part["info"] = {**(part.get("info") or {}), MADE_BY: True}
        with atomic_write(folder / f"{name}.json", "w") as f:
            json.dump(part, f)
    print(table(parts) + "\n")
    found = check(parts, args.images, args.group or "video", args.threshold)
    if found and method != "group":
        print("--group video keeps the frames of a video together")
    print(f"written: {', '.join(str(folder / f'{name}.json') for name in parts)}")
    return 0
