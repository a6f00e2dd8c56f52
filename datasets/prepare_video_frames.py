#!/usr/bin/env python3
"""Extract frames of videos for annotation; they keep the name of their video.

prepare_video_frames.py a.mp4 b.mov FOLDER --output data/frames [--every 15 | --fps 2]

Writes OUTPUT/frames/VIDEO/000123.jpg and OUTPUT/frames.json (COCO format without annotations).
After annotation, `tools/split_data.py annotated.json --group video` keeps videos on one side.

Exit codes: 0 all videos; 1 a mistake, or a video that could not be read (it is listed, the others
are written).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tabulate import tabulate
from tqdm import tqdm

from d2kit.engine import user_errors
from d2kit.utils.text import one_line
from d2kit.video.sources import extract_frames

SUFFIXES = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".ts", ".3gp"}


def find_videos(inputs: list[Path]) -> list[Path]:
    """Return the video files named by `inputs`, folders searched recursively."""
    found: list[Path] = []
    for entry in inputs:
        if entry.is_dir():
            found += sorted(
                p
                for p in entry.rglob("*")
                if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file()
            )
        elif entry.is_file():
            found.append(entry)
        else:
            raise FileNotFoundError(f"{entry}: no such file or folder")
    if not found:
        raise FileNotFoundError(f"no video ({', '.join(sorted(SUFFIXES))}) in {inputs}")
    return found


def main() -> None:
    """Extract and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("videos", type=Path, nargs="+", help="files or folders")
    parser.add_argument("--output", type=Path, required=True)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--every", type=int, default=1, help="every N-th frame (default 1)")
    how.add_argument(
        "--fps", type=float, help="pictures per second, by the time stamps of the file"
    )
    parser.add_argument("--quality", type=int, default=95, help="of the JPEG files")
    args = parser.parse_args()
    with user_errors():
        with tqdm(desc="writing frames", unit="frame") as bar:
            found = extract_frames(
                find_videos(args.videos),
                args.output,
                every=args.every,
                fps=args.fps,
                quality=args.quality,
                progress=bar.update,
            )
        rows = []
        for video in found["videos"]:
            count = sum(im["video_id"] == video["id"] for im in found["images"])
            state = one_line(video["problem"] or "complete")
            rows.append([one_line(video["name"]), video["frames"], count, state])
        print(tabulate(rows, ["video", "frames", "written", "state"], tablefmt="github"))
        print(f"\nwritten: {args.output / 'frames.json'}")
        unread = [one_line(v["file_name"]) for v in found["videos"] if not v["frames"]]
        if unread:
            sys.exit(f"{len(unread)} of {len(rows)} videos could not be read: {', '.join(unread)}")


if __name__ == "__main__":
    main()
