import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_util

from d2kit.data.catalog import DatasetCatalog, MetadataCatalog
from d2kit.evaluation import SemSegEvaluator
from d2kit.evaluation.sem_seg_evaluation import is_boundary, load_image_into_numpy_array
from d2kit.utils import comm

NAME = "zz_sem_seg_evaluation"
NAMES = ["sky", "road", "tree", "rare", "absent"]


@pytest.fixture
def data(tmp_path):
    """Return [(file, truth, prediction)]; 255 is void, class 4 is only predicted."""
    rng = np.random.default_rng(3)
    made = []
    for number in range(4):
        truth = np.kron(rng.integers(0, 3, (4, 5)), np.ones((12, 13), int))
        truth[rng.random(truth.shape) < 0.1] = 255
        if number == 0:
            truth[:10, :10] = 3
        guess = np.roll(np.where(truth == 255, 0, truth), 2, axis=1)
        guess[rng.random(guess.shape) < 0.05] = 4
        if number == 3:
            truth[:] = 255
        file = str(tmp_path / f"{number}.png")
        Image.fromarray(truth.astype(np.uint8)).save(file)
        made.append((f"{number}.jpg", truth, guess))
    records = [
        {"file_name": f, "sem_seg_file_name": str(tmp_path / f"{i}.png")}
        for i, (f, _, _) in enumerate(made)
    ]
    DatasetCatalog.register(NAME, lambda: records)
    MetadataCatalog.get(NAME).set(
        stuff_classes=NAMES,
        ignore_label=255,
        stuff_dataset_id_to_contiguous_id={10 * i + 1: i for i in range(5)},
    )
    yield made
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def run(data, output_dir=None, scores=False, **settings):
    evaluator = SemSegEvaluator(NAME, output_dir=output_dir, **settings)
    for file, _, guess in data:
        output = torch.as_tensor(guess)
        if scores:
            output = torch.nn.functional.one_hot(output, 5).permute(2, 0, 1).float()
        evaluator.process([{"file_name": file}], [{"sem_seg": output}])
    return evaluator.evaluate()


def erode(mask, times):
    for _ in range(times):
        padded = np.pad(mask, 1)
        mask = np.min(
            [np.roll(padded, (y, x), (0, 1)) for y in (-1, 0, 1) for x in (-1, 0, 1)], axis=0
        )[1:-1, 1:-1]
    return mask


def boundary(labels, value):
    mask = labels == value
    return mask & ~erode(mask, max(1, round(0.02 * np.hypot(*labels.shape))))


def naive(data):
    """The four figures of Long et al. 2015 and Boundary IoU (Cheng et al. 2021), pixel by pixel."""
    truth = np.concatenate([t.ravel() for _, t, _ in data])
    guess = np.concatenate([g.ravel() for _, _, g in data])
    known = truth != 255
    figures, ious, accuracies, weighted = {}, [], [], 0
    for value, name in enumerate(NAMES):
        a, b = truth == value, (guess == value) & known
        figures[f"IoU-{name}"] = figures[f"ACC-{name}"] = figures[f"BoundaryIoU-{name}"] = np.nan
        if not a.any():
            continue
        iou = (a & b).sum() / (a | b).sum()
        ious.append(iou)
        accuracies.append((a & b).sum() / a.sum())
        weighted += iou * a.sum() / known.sum()
        edges = [(boundary(t, value), boundary(g, value) & (t != 255)) for _, t, g in data]
        both, either = (
            sum(op(x, y).sum() for x, y in edges) for op in (np.logical_and, np.logical_or)
        )
        figures[f"IoU-{name}"] = iou * 100
        figures[f"ACC-{name}"] = accuracies[-1] * 100
        figures[f"BoundaryIoU-{name}"] = both / either * 100
    for name in NAMES:
        pair = figures[f"IoU-{name}"], figures[f"BoundaryIoU-{name}"]
        figures[f"min(IoU, B-Iou)-{name}"] = np.minimum(*pair)
    figures["mIoU"] = np.mean(ious) * 100
    figures["fwIoU"] = weighted * 100
    figures["mACC"] = np.mean(accuracies) * 100
    figures["pACC"] = (truth == guess)[known].mean() * 100
    return figures


def test_figures_equal_the_published_rules(data, tmp_path):
    got = run(data)["sem_seg"]
    assert got == pytest.approx(naive(data), abs=1e-9, nan_ok=True)
    assert list(got)[:2] == ["mIoU", "fwIoU"]
    assert 0 < got["mIoU"] < 100
    assert got == pytest.approx(run(data, scores=True)["sem_seg"], nan_ok=True)


def test_means_are_those_of_hotcoco(data):
    from hotcoco.semantic import SemanticEval

    theirs = SemanticEval(NAMES)
    for _, truth, guess in data:
        theirs.update(truth.astype(np.int64), guess.astype(np.int64))
    got = run(data)["sem_seg"]
    assert got["pACC"] == pytest.approx(theirs.report()["metrics"]["aAcc"] * 100)
    per_class = np.diag(theirs.confusion())[:4] / theirs.confusion().sum(axis=1)[:4]
    assert [got[f"ACC-{n}"] for n in NAMES[:4]] == pytest.approx(list(per_class * 100))


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (40, 50), (120, 90)])
def test_boundary_is_what_erosion_removes(size):
    labels = np.kron(np.random.default_rng(0).integers(0, 4, (9, 9)), np.ones((14, 23), int))
    labels = labels[: size[0], : size[1]]
    for value in np.unique(labels):
        expected = boundary(labels, value)
        np.testing.assert_array_equal(is_boundary(labels) & (labels == value), expected)


def test_boundaries_can_be_left_out(data, monkeypatch):
    whole = run(data)["sem_seg"]
    monkeypatch.setattr(
        "d2kit.evaluation.sem_seg_evaluation.boundary_iou_counts", lambda *_: pytest.fail("counted")
    )
    monkeypatch.setattr(SemSegEvaluator, "reset", without_boundaries(SemSegEvaluator.reset))
    left = run(data)["sem_seg"]
    assert set(whole) - set(left) == {k for k in whole if "Boundary" in k or k.startswith("min(")}
    assert left == pytest.approx({k: whole[k] for k in left}, nan_ok=True)


def without_boundaries(reset):
    def wrapped(self):
        self._compute_boundary_iou = False
        reset(self)

    return wrapped


def test_predictions_are_written(data, tmp_path):
    results = run(data, str(tmp_path / "out"))
    entries = json.loads((tmp_path / "out/sem_seg_predictions.json").read_text())
    rebuilt = np.full(data[0][2].shape, -1)
    for entry in entries:
        if entry["file_name"] == data[0][0]:
            rebuilt[mask_util.decode(entry["segmentation"]) == 1] = (entry["category_id"] - 1) // 10
    np.testing.assert_array_equal(rebuilt, data[0][2])
    stored = torch.load(tmp_path / "out/sem_seg_evaluation.pth", weights_only=True)
    np.testing.assert_equal(stored, results["sem_seg"])


def test_nothing_processed(data):
    got = SemSegEvaluator(NAME).evaluate()["sem_seg"]
    assert all(np.isnan(value) for value in got.values())


def test_other_process_sends_and_returns_none(data, monkeypatch):
    whole = run(data)
    sent = []
    with monkeypatch.context() as other:
        other.setattr(comm, "is_main_process", lambda: False)
        other.setattr(comm, "gather", lambda part, dst=0: sent.append(part) or [])
        assert run(data[1::2]) is None
    monkeypatch.setattr(comm, "gather", lambda part, dst=0: [part, *sent])
    np.testing.assert_equal(run(data[::2]), whole)


def test_wrong_use_is_told(data, tmp_path):
    evaluator = SemSegEvaluator(NAME, output_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"0\.png: labels are \(48, 65\)"):
        evaluator.process([{"file_name": "0.jpg"}], [{"sem_seg": torch.zeros(5, 3, 3)}])
    with pytest.raises(ValueError, match="NUM_CLASSES"):
        evaluator.process([{"file_name": "0.jpg"}], [{"sem_seg": torch.full((48, 65), 5)}])
    with pytest.raises(ValueError, match="stuff_classes"):
        SemSegEvaluator(NAME, num_classes=7)
    DatasetCatalog.register("zz_none", lambda: [{"file_name": "a.jpg"}])
    with pytest.raises(ValueError, match=r"no semantic labels.*a\.jpg"):
        SemSegEvaluator("zz_none")
    DatasetCatalog.remove("zz_none")


def test_labels_as_numpy(tmp_path):
    Image.fromarray(np.eye(3, dtype=np.uint8)).save(tmp_path / "a.png")
    array = load_image_into_numpy_array(str(tmp_path / "a.png"), copy=True, dtype="int64")
    assert array.dtype == np.int64
    array[0] = 1
    with pytest.raises(FileNotFoundError):
        load_image_into_numpy_array(str(tmp_path / "b.png"))
