"""One flipped bit in a file that d2kit wrote, at each entrance: refused, or the same weights.

``D2KIT_FLIPPED_BITS=300 pytest -m faults`` flips as many in each file (half an hour).
"""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from d2kit.checkpoint import DetectionCheckpointer
from d2kit.checkpoint.files import read_checkpoint
from d2kit.cli import train
from d2kit.cli.weights import convert_weights_main
from d2kit.config import CfgNode
from d2kit.modeling import build_model
from d2kit.predict import init_detector
from tests.support import tiny_run
from tests.support.tiny_detector import detector_cfg
from tests.support.tiny_run import digest

BITS = int(os.environ.get("D2KIT_FLIPPED_BITS", "3"))
SUFFIXES = (".pth", ".safetensors", ".pkl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with weights of a tiny detector in each format, and its config."""
    path = tmp_path_factory.mktemp("weights")
    torch.manual_seed(1)
    checkpointer = DetectionCheckpointer(build_model(detector_cfg()), path)
    checkpointer.save("model")
    checkpointer.save("model.safetensors")
    convert_weights_main([str(path / "model.pth"), str(path / "model.pkl")])
    cfg = detector_cfg()
    cfg.OUTPUT_DIR = str(path / "run")
    cfg.DATASETS.TEST = ()
    (path / "config.yaml").write_text(cfg.dump())
    return path


def detector(weights: Path, folder: Path) -> dict[str, torch.Tensor]:
    return init_detector(detector_cfg(), weights).model.state_dict()


def evaluated(weights: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights that ``--eval-only`` evaluates."""
    seen = []

    class Trainer(train.Trainer):
        @classmethod
        def test(cls, cfg: CfgNode, model: torch.nn.Module, evaluators: object = None) -> dict:
            seen.append({name: value.clone() for name, value in model.state_dict().items()})
            return {}

    line = ["--config-file", str(folder / "config.yaml"), "--eval-only"]
    args = train.argument_parser().parse_args([*line, "MODEL.WEIGHTS", str(weights)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Trainer", Trainer)
        train.run(args)
    return seen[0]


def converted(weights: Path, folder: Path) -> dict[str, torch.Tensor]:
    target = folder / "converted.safetensors"
    target.unlink(missing_ok=True)
    convert_weights_main([str(weights), str(target)])
    return read_checkpoint(target)["model"]


def served(weights: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights that `convert_weights --to d2kit-folder` writes."""
    shutil.rmtree(folder / "served", ignore_errors=True)
    line = [str(weights), str(folder / "served"), "--to", "d2kit-folder"]
    convert_weights_main([*line, "--config-file", str(folder / "config.yaml")])
    return read_checkpoint(folder / "served" / "model_final.pth")["model"]


def check(path: Path, read: Callable[[Path], dict[str, torch.Tensor]]) -> None:
    """Flip bits of a file, one at a time, and read it."""
    raw, wanted = path.read_bytes(), digest(read(path))
    rng, refused = random.Random(path.suffix), 0
    damaged = path.with_name(f"damaged{path.suffix}")
    for _ in range(BITS):
        flipped = bytearray(raw)
        place, bit = rng.randrange(len(raw)), rng.randrange(8)
        flipped[place] ^= 1 << bit
        damaged.write_bytes(flipped)
        try:
            found = read(damaged)
        except (ValueError, KeyError, SystemExit):
            refused += 1
            continue
        assert digest(found) == wanted, f"bit {bit} of byte {place}: other weights, silently"
    print(f"{path.name}: {refused} of {BITS} refused, the others load the same weights")
    assert refused


@pytest.mark.faults(33)
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("read", [detector, evaluated, converted, served])
def test_no_entrance_takes_other_weights(
    folder: Path, suffix: str, read: Callable[[Path, Path], dict[str, torch.Tensor]]
) -> None:
    check(folder / f"model{suffix}", lambda path: read(path, folder))


@pytest.mark.faults(33)
@pytest.mark.parametrize("name", ["model_final.pth", "model_final_ema.safetensors"])
def test_weights_of_a_training_as_the_start_of_another(tmp_path: Path, name: str) -> None:
    """MODEL.WEIGHTS is what a training has written: its last step, its moving average."""
    (tmp_path / "images").mkdir()
    tiny_run.register(tmp_path / "images")
    options = ("SOLVER.MAX_ITER", 2, "SOLVER.EMA.ENABLED", True)
    trainer = tiny_run.TinyTrainer(tiny_run.tiny_cfg(tmp_path / "first", *options))
    trainer.resume_or_load(resume=False)
    trainer.train()

    def read(path: Path) -> dict[str, torch.Tensor]:
        cfg = tiny_run.tiny_cfg(tmp_path / "second", "MODEL.WEIGHTS", str(path))
        later = tiny_run.TinyTrainer(cfg)
        later.resume_or_load(resume=False)
        return later.model.state_dict()

    check(tmp_path / "first" / name, read)
