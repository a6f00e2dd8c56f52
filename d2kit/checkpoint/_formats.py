"""Reads weight files of every supported kind; makes states of training plain data."""

import pickle
import re
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2kit.checkpoint._verify import read_torch, read_torch_of_mmengine
from d2kit.utils.safe_pickle import load_pickle

__all__ = ["plain_state", "read_checkpoint", "write_safetensors"]

PLAIN = (Tensor, bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
WEIGHT_KEYS = ("model", "state_dict", "model_state")  # Detectron2, Lightning and timm, pycls


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
        ValueError: if the file is damaged, of another kind, or wants to run code.
    """
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


def _from_pickle(data: Any, path: Path) -> dict[str, Any]:
    """Bring the content of a zoo pickle into our form."""
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a dict, got {type(data).__name__}")
    if isinstance(data.get("model"), dict):
        data["model"] = {name: _as_array(value) for name, value in data["model"].items()}
        return data
    blobs = data["blobs"] if isinstance(data.get("blobs"), dict) else data
    weights = {k: v for k, v in blobs.items() if isinstance(v, np.ndarray)}
    weights = {k: v for k, v in weights.items() if not k.endswith("_momentum")}
    if not weights:
        raise ValueError(f"{path}: no arrays found; is it a file of weights?")
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _as_array(value: Any) -> Any:
    """Undo NumPy's turning an array without axes into a number."""
    return np.asarray(value) if isinstance(value, np.generic) else value


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error})") from error


def write_safetensors(state: Mapping[str, Tensor]) -> bytes:
    """Return the content of a safetensors file; tensors that share memory are written in full."""
    from safetensors.torch import save

    copies = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    pointers: set[int] = set()
    for name, tensor in copies.items():
        if tensor.data_ptr() in pointers:
            copies[name] = tensor.clone()
        pointers.add(tensor.data_ptr())
    return save(copies, metadata={"format": "pt"})


def plain_state(value: Any, where: str) -> Any:
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
