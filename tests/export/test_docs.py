"""The lines of docs/export.md that run an exported file without d2kit."""

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from d2kit.export import export_model
from tests.export.kinds import model_of, picture
from tests.export.test_export import to_input

PAGE = Path(__file__).parents[2] / "docs" / "export.md"


def lines_of(form):
    """The lines that draw masks; those for TorchScript are the ones for ONNX with two exchanged."""
    [lines, other] = re.findall(
        r"```python\n((?:import json|session).*?)```", PAGE.read_text(), re.DOTALL
    )
    assert "d2kit" not in lines + other
    assert len(lines.strip().splitlines()) <= 11
    if form == "onnx":
        return lines
    for line in other.strip().splitlines():
        name = line.split(" = ")[0]
        lines = re.sub(rf"^{name} = .*$", lambda _, line=line: line, lines, flags=re.MULTILINE)
    return lines.replace("onnxruntime", "torch, torchvision", 1)


@pytest.mark.parametrize("form", ["onnx", "torchscript"])
def test_the_lines_without_d2kit_draw_masks(form, tmp_path, monkeypatch):
    if form == "onnx":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    image = picture("many").permute(1, 2, 0).byte().numpy()
    extra = {"min_size": 128, "max_size": 300, "input_format": "BGR"}
    export_model(model_of("mask FPN"), form, "exported", image, to_input, metadata=extra)
    cv2.imwrite("street.jpg", image)
    exec(lines_of(form), {})
    drawn, before = cv2.imread("masks.png"), cv2.imread("street.jpg")
    assert drawn.shape == before.shape
    assert bool(np.any(drawn == (0, 200, 0)))
    assert json.loads(Path("exported/parity.json").read_text())["problems"] == []
