"""Which files are pictures: one set of suffixes, and what is found below some inputs."""

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

__all__ = ["MAX_IMAGE_PIXELS", "IMAGE_SUFFIXES", "ImageFiles", "find_image_files"]

# Refused before anything is allocated. 178,956,970 pixels (512 MiB of RGB) is where Pillow refuses.
MAX_IMAGE_PIXELS = 178_956_970

IMAGE_SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
        *(".ppm", ".pgm", ".pbm", ".pnm", ".webp", ".jp2", ".j2k", ".avif"),
    )
)
"""Suffixes, in lower case, of the formats that `d2kit.data.detection_utils.read_image` reads."""

_HINTS = {".heic": "convert it, for example with pillow-heif", ".svg": "draw it into a PNG first"}
_HINTS[".heif"] = _HINTS[".heic"]


@dataclasses.dataclass
class ImageFiles:
    """What is found below some inputs.

    Attributes:
        files: files to read, in sorted order within each folder, each once.
        bad: (path, reason) of inputs that are not there, and of folders that cannot be read.
        left_out: files in folders that are not tried: hidden ones, and other suffixes.
    """

    files: list[Path] = dataclasses.field(default_factory=list)
    bad: list[tuple[Path, str]] = dataclasses.field(default_factory=list)
    left_out: list[Path] = dataclasses.field(default_factory=list)

    def describe_left_out(self) -> str:
        """Return one line that counts what was left out, by kind; "" where there is nothing."""
        if not self.left_out:
            return ""
        kinds = Counter(
            "hidden" if path.name.startswith(".") else path.suffix.lower() or "without suffix"
            for path in self.left_out
        )
        texts = [
            f"{n} {kind} ({_HINTS[kind]})" if kind in _HINTS else f"{n} {kind}"
            for kind, n in kinds.most_common()
        ]
        return f"{len(self.left_out)} files left out, not images that are read: {', '.join(texts)}"


def find_image_files(inputs: Iterable[str | os.PathLike[str]]) -> ImageFiles:
    """Look for pictures, in folders recursively.

    Args:
        inputs: files, which are tried whatever their suffix, and folders, of which the visible
            files with a suffix of `IMAGE_SUFFIXES` are taken. Links to folders are not followed.
    """
    found = ImageFiles()
    for entry in map(Path, inputs):
        if os.path.isdir(entry):
            _walk(entry, found)
        elif os.path.isfile(entry):
            found.files.append(entry)
        elif os.path.islink(entry):
            found.bad.append((entry, "a link to a file that is not there"))
        else:
            found.bad.append((entry, "no such file or folder"))
    found.files = list(dict.fromkeys(found.files))
    return found


def _walk(folder: Path, found: ImageFiles) -> None:
    def unreadable(error: OSError) -> None:
        found.bad.append((Path(str(error.filename)), f"cannot be read ({error.strerror})"))

    files = []
    for place, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(place, name) for name in names]
    for path in sorted(files):
        if path.name.startswith(".") or path.suffix.lower() not in IMAGE_SUFFIXES:
            found.left_out.append(path)
        elif not os.path.exists(path):
            found.bad.append((path, "a link to a file that is not there"))
        else:
            found.files.append(path)
