"""Frames from a folder of pictures and from a camera."""

from __future__ import annotations

import logging
import re
import struct
import time
from collections.abc import Collection, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from d2kit.tracking import Sighting
from d2kit.utils.file_io import IMAGE_SUFFIXES
from d2kit.utils.text import one_line
from d2kit.video.video_file import Frame, Selection, SourceInfo, sampled_digest
from d2kit.visualization.canvas import fitted, inside, paste, plate
from d2kit.visualization.drawing import palette

_NEEDS = {".heic": "pillow-heif", ".heif": "pillow-heif"}  # ending -> package that reads it

logger = logging.getLogger(__name__)


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """Return a key by which frame10 comes after frame9."""
    parts = re.split(r"(\d+)", path.name)
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in parts]


def encode_jpeg(image: np.ndarray, quality: int, aspect: float = 1.0) -> bytes:
    """Return a picture as JPEG.

    Args:
        image: (H, W, 3) uint8 BGR.
        quality: 1..100.
        aspect: width of a pixel over its height, written into the file's header (JFIF density).
    """
    import cv2

    done, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise ValueError(f"a picture of shape {image.shape} cannot be written as JPEG")
    jpeg = bytearray(data.tobytes())
    if aspect != 1 and jpeg[6:11] == b"JFIF\0":
        shape = Fraction(aspect).limit_denominator(255)
        # No unit, only a ratio; of densities: of wide pixels there are few, the terms change place.
        jpeg[13:18] = struct.pack(">BHH", 0, shape.denominator, shape.numerator)
    return bytes(jpeg)


class PictureFolder:
    """The pictures of a folder, in natural order of their names, as the frames of a video.

    Pictures that cannot be read are passed over and counted.

    Args:
        path: the folder; not searched further down.
        selection: which frames.
        fps: frame rate.

    Raises:
        ValueError: if there is no picture, or if they differ in size.
    """

    def __init__(self, path: Path, selection: Selection, fps: float) -> None:
        if not 0 < fps <= 1000:
            raise ValueError(f"--fps must be above 0 and at most 1000, got {fps}")
        self._selection = selection
        self.seen, self.problem, self.damaged = 0, "", 0
        # ._x.jpg is what macOS puts beside x.jpg: no picture
        entries = [p for p in path.iterdir() if not p.name.startswith(".")]
        pictures = [p for p in entries if p.suffix.lower() in IMAGE_SUFFIXES]
        self._files = sorted((p for p in pictures if p.is_file()), key=_natural)
        self._left_out = sorted(set(entries) - set(self._files))
        if not self._files:
            raise ValueError(
                f"--input {path}: no picture ({', '.join(sorted(IMAGE_SUFFIXES))}) in the folder; "
                "expected a video, a folder whose pictures are its frames, or a camera"
            )
        width, height = self._common_size(path)
        self.info = SourceInfo(
            name=str(path),
            width=width,
            height=height,
            fps=fps,
            expected=selection.covers(len(self._files), fps),
            bytes=sum(p.stat().st_size for p in self._files),
            content=sampled_digest(self._files),
        )

    def _common_size(self, path: Path) -> tuple[int, int]:
        """Return (width, height) of all pictures, by their headers."""
        from d2kit.data.detection_utils import upright_size

        sizes: dict[tuple[int, int], list[Path]] = {}
        for file in self._files:
            try:
                size = upright_size(file)
            except Exception:  # Pillow raises many types; reading it will say which
                continue
            sizes.setdefault(size, []).append(file)
        if not sizes:
            raise ValueError(
                f"--input {path}: none of the {len(self._files)} pictures in the folder can be read"
            )
        if len(sizes) > 1:
            listed = "; ".join(
                f"{w}x{h}: {len(files)}, for example {files[0].name}"
                for (w, h), files in sorted(sizes.items(), key=lambda item: -len(item[1]))
            )
            raise ValueError(
                f"--input {path}: the pictures differ in size, a video has one ({listed}); put "
                "each size into a folder of its own, or use d2kit predict"
            )
        return next(iter(sizes))

    def __iter__(self) -> Iterator[Frame]:
        """Yield the selected frames."""
        from d2kit.data.detection_utils import read_image

        self.seen, self.problem, self.damaged = 0, "", 0
        selected = 0
        for index, file in enumerate(self._files):
            moment = index / self.info.fps
            if self._selection.end is not None and moment >= self._selection.end:
                break
            self.seen = index + 1
            if moment < self._selection.start:
                continue
            selected += 1
            if (selected - 1) % self._selection.stride:
                continue
            try:
                image = read_image(file, "BGR")
            except (ValueError, OSError) as error:
                self.damaged += 1
                logger.warning("passed over: %s", error)
                continue
            yield Frame(index, moment, image)
        if self.damaged:
            self.problem = f"{self.damaged} pictures could not be read"
        if self._left_out:
            self._tell_left_out()

    def _tell_left_out(self) -> None:
        """Say once, at the end, what of the folder was not looked at."""
        left = self._left_out
        names = ", ".join(one_line(p.name) for p in left[:5]) + (", ..." if len(left) > 5 else "")
        packages = sorted({_NEEDS[p.suffix.lower()] for p in left if p.suffix.lower() in _NEEDS})
        hint = f"; convert HEIC first, with the package {packages[0]}" if packages else ""
        logger.warning("%d entries of the folder left out: %s%s", len(left), names, hint)


class Camera:
    """A camera of this machine; time stamps are seconds since its first frame.

    Args:
        name: its number, or its device.
        selection: which frames.

    Raises:
        ValueError: if it cannot be opened.
    """

    def __init__(self, name: str, selection: Selection) -> None:
        import cv2

        self._selection = selection
        self.seen, self.problem, self.damaged = 0, "", 0
        self._capture = cv2.VideoCapture(int(name) if name.isdigit() else name)
        self._waiting = self._capture.read()
        done, image = self._waiting
        if not done:
            raise ValueError(
                f"--input {name}: no camera of that number gives a picture; is it connected, and "
                "not in use? `ls /dev/video*` lists the devices"
            )
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.info = SourceInfo(
            name=f"camera {name}",
            width=image.shape[1],
            height=image.shape[0],
            fps=fps if 1 <= fps <= 1000 else 25.0,
            expected=selection.covers(None, fps if fps > 0 else 25.0),
            bytes=0,
        )

    def __iter__(self) -> Iterator[Frame]:
        """Yield frames until the selected end, or until it gives no more."""
        began = time.monotonic()
        selected = 0
        waiting: Any = self._waiting
        try:
            while True:
                done, image = waiting or self._capture.read()
                moment = 0.0 if waiting else time.monotonic() - began
                waiting = None
                if self._selection.end is not None and moment >= self._selection.end:
                    return
                if not done:
                    self.problem = f"the camera gave no picture after {self.seen} frames"
                    return
                self.seen += 1
                if moment < self._selection.start:
                    continue
                selected += 1
                if (selected - 1) % self._selection.stride == 0:
                    yield Frame(self.seen - 1, moment, image)
        finally:
            self._capture.release()


_OPACITY = 0.4


def track_color(identity: int) -> tuple[int, int, int]:
    """Return the BGR colour of an identity in [0, 255]: always the same one."""
    red, green, blue = palette(identity)
    return round(blue * 255), round(green * 255), round(red * 255)


def draw_tracks(
    image: np.ndarray,
    sightings: Sequence[Sighting],
    names: Sequence[str],
    time: float,
    *,
    untinted: Collection[int] = (),
) -> None:
    """Draw masks, boxes, identities and the time, in place.

    Args:
        image: (H, W, 3) uint8 BGR, contiguous.
        sightings: the tracks; masks as `MaskPatch`. Interpolated boxes are thin.
        names: of the classes.
        time: of the frame, seconds.
        untinted: identities whose mask is not drawn.
    """
    thick = max(1, round(min(image.shape[:2]) / 400))
    for sighting in sightings:
        shown = sighting.mask is not None and sighting.track_id not in untinted
        if shown and sighting.mask.bits.size:
            _tint(image, sighting, thick)
    for sighting in sightings:
        _box(image, sighting, names, thick)
    _text(image, _clock(time), (4, image.shape[0] - 5), (0, 0, 0), thick)


def _tint(image: np.ndarray, sighting: Sighting, thick: int) -> None:
    import cv2

    patch, color = sighting.mask, track_color(sighting.track_id)
    height, width = patch.bits.shape
    part = image[patch.y : patch.y + height, patch.x : patch.x + width]
    tinted = cv2.addWeighted(part, 1 - _OPACITY, np.full_like(part, color), _OPACITY, 0)
    cv2.copyTo(tinted, patch.bits, part)
    outlines, _ = cv2.findContours(
        patch.bits, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE, offset=(patch.x, patch.y)
    )
    cv2.drawContours(image, outlines, -1, color, thick)


def _box(image: np.ndarray, sighting: Sighting, names: Sequence[str], thick: int) -> None:
    import cv2

    color = track_color(sighting.track_id)
    # coordinates far outside would not fit into the integers of OpenCV
    height, width = image.shape[:2]
    x0, x1 = (round(min(max(v, -9.0), width + 9.0)) for v in sighting.box[::2])
    y0, y1 = (round(min(max(v, -9.0), height + 9.0)) for v in sighting.box[1::2])
    line = thick if sighting.interpolated else 2 * thick
    cv2.rectangle(image, (x0, y0), (x1, y1), color, line)
    name = names[sighting.class_id] if sighting.class_id < len(names) else str(sighting.class_id)
    _text(image, f"{sighting.track_id} {name}", (x0, y0 - 3), color, thick)


def _text(
    image: np.ndarray, text: str, corner: tuple[int, int], color: tuple[int, ...], thick: int
) -> None:
    """Write on a ground of `color`, whose lower left corner is moved into the picture.

    As in pictures: every script for which there is a font.
    """
    size = 10 * thick + 2
    light = 0.114 * color[0] + 0.587 * color[1] + 0.299 * color[2] > 128
    ink = (0, 0, 0) if light else (255, 255, 255)
    ground = (color[2], color[1], color[0])  # plates are RGB, as coloured emoji are
    line = fitted(text, size, image.shape[1])
    picture = plate(line, size, ink, ground, 1.0)[..., [2, 1, 0, 3]]
    height, width = picture.shape[:2]
    place = (corner[0], corner[1] - height + 3)
    x, y = inside(*place, (width, height), (image.shape[1], image.shape[0]))
    paste(image, picture, x, y)


def _clock(time: float) -> str:
    minutes, seconds = divmod(time, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02d}:{seconds:05.2f}"
