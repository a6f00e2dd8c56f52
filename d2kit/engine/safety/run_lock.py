"""One run at a time in an output folder, and a resumed run with the config of its checkpoint."""

from __future__ import annotations

import atexit
import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from d2kit.utils import comm
from d2kit.utils.file_io import atomic_write, remove_leftovers
from d2kit.utils.names import flatten

__all__ = [
    "ConfigRecord",
    "RunLock",
    "config_differences",
    "hold_output_dir",
    "release_output_dir",
    "sole_run",
]


logger = logging.getLogger(__name__)

NAME = ".running"
HEARTBEAT = 10.0  # seconds between two signs of life
LONGEST = 1 << 16  # bytes of a lock file
WATCHED = 2.5 * HEARTBEAT  # seconds for a sign of life from a machine whose clock was ahead
STALE = 60.0  # seconds without one, after which a process on another machine counts as dead


class RunLock:
    """Holds a folder for this process: a file in it names the process and is touched regularly.

    A file left by a dead process does not hold: on this machine the process is looked up, by
    number and time of its start; on another one the file must have been untouched for a minute. One
    that names no process, empty or damaged, is taken over at once.

    Args:
        folder: must exist and be writable.

    Raises:
        BlockingIOError: if another living process holds the folder; nothing is changed.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "start": _start(os.getpid()),
        }
        self._end = threading.Event()
        with _alone(folder):
            other = _read(self.path)
            if other is not None and other != self.owner and _lives(other, self.path):
                raise BlockingIOError(
                    f"OUTPUT_DIR '{folder}' is in use by process {other.get('pid')} on "
                    f"{other.get('host')}; wait for it, stop it, or choose another folder"
                )
            if other is not None:
                logger.warning("Taking over '%s' from %s, which is dead", folder, other)
            if self.path.is_dir() and not self.path.is_symlink():
                raise IsADirectoryError(f"'{self.path}' is a folder; remove it")
            with atomic_write(self.path, "w") as file:  # never seen half-written
                json.dump(self.owner, file)
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()
        atexit.register(self.release)

    def _beat(self) -> None:
        while not self._end.wait(HEARTBEAT):
            with suppress(OSError):
                os.utime(self.path)

    def release(self) -> None:
        """Give the folder free; does nothing in a child that was forked, or if it is free."""
        self._end.set()
        if os.getpid() == self.owner["pid"] and _read(self.path) == self.owner:
            self.path.unlink(missing_ok=True)


class _alone:  # noqa: N801 - used like a function
    """Lets one process of this machine at a time look at a folder's lock and change it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._handle = -1

    def __enter__(self) -> None:
        import portalocker

        with suppress(OSError):  # a system that does not open folders
            self._handle = os.open(self._folder, os.O_RDONLY)
            with suppress(portalocker.LockException):  # a file system without locks
                portalocker.lock(self._handle, portalocker.LockFlags.EXCLUSIVE)

    def __exit__(self, *_: object) -> None:
        if self._handle >= 0:
            os.close(self._handle)


def _read(path: Path) -> dict[str, object] | None:
    """Return who is named in a lock file, {} for nobody; None if there is none."""
    try:
        regular = path.is_file() and path.stat().st_size < LONGEST  # a pipe would be waited for
        if not regular and not os.path.lexists(path):
            return None
        found = json.loads(path.read_text(encoding="utf-8")) if regular else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


def _start(pid: int) -> str:
    """Return when a process was started, in the system's ticks; "" if it is dead or unknown."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return ""
    fields = re.sub(r"^.*\)", "", text, flags=re.DOTALL).split()  # the name may hold anything
    return "" if fields[0] in "ZX" else fields[19]


def _lives(owner: dict[str, object], path: Path) -> bool:
    """Tell whether the process that a lock names is alive."""
    pid, host = owner.get("pid"), owner.get("host")
    if not isinstance(host, str) or type(pid) is not int or not 0 < pid < 1 << 31:
        return False  # complete files only take the name: this is none of ours
    if host != socket.gethostname():
        return _beats(path)
    if Path("/proc/self/stat").exists():
        return bool(_start(pid)) and _start(pid) == owner.get("start")
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _beats(path: Path) -> bool:
    """Tell whether the process of another machine goes on touching its file.

    A time in the future is of a clock that was ahead, and says nothing: then it is watched.
    """
    age = _age(path)
    if age >= 0:
        return age < STALE
    before, end = path.stat().st_mtime_ns, time.monotonic() + WATCHED
    while time.monotonic() < end:
        time.sleep(0.2)
        with suppress(OSError):
            if path.stat().st_mtime_ns != before:
                return True
    return False


def _age(path: Path) -> float:
    """Return for how many seconds a file was untouched, by the clock of its file system."""
    now = path.with_name(f"{NAME}-{os.urandom(8).hex()}")
    try:
        now.write_bytes(b"")
        return now.stat().st_mtime - path.stat().st_mtime
    finally:
        now.unlink(missing_ok=True)


_held: dict[Path, RunLock] = {}


def hold_output_dir(path: str) -> None:
    """Hold an output folder until this process ends, and remove what a killed one left half-done.

    Rank 0 does it for all processes, which must call this together; again it does nothing.

    Args:
        path: the folder; must exist.

    Raises:
        BlockingIOError: on all processes, if another run holds it.
    """
    problem = ""
    folder = Path(path).resolve()
    held = _held.get(folder)
    mine = held is not None and held.owner["pid"] == os.getpid() and held.path.exists()
    if comm.is_main_process() and not mine:
        try:
            _held[folder] = RunLock(folder)
        except BlockingIOError as error:
            problem = str(error)
        else:
            for left in remove_leftovers(folder):
                logger.warning("Removed %s, left by a process that was killed while writing", left)
    problem = comm.all_gather(problem)[0]
    if problem:
        raise BlockingIOError(problem)


def release_output_dir(path: str) -> None:
    """Give a folder free that `hold_output_dir` holds; does nothing otherwise."""
    held = _held.pop(Path(path).resolve(), None)
    if held is not None:
        held.release()


@contextmanager
def sole_run(folder: Path) -> Iterator[None]:
    """Hold an output folder for the time of a block; for runs of one process, such as tracking.

    Args:
        folder: must exist.

    Raises:
        BlockingIOError: if another run holds it, be it one of this process.
    """
    resolved = folder.resolve()
    held = _held.get(resolved)
    if held is not None and held.owner["pid"] == os.getpid() and held.path.exists():
        raise BlockingIOError(
            f"'{folder}' is in use by another run of this process ({os.getpid()}); end it first, "
            "or choose another folder"
        )
    hold_output_dir(str(folder))
    try:
        yield
    finally:
        release_output_dir(str(folder))


_ABSENT = "(no such key)"

# Keys, or the beginnings of keys, that do not change what is trained. A longer training is no
# other one until it comes to the old end; the seed is taken from the checkpoint.
HARMLESS = (
    *("OUTPUT_DIR", "VERSION", "VIS_PERIOD", "TEST.", "DATASETS.TEST", "SEED", "RESUME_CHANGED"),
    *("DATALOADER.NUM_WORKERS", "DATALOADER.MAX_SKIPPED_IMAGES", "SOLVER.MAX_ITER"),
    *("SOLVER.MAX_EPOCHS", "MODEL.WEIGHTS"),
    *(
        "SOLVER.CHECKPOINT_PERIOD",
        "MODEL.DEVICE",
        "MODEL.COMPILE",  # other digits, as of another device
        "SOLVER.AMP.ENABLED",  # the machine decides, as it does the device
        "CUDNN_BENCHMARK",
        "DETERMINISTIC",
        "DETERMINISTIC_STRICT",
        "INPUT.MIN_SIZE_TEST",
    ),
    *("INPUT.MAX_SIZE_TEST", "SOLVER.EARLY_STOPPING", "GLOBAL.HACK", "PREFLIGHT.", "WRITERS."),
)


class ConfigRecord:
    """Keeps a config in checkpoints, and refuses to go on from one of another training.

    Args:
        config: the config as YAML.
        allow: go on nevertheless.
    """

    def __init__(self, config: str, *, allow: bool) -> None:
        self._config = config
        self._allow = allow

    def state_dict(self) -> dict[str, str]:
        """Return the config as YAML."""
        return {"yaml": self._config}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Log the differences from the config of a checkpoint.

        Raises:
            ValueError: if one changes the result, unless that is allowed.
        """
        lines, harmful = config_differences(state_dict["yaml"], self._config)
        if not lines:
            return
        text = "\n  ".join(["the config differs from the checkpoint's:", *lines])
        if harmful and not self._allow:
            raise ValueError(
                f"{text}\nA resumed run would be neither the old training nor the new one. Undo "
                f"the change of {', '.join(harmful)}, choose another OUTPUT_DIR, start without "
                "--resume, or go on nevertheless with RESUME_CHANGED True"
            )
        logger.warning("Resuming although %s", text) if harmful else logger.info("Note: %s", text)


def config_differences(before: str, now: str) -> tuple[list[str], list[str]]:
    """Compare two configs.

    Args:
        before: YAML of the first.
        now: YAML of the second.

    Returns:
        A line for each key that differs, and the keys of those that change what is trained.
    """
    old, new = flatten(yaml.safe_load(before)), flatten(yaml.safe_load(now))
    keys = [key for key in sorted({*old, *new}) if old.get(key, _ABSENT) != new.get(key, _ABSENT)]
    lines = [f"{key}: {old.get(key, _ABSENT)!r} -> {new.get(key, _ABSENT)!r}" for key in keys]
    # a key that one of them lacks came or went with another version of d2kit
    harmful = [k for k in keys if k in old and k in new and not k.startswith(HARMLESS)]
    return lines, harmful
