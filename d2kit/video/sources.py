"""Which source of frames a name means."""

from __future__ import annotations

import os
from pathlib import Path

from d2kit.video.frames import FrameSource, Selection
from d2kit.video.overlay import IMAGE_SUFFIXES, Camera, PictureFolder
from d2kit.video.video_file import VideoFile

__all__ = ["open_source"]


def open_source(name: str, selection: Selection, fps: float = 25.0) -> FrameSource:
    """Open what a name means: a video file, a folder of pictures, or a camera.

    Args:
        name: path; or the number of a camera, or its device (``/dev/video0``).
        selection: which frames.
        fps: frame rate of a folder, which has none of its own.

    Raises:
        FileNotFoundError: if there is nothing of that name.
        ValueError: if it is something else, or has no picture that can be read.
    """
    path = Path(name)
    if name.startswith("/dev/video") or (name.isdigit() and not path.exists()):
        return Camera(name, selection)
    if "://" in name and not path.exists():
        raise ValueError(f"--input {name}: a URL; copy the video to this machine first")
    if path.is_dir():
        return PictureFolder(path, selection, fps)
    if not path.exists():
        raise FileNotFoundError(f"--input {name}: no such file or folder")
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise ValueError(
            f"--input {name}: a still picture; d2kit predict takes pictures, this takes a "
            "video, a folder whose pictures are its frames, or a camera"
        )
    if os.path.getsize(path) == 0:
        raise ValueError(f"--input {name}: the file is empty (0 bytes), expected a video")
    return VideoFile(path, selection)
