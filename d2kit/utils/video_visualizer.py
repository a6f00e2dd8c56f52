"""The documented path of the video visualizer; the code is in `d2kit.visualization`."""

from d2kit.structures import Instances
from d2kit.utils.colormap import random_color, random_colors
from d2kit.visualization.video_visualizer import VideoVisualizer, _DetectedInstance
from d2kit.visualization.visualizer import (
    ColorMode,
    GenericMask,
    Visualizer,
    _PanopticPrediction,
)
from d2kit.visualization.visualizer import (
    create_text_labels as _create_text_labels,
)

__all__ = [
    "ColorMode",
    "GenericMask",
    "Instances",
    "VideoVisualizer",
    "Visualizer",
    "_DetectedInstance",
    "_PanopticPrediction",
    "_create_text_labels",
    "random_color",
    "random_colors",
]
