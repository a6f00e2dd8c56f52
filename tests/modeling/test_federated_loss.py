"""The federated loss from the config alone: weights from the metadata of the training set."""

import subprocess
import sys

import pytest
import torch

from d2kit.data import MetadataCatalog
from d2kit.modeling import build_model
from tests.support.tiny_model import tiny_config, tiny_input


@pytest.fixture
def options():
    name = "_fed_loss_test"
    counts = [(3, 16), (1, 4), (2, 9)]
    MetadataCatalog.get(name).class_image_count = [
        {"id": class_id, "image_count": count} for class_id, count in counts
    ]
    yield [
        *("MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True),
        *("MODEL.ROI_BOX_HEAD.USE_FED_LOSS", True),
        *("MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES", 2),
        *("DATASETS.TRAIN", (name,)),
    ]
    MetadataCatalog.pop(name)


@pytest.mark.parametrize(("power", "weights"), [(0.5, [2, 3, 4]), (1.0, [4, 9, 16])])
def test_weights_come_from_the_training_set(options, power, weights):
    cfg = tiny_config(*options, "MODEL.ROI_BOX_HEAD.FED_LOSS_FREQ_WEIGHT_POWER", power)
    model = build_model(cfg)
    head = model.roi_heads.box_predictor
    assert head.fed_loss_cls_weights.tolist() == weights
    assert head.fed_loss_num_classes == 2
    losses = model([tiny_input(0), tiny_input(1, 0)])
    sum(losses.values()).backward()
    assert torch.isfinite(losses["loss_cls"])


def test_number_of_classes_must_agree(options):
    with pytest.raises(ValueError, match="one weight per class, 4"):
        build_model(tiny_config(*options, "MODEL.ROI_HEADS.NUM_CLASSES", 4))


def test_a_process_without_datasets_is_told_what_to_import():
    code = (
        "from tests.support.tiny_model import tiny_config\n"
        "from d2kit.modeling import build_model\n"
        "cfg = tiny_config('MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE', True,\n"
        "    'MODEL.ROI_BOX_HEAD.USE_FED_LOSS', True, 'DATASETS.TRAIN', ('lvis_v1_train',))\n"
        "try:\n    build_model(cfg)\n"
        "except LookupError as error:\n    assert 'import d2kit.data' in str(error)\n"
        "else:\n    raise SystemExit('not told')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
