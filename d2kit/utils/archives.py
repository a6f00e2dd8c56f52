"""Unpacks archives of others: members are checked before they are written."""

from __future__ import annotations

import shutil
import stat
import zipfile
from pathlib import Path, PurePosixPath

GIB = 1 << 30


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
        max_ratio: unpacked to packed size above which a member counts as a bomb.

    Returns:
        Paths of the files written, in the archive's order.

    Raises:
        FileNotFoundError: `archive` does not exist.
        ValueError: not a zip file, or a member has an absolute name, ``..``, is a link, or is
            larger than the limits. Nothing is written in that case.
    """
    archive, destination = Path(archive), Path(destination)
    if not archive.is_file():
        raise FileNotFoundError(f"archive {archive} does not exist")
    try:
        with zipfile.ZipFile(archive) as bundle:
            members = [m for m in bundle.infolist() if not m.is_dir()]
            _check(archive, members, max_bytes, max_ratio)
            return [_write(bundle, member, destination) for member in members]
    except zipfile.BadZipFile as error:
        raise ValueError(f"{archive} is not a readable zip archive: {error}") from error


def _check(archive: Path, members: list[zipfile.ZipInfo], max_bytes: int, max_ratio: float) -> None:
    total = 0
    for member in members:
        name = PurePosixPath(member.filename.replace("\\", "/"))
        mode = member.external_attr >> 16
        if name.is_absolute() or ".." in name.parts or ":" in name.parts[0]:
            raise ValueError(f"{archive}: member {member.filename!r} points outside; refused")
        if stat.S_ISLNK(mode):
            raise ValueError(f"{archive}: member {member.filename!r} is a link; refused")
        if member.file_size > 1 << 20 and member.file_size > max_ratio * member.compress_size:
            raise ValueError(
                f"{archive}: member {member.filename!r} unpacks to {member.file_size:,} bytes "
                f"from {member.compress_size:,}; refused as a bomb (limit: {max_ratio} times)"
            )
        total += member.file_size
    if total > max_bytes:
        raise ValueError(f"{archive} unpacks to {total:,} bytes; expected at most {max_bytes:,}")


def _write(bundle: zipfile.ZipFile, member: zipfile.ZipInfo, destination: Path) -> Path:
    target = destination / member.filename.replace("\\", "/")
    target.parent.mkdir(parents=True, exist_ok=True)
    with bundle.open(member) as source, open(target, "wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)
    return target
