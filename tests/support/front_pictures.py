"""Makes the strip of pictures of the front page from two finished runs, each below 200 kB.

python -m tests.support.front_pictures --photos output/PennFudanPed --ward output/patient_video_demo
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path

import cv2
import numpy as np

import d2kit
from d2kit.cli.visualize import visualize_main
from d2kit.config import CfgNode, get_cfg
from d2kit.data.datasets.validate import read_json
from tests.support.browser import browser

SIZE = (800, 600)
"""Width and height of each picture in pixels."""
MOST = 200_000
"""Bytes of each."""


def save(bgr: np.ndarray, path: Path) -> None:
    """Cut a picture to the shape of the strip, and write it as a JPEG small enough."""
    height, width = bgr.shape[:2]
    scale = max(SIZE[0] / width, SIZE[1] / height)
    kind = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    bgr = cv2.resize(bgr, None, fx=scale, fy=scale, interpolation=kind)
    x = (bgr.shape[1] - SIZE[0]) // 2
    bgr = bgr[: SIZE[1], x : x + SIZE[0]]
    for quality in range(92, 20, -4):
        data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
        if len(data) < MOST:
            path.write_bytes(data)
            print(f"{path}: {len(data) / 1000:.0f} kB")
            return
    raise ValueError(f"{path}: not below {MOST} bytes at any quality")


def photograph(page: Path, path: Path, width: int = 1000) -> None:
    """Save what a browser window of the strip's shape, `width` pixels wide, shows of a page."""
    with tempfile.TemporaryDirectory() as profile, browser(profile) as chromium:
        chromium.open(page.resolve().as_uri(), width, width * SIZE[1] // SIZE[0])
        shot = path.with_suffix(".png")
        chromium.screenshot(shot, whole=False)
    save(cv2.imread(str(shot)), path)
    shot.unlink()


def test_set(cfg: CfgNode) -> tuple[Path, Path]:
    """Return annotation file and image folder of the test set of a run."""
    sets = {name: (Path(file), Path(images)) for name, file, images in cfg.DATASETS.REGISTER_COCO}
    return sets[cfg.DATASETS.TEST[0]]


def overlay(run: Path, path: Path) -> None:
    """Draw what the model finds on the test picture with most objects that is hardly cut."""
    cfg = get_cfg()
    cfg.merge_from_file(str(run / "config.yaml"))
    file, images = test_set(cfg)
    coco = read_json(str(file), str(file))
    counts = Counter(a["image_id"] for a in coco["annotations"])
    shape = SIZE[0] / SIZE[1]
    whole = [i for i in coco["images"] if 0.9 < i["width"] / i["height"] / shape < 1.1]
    name = max(whole or coco["images"], key=lambda i: counts[i["id"]])["file_name"]
    model = d2kit.init_detector(
        str(run / "config.yaml"), str(run / "model_final.pth"), device="cpu", confidence=0.6
    )
    found = model(str(images / name))
    drawn = path.with_suffix(".png")
    d2kit.show_result(str(images / name), found, model.class_names, out_file=str(drawn))
    save(cv2.imread(str(drawn)), path)
    drawn.unlink()


def tracked(run: Path, path: Path) -> None:
    """Take a frame of the video in which the patient is followed."""
    video = cv2.VideoCapture(str(run / "tracked/annotated.mp4"))
    video.set(cv2.CAP_PROP_POS_FRAMES, int(0.6 * video.get(cv2.CAP_PROP_FRAME_COUNT)))
    there, frame = video.read()
    if not there:
        raise FileNotFoundError(f"{run / 'tracked/annotated.mp4'}: no frame; run `make demo`")
    save(frame, path)


def main() -> None:
    """Make all four."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path, required=True, help="run of `d2kit train --data`")
    parser.add_argument("--ward", type=Path, required=True, help="run of `make demo`")
    default = Path(__file__).parents[2] / "docs/pictures"
    parser.add_argument("--output", type=Path, default=default)
    args = parser.parse_args()
    cfg = get_cfg()
    cfg.merge_from_file(str(args.photos / "config.yaml"))
    file, images = test_set(cfg)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "data.html"
        given = ["--json", str(file), "--images", str(images), "--html", str(page), "--count", "12"]
        visualize_main(given)
        photograph(page, args.output / "data_page.jpg", 800)
    overlay(args.photos, args.output / "overlay.jpg")
    tracked(args.ward, args.output / "tracked.jpg")
    photograph(args.photos / "report.html", args.output / "results_page.jpg")


if __name__ == "__main__":
    main()
