"""Opening of files by path or URL, and writing that survives a crash."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from iopath.common.file_io import HTTPURLHandler, PathHandler
from iopath.common.file_io import PathManager as PathManagerBase

__all__ = ["PathHandler", "PathManager", "atomic_write"]


class ModelZooHandler(PathHandler):
    """Resolves ``detectron2://NAME`` to the public download location of the model zoo."""

    PREFIX = "detectron2://"
    LOCATION = "https://dl.fbaipublicfiles.com/detectron2/"

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _url(self, path: str) -> str:
        return self.LOCATION + path[len(self.PREFIX) :]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        return PathManager.get_local_path(self._url(path), force=force, **kwargs)

    def _open(
        self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any
    ) -> IO[str] | IO[bytes]:
        return PathManager.open(self._url(path), mode, buffering, **kwargs)


PathManager = PathManagerBase()
"""Opens local paths, http(s) URLs (cached downloads) and ``detectron2://`` names."""
PathManager.register_handler(HTTPURLHandler())
PathManager.register_handler(ModelZooHandler())


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file that takes its name only when it is complete.

    The block writes to ``.<name>.<pid>-<random>.tmp`` in the target's folder. At its end the file
    is fsynced and renamed onto `path`; if the block raises, it is removed and `path` is as before.

    Args:
        path: the target, on a local file system; its folder must exist.
        mode: ``"wb"`` or ``"w"`` (UTF-8, newlines unchanged).

    Yields:
        The open file.

    Raises:
        ValueError: if `mode` is another one.
        OSError: if the file cannot be written; on a full disk the message has path and sizes.
    """
    if mode not in ("wb", "w"):
        raise ValueError(f"atomic_write: mode must be 'wb' or 'w', got '{mode}'")
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    text = {"encoding": "utf-8", "newline": ""} if mode == "w" else {}
    try:
        with open(temporary, mode.replace("w", "x"), **text) as file:  # type: ignore[call-overload]
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except BaseException as error:
        size = temporary.stat().st_size if temporary.exists() else 0
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            free = shutil.disk_usage(target.parent).free
            raise OSError(
                errno.ENOSPC,
                f"disk full: wrote {size:,} bytes, {free:,} bytes are free in the folder; "
                "free some space or choose another OUTPUT_DIR",
                str(target),
            ) from error
        raise
