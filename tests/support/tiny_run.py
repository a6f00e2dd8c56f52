"""A model, a dataset and a config so small that a training takes a second."""

import hashlib

import numpy as np
import torch
from torch import nn

from d2kit.config import get_cfg
from d2kit.data import DatasetCatalog, MetadataCatalog
from d2kit.engine import DefaultTrainer
from d2kit.modeling.meta_arch.build import freeze_by_pattern
from d2kit.utils.file_io import atomic_write

NAME = "engine_tests_tiny"
SIZE = 32


class TinyModel(nn.Module):
    """Two convolutions and a loss that depends on image and boxes.

    With `noise` there are BatchNorm and dropout between them.
    """

    def __init__(self, noise=True):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=4)
        self.norm = nn.BatchNorm2d(4) if noise else nn.Identity()
        self.dropout = nn.Dropout(0.3 if noise else 0.0)
        self.head = nn.Conv2d(4, 2, 1)
        self.poison = None  # image ids whose loss is NaN

    def forward(self, batch):
        images = torch.stack([sample["image"][:, :SIZE, :SIZE] for sample in batch]).float() / 255
        x = self.head(self.dropout(self.norm(self.conv(images)).relu()))
        boxes = torch.stack([s["instances"].gt_boxes.tensor.mean() / SIZE for s in batch])
        losses = {
            "loss_cls": (x[:, 0].mean(dim=(1, 2)) - boxes).square().mean(),
            "loss_box": (x[:, 1] - 1).abs().mean(),
        }
        if self.poison is not None and any(s["image_id"] in self.poison for s in batch):
            losses["loss_box"] = losses["loss_box"] * float("nan")
        return losses


def records(folder, count=7):
    """Write noise images; return their records with one box each."""
    from PIL import Image

    rng = np.random.default_rng(0)
    found = []
    for i in range(count):
        height, width = (SIZE, SIZE + 8) if i % 3 else (SIZE + 8, SIZE)
        path = folder / f"{i}.png"
        if not path.exists():
            pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
            with atomic_write(path) as file:
                Image.fromarray(pixels).save(file, format="png")
        box = {"bbox": [2, 3, 10 + i, 12], "bbox_mode": 0, "category_id": 0}
        found.append(
            {"file_name": str(path), "image_id": i, "height": height, "width": width}
            | {"annotations": [box]}
        )
    return found


def register(folder):
    """Register the dataset, whose images lie in `folder`."""
    if NAME in DatasetCatalog.list():
        DatasetCatalog.remove(NAME)
    MetadataCatalog.pop(NAME, None)
    DatasetCatalog.register(NAME, lambda: records(folder))
    MetadataCatalog.get(NAME).thing_classes = ["thing"]


def tiny_cfg(output, *options):
    cfg = get_cfg()
    cfg.merge_from_list(
        ["MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.NUM_CLASSES", 1, "DATASETS.TRAIN", (NAME,)]
        + ["INPUT.MIN_SIZE_TRAIN", (SIZE, SIZE + 4), "INPUT.MAX_SIZE_TRAIN", 4 * SIZE]
        + ["SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 12, "SOLVER.CHECKPOINT_PERIOD", 6]
        + ["SOLVER.BASE_LR", 0.1, "SOLVER.WARMUP_ITERS", 4, "SOLVER.STEPS", (8,)]
        + ["DATALOADER.NUM_WORKERS", 0, "SEED", 3, "OUTPUT_DIR", str(output), *options]
    )
    return cfg


class TinyTrainer(DefaultTrainer):
    noise = True

    @classmethod
    def build_model(cls, cfg):
        torch.manual_seed(0)
        model = TinyModel(cls.noise)
        freeze_by_pattern(model, cfg.MODEL.FREEZE)
        return model

    def build_writers(self):
        return super().build_writers()[:2]  # importing TensorBoard takes seconds


class EvaluatedTrainer(TinyTrainer):
    """Evaluates without data: its metrics are functions of the weights."""

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        return {"bbox": {"AP": 100 * weights.sin().abs().mean().item()}}


def digest(state):
    """SHA-256 of all tensors and numbers of a nested state."""
    sha = hashlib.sha256()

    def walk(value):
        if isinstance(value, torch.Tensor):
            sha.update(value.detach().contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                sha.update(str(key).encode())
                walk(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                walk(item)
        else:
            sha.update(repr(value).encode())

    walk(state)
    return sha.hexdigest()


def final_state(folder):
    """Digest of weights, optimizer, schedule and hooks at the end of a training."""
    saved = torch.load(folder / "model_final.pth", weights_only=True)
    return digest({"model": saved["model"], "trainer": saved["trainer"]})
