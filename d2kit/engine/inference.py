"""The names of `d2kit.predict`, under the path that d2kit 0.1 had them."""

from d2kit.predict import (
    Predictor,
    find_images,
    inference_detector,
    init_detector,
    show_result,
)

__all__ = ["Predictor", "find_images", "inference_detector", "init_detector", "show_result"]
