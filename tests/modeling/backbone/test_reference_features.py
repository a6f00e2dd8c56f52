"""Features of zoo backbones with deterministic weights, against those of Detectron2."""

import runpy

import numpy as np
import pytest
import torch

from d2kit.config import get_cfg
from d2kit.layers.blocks import fold_batch_norm
from d2kit.structures import ImageList
from tests.modeling.backbone.test_state_dicts import build
from tests.support.reference_files import reference_path

FILL = runpy.run_path(str(reference_path("fill.py")))
SIZES = [(128, 160), (96, 144)]


def filled(name: str) -> torch.nn.Module:
    backbone = build(name).eval()
    state = backbone.state_dict()
    for key, value in state.items():
        if value.is_floating_point():
            value.copy_(torch.from_numpy(FILL["fill"](f"backbone.{key}", tuple(value.shape))))
    return backbone


def batch(divisibility: int) -> torch.Tensor:
    cfg = get_cfg()
    mean = torch.tensor(cfg.MODEL.PIXEL_MEAN).view(3, 1, 1)
    std = torch.tensor(cfg.MODEL.PIXEL_STD).view(3, 1, 1)
    images = [torch.from_numpy(FILL["image"](i, h, w)).float() for i, (h, w) in enumerate(SIZES)]
    return ImageList.from_tensors([(x - mean) / std for x in images], divisibility).tensor


def check(features: dict[str, torch.Tensor], name: str) -> None:
    reference = np.load(reference_path(f"models/{name.replace('/', '__')[:-5]}.npz"))
    levels = {key.split(".")[1] for key in reference if key.startswith("feature.")}
    assert set(features) == levels
    for level, feature in features.items():
        x = feature.double().numpy()
        std = float(reference[f"feature.{level}.std"])
        assert x.mean() == pytest.approx(float(reference[f"feature.{level}.mean"]), abs=1e-4 * std)
        assert x.std(ddof=1) == pytest.approx(std, rel=1e-4)
        expected = reference[f"feature.{level}.slice"]
        np.testing.assert_allclose(x[:, :4, :3, :3], expected, rtol=1e-4, atol=1e-4 * std)


@pytest.mark.parametrize(
    "name",
    [
        "COCO-Detection/rpn_R_50_FPN_1x.yaml",
        "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_3x.yaml",
        "COCO-InstanceSegmentation/mask_rcnn_R_50_DC5_3x.yaml",
        "COCO-Detection/retinanet_R_50_FPN_3x.yaml",
    ],
)
def test_features_equal_the_reference_before_and_after_optimisation(name):
    backbone = filled(name)
    x = batch(backbone.size_divisibility)
    with torch.inference_mode():
        check(backbone(x), name)
        folded = fold_batch_norm(backbone).to(memory_format=torch.channels_last)
        check(folded(x.contiguous(memory_format=torch.channels_last)), name)
