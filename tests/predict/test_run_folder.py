"""The folder of a training is a model; what holds only a backbone's weights is none."""

import cv2
import numpy as np
import pytest
import torch

from d2kit import Predictor
from d2kit.checkpoint import DetectionCheckpointer
from d2kit.cli.predict import predict_main, track_main
from d2kit.cli.train import train_net_main
from d2kit.cli.weights import export_main
from d2kit.export.backends import TRAINED, read_config
from tests.export.kinds import config_of, model_of, picture


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What a training leaves: its config, which names what it began with, and its weights."""
    folder = tmp_path_factory.mktemp("run")
    model = model_of("faster FPN")
    DetectionCheckpointer(model, str(folder)).save("model_final")
    first = {k: v for k, v in model.state_dict().items() if k.startswith("backbone.")}
    torch.save(first, folder / "backbone.pth")
    cfg = config_of("faster FPN", "MODEL.WEIGHTS", str(folder / "backbone.pth"))
    (folder / "config.yaml").write_text(cfg.dump())
    cv2.imwrite(str(folder / "many.png"), picture("many").permute(1, 2, 0).numpy().astype(np.uint8))
    return folder


def test_its_weights_are_those_that_were_trained(run):
    found = Predictor(str(run))(str(run / "many.png"))
    wanted = Predictor(str(run / "config.yaml"), str(run / "model_final.pth"))(
        str(run / "many.png")
    )
    assert len(found) == len(wanted) > 0
    torch.testing.assert_close(found.scores, wanted.scores)


def test_the_best_are_taken_first(run, tmp_path):
    (tmp_path / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    for name in reversed(TRAINED):
        (tmp_path / name).touch()
        assert str(tmp_path / name) == read_config(tmp_path).MODEL.WEIGHTS


COMMANDS = {
    "predict": (predict_main, ["--input", "many.png"]),
    "track": (track_main, ["--input", "ward.mp4", "--no-video"]),
    "export": (export_main, ["--format", "torchscript", "--image", "many.png"]),
}


@pytest.mark.parametrize("verb", COMMANDS)
def test_weights_of_a_backbone_alone_are_refused(verb, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(run)
    if verb == "track":
        video = cv2.VideoWriter("ward.mp4", cv2.VideoWriter_fourcc(*"mp4v"), 10.0, (96, 64))
        for _ in range(3):
            video.write(np.zeros((64, 96, 3), np.uint8))
        video.release()
    main, words = COMMANDS[verb]
    with pytest.raises(SystemExit):
        main(["--config-file", "config.yaml", *words, "--output", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert "weights of the model are not in it" in said
    assert "its folder as --config-file" in said


def test_training_on_needs_a_word(run, capsys):
    with pytest.raises(SystemExit):
        train_net_main(["--config-file", str(run)])
    assert "--resume goes on with it" in capsys.readouterr().err
