"""Names of things: registries, nearest names, keys of nested configs, errors of wrong ones."""

from __future__ import annotations

import difflib
import importlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from fvcore.common.registry import Registry as _FvcoreRegistry

__all__ = [
    "AssertedFileError",
    "AssertedKeyError",
    "AssertedTypeError",
    "AssertedValueError",
    "NoStorageError",
    "NoWeightsError",
    "Registry",
    "ZooError",
    "flatten",
    "locate",
    "nearest_names",
    "overrides",
]


def nearest_names(name: str, candidates: Iterable[str], n: int = 3) -> list[str]:
    """Return the `n` candidates that look most like `name`, best first.

    A dotted candidate is compared as a whole and by its last part, so that both a misspelt key and
    a right key in the wrong section find their target.

    Args:
        name: what the user wrote.
        candidates: the names that exist, dotted or not.
        n: the largest number of names to return.

    Returns:
        Up to `n` names; empty where nothing is similar.
    """
    wanted = name.casefold()
    last = wanted.rpartition(".")[2]

    def likeness(candidate: str) -> float:
        other = candidate.casefold()
        whole = difflib.SequenceMatcher(None, wanted, other).ratio()
        if "." not in candidate:
            return whole
        part = difflib.SequenceMatcher(None, last, other.rpartition(".")[2]).ratio()
        return max(whole, part) * 0.75 + min(whole, part) * 0.25

    scored = sorted(((likeness(c), c) for c in dict.fromkeys(candidates)), key=lambda s: -s[0])
    return [candidate for score, candidate in scored[:n] if score >= 0.6]


FIXED_NAMES = {
    "META_ARCH": "GeneralizedRCNN ProposalNetwork RetinaNet PanopticFPN SemanticSegmentor",
    "BACKBONE": "build_resnet_backbone build_resnet_fpn_backbone "
    "build_retinanet_resnet_fpn_backbone",
    "PROPOSAL_GENERATOR": "RPN RRPN",
    "RPN_HEAD": "StandardRPNHead",
    "ANCHOR_GENERATOR": "DefaultAnchorGenerator RotatedAnchorGenerator",
    "ROI_HEADS": "StandardROIHeads Res5ROIHeads CascadeROIHeads RROIHeads",
    "ROI_BOX_HEAD": "FastRCNNConvFCHead",
    "ROI_MASK_HEAD": "MaskRCNNConvUpsampleHead",
    "ROI_KEYPOINT_HEAD": "KRCNNConvDeconvUpsampleHead",
    "SEM_SEG_HEADS": "SemSegFPNHead",
    "TRACKER_HEADS": "BBoxIOUTracker VanillaHungarianBBoxIOUTracker "
    "IOUWeightedHungarianBBoxIOUTracker",
}
"""Registry -> the names that Detectron2's own registry of that name holds."""


def is_ours(module: str | None) -> bool:
    """Tell whether a module (``obj.__module__``) is one of d2kit's."""
    return (module or "").split(".")[0] == "d2kit"


class Registry(_FvcoreRegistry):
    """A named mapping from strings to classes or functions, filled by `register`.

    A name that only d2kit registers gives way: an object from outside d2kit replaces ours, with a
    line in the log, and ours does not replace theirs. A name of Detectron2's own registries
    (`FIXED_NAMES`), or one registered twice by others, is an error.

    Args:
        name: the registry's name, used in messages (for example ``"BACKBONE"``).
    """

    def _do_register(self, name: str, obj: Any) -> None:
        present = self._obj_map.get(name)
        if present is not None:
            theirs, ours = _module_of(obj), _module_of(present)
            fixed = name in FIXED_NAMES.get(self._name, "").split()
            if fixed or is_ours(theirs) == is_ours(ours):
                raise AssertedValueError(
                    f"'{name}' is already registered in the {self._name} registry as "
                    f"{present!r}; give the new object another name"
                )
            if is_ours(theirs):
                return  # somebody's own was registered before ours was imported
            logging.getLogger(__name__).info(
                "'%s' in the %s registry is now %s's, in place of %s's",
                name,
                self._name,
                theirs,
                ours,
            )
        self._obj_map[name] = obj

    def get(self, name: str) -> Any:
        """Return the object registered under `name`.

        Raises:
            KeyError: if there is none; the message lists the nearest names.
        """
        if name in self._obj_map:
            return self._obj_map[name]
        near = nearest_names(str(name), self._obj_map)
        listed = f"nearest: {', '.join(near)}" if near else f"known: {sorted(self._obj_map)}"
        raise KeyError(
            f"no object named '{name}' in the {self._name} registry ({listed}); "
            "is the module that registers it imported?"
        )


def _module_of(obj: Any) -> str:
    return str(getattr(obj, "__module__", None) or type(obj).__module__)


def locate(name: str) -> Any:
    """Return the module, class or function with the dotted path `name`, importing what is needed.

    Args:
        name: for example ``"torch.nn.Conv2d"`` or ``"package.module.Class.method"``.

    Raises:
        ImportError: if no such object exists; a failure inside an existing module is passed on.
    """
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts):
        raise ImportError(f"'{name}' is not a dotted Python path such as 'package.module.Class'")
    for end in range(len(parts), 0, -1):
        module_name = ".".join(parts[:end])
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
                continue
            raise
        for part in parts[end:]:
            if not hasattr(found, part):
                near = nearest_names(part, dir(found))
                raise ImportError(f"cannot locate '{name}': '{part}' not found, nearest: {near}")
            found = getattr(found, part)
        return found
    raise ImportError(f"cannot locate '{name}': there is no module '{parts[0]}'")


_Provider = TypeVar("_Provider", bound=Callable[..., Any])
_PROVIDERS: list[Callable[..., Any]] = []


def provides_class_weights(function: _Provider) -> _Provider:
    """Let `class_weights` call `function(dataset_names, power)`; the last one given is used."""
    _PROVIDERS.append(function)
    return function


def class_weights(dataset_names: Sequence[str], power: float) -> Any:
    """Return the number of training images of each class, raised to `power`.

    Args:
        dataset_names: registered datasets (DATASETS.TRAIN), whose metadata have
            `class_image_count`.
        power: exponent, for example 0.5.

    Returns:
        (K,) float32 tensor.

    Raises:
        LookupError: nothing provides the numbers, because `d2kit.data` was not imported.
    """
    if not _PROVIDERS:
        raise LookupError(
            f"the class frequencies of {list(dataset_names)} (MODEL.ROI_BOX_HEAD.USE_FED_LOSS) "
            "come from the datasets' metadata: `import d2kit.data` before the model is built"
        )
    return _PROVIDERS[-1](dataset_names, power)


class AssertedValueError(ValueError, AssertionError):
    """A value that Detectron2 refuses by an assertion."""


class AssertedTypeError(TypeError, AssertionError):
    """A type that Detectron2 refuses by an assertion."""


class AssertedKeyError(KeyError, AssertionError):
    """A name that Detectron2 looks for by an assertion."""


class AssertedFileError(FileNotFoundError, AssertionError):
    """A file that Detectron2 looks for by an assertion."""


class NoStorageError(RuntimeError, AssertionError):
    """There is no `EventStorage` around the call."""


class ZooError(FileNotFoundError, RuntimeError):
    """A config or checkpoint that the model zoo does not have."""


class NoWeightsError(ValueError, RuntimeError):
    """There are no published weights for a config of the model zoo."""


def flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return full key, ``A.B.C``, -> value of what is no mapping itself.

    Args:
        node: keys are text.
        prefix: put before each key.
    """
    found: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            found |= flatten(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def overrides(obj: object, base: type, *names: str) -> bool:
    """Tell whether the class of `obj` has its own version of one of the methods.

    Asked once, when the object is made: a path that works on all images and levels at once is
    taken only where no subclass has replaced one of the steps that it joins.

    Args:
        obj: an object of `base` or a subclass.
        base: the class whose path it is.
        names: methods of `base`.
    """
    return any(getattr(type(obj), name) is not getattr(base, name) for name in names)
