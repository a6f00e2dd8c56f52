"""Prediction of files: a bad one is listed, a stopped run goes on, other options begin anew."""

import dataclasses
import json
import os

import numpy as np
import pytest
from PIL import Image

from d2kit.predict import Predictor
from d2kit.predict.run import KEPT, _digest, check_results_file, predict_files, write_coco
from d2kit.utils.file_io import IMAGE_SUFFIXES, find_image_files


@pytest.fixture(scope="module")
def predictor(detector):
    return Predictor(*detector, device="cpu", batch_size=2)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    place = tmp_path / "in"
    place.mkdir()
    for i in range(5):
        pixels = rng.integers(0, 255, (30, 40 + 4 * (i // 3), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{i}.png")
    return place


def test_a_bad_file_costs_only_itself(predictor, folder, tmp_path):
    data = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(data[:200])
    (folder / "3.png").write_text("<html>404</html>")
    files = find_image_files([folder]).files
    results = list(predict_files(predictor, files, tmp_path / "o"))
    assert [bool(r.error) for r in results] == [False, True, False, True, False]
    assert "not an image" in results[3].error
    write_coco(results, predictor.class_names, tmp_path / "o/p.json")
    coco = json.loads((tmp_path / "o/p.json").read_text())
    assert [image["id"] for image in coco["images"]] == [1, 3, 5]
    assert [row["id"] for row in coco["annotations"]] == list(range(1, 13))
    assert len(list((tmp_path / "o/overlays").iterdir())) == 3


def test_a_stopped_run_goes_on(predictor, folder, tmp_path, monkeypatch):
    files, out = find_image_files([folder]).files, tmp_path / "o"
    stream = predict_files(predictor, files, out)
    for _ in range(3):
        next(stream)
    stream.close()
    with (out / KEPT).open("a") as file:
        file.write('{"id": 4, "file_na')  # the line at which it was killed
    seen = []
    real = Predictor.__call__
    monkeypatch.setattr(
        Predictor, "__call__", lambda self, images: seen.extend(images) or real(self, images)
    )
    again = list(predict_files(predictor, files, out))
    assert len(seen) == 2
    fresh = list(predict_files(predictor, files, tmp_path / "other"))
    assert [r.found for r in again] == [r.found for r in fresh]
    Image.new("RGB", (40, 30)).save(files[0])
    seen.clear()
    list(predict_files(predictor, files, out))
    assert len(seen) == 1, "a file that changed is predicted anew"


def test_results_of_other_options_are_removed(predictor, detector, folder, tmp_path):
    files, out = find_image_files([folder]).files, tmp_path / "o"
    list(predict_files(predictor, files, out))
    other = Predictor(*detector, device="cpu", confidence=1.0)
    results = list(predict_files(other, files[:1], out))
    assert [len(r.found) for r in results] == [0]
    assert len(list((out / "overlays").iterdir())) == 1


def test_results_of_other_files_are_removed(predictor, folder, tmp_path):
    files, out = find_image_files([folder]).files, tmp_path / "o"
    list(predict_files(predictor, files, out))
    list(predict_files(predictor, files[:2], out))
    assert sorted(p.name for p in (out / "overlays").iterdir()) == ["00001_0.jpg", "00002_1.jpg"]


@pytest.mark.parametrize(
    "change", [{"annotations": [1]}, {"annotations": [{"category_id": 99}]}, {"stamp": [1, "a"]}]
)
def test_a_stored_result_that_was_changed_is_predicted_anew(predictor, folder, tmp_path, change):
    files, out = find_image_files([folder]).files[:2], tmp_path / "o"
    wanted = [len(r.found) for r in predict_files(predictor, files, out)]
    lines = (out / KEPT).read_text().splitlines()
    lines[1] = json.dumps({**json.loads(lines[1]), **change})
    (out / KEPT).write_text("\n".join(lines) + "\n")
    assert [len(r.found) for r in predict_files(predictor, files, out)] == wanted


def test_weights_of_the_same_time_and_size_are_others(predictor, folder, tmp_path, monkeypatch):
    weights = tmp_path / "w.pth"
    settings = dataclasses.replace(predictor.settings, weights=str(weights))
    monkeypatch.setattr(predictor, "settings", settings)
    found = []
    for content in (b"first", b"other"):
        weights.write_bytes(content)
        os.utime(weights, (1, 1))
        found.append(_digest(predictor))
    assert found[0] != found[1]


def test_a_file_of_others_is_not_replaced(tmp_path):
    path = tmp_path / "predictions.json"
    check_results_file(path)
    path.write_text('{"mine": 1}')
    with pytest.raises(ValueError, match="not written by this tool"):
        check_results_file(path)
    write_coco([], ["a"], path)
    check_results_file(path)


def test_a_model_that_fails_on_one_image(predictor, folder, tmp_path, monkeypatch):
    real = predictor.model.forward

    def forward(items):
        if any(item["width"] == 44 for item in items):
            raise RuntimeError("out of memory")
        return real(items)

    monkeypatch.setattr(predictor.model, "forward", forward)
    results = list(predict_files(predictor, find_image_files([folder]).files, tmp_path / "o"))
    assert [r.error.partition(":")[0] for r in results] == ["", "", "", *["the model fails"] * 2]


def test_what_is_no_picture_is_counted(folder, tmp_path):
    (folder / "._0.png").write_bytes(b"")
    (folder / "x.jpg").mkdir()
    (folder / "x.jpg" / "inside.PNG").write_bytes((folder / "0.png").read_bytes())
    (folder / ".cache").mkdir()
    (folder / ".cache" / "no.png").write_bytes(b"")
    (folder / "notes.txt").write_text("")
    (folder / "phone.HEIC").write_bytes(b"")
    (folder / "gone.jpg").symlink_to("nowhere.jpg")
    found = find_image_files([folder, folder / "0.png", tmp_path / "absent", "n" * 999])
    names = [path.name for path in found.files]
    assert names == ["0.png", "1.png", "2.png", "3.png", "4.png", "inside.PNG"]
    assert {path.name for path in found.left_out} == {"._0.png", "notes.txt", "phone.HEIC"}
    text = found.describe_left_out()
    assert text.startswith("3 files left out")
    assert "1 .heic (convert it, for example with pillow-heif)" in text
    assert [path.name[:9] for path, _ in found.bad] == ["gone.jpg", "absent", "nnnnnnnnn"]


@pytest.mark.skipif(os.name != "posix", reason="names are bytes")
def test_names_of_any_bytes(predictor, folder, tmp_path):
    os.rename(folder / "0.png", os.fsencode(folder) + b"/caf\xe9.png")
    os.rename(folder / "1.png", folder / f"{'long' * 60}.png")
    files = find_image_files([folder]).files
    results = list(predict_files(predictor, files, tmp_path / "o"))
    assert not any(r.error for r in results)
    assert len(list((tmp_path / "o/overlays").iterdir())) == 5
    write_coco(results, predictor.class_names, tmp_path / "p.json")
    names = [
        image["file_name"] for image in json.loads((tmp_path / "p.json").read_text())["images"]
    ]
    assert os.fsencode(folder) + b"/caf\xe9.png" in map(os.fsencode, names)


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_every_suffix_is_read(suffix, tmp_path):
    from d2kit.data.detection_utils import read_image

    file = tmp_path / f"a{suffix}"
    kinds = {".dib": "DIB", ".avif": "AVIF", ".j2k": "JPEG2000"}
    mode = {".pgm": "L", ".pbm": "1"}.get(suffix, "RGB")
    Image.new("RGB", (16, 12), (200, 200, 200)).convert(mode).save(file, format=kinds.get(suffix))
    assert read_image(file, "BGR").shape == (12, 16, 3)


@pytest.mark.parametrize(
    "row",
    [
        {"overlay": "../../keep.txt"},
        {"overlay": ""},
        {"overlay": 3},
        {"stamp": None},
        {"annotations": "none"},
        {"id": "1"},
    ],
)
def test_stored_results_of_others_touch_nothing(row, predictor, folder, tmp_path, caplog):
    kept = tmp_path / "keep.txt"
    kept.write_text("mine")
    out = tmp_path / "out"
    out.mkdir()
    sound = {"id": 1, "file_name": "a", "stamp": [0, 0], "overlay": "00001_a.jpg", "height": 1}
    lines = [{"options": "of another run"}, sound | {"width": 1, "annotations": []} | row]
    (out / KEPT).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    files = find_image_files([folder]).files
    assert any(not result.error for result in predict_files(predictor, files, out))
    assert kept.read_text() == "mine"
    assert "line 2 is none of ours" in caplog.text
