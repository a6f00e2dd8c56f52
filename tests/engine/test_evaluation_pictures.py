"""Pictures of ground truth beside prediction, drawn while a training evaluates."""

import numpy as np
import pytest
import torch
from PIL import Image

from d2kit.data import MetadataCatalog
from d2kit.engine import CallbackHook
from d2kit.engine.hooks.evaluation import side_by_side
from d2kit.structures import Boxes, Instances
from d2kit.utils.events import EventStorage
from tests.support import rcnn_data
from tests.support.tiny_run import digest

WITH = ("TEST.VIS_IMAGES", 2, "TEST.EVAL_PERIOD", 2, "SOLVER.MAX_ITER", 3)


@pytest.fixture(scope="module", autouse=True)
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rcnn_data.register(folder)
    yield folder
    rcnn_data.forget()


def state_of(trainer):
    return digest([trainer.model.state_dict(), trainer.optimizer.state_dict()])


def run(output, *options, resume=False, kill_at=None):
    def kill(trainer):
        if trainer.iter == kill_at:
            raise KeyboardInterrupt

    torch.manual_seed(0)
    options = ("SOLVER.CHECKPOINT_PERIOD", 2, *WITH, *options)
    trainer = rcnn_data.Trainer(rcnn_data.training_config(output, *options))
    trainer.register_hooks([CallbackHook(before_step=kill)])
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def files(output):
    return sorted(path.name for path in (output / "vis" / rcnn_data.NAME).iterdir())


@pytest.mark.slow
def test_the_same_images_at_each_evaluation_and_an_equal_end(tmp_path):
    """Drawing changes nothing of the training, nor does a kill in between."""
    without = run(tmp_path / "without", "TEST.VIS_IMAGES", 0)
    assert not (tmp_path / "without" / "vis").exists()
    drawn = run(tmp_path / "drawn")
    expected = [f"00000{i}_{i}_iter000000{n}.jpg" for i in (0, 2) for n in (2, 3)]
    assert files(tmp_path / "drawn") == expected
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", kill_at=2)
    assert files(tmp_path / "killed") == [name for name in expected if "2.jpg" in name]
    resumed = run(tmp_path / "killed", resume=True)
    assert resumed.start_iter == 2
    assert files(tmp_path / "killed") == expected
    assert state_of(drawn) == state_of(resumed) == state_of(without)
    for name in expected:
        one, other = (
            np.asarray(Image.open(tmp_path / run / "vis" / rcnn_data.NAME / name))
            for run in ("drawn", "killed")
        )
        assert np.array_equal(one, other)


def test_pictures_reach_the_events(tmp_path, dataset):
    cfg = rcnn_data.training_config(tmp_path, *WITH)
    trainer = rcnn_data.Trainer(cfg)
    with EventStorage(3) as storage:
        trainer._evaluate()
    found = storage.images()
    assert [name for name, _, _ in found] == [f"vis/{rcnn_data.NAME}/00000{i}_{i}" for i in (0, 2)]
    assert all(image.shape[0] == 3 and image.dtype == torch.uint8 for _, image, _ in found)


@pytest.mark.parametrize("count", [0, 1, 60])
def test_detections_are_drawn_at_the_right(dataset, count):
    """Left of the middle nothing depends on what the model found."""
    record = {"file_name": str(dataset / "0.png"), "annotations": []}
    found = Instances((64, 80), pred_boxes=Boxes(torch.tensor([[10.0, 10.0, 60.0, 50.0]] * count)))
    found.scores = torch.full((count,), 0.9)
    found.pred_classes = torch.zeros(count, dtype=torch.int64)
    weak = Instances((64, 80), pred_boxes=Boxes(torch.tensor([[1.0, 1.0, 70.0, 60.0]])))
    weak.scores, weak.pred_classes = torch.tensor([0.29]), torch.tensor([1])
    meta = MetadataCatalog.get(rcnn_data.NAME)
    nothing = side_by_side(record, {"instances": weak}, meta, 7)
    picture = side_by_side(record, {"instances": Instances.cat([found, weak])}, meta, 7)
    assert picture.shape == nothing.shape == (3 * 64 + 48, 2 * 3 * 80 + 6, 3)
    differs = (picture[48:] != nothing[48:]).any(axis=(0, 2)).nonzero()[0]
    assert (differs.size > 0) == (count > 0)
    assert (differs >= 3 * 80 + 6).all()


def test_a_class_has_one_colour_on_both_sides(dataset):
    box = [20.0, 15.0, 60.0, 45.0]
    record = {"file_name": str(dataset / "0.png")}
    record["annotations"] = [{"bbox": box, "bbox_mode": 0, "category_id": 2, "iscrowd": 0}]
    found = Instances((64, 80), pred_boxes=Boxes(torch.tensor([box])))
    found.scores, found.pred_classes = torch.tensor([0.9]), torch.tensor([2])
    meta = MetadataCatalog.get(rcnn_data.NAME)
    picture = side_by_side(record, {"instances": found}, meta, 1)[48:]
    bottom = slice(45 * 3 - 4, 45 * 3 + 4)  # the lower edge, clear of the labels
    assert np.array_equal(picture[bottom, 100:160], picture[bottom, 346:406])
    found.pred_classes = torch.tensor([1])
    other = side_by_side(record, {"instances": found}, meta, 1)[48:]
    assert not np.array_equal(other[bottom, 100:160], other[bottom, 346:406])


def test_other_outputs(dataset):
    meta = MetadataCatalog.get(rcnn_data.NAME)
    record = {"file_name": str(dataset / "0.png")}
    seg = torch.zeros(2, 64, 80)
    seg[1, 20:40] = 1
    for output in ({"sem_seg": seg}, {"proposals": None}):
        assert side_by_side(record, output, meta, 1).shape == (240, 486, 3)
