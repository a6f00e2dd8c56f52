"""Reads weight files of every supported kind; makes states of training plain data."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
import pickle
import re
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2kit.checkpoint.catalog import check_hash
from d2kit.utils.safe_pickle import load_pickle

logger = logging.getLogger(__name__)

_NUMPY_MAKERS = ("_reconstruct", "scalar")


@dataclass(frozen=True, order=True)
class _Age:
    """When a checkpoint was made; the larger is the newer one.

    Args:
        run: number of its training among those in the folder, from 1; 0: unknown, older than any.
            A later training is newer, however short it is, and whatever the clock says.
        run_started: when its training first began, seconds of `time.time`; orders only trainings
            without a number, of earlier versions; 0: unknown.
        iteration: index of the iteration done last; -1: unknown.
        modified: time of the file, nanoseconds.
    """

    run: int
    run_started: float
    iteration: int
    modified: int


def read_torch(path: Path, *, mmap: bool = False) -> Any:
    """Load a file of `torch.save` onto the CPU, admitting tensors and plain values only."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap or None)


class _Inert:
    """Takes the place of an object of another library: does nothing, whatever is done with it."""

    def __new__(cls, *_: object, **__: object) -> _Inert:
        """Make one, from any arguments."""
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


# MMEngine keeps the history of its log in a checkpoint, under "message_hub".
_MMENGINE_LOG = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in _NUMPY_MAKERS),
    *("numpy.ndarray", "numpy.dtype", "builtins.getattr", "__builtin__.getattr"),
)


def read_torch_of_mmengine(path: Path) -> Any:
    """As `read_torch`, for files with MMEngine's log: nothing of it is imported, called or kept."""
    with torch.serialization.safe_globals([(_Inert, name) for name in _MMENGINE_LOG]):
        data = read_torch(path)
    if isinstance(data, dict):
        data.pop("message_hub", None)
    return data


def damage(path: Path) -> str:
    """Say what is wrong with the content of a checkpoint file; "" if it is intact."""
    try:
        if not zipfile.is_zipfile(path):
            read_torch(path)  # the format before torch 1.6 has no checksums
            return ""
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except Exception as error:  # a damaged archive raises nearly anything
        return f"{type(error).__name__}: {_first_line(error)}"
    return f"the checksum of its record {bad} is wrong" if bad else ""


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]


def _age(path: Path) -> _Age:
    """Return when a checkpoint was made; reads no tensor.

    Raises:
        Exception: of nearly any kind, if it is damaged.
    """
    if not path.is_file():  # a pipe would be waited for
        raise ValueError("not a file")
    if not zipfile.is_zipfile(path):
        raise ValueError("not a complete archive of torch.save")
    data = read_torch(path, mmap=True)
    if not isinstance(data, dict) or "model" not in data:
        raise ValueError("no dict with a key 'model'")
    trainer = data.get("trainer")
    found = data.get("iteration", trainer.get("iteration") if isinstance(trainer, dict) else None)
    started = data.get("run_started")
    run = data.get("run")
    return _Age(
        run if isinstance(run, int) else 0,
        started if isinstance(started, float) and not run else 0.0,
        found if isinstance(found, int) else -1,
        path.stat().st_mtime_ns,
    )


def oldest_first(paths: Iterable[Path]) -> list[Path]:
    """Sort checkpoints as `newest_checkpoint` does; what cannot be read comes before all others."""
    return sorted(paths, key=_age_or_none)


def _age_or_none(path: Path) -> _Age:
    """Return when a checkpoint was made; before all others, if it cannot be read."""
    try:
        return _age(path)
    except Exception:  # see `damage`
        return _Age(-1, -1.0, -1, 0)


def last_run(folder: Path) -> int:
    """Return the highest number of a training that left readable checkpoints in `folder`, or 0."""
    return max([0, *(_age_or_none(path).run for path in folder.glob("*.pth"))])


SET_ASIDE = (
    *("model_best.pth", "model_best_ema.safetensors"),
    *("model_final.pth", "model_final_ema.safetensors"),
)
"""Names under which a training leaves what others take for its result."""


def set_aside(folder: Path, used: str = "") -> list[Path]:
    """Rename the best and final weights of earlier trainings: they are none of the one that begins.

    Args:
        folder: of the output.
        used: weights that the training starts from; they keep their name.

    Returns:
        The new names, such as ``model_best_of_run1.pth``.
    """
    found = [folder / name for name in SET_ASIDE if (folder / name).is_file()]
    found = [path for path in found if not (os.path.exists(used) and path.samefile(used))]
    run, renamed = last_run(folder) if found else 0, []
    for path in found:
        stem, count = f"{path.stem}_of_run{run}", itertools.count(2)
        target = folder / f"{stem}{path.suffix}"
        while target.exists():
            target = folder / f"{stem}_{next(count)}{path.suffix}"
        path.rename(target)
        renamed.append(target)
        logger.info("%s is of an earlier training: renamed to %s", path, target.name)
    return renamed


def newest_checkpoint(folder: Path, trusted: dict[Path, tuple[int, int]]) -> Path | None:
    """Return the newest checkpoint in `folder` that is intact, or None.

    That is the one with the highest iteration, of the training that began last. Each damaged file
    that is met is named in a warning.

    Args:
        folder: holds ``*.pth`` files; need not exist.
        trusted: path -> (size, modification time in ns) of files known to be intact; the one
            returned is added.
    """
    candidates = []
    for path in folder.glob("*.pth") if folder.is_dir() else ():
        try:
            candidates.append((_age(path), path))
        except Exception as error:  # see `damage`
            reason = f"{type(error).__name__}: {_first_line(error)}"
            logger.warning("Checkpoint %s cannot be used (%s)", path, reason)
    for _, path in sorted(candidates, reverse=True):
        status = path.stat()
        mark = (status.st_size, status.st_mtime_ns)
        if trusted.get(path) == mark:
            return path
        problem = damage(path)
        if not problem:
            trusted[path] = mark
            return path
        logger.warning("Checkpoint %s is damaged (%s): using one before", path, problem)
    return None


PLAIN = (Tensor, bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
WEIGHT_KEYS = ("model", "state_dict", "model_state")  # Detectron2, Lightning and timm, pycls
DIGEST = "d2kit_sha256"  # in a .pkl, or the metadata of a .safetensors, that we wrote
LONGEST_HEADER = 64 << 20  # bytes of a safetensors header, about 500,000 tensors
MOST_NUMBERS = 1 << 48  # elements of one tensor
HASHED_NAME = r"-(?=[0-9]*[a-f])([0-9a-f]{8}|[0-9a-f]{64})\.pth"  # not a date


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a ``.pth``, ``.pkl`` or ``.safetensors`` file; nothing in it is executed.

    Args:
        path: a local file. ``.pkl`` is Detectron2's or Caffe2's zoo format; everything else except
            ``.safetensors`` is taken for a file of `torch.save`.

    Returns:
        A dict with "model": name -> tensor or array, and whatever else a training saved.
        "__author__" is "Caffe2" for blobs of Caffe2; "matching_heuristics" is True where names
        must be matched.

    Raises:
        ValueError: if the file is damaged (each that d2kit writes carries checksums), of another
            kind, holds no weights, or wants to run code.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path} is a folder, pipe or device; expected a file of weights")
    _check_name(path)
    found = _read(path)
    if not found["model"]:
        raise ValueError(f"{path} holds no weights: expected tensors by name, got none")
    return found


def _check_name(path: Path) -> None:
    """Compare a file with the digits of its SHA-256 in its name, as torchvision gives them.

    Raises:
        ValueError: if they differ.
    """
    named = re.search(HASHED_NAME, path.name)
    if named is None or not path.is_file():
        return
    if not check_hash(path, named.group(1)):
        raise ValueError(
            f"{path}: its name promises a SHA-256 that begins with {named.group(1)}, which it has "
            "not: the file is damaged; fetch it anew, or rename it if you have changed it yourself"
        )


def _read(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        return {"model": _read_safetensors(path)}
    if path.suffix == ".pkl":
        return _from_pickle(load_pickle(path), path)
    data = _from_torch(path)
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a dict of tensors, got {type(data).__name__}")
    for key in WEIGHT_KEYS:
        if isinstance(data.get(key), Mapping):
            data["model"] = data.pop(key)
            return data
    return {"model": data}


def _from_torch(path: Path) -> Any:
    """Read a file of `torch.save`, or say why it cannot be read."""
    try:
        if not zipfile.is_zipfile(path) and tarfile.is_tarfile(path):
            raise ValueError("a tar archive, the format of 2017")
        if zipfile.is_zipfile(path):
            problem = damage(path)  # torch itself does not look at the checksums
            if problem:
                raise ValueError(problem)
        try:
            return read_torch(path)
        except pickle.UnpicklingError as error:
            if "mmengine." not in str(error):
                raise
            return read_torch_of_mmengine(path)
    except Exception as error:  # damaged files raise nearly anything
        raise ValueError(
            f"{path} is not a readable file of torch.save with tensors and plain values only "
            f"({_reason(error)})"
        ) from error


def _reason(error: Exception) -> str:
    """Return what torch says in one line, the refused global included."""
    text = str(error).strip()
    refused = re.search(r"Unsupported global: GLOBAL (\S+)|unsupported GLOBAL (\S+)", text)
    if refused:
        name = refused.group(1) or refused.group(2)
        return f"it names '{name}', which would run code or is no tensor; nothing was executed"
    return text.partition("\n")[0][:300]


def _from_pickle(data: object, path: Path) -> dict[str, Any]:
    """Bring the content of a zoo pickle into our form."""
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a dict, got {type(data).__name__}")
    if isinstance(data.get("model"), dict):
        data["model"] = {name: _as_array(value) for name, value in data["model"].items()}
        promised = data.pop(DIGEST, None)
        if promised is not None and promised != _digest_of_arrays(data["model"]):
            raise ValueError(
                f"{path} is damaged: its arrays have not the SHA-256 that was written with them; "
                "use another copy"
            )
        return data
    blobs = data["blobs"] if isinstance(data.get("blobs"), dict) else data
    weights = {k: v for k, v in blobs.items() if isinstance(v, np.ndarray)}
    weights = {k: v for k, v in weights.items() if not k.endswith("_momentum")}
    if not weights:
        raise ValueError(f"{path}: no arrays found; is it a file of weights?")
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _digest_of_arrays(arrays: Mapping[str, Any]) -> str:
    """Return `digest_of` the arrays as tensors; "" where they are none."""
    try:
        return digest_of({name: torch.from_numpy(value) for name, value in arrays.items()})
    except (TypeError, ValueError):  # an entry that a flipped bit has turned into something else
        return ""


def _as_array(value: object) -> object:
    """Undo NumPy's turning an array without axes into a number."""
    return np.asarray(value) if isinstance(value, np.generic) else value


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    promised = _check_header(path)
    try:
        weights = load_file(path)
    except (SafetensorError, RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error})") from error
    if promised is not None and promised != digest_of(weights):
        raise ValueError(
            f"{path} is damaged: its tensors have not the SHA-256 that was written with them; use "
            "another copy"
        )
    return weights


def _check_header(path: Path) -> str | None:
    """Check names and shapes of a safetensors file before native code sees them.

    Returns:
        The digest that `write_safetensors` put there; None in files of others.

    Raises:
        ValueError: if the header is damaged or its numbers are out of bounds.
    """
    where = f"{path} is not a readable safetensors file"
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, LONGEST_HEADER):
            raise ValueError(f"{where}: its header says {length:,} bytes, the file has {size:,}")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: its header is no JSON ({str(error)[:200]})") from error
    if not isinstance(header, dict):
        raise ValueError(f"{where}: its header is no object")
    metadata = header.pop("__metadata__", {})
    for name, entry in header.items():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        sound = isinstance(shape, list) and len(shape) <= 32
        sound = sound and all(type(n) is int and 0 <= n <= MOST_NUMBERS for n in shape or ())
        if not sound or math.prod(max(n, 1) for n in shape or ()) > MOST_NUMBERS:
            raise ValueError(f"{where}: tensor {name[:80]!r} has the shape {str(shape)[:80]}")
    digest = metadata.get(DIGEST) if isinstance(metadata, dict) else None
    return digest if isinstance(digest, str) else None


def digest_of(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, types, shapes and content."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_safetensors(state: Mapping[str, Tensor]) -> bytes:
    """Return the content of a safetensors file; tensors that share memory are written in full.

    Its metadata have a SHA-256 of all of it, which `read_checkpoint` checks.
    """
    from safetensors.torch import save

    copies = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    pointers: set[int] = set()
    for name, tensor in copies.items():
        if tensor.data_ptr() in pointers:
            copies[name] = tensor.clone()
        pointers.add(tensor.data_ptr())
    return save(copies, metadata={"format": "pt", DIGEST: digest_of(copies)})


def plain_state(value: object, where: str) -> object:
    """Turn a state into tensors, numbers, text and containers, which load without running code.

    NumPy numbers and arrays are converted; mappings become dicts, named tuples tuples.

    Args:
        value: what some ``state_dict()`` returned.
        where: its place in the checkpoint, for messages.

    Raises:
        TypeError: if something else is in it.
    """
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(value)
    if isinstance(value, Mapping):
        return {key: plain_state(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        kind = next(kind for kind in (list, tuple, set) if isinstance(value, kind))
        return kind(plain_state(item, f"{where}[{i}]") for i, item in enumerate(value))
    raise TypeError(
        f"checkpoint entry {where} is a {type(value).__qualname__}, which cannot be loaded safely; "
        "a state_dict() may hold tensors, numbers, text, and dicts, lists, tuples, sets of them"
    )


def recorded_config(path: Path) -> str:
    """Return the config that a checkpoint of `DefaultTrainer` was trained with, as YAML.

    Args:
        path: a local file.

    Raises:
        ValueError: if the file is damaged, or records no config.
    """
    record = read_checkpoint(path).get("config")
    text = record.get("yaml") if isinstance(record, Mapping) else None
    if not isinstance(text, str):
        raise ValueError(
            f"{path} records no config: only checkpoints of DefaultTrainer do, as .pth; give the "
            "config.yaml of its run"
        )
    return text
