#!/usr/bin/env python3
"""Run folders of other people's Detectron2 code on d2kit, and print a table of what works.

compatibility.py REPO [REPO ...] [--limit SECONDS] [--configs N] [--failures FILE]

Of each folder every Python file that names detectron2 is imported, every YAML config is read, and
of the first N configs that can be read a model is built on the CPU, run on a random picture, and
trained for one step. Each of these happens in a process of its own with a time limit, so that
nothing that fails, hangs or crashes stops the rest. **The code is executed**: give it folders that
you trust. Needs os.fork (Linux, macOS).
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

STAGES = ("imports", "configs", "builds", "forward", "training step")
LEFT_OUT = {".git", "tests", "test", "docs", "build", "setup.py", "conftest.py"}
SIGNS_OF_A_CONFIG = re.compile(r"^(MODEL|SOLVER|DATASETS|_BASE_):", re.MULTILINE)


@dataclass
class Result:
    """What was tried of one folder.

    Attributes:
        name: of the folder.
        licence: first line of its licence, or what its metadata say.
        tried: stage -> how many were tried.
        failures: (stage, file, message) of each that failed.
        needs: packages that are not installed and that its imports asked for.
    """

    name: str
    licence: str
    tried: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 0))
    failures: list[tuple[str, str, str]] = field(default_factory=list)
    needs: set[str] = field(default_factory=set)

    def row(self) -> list[str]:
        """Return the name, the licence, "passed/tried" of each stage, and what is missing."""
        failed = [stage for stage, _, _ in self.failures]
        counts = [f"{n - failed.count(s)}/{n}" if n else "-" for s, n in self.tried.items()]
        return [self.name, self.licence, *counts, ", ".join(sorted(self.needs)) or "-"]


def attempt(step: Callable[[], object], limit: int) -> str:
    """Run a step in a forked process; return what went wrong, or an empty string."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(limit)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        said = ""
        try:
            step()
        except BaseException as error:  # noqa: BLE001 SystemExit of a script at import counts too
            lines = str(error).strip().splitlines() or [""]
            said = f"{type(error).__name__}: {lines[0]}"[:300]
        os.write(writer, f"done {said}".encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    if said.startswith("done "):
        return said[5:]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
        return f"took longer than {limit} s"
    return f"the process ended by itself (status {status})"


def files_of(repo: Path, *suffixes: str) -> Iterator[tuple[Path, str]]:
    """Yield the files below a folder, with their text; tests and documentation are left out."""
    for path in sorted(repo.rglob("*")):
        inside = set(path.relative_to(repo).parts)
        if path.suffix in suffixes and not LEFT_OUT & inside and path.is_file():
            yield path, path.read_text(encoding="utf-8", errors="replace")


def module_of(path: Path) -> tuple[str, Path]:
    """Return the dotted name of a Python file, and the folder that it is imported from."""
    root, parts = path.parent, [path.stem]
    while (root / "__init__.py").exists():
        parts.insert(0, root.name)
        root = root.parent
    return ".".join(part for part in parts if part != "__init__"), root


def licence_of(repo: Path) -> str:
    """Return a name for the licence of a folder, or a question mark."""
    for path in sorted([*repo.glob("LICEN[SC]E*"), *repo.glob("*.dist-info/METADATA")]):
        text = path.read_text(encoding="utf-8", errors="replace")
        stated = re.search(r"^License(?:-Expression)?: (?!UNKNOWN)(.+)$", text, re.MULTILINE)
        known = re.search(r"Apache|MIT|BSD|GPL|Mozilla|NonCommercial", text)
        if stated or known:
            return stated[1] if stated else known[0] if known else "?"
    return "?"


def import_file(path: Path) -> None:
    """Import a Python file as the module that it is."""
    name, root = module_of(path)
    sys.path.insert(0, str(root))
    importlib.import_module(name)


class Config:
    """One YAML config of a folder, and the steps that are tried with it.

    Args:
        path: the file.
        sources: Python files of the folder that define ``add_*_config`` or register something.
    """

    def __init__(self, path: Path, sources: Sequence[Path]) -> None:
        self.path = path
        self.sources = sources

    def read(self) -> Any:
        """Return the default config with the keys of the folder and of d2kit.contrib, merged."""
        from d2kit.config import get_cfg
        from d2kit.contrib import deeplab, panoptic_deeplab, point_rend

        cfg = get_cfg()
        places: list[Any] = [point_rend, deeplab, panoptic_deeplab]
        for source in self.sources:
            try:
                import_file(source)
            except Exception:  # noqa: BLE001 counted under imports
                continue
            places.append(sys.modules[module_of(source)[0]])
        for place in places:
            for name, add in sorted(vars(place).items()):
                if re.fullmatch(r"add_\w*config", name) and callable(add):
                    add(cfg)
        cfg.merge_from_file(self.path)
        return cfg

    def build(self) -> tuple[Any, Any]:
        """Return the config and its model, on the CPU, with random weights."""
        from d2kit.modeling import build_model

        cfg = self.read()
        cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
        return cfg, build_model(cfg)

    def forward(self) -> None:
        """Detect in a random picture."""
        import torch

        _, model = self.build()
        with torch.no_grad():
            model.eval()([{"image": torch.rand(3, 128, 192) * 255, "height": 128, "width": 192}])

    def train(self) -> None:
        """Take one step of SGD on a random picture with two objects.

        Raises:
            FloatingPointError: if the loss is not finite.
        """
        import torch

        from d2kit.utils.events import EventStorage

        cfg, model = self.build()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
        with EventStorage():
            loss = sum(model.train()([picture_with_objects(cfg)]).values())
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()}")
        loss.backward()
        optimizer.step()


def picture_with_objects(cfg: Any) -> dict[str, Any]:
    """Return a training input (3, 128, 192) with what a model of this config learns from."""
    import torch

    from d2kit.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks

    boxes = torch.tensor([[10.0, 10, 90, 90], [60, 40, 180, 120]])
    objects = Instances((128, 192), gt_boxes=Boxes(boxes))
    objects.gt_classes = torch.tensor([0, 0])
    corners: list[Any] = [[[x0, y0, x1, y0, x1, y1, x0, y1]] for x0, y0, x1, y1 in boxes.tolist()]
    if cfg.MODEL.MASK_ON:
        polygons = PolygonMasks(corners)
        by_pixel = cfg.INPUT.MASK_FORMAT == "bitmask"
        objects.gt_masks = BitMasks.from_polygon_masks(polygons, 128, 192) if by_pixel else polygons
    if cfg.MODEL.KEYPOINT_ON:
        points = boxes.reshape(2, 2, 2).mean(1, keepdim=True)
        visible = torch.cat([points, torch.full((2, 1, 1), 2.0)], dim=2)
        count = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
        objects.gt_keypoints = Keypoints(visible.repeat(1, count, 1))
    return {
        "image": torch.rand(3, 128, 192) * 255,
        **{"height": 128, "width": 192, "instances": objects},
        "sem_seg": torch.zeros(128, 192, dtype=torch.long),
    }


def examine(repo: Path, limit: int, most_configs: int) -> Result:
    """Try everything of one folder."""
    result = Result(repo.name, licence_of(repo))

    def tried(stage: str, path: Path, step: Callable[[], object]) -> bool:
        said = attempt(step, limit)
        lacking = re.match(r"ModuleNotFoundError: No module named '([\w-]+)", said)
        if lacking and lacking[1] not in ("detectron2", "d2kit"):
            result.needs.add(lacking[1])  # says nothing about d2kit
            return False
        result.tried[stage] += 1
        if said:
            result.failures.append((stage, str(path.relative_to(repo)), said))
        return not said

    sources = []
    for path, text in files_of(repo, ".py"):
        if "detectron2" in text:
            tried("imports", path, partial(import_file, path))
            if re.search(r"def add_\w*config|_REGISTRY\.register|@configurable", text):
                sources.append(path)
    for path, text in files_of(repo, ".yaml", ".yml"):
        if not SIGNS_OF_A_CONFIG.search(text):
            continue
        config = Config(path, sources)
        if not tried("configs", path, config.read) or result.tried["builds"] >= most_configs:
            continue
        if tried("builds", path, config.build):
            tried("forward", path, config.forward)
            tried("training step", path, config.train)
    return result


def main(arguments: list[str] | None = None) -> int:
    """Print the table; return 1 where anything failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("repos", nargs="+", type=Path, metavar="REPO", help="folders of checkouts")
    parser.add_argument("--limit", type=int, default=120, help="seconds for each step")
    parser.add_argument("--configs", type=int, default=10, help="configs to build of each folder")
    parser.add_argument("--failures", type=Path, help="write the failures here, tab-separated")
    options = parser.parse_args(arguments)
    for repo in options.repos:
        if not repo.is_dir():
            parser.error(f"{repo}: no such folder")
    import torch

    import d2kit.as_detectron2
    import d2kit.engine
    import d2kit.modeling  # noqa: F401 imported once, before the forks

    torch.set_num_threads(1)
    results = []
    for repo in options.repos:
        results.append(examine(repo.resolve(), options.limit, options.configs))
        print(*results[-1].row(), sep=" | ", file=sys.stderr, flush=True)
    headers = ["project", "licence", *STAGES, "not installed"]
    print(tabulate([r.row() for r in results], headers, tablefmt="github", disable_numparse=True))
    failures = [(r.name, *failure) for r in results for failure in r.failures]
    lines = ["\t".join(failure) for failure in failures]
    if options.failures:
        options.failures.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    elif lines:
        print("", *lines, sep="\n")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
