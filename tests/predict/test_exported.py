"""Exported folders stand where a config and weights stand, and give the same results."""

import builtins
import json

import numpy as np
import pytest
import torch
from PIL import Image

import d2kit
from d2kit.cli import train
from d2kit.cli.evaluate import report_main
from d2kit.cli.predict import predict_main, track_main
from d2kit.cli.weights import export_config, write_folder
from d2kit.config import get_cfg
from d2kit.engine import DefaultPredictor
from d2kit.export import load_exported
from d2kit.export.backends import FILES, sha256
from d2kit.modeling import build_model
from tests.export.test_export import needs
from tests.support.tiny_model import tiny_config, tiny_input

# torch.export of this model takes minutes: tests/export/table.py runs it
FORMATS = ["torchscript", "onnx", pytest.param("openvino", marks=pytest.mark.slow)]


def pixels(seed, size=(64, 80)):
    return np.ascontiguousarray(tiny_input(seed, 3, size)["image"].byte().permute(1, 2, 0).numpy())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A config file and weights of a tiny Mask R-CNN with spread-out scores."""
    folder = tmp_path_factory.mktemp("detector")
    cfg = tiny_config("MODEL.CLASS_NAMES", ["cat", "dog", "newt"], "TEST.DETECTIONS_PER_IMAGE", 10)
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.2
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 96, 160
    torch.manual_seed(0)
    model = build_model(cfg)
    with torch.no_grad():
        for parameter in model.roi_heads.parameters():
            parameter.mul_(3)
    torch.save({"model": model.state_dict()}, folder / "model.pth")
    cfg.MODEL.WEIGHTS = str(folder / "model.pth")
    (folder / "config.yaml").write_text(cfg.dump())
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def exports(trained, tmp_path_factory):
    """Format -> folder, made when it is asked for."""
    made = {}
    picture = tmp_path_factory.mktemp("picture") / "a.png"
    Image.fromarray(pixels(0)).save(picture)

    def get(form):
        needs(form)
        if form not in made:
            cfg = get_cfg()
            cfg.merge_from_file(trained)
            made[form] = tmp_path_factory.mktemp(form)
            export_config(cfg, form, made[form], image_file=picture)
        return made[form]

    return get


def equal(found, expected):
    """Assert that two results are the same but for the order of equal scores."""
    assert found.image_size == expected.image_size
    assert found.get_fields().keys() == expected.get_fields().keys()
    assert len(found) == len(expected)
    if len(expected):
        apart = torch.cdist(expected.pred_boxes.tensor, found.pred_boxes.tensor)
        apart += 100 * (expected.pred_classes[:, None] != found.pred_classes)
        order = apart.argmin(1)
        assert sorted(order.tolist()) == list(range(len(found)))
        found = found[order]
    torch.testing.assert_close(
        found.pred_boxes.tensor, expected.pred_boxes.tensor, atol=1e-2, rtol=1e-4
    )
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=1e-4)
    assert found.pred_classes.tolist() == expected.pred_classes.tolist()
    assert found.pred_masks.shape == expected.pred_masks.shape
    assert (found.pred_masks != expected.pred_masks).sum() <= 2 * len(found)


@pytest.mark.parametrize("form", FORMATS)
def test_predictor_of_a_folder_is_that_of_the_model(form, exports, trained):
    pictures = [pixels(1), pixels(2), pixels(3, (90, 60)), pixels(4, (70, 120))]
    exported, eager = d2kit.Predictor(exports(form)), d2kit.Predictor(trained)
    assert exported.class_names == exported.metadata.thing_classes == ["cat", "dog", "newt"]
    for found, expected in zip(exported(pictures), eager(pictures), strict=True):
        assert len(expected) > 1
        equal(found, expected)
    equal(exported(pictures[0]), eager(pictures[0]))
    grey = np.full((64, 80, 3), 110, np.uint8)
    found, expected = exported(grey), eager(grey)
    # places of a grey picture are equally good: which of them stay is chance
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=1e-4)
    assert found.pred_masks.shape == expected.pred_masks.shape


def test_thresholds_tiles_and_other_sizes(exports, trained):
    folder, image = exports("torchscript"), pixels(5, (150, 220))
    score = float(d2kit.Predictor(trained)(image).scores.median())
    for options in (
        {"confidence": score},
        {"tile": 96, "tile_overlap": 0.3},
        {"agnostic_nms": 0.3, "color": "RGB"},
        {"cfg_options": {"INPUT.MIN_SIZE_TEST": 128}},
    ):
        expected = d2kit.init_detector(trained, **options)(image)
        assert len(expected) > 0
        equal(d2kit.init_detector(folder, **options)(image), expected)
    nothing = d2kit.Predictor(folder, confidence=1.0)(image)
    assert nothing.pred_masks.shape == (0, 150, 220)
    cfg = d2kit.Predictor(folder).cfg
    equal(DefaultPredictor(cfg)(image)["instances"], d2kit.Predictor(trained)(image))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"confidence": 0.1}, "SCORE_THRESH_TEST is 0.1 here and 0.2 inside the exported model"),
        ({"cfg_options": {"MODEL.ROI_HEADS.NMS_THRESH_TEST": 0.3}}, "export the model again with"),
        ({"cfg_options": {"TEST.DETECTIONS_PER_IMAGE": 5}}, "DETECTIONS_PER_IMAGE is 5 here"),
        ({"cfg_options": {"TEST.DTYPE": "bfloat16"}}, "computes in the type that it was written"),
        ({"checkpoint": "other.pth"}, "leave out weights"),
    ],
)
def test_what_is_inside_the_file_cannot_be_changed(options, text, exports):
    with pytest.raises(ValueError, match=text):
        d2kit.init_detector(exports("torchscript"), **options)


@pytest.mark.parametrize("name", ["model.ts", "config.yaml"])
def test_one_flipped_bit_is_refused(name, exports, tmp_path):
    for file in exports("torchscript").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    d2kit.Predictor(tmp_path)
    data = bytearray((tmp_path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{name} is not the file that was checked"):
        d2kit.Predictor(tmp_path)


def test_a_folder_that_is_none(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match="no metadata.json, which `d2kit export`"):
        d2kit.Predictor(trained.parent)
    with pytest.raises(FileNotFoundError, match="missing' is no name of the model zoo"):
        d2kit.Predictor(tmp_path / "missing")


@pytest.mark.parametrize(("form", "package"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_a_missing_package_is_named(form, package, exports, tmp_path, monkeypatch):
    for file in exports("torchscript").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / FILES[form]).write_bytes(b"")
    metadata = json.loads((tmp_path / "metadata.json").read_text()) | {"format": form}
    metadata["sha256"][FILES[form]] = sha256(tmp_path / FILES[form])
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ImportError(f"No module named '{name}'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match=rf"pip install 'd2kit\[{form}\]'"):
        d2kit.Predictor(tmp_path)


def test_a_folder_of_a_model_of_d2kit_itself_can_be_moved(trained, tmp_path):
    write_folder(trained, str(trained.with_name("model.pth")), tmp_path / "made")
    moved = (tmp_path / "made").rename(tmp_path / "served")
    equal(d2kit.Predictor(moved)(pixels(1)), d2kit.Predictor(trained)(pixels(1)))
    with pytest.raises(ValueError, match="Predictor"):
        load_exported(moved)
    (moved / "model_final.pth").write_bytes(trained.with_name("model.pth").read_bytes()[:-1])
    with pytest.raises(ValueError, match="not the file that was checked"):
        d2kit.Predictor(moved)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_eight_bits_find_nearly_the_same(form, trained, exports, tmp_path):
    needs(form)
    place = tmp_path / "pictures"
    place.mkdir()
    for i in range(4):
        Image.fromarray(pixels(i)).save(place / f"{i}.png")
    cfg = get_cfg()
    cfg.merge_from_file(trained)
    report = export_config(cfg, form, tmp_path / "o", image_file=place / "0.png", int8_folder=place)
    metadata = json.loads((tmp_path / "o/metadata.json").read_text())
    assert metadata["int8"]
    assert report["problems"], "8 bits are not float32"
    found, expected = (d2kit.Predictor(p)(pixels(1)) for p in (tmp_path / "o", trained))
    inside = (found.pred_masks.any(0) & expected.pred_masks.any(0)).sum()
    assert inside > 0.8 * (found.pred_masks.any(0) | expected.pred_masks.any(0)).sum()
    with pytest.raises(ValueError, match="torchscript cannot"):
        export_config(cfg, "torchscript", tmp_path / "t", int8_folder=place)


@pytest.fixture
def dataset(tmp_path):
    """Pictures and their annotations as DATASETS.REGISTER_COCO takes them."""
    place = tmp_path / "pictures"
    place.mkdir()
    images, annotations = [], []
    for i in range(3):
        item = tiny_input(i, 3)
        Image.fromarray(pixels(i)).save(place / f"{i}.png")
        images.append({"id": i + 1, "file_name": f"{i}.png", "height": 64, "width": 80})
        fields = item["instances"]
        for box, c in zip(fields.gt_boxes.tensor.tolist(), fields.gt_classes.tolist(), strict=True):
            x, y, w, h = box[0], box[1], box[2] - box[0], box[3] - box[1]
            corners = [x, y, x + w, y, x + w, y + h, x, y + h]
            one = {"id": len(annotations) + 1, "image_id": i + 1, "category_id": c + 1}
            one |= {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0, "segmentation": [corners]}
            annotations.append(one)
    names = ("cat", "dog", "newt")
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "truth.json").write_text(json.dumps(content))
    return place, tmp_path / "truth.json"


@pytest.mark.slow
def test_commands_take_the_folder(exports, trained, dataset, tmp_path, capsys):
    folder, (place, _) = exports("torchscript"), dataset
    args = ["--input", str(place), "--output", str(tmp_path / "found")]
    predict_main(["--config-file", str(folder), *args])
    found = json.loads((tmp_path / "found/predictions.json").read_text())
    predict_main(["--config-file", str(trained), *args[:-1], str(tmp_path / "e")])
    expected = json.loads((tmp_path / "e/predictions.json").read_text())
    assert found["categories"] == expected["categories"]
    assert [a["category_id"] for a in found["annotations"]] == [
        a["category_id"] for a in expected["annotations"]
    ]
    code = track_main(
        ["--config-file", str(folder), "--input", str(place), "--output", f"{tmp_path}/t"]
    )
    assert code == 0
    assert "identities" in capsys.readouterr().out


def test_evaluation_and_report(exports, trained, dataset, tmp_path, capsys):
    folder, (place, truth) = exports("torchscript"), dataset
    name = f"exported_{tmp_path.name}"
    opts = ["DATASETS.REGISTER_COCO", f"[['{name}', '{truth}', '{place}']]"]
    opts += ["DATASETS.TEST", f"('{name}',)", "DATALOADER.NUM_WORKERS", "0"]
    with pytest.raises(SystemExit):
        report_main([str(folder)])
    assert "evaluate it first" in capsys.readouterr().err
    results = []
    for config, output in ((folder, []), (trained, ["OUTPUT_DIR", str(tmp_path / "run")])):
        words = ["--eval-only", "--config-file", str(config), *opts, *output]
        results.append(train.run(train.argument_parser().parse_args(words)))
    exported, eager = results
    assert exported.keys() == eager.keys() == {"bbox", "segm"}
    for task in eager:
        assert exported[task]["AP"] == pytest.approx(eager[task]["AP"], abs=0.05)
    report_main([str(folder)])
    assert (folder / "evaluation" / "report.html").is_file()
    with pytest.raises(SystemExit):
        train.run(train.argument_parser().parse_args(["--config-file", str(folder)]))
    assert "not trained" in capsys.readouterr().err
