"""Car types: suv, sedan, minivan and convertible in pictures of one car each."""

from project.cars.dataset import (
    CLASS_NAMES,
    describe_set,
    prepare,
    read_sizes,
    register,
    split_name,
)
from project.cars.drawing import draw_car, split_counts, write_synthetic

__all__ = [
    "CLASS_NAMES",
    "describe_set",
    "draw_car",
    "prepare",
    "read_sizes",
    "register",
    "split_counts",
    "split_name",
    "write_synthetic",
]
