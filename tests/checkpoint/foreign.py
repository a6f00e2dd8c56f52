"""State dicts of other libraries: their names and shapes, with rows that tell where they went."""

import gzip
import json
from pathlib import Path

import torch
from torchvision.models import detection

from tests.support.reference_files import reference_path

DATA = Path(__file__).parents[1] / "support/files"


def distinct(shapes):
    """Weights of these shapes, each row of which is another number (tiny but for axis 0)."""
    weights = {}
    for k, (name, shape) in enumerate(shapes.items()):
        rows = torch.arange(shape[0] if shape else 1, dtype=torch.float32) + 1000 * (k + 1)
        weights[name] = rows.reshape(shape) if len(shape) < 2 else rows[:, None]
    return weights


def torchvision_shapes(name, **kwargs):
    with torch.device("meta"):
        model = getattr(detection, name)(weights=None, weights_backbone=None, **kwargs)
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def zoo_shapes(name):
    with gzip.open(reference_path("state_dicts.json.gz")) as file:
        return json.load(file)[f"{name}.yaml"]


def mmdetection_shapes(name):
    with gzip.open(DATA / "mmdetection_state_dicts.json.gz") as file:
        return json.load(file)[name]
