"""`tools/lazyconfig_train_net.py` on a tiny model: trains, resumes to the same bits, evaluates."""

import importlib.util
import json

import cv2
import numpy as np
import pytest
import torch

from d2kit.config import LazyConfig
from d2kit.data import DatasetCatalog, MetadataCatalog
from d2kit.data.datasets import register_coco_instances
from d2kit.engine import hooks
from tests.support.code import ROOT

pytest.importorskip("omegaconf")

CONFIG = '''
"""A small model, built on the zoo's Mask R-CNN."""
from d2kit import model_zoo

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
model.backbone.bottom_up.stem.norm = model.backbone.bottom_up.stages.norm = "GN"
model.backbone.bottom_up.stages.depth = 18
del model.backbone.bottom_up.stages.stride_in_1x1
model.backbone.bottom_up.freeze_at = 0
model.backbone.out_channels = 16
model.proposal_generator.head.in_channels = 16
model.proposal_generator.batch_size_per_image = 32
model.proposal_generator.post_nms_topk = (30, 20)
model.roi_heads.num_classes = 2
model.roi_heads.batch_size_per_image = 8
model.roi_heads.box_head.input_shape.channels = 16
model.roi_heads.box_head.fc_dims = [32]
model.roi_heads.box_predictor.input_shape.channels = 32
model.roi_heads.mask_head.input_shape.channels = 16
model.roi_heads.mask_head.conv_dims = [8, 8]

optimizer = model_zoo.get_config("common/optim.py").SGD
optimizer.lr = 0.002
_schedules = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py")
lr_multiplier = _schedules.lr_multiplier
dataloader = model_zoo.get_config("common/data/coco.py").dataloader
for _part in (dataloader.train, dataloader.test):
    _part.num_workers = 0
    _part.dataset.names = "zz_lazy"
    _part.mapper.augmentations[0].update(short_edge_length=64, max_size=80)
dataloader.train.mapper.instance_mask_format = "bitmask"
dataloader.train.total_batch_size = 2
train = model_zoo.get_config("common/train.py").train
train.update(init_checkpoint="", max_iter=4, device="cpu", eval_period=0, log_period=1)
train.checkpointer.period = 2
'''


@pytest.fixture
def config(tmp_path):
    """A file with the config above, and a dataset of four images."""
    annotations, images = [], []
    rng = np.random.default_rng(0)
    for i in range(4):
        picture = rng.integers(0, 60, (64, 80, 3), dtype=np.uint8)
        x, y = (int(v) for v in rng.integers(2, 30, 2))
        picture[y : y + 25, x : x + 30, i % 2] += 150
        cv2.imwrite(str(tmp_path / f"{i}.png"), picture)
        images.append({"id": i, "file_name": f"{i}.png", "height": 64, "width": 80})
        corners = [x, y, x + 30, y, x + 30, y + 25, x, y + 25]
        box = {"bbox": [x, y, 30, 25], "area": 750, "segmentation": [corners], "iscrowd": 0}
        annotations.append({"id": i + 1, "image_id": i, "category_id": i % 2 + 1, **box})
    categories = [{"id": 1, "name": "blue"}, {"id": 2, "name": "green"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "data.json").write_text(json.dumps(content))
    register_coco_instances("zz_lazy", {}, str(tmp_path / "data.json"), str(tmp_path))
    (tmp_path / "tiny.py").write_text(CONFIG)
    yield tmp_path / "tiny.py"
    DatasetCatalog.pop("zz_lazy", None)
    MetadataCatalog.pop("zz_lazy", None)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(
        "lazy_train", ROOT / "tools/lazyconfig_train_net.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script, config, folder, *arguments):
    arguments = ["--config-file", str(config), "--trust-config", *arguments]
    arguments.append(f"train.output_dir={folder}")
    return script.main(script.parser().parse_args(arguments))


def test_train_resume_evaluate(script, config, tmp_path):
    whole = tmp_path / "whole"
    results = run(script, config, whole, "train.seed=3")
    assert set(results) == {"bbox", "segm"}
    saved = LazyConfig.load(str(whole / "config.yaml"))
    assert saved.train.seed == 3
    assert saved.model.roi_heads.num_classes == 2

    weights = f"train.init_checkpoint={whole / 'model_final.pth'}"
    again = run(script, config, tmp_path / "eval", "--eval-only", weights)
    assert json.dumps(again) == json.dumps(results)


@pytest.mark.slow
def test_a_run_that_was_cut_ends_with_the_same_weights(script, config, tmp_path, monkeypatch):
    class Cut(Exception):
        pass

    def stop(self):
        if self.trainer.iter == 2:
            raise Cut

    run(script, config, tmp_path / "whole", "train.seed=3")
    with monkeypatch.context() as patch:
        patch.setattr(hooks.PeriodicWriter, "after_step", stop)
        with pytest.raises(Cut):
            run(script, config, tmp_path / "cut", "train.seed=3")
    run(script, config, tmp_path / "cut", "--resume")
    whole, cut = (
        torch.load(tmp_path / name / "model_final.pth", weights_only=True)["model"]
        for name in ("whole", "cut")
    )
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_a_config_is_not_run_unless_it_is_trusted(script, config, capsys):
    arguments = script.parser().parse_args(["--config-file", str(config)])
    with pytest.raises(SystemExit):
        script.main(arguments)
    assert "--trust-config" in capsys.readouterr().err
