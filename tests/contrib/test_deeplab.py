"""DeepLabV3+ from the config to training and evaluation."""

import pytest
import torch
from PIL import Image

from d2kit.contrib.deeplab import (
    DeepLabV3PlusHead,
    add_deeplab_config,
    build_lr_scheduler,
)
from d2kit.data import DatasetCatalog, MetadataCatalog
from d2kit.engine import DefaultTrainer
from d2kit.modeling import build_model
from tests.support.tiny_dense import labelled_input
from tests.support.tiny_model import tiny_config

NAME = "deeplab_tests"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Four images with label images, on disk."""
    folder = tmp_path_factory.mktemp("deeplab")
    records = []
    for i in range(4):
        item = labelled_input(i, objects=i, size=(64, 64))
        image = item["image"].permute(1, 2, 0).clamp(0, 255).byte().numpy()[:, :, ::-1]
        files = {"file_name": f"{folder}/{i}.png", "sem_seg_file_name": f"{folder}/{i}_labels.png"}
        Image.fromarray(image).save(files["file_name"])
        Image.fromarray(item["sem_seg"].byte().numpy()).save(files["sem_seg_file_name"])
        records.append({**files, "image_id": i, "height": 64, "width": 64})
    DatasetCatalog.register(NAME, lambda: records)
    classes = ["things", "wall", "floor"]
    MetadataCatalog.get(NAME).set(evaluator_type="sem_seg", stuff_classes=classes, ignore_label=255)
    yield
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def config(*options):
    cfg = tiny_config()
    add_deeplab_config(cfg)
    cfg.merge_from_list(
        ["MODEL.META_ARCHITECTURE", "SemanticSegmentor", "DATASETS.TRAIN", (NAME,)]
        + ["DATASETS.TEST", (NAME,), "INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MIN_SIZE_TEST", 64]
        + ["MODEL.SEM_SEG_HEAD.NAME", "DeepLabV3PlusHead", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3]
        + ["MODEL.SEM_SEG_HEAD.IN_FEATURES", ["p2", "p3"], "MODEL.SEM_SEG_HEAD.NORM", "BN"]
        + ["MODEL.SEM_SEG_HEAD.CONVS_DIM", 32, "MODEL.SEM_SEG_HEAD.ASPP_CHANNELS", 32]
        + ["MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS", [32], "MODEL.SEM_SEG_HEAD.ASPP_DROPOUT", 0.0]
        + ["MODEL.SEM_SEG_HEAD.ASPP_DILATIONS", [1, 2, 3], "SOLVER.BASE_LR", 0.05, "SEED", 1]
        + ["SOLVER.LR_SCHEDULER_NAME", "WarmupPolyLR", "SOLVER.WARMUP_ITERS", 0]
        + ["SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 3, "DATALOADER.NUM_WORKERS", 0]
        + [*options]
    )
    return cfg


class Trainer(DefaultTrainer):
    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        return build_lr_scheduler(cfg, optimizer)

    def build_writers(self):
        return []


@pytest.mark.usefixtures("dataset")
@pytest.mark.parametrize(
    ("loss", "crop", "separable"),
    [("hard_pixel_mining", True, False), ("cross_entropy", False, True)],
)
def test_train_and_evaluate(loss, crop, separable, tmp_path):
    cfg = config(
        *("MODEL.SEM_SEG_HEAD.LOSS_TYPE", loss, "OUTPUT_DIR", str(tmp_path)),
        *("MODEL.SEM_SEG_HEAD.USE_DEPTHWISE_SEPARABLE_CONV", separable),
        *("INPUT.CROP.ENABLED", crop, "INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE", [32, 32]),
    )
    trainer = Trainer(cfg)
    before = {k: v.clone() for k, v in trainer.model.named_parameters()}
    results = trainer.train()
    for key, parameter in trainer.model.named_parameters():
        assert torch.isfinite(parameter).all(), key
        assert parameter.grad.any(), key
        assert not torch.equal(parameter, before[key]), key
    assert 0 <= results["sem_seg"]["mIoU"] <= 100


@pytest.mark.parametrize(("loss", "rate"), [("hard_pixel_mining", 0.001), ("cross_entropy", 0.05)])
def test_three_steps_on_one_batch(loss, rate):
    torch.manual_seed(0)
    model = build_model(config("MODEL.SEM_SEG_HEAD.LOSS_TYPE", loss))
    moved = torch.optim.SGD(model.parameters(), lr=rate)
    batch = [labelled_input(0), labelled_input(1, 3, (48, 70))]
    totals = []
    for _ in range(3):
        (value,) = model(batch).values()
        moved.zero_grad()
        value.backward()
        assert all(p.grad.any() for p in model.parameters())
        moved.step()
        totals.append(value.item())
    assert totals[0] > totals[1] > totals[2]


@torch.no_grad()
def test_scores_in_the_wanted_size():
    model = build_model(config()).eval()
    (output,) = model([{**labelled_input(0, size=(50, 62)), "height": 32, "width": 100}])
    assert output["sem_seg"].shape == (3, 32, 100)


@pytest.mark.parametrize(
    ("options", "match"),
    [(["INPUT.CROP.ENABLED", True], r"INPUT\.CROP\.TYPE"), ([], "'p2'")],
)
def test_mistakes_in_the_config_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        DeepLabV3PlusHead(config(*options), {})
