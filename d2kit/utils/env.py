"""Seeds, random states, versions and the process environment."""

from __future__ import annotations

import gc
import hashlib
import importlib
import logging
import os
import random
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = [
    "TORCH_VERSION",
    "derive_seed",
    "fixup_module_metadata",
    "min_torch_version",
    "rng_scope",
    "seed_all_rng",
    "setup_environment",
]


@contextmanager
def paused_gc() -> Iterator[None]:
    """Collect no garbage within the block.

    A full collection walks all objects of torch: 0.19 s, more than our modules take to load, and
    it was triggered by them every time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


TORCH_VERSION: tuple[int, ...] = tuple(
    int(part) for part in torch.__version__.split("+")[0].split(".")[:2]
)
"""(major, minor) of the installed torch."""

ENV_MODULE_VARIABLE = "D2KIT_ENV_MODULE"


def seed_all_rng(seed: int | None = None) -> None:
    """Seed the generators of `random`, `numpy.random` and torch (all devices).

    Args:
        seed: a non-negative integer; None or a negative one draws a strong random seed.
    """
    if seed is None or seed < 0:
        seed = int.from_bytes(os.urandom(4), "little")
        logging.getLogger(__name__).info("Using a generated random seed %d", seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # torch would keep the call, with its stack as text, for a device: 1 ms
        torch.default_generator.manual_seed(seed)


def derive_seed(*numbers: int) -> int:
    """Return a 63-bit hash of integers, the same on every machine and Python version.

    Args:
        numbers: for example (run seed, epoch, position); any size and sign.

    Returns:
        An integer in [0, 2**63).
    """
    text = ",".join(str(int(number)) for number in numbers)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def rng_scope(*numbers: int) -> Iterator[None]:
    """Run a block under random states that depend on `numbers` only, then restore the old ones.

    Covers `random`, `numpy.random` and torch's CPU generator, which is what augmentations draw
    from, so that a sample is a function of (seed, position) and not of the worker that made it.

    Args:
        numbers: hashed by `derive_seed`.
    """
    seed = derive_seed(*numbers)
    saved = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    try:
        random.seed(seed)
        np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(saved[0])
        np.random.set_state(saved[1])
        torch.random.set_rng_state(saved[2])


def fixup_module_metadata(
    module_name: str, namespace: MutableMapping[str, Any], keys: Sequence[str] | None = None
) -> None:
    """Make objects re-exported by a module say that they live there.

    Args:
        module_name: usually ``__name__`` of the re-exporting module.
        namespace: usually ``globals()`` of it; must hold the objects.
        keys: names to change; None means the public names of classes and functions.
    """
    package = module_name.partition(".")[0]
    for key in list(namespace) if keys is None else keys:
        value = namespace[key]
        home = getattr(value, "__module__", None)
        if keys is None and (key.startswith("_") or not str(home).startswith(package)):
            continue
        if home is not None and hasattr(value, "__qualname__"):
            value.__module__ = module_name


def setup_environment() -> None:
    """Check the torch version and run the user's environment module, if one is named.

    The variable ``D2KIT_ENV_MODULE`` may name an importable module with a function
    ``setup_environment()``, for site-wide settings; it is called at every call of this one.

    Raises:
        RuntimeError: if torch is older than 2.10.
        AttributeError: if the named module has no such function.
    """
    if TORCH_VERSION < (2, 10):
        raise RuntimeError(f"d2kit needs torch >= 2.10, found {torch.__version__}; upgrade torch")
    name = os.environ.get(ENV_MODULE_VARIABLE)
    if name:
        importlib.import_module(name).setup_environment()


def min_torch_version(min_version: str) -> bool:
    """Tell whether torch is at least of a version.

    Args:
        min_version: for example "2.10".
    """
    import torch

    return _numbers(torch.__version__) >= _numbers(min_version)


def _numbers(version: object) -> tuple[int, ...]:
    """Return the leading numbers of a version: (2, 14, 1) of "2.14.1+cu130"."""
    parts = []
    for part in str(version).split("+")[0].split("."):
        if not part.isdigit():
            break
        parts.append(int(part))
    return tuple(parts)
