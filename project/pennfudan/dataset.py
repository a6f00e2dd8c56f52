"""The Penn-Fudan pedestrian database as COCO JSON: 170 images, one class, instance masks.

Source: Wang, Shi, Song, Shen: Object Detection Combining Recognition and Segmentation, ACCV 2007.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from project.masks import mask_annotation

URL = "https://www.cis.upenn.edu/~jshi/ped_html/PennFudanPed.zip"
TRAIN, TEST = "pennfudan_train", "pennfudan_test"
CLASS_NAMES = ("pedestrian",)
TEST_IMAGES = 50


def download(folder: Path) -> Path:
    """Download the archive into `folder`, unless it is there, and return its path."""
    import torch

    target = folder / "PennFudanPed.zip"
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL, str(target))
        except OSError as error:
            raise OSError(
                f"could not download {URL} ({error}); fetch it by other means and call again "
                f"with --zip FILE"
            ) from error
    return target


def prepare(archive: Path, root: Path, seed: int = 1) -> dict[str, int]:
    """Unpack the database and write ``train.json`` and ``test.json`` with RLE masks.

    Args:
        archive: PennFudanPed.zip in its published layout.
        root: output folder.
        seed: seed of the random split; the last 50 of the permutation are the test set.

    Returns:
        Number of images per file name.

    Raises:
        ValueError: the archive holds no ``PennFudanPed/PNGImages`` and ``PedMasks``.
    """
    import torch

    from d2kit.utils.file_io import atomic_write, extract_zip

    extract_zip(archive, root, max_bytes=1 << 30)
    base = root / "PennFudanPed"
    names = sorted(p.stem for p in (base / "PNGImages").glob("*.png"))
    lonely = [n for n in names if not (base / "PedMasks" / f"{n}_mask.png").is_file()]
    if not names or lonely:
        raise ValueError(
            f"{archive}: expected PennFudanPed/PNGImages/X.png with PennFudanPed/PedMasks/"
            f"X_mask.png, got {len(names)} images, without mask: {lonely[:3]}"
        )
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    splits = {"train.json": sorted(order[:-TEST_IMAGES]), "test.json": sorted(order[-TEST_IMAGES:])}
    for file_name, indices in splits.items():
        with atomic_write(root / file_name, "w") as f:
            json.dump(_coco(base, names, indices), f)
    return {file_name: len(indices) for file_name, indices in splits.items()}


def _coco(base: Path, names: list[str], indices: list[int]) -> dict:
    """Return the COCO dict of some images; the image id is the index in the sorted list + 1."""
    images, annotations = [], []
    for index in indices:
        mask = _read_mask(base / "PedMasks" / f"{names[index]}_mask.png")
        height, width = mask.shape
        image = {"id": index + 1, "width": width, "height": height}
        images.append(image | {"file_name": f"PennFudanPed/PNGImages/{names[index]}.png"})
        for value in np.unique(mask[mask > 0]):
            annotation = {"id": len(annotations) + 1, "image_id": index + 1}
            annotations.append(annotation | mask_annotation(mask == value, 1))
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASS_NAMES)]
    return {"categories": categories, "images": images, "annotations": annotations}


def _read_mask(path: Path) -> np.ndarray:
    """Return the (H, W) uint8 instance labels; the palette indices are the labels."""
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image)


def register(root: str | os.PathLike | None = None) -> None:
    """Register ``pennfudan_train`` and ``pennfudan_test``."""
    from d2kit.data.datasets import register_coco_instances
    from project.datasets_root import datasets_root

    folder = datasets_root(root) / "pennfudan"
    for name, file_name in ((TRAIN, "train.json"), (TEST, "test.json")):
        register_coco_instances(
            name, {"thing_classes": list(CLASS_NAMES)}, str(folder / file_name), str(folder)
        )
