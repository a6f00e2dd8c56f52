"""Every notebook runs from its first cell to its last, and shows what it promises."""

import pickle
import re
from pathlib import Path

import cv2
import pytest
import torch

from d2kit import model_zoo
from d2kit.modeling import build_model
from project.cars import draw_car
from tests.support.archives import pennfudan_archive

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def executed(path: Path) -> str:
    """Run a notebook in the repository's root; return the text that it printed."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    root = str(path.parents[1])
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": root}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    return "".join(output.get("text", "") for output in outputs)


def test_there_are_notebooks():
    expected = {"inference", "patient_video", "patients_training", "pennfudan"}
    assert {path.stem for path in NOTEBOOKS} == expected


def prepare_inference(folder, monkeypatch):
    """Put random weights where the published ones would be, and draw a picture."""
    config = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x"
    torch.manual_seed(0)
    cfg = model_zoo.get_config(f"{config}.yaml")
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    with torch.no_grad():  # random scores are all alike: spread them, so that some are high
        model.roi_heads.box_predictor.cls_score.weight.mul_(30)
    url = model_zoo.get_checkpoint_url(f"{config}.yaml")
    weights = {k: v.numpy() for k, v in model.state_dict().items()}
    with open(folder / url.rpartition("/")[2], "wb") as file:
        pickle.dump({"model": weights, "__author__": "a test"}, file)
    cv2.imwrite(str(folder / "car.jpg"), draw_car("sedan", (1,))[0][..., ::-1])
    monkeypatch.setenv("D2KIT_WEIGHTS", str(folder))
    monkeypatch.setenv("D2KIT_IMAGE", str(folder / "car.jpg"))
    monkeypatch.setenv("D2KIT_THRESHOLD", "0.05")
    monkeypatch.setenv("D2KIT_BENCHMARK", "--size 64 96 --repeats 1")


def prepare_pennfudan(folder, monkeypatch):
    """Use the archive beside the checkout, or a small one."""
    monkeypatch.setenv("PENNFUDAN_ZIP", str(pennfudan_archive(folder)))
    monkeypatch.setenv("D2KIT_DATASETS", str(folder))
    monkeypatch.setenv("D2KIT_SMALL", "1")


def prepare_patients_training(folder, monkeypatch):
    """Ask for the try-out."""
    monkeypatch.setenv("D2KIT_SMALL", "1")


PREPARE = {
    "inference": prepare_inference,
    "patients_training": prepare_patients_training,
    "pennfudan": prepare_pennfudan,
}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)  # Agg, as in CI, would show no picture
    if path.stem in PREPARE:
        PREPARE[path.stem](tmp_path, monkeypatch)
    text = executed(path)
    if path.stem == "patient_video":
        assert "identities joined to the patient" in text
        assert "No rhythmic shaking found" not in text
    if path.stem == "inference":
        assert int(re.search(r"(\d+) detections", text)[1]) > 0
        assert re.search(r"Mask R-CNN +\| cpu +\| d2kit +\|", text)
        assert ("no GPU here" in text) == (not torch.cuda.is_available())
    if path.stem == "patients_training":
        assert "by video: 0 videos on both sides, 0 pairs of frames look the same" in text
        shared, pairs = re.search(r"by frame: (\d+) videos on both sides, (\d+) pairs", text).groups()
        assert int(shared) > 0
        assert int(pairs) > 0
        assert re.search(r"\| all, by group +\| +\d+ \|", text)
    if path.stem == "pennfudan":
        assert re.search(r"bbox: AP \d", text)
        assert re.search(r"segm: AP \d", text)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_with_results(path):
    nbformat = pytest.importorskip("nbformat")
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    if path.stem == "inference":  # of published weights, which could not be had here
        assert not any(cell.outputs for cell in cells)
        return
    assert all(cell.execution_count for cell in cells)
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert path.stat().st_size < 600_000
    assert str(Path.home()) not in path.read_text()
