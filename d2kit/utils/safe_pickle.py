"""Reads pickles of others without running anything, and pickles what plain pickle refuses."""

from __future__ import annotations

import collections
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np

__all__ = [
    "PicklableWrapper",
    "SafeUnpickler",
    "load_pickle",
]


PLAIN_KINDS = "biufcSU"
OBJECT_KIND = "O"


class _Sealed:
    """A callable that a pickle may call but not change (BUILD would set attributes of a function).

    Args:
        function: what a call runs.
    """

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self._function(*args, **kwargs)

    def __setstate__(self, state: object) -> NoReturn:
        raise pickle.UnpicklingError("the pickle tries to change a function")


class _Dtype:
    """Stands for a `numpy.dtype` while a pickle is read; admits plain kinds only."""

    __slots__ = ("dtype",)

    def __init__(self, spec: str | bytes, align: bool = False, copy: bool = False) -> None:
        text = spec.decode("ascii") if isinstance(spec, bytes) else spec
        if not isinstance(text, str):
            raise pickle.UnpicklingError(f"dtype is described by {type(text).__name__}, not text")
        self.dtype = np.dtype(text)
        if self.dtype.kind not in PLAIN_KINDS + OBJECT_KIND:
            raise pickle.UnpicklingError(f"dtype {text!r} is not a plain number, text or object")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if not isinstance(state, tuple) or len(state) < 5 or any(x is not None for x in state[2:5]):
            raise pickle.UnpicklingError("structured dtypes are not read")
        order: Any = state[1].decode("ascii") if isinstance(state[1], bytes) else state[1]
        if order not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError(f"byte order {order!r} is none of < > = |")
        if order != "|":
            self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stands for a `numpy.ndarray` while a pickle is read; `value` is the array at the end."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: np.ndarray = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if not isinstance(state, tuple) or len(state) not in (4, 5):
            raise pickle.UnpicklingError("the state of an array is not a tuple of 4 or 5")
        shape, dtype, fortran, raw = state[-4:]
        self.value = _make_array(raw, dtype, shape, "F" if fortran else "C")


def _shape_size(shape: object) -> int:
    """Return the number of elements of a checked `shape`."""
    if not isinstance(shape, tuple) or any(type(s) is not int or s < 0 for s in shape):
        raise pickle.UnpicklingError(f"array shape {shape!r} is not a tuple of sizes")
    size = 1
    for side in shape:
        size *= side
    return size


def _make_array(raw: object, dtype: object, shape: Any, order: object = "C") -> np.ndarray:
    """Build an array from `raw` (bytes, or a list for objects), whose length must fit."""
    if not isinstance(dtype, _Dtype) or order not in ("C", "F"):
        raise pickle.UnpicklingError("an array without a dtype or order")
    size, plain = _shape_size(shape), dtype.dtype
    if plain.kind == OBJECT_KIND:
        if not isinstance(raw, list) or len(raw) != size:
            raise pickle.UnpicklingError("an array of objects whose list does not fit its shape")
        objects = np.empty(size, dtype=object)
        for i, item in enumerate(raw):
            objects[i] = item
        return np.reshape(objects, shape, order=order)
    data = raw.encode("latin1") if isinstance(raw, str) else raw
    if not isinstance(data, (bytes, bytearray)) or len(data) != size * plain.itemsize:
        raise pickle.UnpicklingError(f"array data do not fit shape {shape} of {plain}")
    if size * plain.itemsize == 0:
        return np.empty(shape, dtype=plain)
    flat: np.ndarray = np.frombuffer(data, dtype=plain)
    return np.array(flat.reshape(shape, order=order), order=order)


def _reconstruct(subtype: object, shape: object, code: object) -> _Array:
    """Stand-in for NumPy's `_reconstruct`: an empty array whose state follows."""
    if subtype is not _NDARRAY:
        raise pickle.UnpicklingError("only plain numpy.ndarray is reconstructed")
    return _Array()


def _frombuffer(raw: object, dtype: object, shape: object, order: object, *_: object) -> np.ndarray:
    """Stand-in for NumPy's `_frombuffer` (pickle protocol 5)."""
    return _make_array(raw, dtype, shape, order)


def _scalar(dtype: object, raw: object = b"") -> object:
    """Stand-in for NumPy's `scalar`."""
    if isinstance(dtype, _Dtype) and dtype.dtype.kind == OBJECT_KIND:
        raise pickle.UnpicklingError("NumPy scalars that hold objects are not read")
    return _make_array(raw, dtype, (1,))[0]


def _encode(text: object, encoding: object = "latin1") -> bytes:
    """Stand-in for `_codecs.encode`, which protocol 2 uses to write bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("only text is encoded, and only to latin1")
    return text.encode("latin1")


def _bytes(*args: object) -> bytes:
    """Stand-in for `bytes`, which old protocols call without arguments for the empty value."""
    return bytes(_bytearray(*args))


def _bytearray(data: object = b"", encoding: object = "latin1") -> bytearray:
    """Stand-in for `bytearray` that copies, and never allocates a size that the file names."""
    if isinstance(data, str):
        return bytearray(_encode(data, encoding))
    if not isinstance(data, (bytes, bytearray)):
        raise pickle.UnpicklingError("bytearray of something that is not bytes")
    return bytearray(data)


_NDARRAY = object()


def _allowed() -> dict[tuple[str, str], Any]:
    """Return the table (module, name) -> what the name stands for."""
    table: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): _NDARRAY,
        ("numpy", "dtype"): _Sealed(_Dtype),
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("_codecs", "encode"): _Sealed(_encode),
    }
    for core in ("numpy.core", "numpy._core"):
        table[f"{core}.multiarray", "_reconstruct"] = _Sealed(_reconstruct)
        table[f"{core}.multiarray", "scalar"] = _Sealed(_scalar)
        table[f"{core}.numeric", "_frombuffer"] = _Sealed(_frombuffer)
    for module in ("builtins", "__builtin__"):
        for kind in (list, dict, tuple, set, frozenset, complex):
            table[module, kind.__name__] = kind
        table[module, "bytearray"] = _Sealed(_bytearray)
        table[module, "bytes"] = _Sealed(_bytes)
    return table


_ALLOWED = _allowed()


class _Refused(ValueError):
    """A pickle names what is not admitted."""


class SafeUnpickler(pickle.Unpickler):
    """Unpickler that admits plain data only.

    Args:
        file: binary file to read.
        encoding: how text of Python 2 is decoded; "latin1" reads the arrays of the model zoo.
        extra_globals: further admitted names, (module, name) -> the object. Functions are sealed
            against change; a class given here is the caller's responsibility.

    Raises (from `load`):
        ValueError: the pickle names a global that is not admitted, or is damaged.
    """

    def __init__(
        self,
        file: IO[bytes],
        *,
        encoding: str = "latin1",
        extra_globals: Mapping[tuple[str, str], Any] | None = None,
    ) -> None:
        super().__init__(file, encoding=encoding)
        self._extra = {
            key: _Sealed(value) if callable(value) and not isinstance(value, type) else value
            for key, value in (extra_globals or {}).items()
        }
        self._name = getattr(file, "name", "the pickle")

    def find_class(self, module: str, name: str) -> Any:
        """Return what global `module.name` stands for; refuse a name that is not admitted."""
        key = (module, name)
        if key in self._extra:
            return self._extra[key]
        if key in _ALLOWED:
            return _ALLOWED[key]
        raise _Refused(
            f"{self._name}: refused, because the pickle names the global '{module}.{name}'. "
            "Expected only NumPy arrays and builtin containers. Loading it with pickle would run "
            "code from the file; convert it to .npz, .json or .safetensors where you trust it."
        )

    def load(self) -> Any:
        """Read one object.

        Returns:
            The object, made of builtin containers, numbers, text and plain NumPy arrays.

        Raises:
            ValueError: a global that is not admitted, or damaged data.
        """
        try:
            return _plain(super().load(), {})
        except _Refused:
            raise
        except OSError:
            raise
        except MemoryError as error:
            raise ValueError(
                f"{self._name}: not a readable pickle (it asks for more memory than there is)"
            ) from error
        except Exception as error:  # a damaged pickle raises nearly anything
            reason = " ".join(str(error).split())
            raise ValueError(f"{self._name}: not a readable pickle ({reason})") from error


def load_pickle(
    path: str | Path,
    *,
    encoding: str = "latin1",
    extra_globals: Mapping[tuple[str, str], Any] | None = None,
) -> Any:
    """Read a pickle file with `SafeUnpickler`.

    Args:
        path: file to read.
        encoding: see `SafeUnpickler`.
        extra_globals: see `SafeUnpickler`.

    Returns:
        The object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: refused or damaged.
    """
    with open(path, "rb") as file:
        return SafeUnpickler(file, encoding=encoding, extra_globals=extra_globals).load()


def _plain(item: object, seen: dict[int, Any]) -> object:
    """Replace stand-ins within `item`; `seen` maps the id of each visited part to its result."""
    if isinstance(item, (str, bytes, int, float, bool, type(None))):
        return item
    if isinstance(item, _Dtype):
        return item.dtype
    if item is _NDARRAY:
        return np.ndarray
    if id(item) in seen:
        return seen[id(item)][1]
    # The pair keeps `item` alive, so that its id is not used again.
    if isinstance(item, _Array):
        seen[id(item)] = (item, item.value)
        _fill(item.value, seen)
        return item.value
    if type(item) is tuple:
        replaced = tuple(_plain(x, seen) for x in item)
        seen[id(item)] = (item, replaced)
        return replaced
    seen[id(item)] = (item, item)
    _fill(item, seen)
    return item


def _fill(item: object, seen: dict[int, Any]) -> None:
    """Replace stand-ins in the places of a list, dictionary or array of objects."""
    if isinstance(item, list):
        item[:] = [_plain(x, seen) for x in item]
    elif isinstance(item, dict):
        for key, value in item.items():
            item[key] = _plain(value, seen)
    elif isinstance(item, np.ndarray) and item.dtype.kind == OBJECT_KIND:
        for place in np.ndindex(item.shape):
            item[place] = _plain(item[place], seen)


def _same(value: object) -> object:
    return value


class PicklableWrapper:
    """Wraps an object so that closures and lambdas can be sent to workers.

    Pickling goes through cloudpickle where it is installed; the receiver gets the object itself,
    without the wrapper. Attributes and calls are those of the object.

    Args:
        obj: the object, for example a dataset mapper defined inside a function.
    """

    def __init__(self, obj: object) -> None:
        if isinstance(obj, PicklableWrapper):
            obj = obj._obj
        self._obj: Any = obj

    def __reduce__(self) -> tuple[Any, tuple[Any]]:
        try:
            import cloudpickle
        except ImportError:
            return _same, (self._obj,)
        return cloudpickle.loads, (cloudpickle.dumps(self._obj),)

    def __call__(self, *args: object, **kwargs: object) -> Any:
        """Call the object."""
        return self._obj(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "_obj":  # not set yet, while being copied
            raise AttributeError(name)
        return getattr(self._obj, name)
