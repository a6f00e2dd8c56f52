"""Car types: suv, sedan, minivan and convertible in pictures of one car each."""

from project.cars.dataset import CLASS_NAMES, prepare, register, split_name
from project.cars.drawing import draw_car, write_synthetic

__all__ = ["CLASS_NAMES", "draw_car", "prepare", "register", "split_name", "write_synthetic"]
