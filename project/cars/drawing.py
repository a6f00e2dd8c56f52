"""Synthetic pictures of cars from the side, with exact masks, as a function of a seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

WIDTH, HEIGHT = 240, 160
CLASS_NAMES = ("suv", "sedan", "minivan", "convertible")
SPLITS = {"train": 60, "val": 20, "test": 20}

# Outlines in shares of the car's length from the rear bumper (x) and of its height from the ground
# (y up). Glass lies inside the body.
_BODY = {
    "suv": [(0, 0.2), (0, 0.62), (0.03, 0.95), (0.1, 1), (0.6, 1), (0.74, 0.64), (0.97, 0.56),
            (1, 0.2)],
    "sedan": [(0, 0.22), (0, 0.55), (0.14, 0.6), (0.3, 0.95), (0.56, 0.95), (0.73, 0.6),
              (0.97, 0.5), (1, 0.22)],
    "minivan": [(0, 0.2), (0, 0.75), (0.04, 1), (0.56, 1), (0.84, 0.62), (0.98, 0.45), (1, 0.2)],
    "convertible": [(0, 0.22), (0, 0.56), (0.2, 0.6), (0.26, 0.55), (0.56, 0.55), (0.59, 0.58),
                    (0.97, 0.48), (1, 0.22)],
}  # fmt: skip
_GLASS = {
    "suv": [[(0.07, 0.66), (0.1, 0.92), (0.33, 0.92), (0.33, 0.66)],
            [(0.36, 0.66), (0.36, 0.92), (0.58, 0.92), (0.69, 0.66)]],
    "sedan": [[(0.21, 0.62), (0.32, 0.88), (0.42, 0.88), (0.42, 0.62)],
              [(0.45, 0.62), (0.45, 0.88), (0.55, 0.88), (0.67, 0.62)]],
    "minivan": [[(0.05, 0.66), (0.07, 0.92), (0.28, 0.92), (0.28, 0.66)],
                [(0.31, 0.66), (0.31, 0.92), (0.55, 0.92), (0.77, 0.66)]],
    "convertible": [[(0.56, 0.58), (0.5, 0.86), (0.52, 0.87), (0.6, 0.6)]],
}  # fmt: skip
_SHAPE = {  # height over length
    "suv": (0.44, 0.5),
    "sedan": (0.31, 0.36),
    "minivan": (0.42, 0.47),
    "convertible": (0.33, 0.38),
}


def draw_car(kind: str, seed: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Draw one car.

    Args:
        kind: one of `CLASS_NAMES`.
        seed: whatever it is, the same seed gives the same picture.

    Returns:
        (160, 240, 3) uint8 RGB, and the car's mask (160, 240) bool.
    """
    import cv2

    rng = np.random.default_rng(seed)
    image, mask = _street(rng), np.zeros((HEIGHT, WIDTH), np.uint8)
    length = rng.uniform(150, 205)
    height = length * rng.uniform(*_SHAPE[kind])
    left = rng.uniform(12, WIDTH - 12 - length)
    ground = rng.uniform(118, 140)
    flip = rng.random() < 0.5

    def place(points: list[tuple[float, float]]) -> np.ndarray:
        shares = np.array(points)
        x = left + length * (1 - shares[:, 0] if flip else shares[:, 0])
        return np.round(np.stack([x, ground - height * shares[:, 1]], 1) * 16).astype(np.int32)

    paint = rng.uniform(30, 230, 3)
    for target, value in ((image, paint.tolist()), (mask, 1)):
        cv2.fillPoly(target, [place(_BODY[kind])], value, cv2.LINE_AA, 4)
    lower = [(0, 0.2), (0, 0.34), (1, 0.34), (1, 0.2)]
    cv2.fillPoly(image, [place(lower)], (paint * 0.75).tolist(), cv2.LINE_AA, 4)
    glass = (np.array([70, 90, 110]) + rng.uniform(-25, 60)).tolist()
    for pane in _GLASS[kind]:
        cv2.fillPoly(image, [place(pane)], glass, cv2.LINE_AA, 4)
        cv2.fillPoly(mask, [place(pane)], 1, cv2.LINE_AA, 4)
    radius = int(round(16 * height * (0.2 if kind in ("suv", "minivan") else 0.26)))
    for x in (0.2, 0.79):
        center = place([(x, 0.0)])[0] - (0, int(0.8 * radius))
        for target, value in ((image, (26, 26, 28)), (mask, 1)):
            cv2.circle(target, center.tolist(), radius, value, -1, cv2.LINE_AA, 4)
        cv2.circle(image, center.tolist(), radius // 2, (150, 152, 156), -1, cv2.LINE_AA, 4)
    light = rng.uniform(0.75, 1.15) * (1 + 0.15 * np.linspace(-1, 1, WIDTH)[None, :, None])
    noisy = image * light + rng.normal(0, rng.uniform(2, 6), image.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8), mask.astype(bool)


def _street(rng: np.random.Generator) -> np.ndarray:
    """Return a background: sky or wall, houses, a road."""
    import cv2

    image = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    image[:] = rng.uniform(150, 235, 3)
    for x in range(0, WIDTH, 40):
        if rng.random() < 0.7:
            top = int(rng.uniform(10, 80))
            colour = rng.uniform(110, 200, 3).tolist()
            cv2.rectangle(image, (x, top), (x + int(rng.uniform(20, 44)), 100), colour, -1)
    road = int(rng.uniform(92, 112))
    image[road:] = rng.uniform(90, 140)
    image[road : road + 3] = rng.uniform(170, 200)
    return image


def split_counts(count: int) -> dict[str, int]:
    """Return split -> pictures of each class, in the shares of `SPLITS`.

    Args:
        count: pictures of each class, at least 5.

    Raises:
        ValueError: if it is less.
    """
    if count < 5:
        raise ValueError(f"expected at least 5 drawn cars of each class, got {count}")
    held_out = round(0.2 * count)
    return {"train": count - 2 * held_out, "val": held_out, "test": held_out}


def write_synthetic(root: Path, seed: int = 0, counts: dict[str, int] | None = None) -> None:
    """Write pictures as ``ROOT/SPLIT/CLASS/0000.jpg``, the layout that `prepare` reads.

    Args:
        root: output folder.
        seed: of the whole set; splits never share a picture.
        counts: split -> pictures per class.
    """
    import cv2

    for s, (split, count) in enumerate((counts or SPLITS).items()):
        for k, kind in enumerate(CLASS_NAMES):
            folder = root / split / kind
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                rgb, _ = draw_car(kind, (seed, s, k, i))
                path = folder / f"{i:04d}.jpg"
                if not cv2.imwrite(str(path), rgb[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92]):
                    raise OSError(f"could not write {path}: is the disk full?")
