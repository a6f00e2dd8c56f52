"""The Penn-Fudan archive, or a small one of its layout where it is not on this machine."""

import os
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

SHARED = Path(__file__).parents[3] / "shared/datasets/PennFudanPed.zip"


def small_archive(path: Path, images: int = 60) -> Path:
    """Write an archive of noise with two rectangles in each picture."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as bundle:
        for i in range(images):
            mask = np.zeros((20, 30), np.uint8)
            mask[3:9, 4:8] = 1
            mask[10:18, 15:29] = 2
            for folder, suffix, array in (
                ("PNGImages", "", rng.integers(0, 255, (20, 30, 3), np.uint8)),
                ("PedMasks", "_mask", mask),
            ):
                with bundle.open(f"PennFudanPed/{folder}/Ped{i:05d}{suffix}.png", "w") as f:
                    Image.fromarray(array).save(f, "PNG")
    return path


def pennfudan_archive(folder: Path) -> Path:
    """Return the published archive (``$PENNFUDAN_ZIP``, or beside the checkout), or a small one."""
    published = Path(os.environ.get("PENNFUDAN_ZIP") or SHARED)
    return published if published.is_file() else small_archive(folder / "PennFudanPed.zip")
