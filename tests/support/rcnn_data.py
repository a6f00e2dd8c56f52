"""A COCO dataset of a few small images with boxes, polygons and keypoints, on disk."""

import json

import numpy as np
import torch

from d2kit.data import DatasetCatalog, MetadataCatalog
from d2kit.data.datasets import register_coco_instances
from d2kit.engine import DefaultTrainer
from d2kit.utils.file_io import atomic_write
from tests.support.tiny_heads import SIZE
from tests.support.tiny_model import tiny_config, tiny_input

NAME = "rcnn_end_to_end"
CLASSES = ("a", "b", "c")
KEYPOINT_META = {
    "keypoint_names": ("left", "right", "middle"),
    "keypoint_flip_map": (("left", "right"),),
    "class_image_count": [{"id": i + 1, "image_count": 3 * i + 1} for i in range(3)],
}
COLOUR_ORDER = slice(None, None, -1)  # BGR in memory, RGB in the file


def write_dataset(folder, images=4, objects=2):
    """Write images of `tiny_input` with their annotations; return the JSON's path."""
    from PIL import Image

    rows, annotations = [], []
    for i in range(images):
        item = tiny_input(i, objects)
        pixels = item["image"].clamp(0, 255).byte().numpy().transpose(1, 2, 0)
        with atomic_write(folder / f"{i}.png") as file:
            Image.fromarray(np.ascontiguousarray(pixels[..., COLOUR_ORDER])).save(file, "png")
        rows.append({"id": i, "file_name": f"{i}.png", "height": SIZE[0], "width": SIZE[1]})
        truth = item["instances"]
        boxes = truth.gt_boxes.tensor.clone()
        boxes[:, 2:] = torch.minimum(boxes[:, 2:], torch.tensor([SIZE[1], SIZE[0]]))
        for (x0, y0, x1, y1), c in zip(boxes.tolist(), truth.gt_classes.tolist(), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": c + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                    "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
                    "keypoints": [x0, y0, 2, x1 - 1, y0, 2, (x0 + x1) / 2, (y0 + y1) / 2, 1],
                    "num_keypoints": 3,
                }
            )
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    content = {"images": rows, "annotations": annotations, "categories": categories}
    path = folder / "truth.json"
    with atomic_write(path, "w") as file:
        json.dump(content, file)
    return path


def register(folder):
    """Write the dataset to `folder` and register it as `NAME`."""
    forget()
    register_coco_instances(NAME, KEYPOINT_META, write_dataset(folder), folder)


def forget():
    if NAME in DatasetCatalog.list():
        DatasetCatalog.remove(NAME)
    MetadataCatalog.pop(NAME, None)


def training_config(output, *options, base=None):
    """A config of the tiny model that trains 3 steps on `NAME` and evaluates there."""
    cfg = tiny_config() if base is None else base
    cfg.merge_from_list(
        [
            *("DATASETS.TRAIN", (NAME,), "DATASETS.TEST", (NAME,), "OUTPUT_DIR", str(output)),
            *("INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MIN_SIZE_TEST", 64),
            *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 3, "SOLVER.WARMUP_ITERS", 0),
            *("SOLVER.BASE_LR", 0.01, "DATALOADER.NUM_WORKERS", 0, "SEED", 1),
            *("TEST.KEYPOINT_OKS_SIGMAS", (0.05, 0.05, 0.1), "TEST.DETECTIONS_PER_IMAGE", 10),
            *options,
        ]
    )
    return cfg


class Trainer(DefaultTrainer):
    """Remembers which parameters ever had a gradient; writes no TensorBoard (slow to import)."""

    def build_writers(self):
        return super().build_writers()[:2]

    def run_step(self):
        super().run_step()
        seen = self.__dict__.setdefault("with_gradient", set())
        seen.update(n for n, p in self.model.named_parameters() if p.grad is not None)


def train(cfg):
    """Train and evaluate; return the trainer and the results."""
    torch.manual_seed(0)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    return trainer, trainer.train()
