"""Draws detections over their image, for notebooks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from d2kit.predict.inputs import ColorOrder, Image, check_color, to_array
from d2kit.structures import Instances

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["show_result"]


def show_result(
    img: Image,
    result: Instances,
    class_names: Sequence[str] | None = None,
    score_thr: float = 0.3,
    *,
    color: ColorOrder = "BGR",
    out_file: str | os.PathLike | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw detections over their image with matplotlib, one colour per instance.

    The names of the first four arguments and of `out_file` are MMDetection's.

    Args:
        img: array (H, W, 3) or, grey, (H, W) uint8, a path or a PIL image.
        result: its detections.
        class_names: names in the order of class ids; `Predictor.class_names`.
        score_thr: detections with a lower score are left out.
        color: order of the channels where `img` is an array.
        out_file: picture to write, by suffix; None: none.
        ax: axes to draw into; None: a new figure of the image's shape.

    Returns:
        The axes; ``plt.show()`` shows them, a notebook does so by itself.

    Raises:
        ValueError: if `result` is not of one image, or `color` is neither of the two.
    """
    from d2kit.visualization import Visualizer
    from d2kit.visualization.plots import show_image

    check_color(color)
    if not isinstance(result, Instances):
        raise ValueError(
            f"show_result: expected the detections of one image, got {type(result).__name__}; "
            "call it for each image of a list"
        )
    if isinstance(img, np.ndarray) and img.ndim == 2:
        img = np.repeat(img[:, :, None], 3, axis=2)  # grey
    rgb = to_array(img, color=color, wanted="RGB")
    metadata = {"thing_classes": list(class_names)} if class_names is not None else {}
    kept = result[result.scores >= score_thr]
    drawn = Visualizer(rgb, metadata).draw_instance_predictions(kept)
    if out_file is not None:
        drawn.save(os.fspath(out_file))
    return show_image(drawn.get_image(), ax)
