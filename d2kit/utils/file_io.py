"""Opening of files by path or URL, writing that survives a crash, unpacking of archives."""

from __future__ import annotations

import dataclasses
import errno
import json
import lzma
import os
import re
import shutil
import stat
import threading
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path, PurePosixPath
from typing import IO, Any

from iopath.common.file_io import HTTPURLHandler, PathHandler
from iopath.common.file_io import PathManager as PathManagerBase

from d2kit.utils.text import from_one_line, one_line

__all__ = [
    "PathHandler",
    "PathManager",
    "atomic_write",
    "load_json",
    "remove_leftovers",
]


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


SYNC_PAUSE = 0.003  # seconds between two; shorter writes end before the first
_TEMPORARY = r"\..+\.(\d+)-[0-9a-f]{8}\.tmp"


class ModelZooHandler(PathHandler):
    """Resolves ``detectron2://NAME`` to the public download location of the model zoo."""

    PREFIX = "detectron2://"
    LOCATION = "https://dl.fbaipublicfiles.com/detectron2/"

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _url(self, path: str) -> str:
        return self.LOCATION + path[len(self.PREFIX) :]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: object) -> str:
        return str(PathManager.get_local_path(self._url(path), force=force, **kwargs))

    def _open(
        self, path: str, mode: str = "r", buffering: int = -1, **kwargs: object
    ) -> IO[str] | IO[bytes]:
        found: IO[str] | IO[bytes] = PathManager.open(self._url(path), mode, buffering, **kwargs)
        return found


PathManager = PathManagerBase()
"""Opens local paths, http(s) URLs (cached downloads) and ``detectron2://`` names."""
PathManager.register_handler(HTTPURLHandler())
PathManager.register_handler(ModelZooHandler())


def load_json(path: str | os.PathLike[str], shown: str = "") -> Any:
    """Read a JSON file of others.

    Args:
        path: local path.
        shown: path for messages; empty: `path`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no file, or no JSON in UTF-8; the message has the path, and line and column.
    """
    shown = shown or os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{shown}: there is no such file; expected JSON")
    if not os.path.isfile(path):  # a pipe would be waited for
        kind = "folder" if os.path.isdir(path) else "pipe or device"
        raise ValueError(f"{shown}: is a {kind}; expected a JSON file")
    try:
        with open(path, encoding="utf-8-sig") as file:
            return json.load(file)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{shown}:{error.lineno}:{error.colno}: not valid JSON ({error.msg}); is the file "
            "complete? Restore it from its source"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{shown}: not a text file in UTF-8 ({error})") from error
    except RecursionError as error:
        raise ValueError(f"{shown}: not valid JSON (nested too deeply)") from error
    except ValueError as error:  # an integer of thousands of digits
        raise ValueError(f"{shown}: a number cannot be read ({error})") from error


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def _reaching_the_disk(handle: int) -> Iterator[None]:
    """Let the disk write while the block does: the fsync behind it waits for the rest only.

    Raises:
        OSError: at the end, if the disk refused; the kernel says so only once.
    """
    done = threading.Event()

    def sync() -> None:
        while not done.wait(SYNC_PAUSE):
            os.fsync(handle)

    with ThreadPoolExecutor(1, "fsync") as pool:
        job = pool.submit(sync)
        try:
            yield
        finally:
            done.set()
        job.result()


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file that takes its name only when it is complete.

    The block writes to ``.<name>.<pid>-<random>.tmp`` in the target's folder. At its end the file
    is fsynced and renamed onto `path`; if the block raises, it is removed and `path` is as before.
    The disk begins to write while the block still does, where that takes long.

    Args:
        path: the target, on a local file system; its folder must exist.
        mode: ``"wb"`` or ``"w"`` (UTF-8, newlines unchanged).

    Yields:
        The open file.

    Raises:
        ValueError: if `mode` is another one.
        OSError: if the file cannot be written, with its path; on a full disk with sizes too.
    """
    if mode not in ("wb", "w"):
        raise ValueError(f"atomic_write: mode must be 'wb' or 'w', got '{mode}'")
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    text = {"encoding": "utf-8", "newline": ""} if mode == "w" else {}
    try:
        with open(temporary, mode.replace("w", "x"), **text) as file:  # type: ignore[call-overload]
            with _reaching_the_disk(file.fileno()) if mode == "wb" else nullcontext():
                yield file
                file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except BaseException as error:
        size = temporary.stat().st_size if temporary.exists() else 0
        temporary.unlink(missing_ok=True)
        system = _system_error(error)
        if system is None or system.errno is None:
            raise
        if system.filename is not None and os.fspath(system.filename) != os.fspath(temporary):
            raise  # of another file
        reason = os.strerror(system.errno)
        if system.errno == errno.ENOSPC:
            free = shutil.disk_usage(target.parent).free
            reason = (
                f"disk full: wrote {size:,} bytes, {free:,} bytes are free in the folder; "
                "free some space or choose another OUTPUT_DIR"
            )
        raise OSError(system.errno, reason, str(target)) from error


def _system_error(error: BaseException | None) -> OSError | None:
    """Return the system's refusal behind an error: torch complains of a lost position instead."""
    while error is not None and not isinstance(error, OSError):
        if not isinstance(error, RuntimeError):
            return None
        error = error.__context__
    return error


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove the temporary files of `atomic_write` that killed processes left in a folder.

    Args:
        folder: nobody else may write to it meanwhile; this process may.

    Returns:
        What was removed.
    """
    removed = []
    for path in sorted(folder.glob(".*.tmp")):
        found = re.fullmatch(_TEMPORARY, path.name)
        if found and int(found.group(1)) != os.getpid():
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


OWN = ".made_by_d2kit"
"""A tool's list of the files that it has written into a folder, one name a line."""


class OwnFiles:
    """The files that a tool has written into a folder: it replaces these and touches no others.

    Args:
        folder: of the output; made where it is missing.
        advice: what to do where a file of others is in the way, for the message.
        overwrite: files of others may be replaced.
    """

    def __init__(self, folder: Path, advice: str, *, overwrite: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._advice, self._overwrite = folder, advice, overwrite
        self._list = folder / OWN
        text = self._list.read_text("utf-8", "replace") if self._list.is_file() else ""
        found = (from_one_line(line) for line in text.splitlines())
        # the list may be one of others, and what it names is deleted
        self._mine = {n for n in found if n and not os.path.isabs(n) and ".." not in n.split("/")}

    def check(self, names: Iterable[str]) -> None:
        """Refuse names that files of others have.

        Raises:
            ValueError: with the first of them; nothing is changed.
        """
        if self._overwrite:
            return
        for name in names:
            if name not in self._mine and os.path.lexists(self._folder / name):
                raise ValueError(
                    f"{self._folder / name} exists and was not written by this tool (its list: "
                    f"{self._list}); {self._advice}"
                )

    def clear(self) -> None:
        """Remove what earlier runs have written."""
        for name in sorted(self._mine):
            if not (self._folder / name).is_dir():
                (self._folder / name).unlink(missing_ok=True)
        self._mine = set()
        self._list.write_text("", encoding="utf-8")

    def claim(self, name: str) -> Path:
        """Return the path of a file to write, which is listed first: a killed run knows it too.

        Raises:
            ValueError: as `check`.
        """
        self.check([name])
        if name not in self._mine:
            self._mine.add(name)
            with self._list.open("a", encoding="utf-8") as file:
                file.write(f"{one_line(name, None)}\n")
        return self._folder / name


GIB = 1 << 30
MOST_MEMBERS = 2_000_000
SMALL = 1 << 20  # bytes below which a member alone may be packed as tightly as it likes


def extract_zip(
    archive: str | Path,
    destination: str | Path,
    *,
    max_bytes: int = 8 * GIB,
    max_ratio: float = 200,
) -> list[Path]:
    """Unpack a zip archive below `destination`, refusing members that could do harm.

    Args:
        archive: zip file.
        destination: folder; created where missing.
        max_bytes: unpacked size in bytes above which the archive is refused.
        max_ratio: unpacked to packed size above which a member, or the whole, counts as a bomb.

    Returns:
        Paths of the files written, in the archive's order.

    Raises:
        FileNotFoundError: `archive` does not exist.
        ValueError: not a zip file, or a member has an absolute name, ``..``, control characters,
            a name that another one has, is a link, is encrypted, damaged or larger than the limits.
            Nothing is left of it in that case.
    """
    archive, destination = Path(archive), Path(destination)
    if not archive.is_file():
        raise FileNotFoundError(f"archive {archive} does not exist")
    try:
        with zipfile.ZipFile(archive) as bundle:
            members = [m for m in bundle.infolist() if not m.is_dir()]
            _check(archive, members, max_bytes, max_ratio)
            return _write_all(bundle, members, destination)
    except DAMAGED as error:
        raise ValueError(f"{archive} is not a readable zip archive: {error}") from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # of the disk
            raise
        raise ValueError(
            f"{archive} is not a readable zip archive: a place before its start"
        ) from error


# of zipfile: damaged, compressed in an unknown way, encrypted, cut
DAMAGED = (
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
)


def _write_all(
    bundle: zipfile.ZipFile, members: list[zipfile.ZipInfo], destination: Path
) -> list[Path]:
    """Write the members; those that were not there before are removed if one fails."""
    written: list[Path] = []
    try:
        for member in members:
            written.append(_write(bundle, member, destination))  # noqa: PERF401 kept for `except`
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return written


def _check(archive: Path, members: list[zipfile.ZipInfo], max_bytes: int, max_ratio: float) -> None:
    if len(members) > MOST_MEMBERS:
        raise ValueError(
            f"{archive} has {len(members):,} members; expected at most {MOST_MEMBERS:,}"
        )
    total, seen = 0, set()
    for member in members:
        name = PurePosixPath(member.filename.replace("\\", "/"))
        mode = member.external_attr >> 16
        shown = one_line(member.filename, 80)
        if not name.parts or name.is_absolute() or ".." in name.parts or ":" in name.parts[0]:
            raise ValueError(f"{archive}: member '{shown}' points outside; refused")
        if any(unicodedata.category(c) in ("Cc", "Cs") for c in str(name)) or len(str(name)) > 1000:
            raise ValueError(f"{archive}: member '{shown}' has a name that is none; refused")
        if str(name).casefold() in seen:
            raise ValueError(f"{archive}: member '{shown}' is there twice; refused")
        seen.add(str(name).casefold())
        if stat.S_ISLNK(mode):
            raise ValueError(f"{archive}: member '{shown}' is a link; refused")
        if member.file_size > SMALL and member.file_size > max_ratio * member.compress_size:
            raise ValueError(
                f"{archive}: member '{shown}' unpacks to {member.file_size:,} bytes "
                f"from {member.compress_size:,}; refused as a bomb (limit: {max_ratio} times)"
            )
        total += member.file_size
    if total > max_bytes:
        raise ValueError(f"{archive} unpacks to {total:,} bytes; expected at most {max_bytes:,}")
    size = archive.stat().st_size  # members may share their bytes: the file counts
    if total > SMALL and total > max_ratio * size:
        raise ValueError(
            f"{archive} unpacks to {total:,} bytes from {size:,}; refused as a bomb (limit: "
            f"{max_ratio} times)"
        )


def _write(bundle: zipfile.ZipFile, member: zipfile.ZipInfo, destination: Path) -> Path:
    target = destination / member.filename.replace("\\", "/")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with bundle.open(member) as source, open(target, "wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    return target
