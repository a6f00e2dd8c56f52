#!/usr/bin/env python3
"""What protection costs: a training step with it and without, a checkpoint beside `torch.save`.

benchmark_protection.py step [--repeats 200]: in turn, on the same batch, an iteration of
    `DefaultTrainer` with all its hooks (every step seeded, statistics of BatchNorm kept, losses
    checked on the host, signals, watchdog, timer, writers) and a bare loop: forward, backward,
    update, schedule. The demo's model on the synthetic ward, and a model of 24 weights. With two
    processes: torchrun --nproc-per-node 2 benchmark_protection.py step
benchmark_protection.py save --repeats 9: in turn `DetectionCheckpointer.save` (checksums, a
    temporary name, fsync of file and folder) and `torch.save` of the same content, with fsync
    and without, for the demo and for Mask R-CNN R50-FPN, weights and optimizer.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from d2kit.checkpoint import DetectionCheckpointer
from d2kit.cli.benchmark import machine
from d2kit.config import CfgNode, get_cfg
from d2kit.engine import DefaultTrainer, launch
from d2kit.engine.safety.stopping import add_preemption
from d2kit.solver import build_optimizer
from d2kit.utils import comm
from d2kit.utils.events import EventStorage
from project import patient_video

CONFIGS = Path(__file__).parents[1] / "configs"
DEMO = "PatientVideo/mask_rcnn_R_18_FPN_demo.yaml"
LARGE = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"


def config(name: str, folder: str, *options: object) -> CfgNode:
    """Return a config of this repository, on the CPU, with random weights."""
    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIGS / name))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "OUTPUT_DIR", folder])
    cfg.merge_from_list(["SOLVER.CHECKPOINT_PERIOD", 10**6, "SOLVER.MAX_ITER", 10**6, *options])
    return cfg


class Tiny(nn.Module):
    """A convolution, BatchNorm, and a loss: nothing for the cost of a step to hide behind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 2, stride=16)
        self.norm = nn.BatchNorm2d(2)

    def forward(self, batch: list[dict]) -> dict[str, torch.Tensor]:
        """Return the loss of a batch."""
        images = torch.stack([sample["image"][:, :64, :64] for sample in batch]).float()
        return {"loss": self.norm(self.conv(images)).square().mean()}


class TinyTrainer(DefaultTrainer):
    """Trains `Tiny`."""

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Return the model; the config's is not used."""
        return Tiny()


class Pair:
    """One training, whose steps are done by the trainer or by a bare loop.

    Args:
        trainer: a new one.
    """

    def __init__(self, trainer: DefaultTrainer) -> None:
        self.trainer = trainer
        self.batches = iter(trainer.data_loader)
        add_preemption(trainer, trainer.checkpointer)
        trainer.start_iter, trainer.iter = 0, 0
        trainer.storage = EventStorage(0)

    def protected(self, batch: list[dict]) -> None:
        """Do an iteration as `DefaultTrainer.train` does it."""
        self.trainer._trainer._data_loader_iter_obj = iter([batch])
        self.trainer._iterate(self.trainer.iter + 1)

    def bare(self, batch: list[dict]) -> None:
        """Do what any training must."""
        inner = self.trainer._trainer
        with inner._forward_context():
            losses = inner.model(batch)
        inner.optimizer.zero_grad()
        sum(losses.values()).backward()
        inner.optimizer.step()
        self.trainer.scheduler.step()

    def measure(self, pairs: int) -> dict[str, np.ndarray]:
        """Return wall and processor seconds of each pair: (pairs, 2) protected and bare."""
        runs = (self.protected, self.bare)
        found: dict[str, list] = {"wall": [], "processor": []}
        with self.trainer.storage:
            self.trainer.before_train()
            for number in range(-5, pairs):
                batch = next(self.batches)
                times = np.zeros((2, 2))
                for k in (0, 1) if number % 2 else (1, 0):
                    comm.synchronize()
                    before = time.perf_counter(), time.process_time()
                    runs[k](batch)
                    times[:, k] = time.perf_counter() - before[0], time.process_time() - before[1]
                if number >= 0:
                    found["wall"].append(times[0])
                    found["processor"].append(times[1])
            self.trainer.after_train()
        return {key: np.array(value) for key, value in found.items()}


def row_of_pairs(name: str, clock: str, times: np.ndarray) -> list:
    """Return a line of the table: median difference of the pairs, 95 % bootstrap interval."""
    differences = times[:, 0] - times[:, 1]
    bare = float(np.median(times[:, 1]))
    draws = np.random.default_rng(0).integers(0, len(times), (2000, len(times)))
    low, high = np.percentile(np.median(differences[draws], axis=1), (2.5, 97.5))
    middle = float(np.median(differences))
    seconds = f"{middle * 1e3:.2f} ({low * 1e3:.2f} to {high * 1e3:.2f})"
    share = f"{middle / bare:.1%} ({low / bare:.1%} to {high / bare:.1%})"
    return [name, clock, f"{bare * 1e3:.2f}", seconds, share]


def step(args: argparse.Namespace) -> None:
    """Measure the step and print the table, on rank 0."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if comm.is_main_process():
            patient_video.generate(args.data / "patient_video")
        comm.synchronize()
        patient_video.register(args.data)
        for name, kind in (("tiny", TinyTrainer), ("demo", DefaultTrainer)):
            if name in args.models:
                output = comm.all_gather(f"{folder}/{name}")[0]
                options = ("SOLVER.LR_FACTORS", []) if name == "tiny" else ()
                trainer = kind(config(DEMO, output, *options))
                found = Pair(trainer).measure(args.repeats)
                rows += [row_of_pairs(name, clock, times) for clock, times in found.items()]
    if comm.is_main_process():
        headers = ["model", "clock", "bare step, ms", "protection, ms (95 %)", "of the step"]
        print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))
        print(f"{comm.get_world_size()} processes, {machine(args)}")


class State:
    """The state of a training with an optimizer, as a checkpointable."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict:
        """Return it."""
        return {"iteration": 1, "optimizer": self.optimizer.state_dict()}


def trained(name: str, folder: str) -> tuple[nn.Module, State]:
    """Return a model, and the state of its training after one step."""
    cfg = config(name, folder)
    model = DefaultTrainer.build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, State(optimizer)


def save(args: argparse.Namespace) -> None:
    """Measure the checkpoint and print the table."""
    rows: list[list] = []
    args.data.mkdir(parents=True, exist_ok=True)
    for title, name in (("demo", DEMO), ("Mask R-CNN R50-FPN", LARGE)):
        with tempfile.TemporaryDirectory(dir=args.data) as folder:
            rows += save_rows(title, *trained(name, folder), Path(folder), args)
    headers = ["content", "MB", "written by", "s", "fastest", "processor s", "of torch.save"]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))
    print(machine(args))


def save_rows(
    title: str, model: nn.Module, state: State, folder: Path, args: argparse.Namespace
) -> list[list]:
    """Return the lines of one model."""
    checkpointer = DetectionCheckpointer(model, folder, trainer=state)
    path = folder / "model_0000001.pth"

    def plain(*, sync: bool) -> None:
        content = {"model": model.state_dict(), "trainer": state.state_dict(), "iteration": 1}
        with path.open("wb") as file:
            torch.save(content, file)
            if sync:
                file.flush()
                os.fsync(file.fileno())

    ways: dict[str, Callable[[], None]] = {
        "torch.save": lambda: plain(sync=False),
        "torch.save, fsync": lambda: plain(sync=True),
        "d2kit": lambda: checkpointer.save("model_0000001", iteration=1),
    }
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for number in range(args.repeats * len(ways)):
        way = list(ways)[(number + number // len(ways)) % len(ways)]
        path.unlink(missing_ok=True)
        os.sync()
        time.sleep(args.pause)
        before = time.perf_counter(), time.process_time()
        ways[way]()
        times[way].append((time.perf_counter() - before[0], time.process_time() - before[1]))
    size = path.stat().st_size / 1e6
    rows = []
    for way, found in times.items():
        ratio = statistics.median(
            ours[0] / theirs[0] for ours, theirs in zip(found, times["torch.save"], strict=True)
        )
        wall, processor = (statistics.median(x) for x in zip(*found, strict=True))
        fastest = min(x[0] for x in found)
        rows.append([title, f"{size:.0f}", way, f"{wall:.3f}", f"{fastest:.3f}"])
        rows[-1] += [f"{processor:.3f}", f"{ratio:.2f}"]
    return rows


def run(args: argparse.Namespace) -> None:
    """Do the chosen task in this process."""
    torch.set_num_threads(args.threads)
    {"step": step, "save": save}[args.task](args)


def main() -> None:
    """Read the arguments, and join the processes of torchrun, if it is one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=("step", "save"))
    parser.add_argument("--repeats", type=int, default=200, help="pairs of steps, or saves")
    parser.add_argument(
        "--pause", type=float, default=0.0, help="seconds before a save: disks allow bursts"
    )
    parser.add_argument("--models", nargs="+", default=["tiny", "demo"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, default=Path("datasets/data"))
    parser.set_defaults(device=["cpu"], size=(160, 240))
    args = parser.parse_args()
    launch(run, 0, num_processes=1, args=(args,))


if __name__ == "__main__":
    main()
