"""Finds weight files: local paths, URLs, `detectron2://`, `torchvision://`, `catalog://` names."""

import logging
import os
import urllib.parse
from pathlib import Path

from d2kit.checkpoint._download import cache_path, check_hash, download, hash_of_url
from d2kit.utils.file_io import PathManager
from d2kit.utils.registry import nearest_names

__all__ = ["find_weights", "weights_url"]

logger = logging.getLogger(__name__)

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
            return models.get_weight(name).url
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"torchvision has no weights named '{name}': {error}") from error
    known = models.list_models()
    if name not in known:
        near = nearest_names(name, known)
        raise ValueError(f"torchvision has no model named '{name}'; nearest: {near}")
    return models.get_model_weights(name).DEFAULT.url  # type: ignore[attr-defined]


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
            ``torchvision://resnet50``, or a prefix that a handler of `PathManager` knows.

    Raises:
        FileNotFoundError: if there is no such file; the message says where to put it.
        ValueError: if a downloaded file has the wrong hash.
    """
    url = weights_url(name)
    scheme = urllib.parse.urlsplit(url).scheme
    if scheme not in ("http", "https"):
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
