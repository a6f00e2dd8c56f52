"""Downloads of weight files into a cache: atomic, hash-checked, one process at a time."""

import hashlib
import logging
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from d2kit.utils.file_io import atomic_write

__all__ = ["cache_path", "check_hash", "download", "hash_of_url"]

logger = logging.getLogger(__name__)

CHUNK = 1 << 20
TIMEOUT = 30  # seconds without a byte
TORCHVISION_NAME = re.compile(r"-([0-9a-f]{8,64})\.pth$")


def cache_path(url: str) -> Path:
    """Return where the download of `url` is kept: ``$D2KIT_CACHE`` or ``~/.cache/d2kit``."""
    root = Path(os.environ.get("D2KIT_CACHE") or Path.home() / ".cache" / "d2kit")
    parts = urllib.parse.urlsplit(url)
    names = [part for part in parts.path.split("/") if part not in ("", ".", "..")]
    if not names:
        raise ValueError(f"the URL '{url}' names no file")
    return root.joinpath("weights", parts.netloc.replace(":", "_"), *names)


def hash_of_url(url: str) -> str:
    """Return the leading hexadecimal digits of the file's SHA-256 that a URL promises, or "".

    A fragment ``#sha256=<digits>`` promises them, and torchvision's file names carry eight.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.fragment.startswith("sha256="):
        return parts.fragment[len("sha256=") :].lower()
    named = TORCHVISION_NAME.search(parts.path)
    return named.group(1) if named and parts.netloc.endswith("pytorch.org") else ""


def check_hash(path: Path, expected: str) -> bool:
    """Tell whether the SHA-256 of a file starts with `expected`; "" fits every file."""
    if not expected:
        return True
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest().startswith(expected)


@contextmanager
def _exclusive(target: Path) -> Iterator[None]:
    """Let one process at a time, of those on this machine, work on `target`."""
    import portalocker

    lock = target.with_name(f".{target.name}.lock")
    with open(lock, "w", encoding="ascii") as file:
        portalocker.lock(file, portalocker.LockFlags.EXCLUSIVE)
        yield


def download(url: str) -> Path:
    """Return the local copy of the file at `url`, fetching it where the cache lacks it.

    Args:
        url: http or https; a fragment ``#sha256=<digits>`` is checked and not sent.

    Raises:
        ValueError: if the file's hash is not the promised one (nothing is kept).
        OSError: if the file cannot be fetched completely.
    """
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"only http and https are downloaded, got '{url}'")
    target, expected = cache_path(url), hash_of_url(url)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(target):
        if target.exists():
            if check_hash(target, expected):
                return target
            logger.warning("%s in the cache is damaged (SHA-256): fetching it anew", target)
            target.unlink()
        _fetch(url.partition("#")[0], target, expected)
    return target


def _fetch(url: str, target: Path, expected: str) -> None:
    """Copy the answer to a request into `target`, which appears only when complete and checked."""
    from tqdm import tqdm

    logger.info("Downloading %s to %s", url, target)
    request = urllib.request.Request(url, headers={"User-Agent": "d2kit"})
    digest, received = hashlib.sha256(), 0
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer, atomic_write(target) as file:
        promised = answer.headers.get("Content-Length")
        total = int(promised) if promised else None
        with tqdm(total=total, unit="B", unit_scale=True, desc=target.name, mininterval=1) as bar:
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                digest.update(chunk)
                received += len(chunk)
                bar.update(len(chunk))
        if total is not None and received != total:
            raise OSError(f"the connection ended after {received:,} of {total:,} bytes of {url}")
        if not digest.hexdigest().startswith(expected):
            raise ValueError(
                f"{url}: expected a file with SHA-256 {expected}..., got {digest.hexdigest()}; "
                "the file was not kept"
            )
