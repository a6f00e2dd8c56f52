"""Registries of classes by name, and the class frequencies that heads ask for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fvcore.common.registry import Registry as _FvcoreRegistry  # 25 ms: it imports tabulate

from d2kit.utils.names import (
    AssertedValueError,
    flatten,
    locate,
    nearest_names,
    overrides,
)

__all__ = [
    "AssertedValueError",
    "Registry",
    "flatten",
    "locate",
    "nearest_names",
    "overrides",
]


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

    def _do_register(self, name: str, obj: object) -> None:
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


def _module_of(obj: object) -> str:
    return str(getattr(obj, "__module__", None) or type(obj).__module__)


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
