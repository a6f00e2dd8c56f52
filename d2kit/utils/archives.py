"""Unpacks archives of others: members are checked before they are written."""

from __future__ import annotations

import errno
import lzma
import shutil
import stat
import unicodedata
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from d2kit.utils.text import one_line

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
