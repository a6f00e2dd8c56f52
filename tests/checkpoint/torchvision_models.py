"""Torchvision's detectors with random weights, and ours with the same weights."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision.models import detection

from d2kit.config import get_cfg
from d2kit.engine import DefaultPredictor

CONFIGS = Path(__file__).parents[2] / "configs" / "torchvision"
# Parts of parameter names -> factor that makes random predictors decide something.
_DECIDED = {
    "cls_score.weight": 100,
    "bbox_pred.weight": 10,
    "bbox_reg.weight": 10,
    "cls_logits.weight": 30,
    "mask_fcn_logits.weight": 300,
}


def random_weights(model: nn.Module, seed: int, strength: float) -> dict[str, torch.Tensor]:
    """Fill a model: norms that are no identity, features near 1, predictors that decide.

    Args:
        model: changed in place.
        seed: of the numbers.
        strength: further factor of the predictors.
    """
    rng = torch.Generator().manual_seed(seed)
    state = model.state_dict()
    for name, value in state.items():
        if not value.is_floating_point():
            continue
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=rng)
        elif name.endswith("bn3.weight"):  # else features grow from block to block
            value.uniform_(0.1, 0.3, generator=rng)
        elif value.dim() == 1 and name.endswith("weight"):
            value.uniform_(0.5, 1.5, generator=rng)
        elif value.dim() == 1:
            value.normal_(0, 0.1, generator=rng)
        else:
            nn.init.kaiming_uniform_(value, a=5**0.5, generator=rng)
            factor = next((f for part, f in _DECIDED.items() if name.endswith(part)), None)
            value.mul_(1 if factor is None else factor * strength)
    model.load_state_dict(state)
    return state


def without_eps(model: nn.Module) -> None:
    """Do what torchvision does to a model with its first COCO weights: no eps in the norms."""
    for module in model.modules():
        if isinstance(
            module, (nn.BatchNorm2d, detection.faster_rcnn.misc_nn_ops.FrozenBatchNorm2d)
        ):
            module.eps = 0.0


def both(
    folder: Path, name: str, options: list[Any], seed: int = 1, **theirs: Any
) -> tuple[nn.Module, DefaultPredictor]:
    """Return torchvision's model `name` and our predictor, ours with weights out of a file.

    Args:
        folder: for the file.
        name: torchvision's name of the model, which is that of our config.
        options: config keys and values in addition.
        seed: of the weights.
        **theirs: arguments of torchvision's model.
    """
    model = getattr(detection, name)(weights=None, weights_backbone=None, **theirs).eval()
    # after group norm features are large, and scores would be all 1
    state = random_weights(model, seed, 0.1 if name == "retinanet_resnet50_fpn_v2" else 1)
    if not name.endswith("_v2"):
        without_eps(model)
    torch.save(state, folder / f"{name}.pth")
    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIGS / f"{name}.yaml"))
    weights = ["MODEL.WEIGHTS", str(folder / f"{name}.pth"), "MODEL.DEVICE", "cpu"]
    cfg.merge_from_list([*weights, *options])
    return model, DefaultPredictor(cfg)


def picture(height: int, width: int, seed: int = 3) -> np.ndarray:
    """An RGB image of noise and blocks, (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 80, (height, width, 3))
    for _ in range(6):
        y, x = rng.integers(0, height - 8), rng.integers(0, width - 8)
        image[y : y + height // 3, x : x + width // 3] += rng.integers(0, 170, 3)
    return image.clip(0, 255).astype(np.uint8)


@torch.no_grad()
def results(
    model: nn.Module, predictor: DefaultPredictor, image: np.ndarray
) -> tuple[dict[str, torch.Tensor], Any]:
    """Return what torchvision and we find in an RGB image."""
    theirs = model([torch.from_numpy(image).permute(2, 0, 1) / 255])[0]
    return theirs, predictor(image[:, :, ::-1])["instances"]
