"""The documented path of the visualizer; the code is in `d2kit.visualization`."""

from d2kit.structures import Boxes, BoxMode, Keypoints
from d2kit.utils.colormap import random_color
from d2kit.visualization.visualizer import (
    _OFF_WHITE,
    ColorMode,
    GenericMask,
    VisImage,
    Visualizer,
    _PanopticPrediction,
)
from d2kit.visualization.visualizer import (
    create_text_labels as _create_text_labels,
)

__all__ = [
    "_OFF_WHITE",
    "BoxMode",
    "Boxes",
    "ColorMode",
    "GenericMask",
    "Keypoints",
    "VisImage",
    "Visualizer",
    "_PanopticPrediction",
    "_create_text_labels",
    "random_color",
]
