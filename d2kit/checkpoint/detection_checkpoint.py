"""`DetectionCheckpointer`: atomic saves, verified resumes, weights of other libraries."""

from __future__ import annotations

import logging
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import torch
from fvcore.common.checkpoint import Checkpointer
from torch import nn

from d2kit.checkpoint.catalog import find_weights, is_lite_file, rename_lite
from d2kit.checkpoint.files import (
    last_run,
    newest_checkpoint,
    plain_state,
    read_checkpoint,
    write_safetensors,
)
from d2kit.utils import comm
from d2kit.utils.file_io import PathManager, atomic_write
from d2kit.utils.logger import auxiliary

__all__ = ["DetectionCheckpointer"]


LIMIT = 40  # rows; a file of another architecture would print hundreds

Misshapen = tuple[str, tuple[int, ...], tuple[int, ...]]


def _grouped(names: Iterable[str]) -> list[str]:
    """Write ``a.weight``, ``a.bias`` as ``a.{bias,weight}``."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        head, _, tail = name.rpartition(".")
        groups[head].append(tail)
    rows = []
    for head, tails in groups.items():
        last = tails[0] if len(tails) == 1 else "{" + ",".join(sorted(tails)) + "}"
        rows.append(f"{head}.{last}" if head else last)
    return sorted(rows)


def _other_classes(misshapen: Iterable[Misshapen]) -> tuple[dict[str, str], list[Misshapen]]:
    """Tell predictors that differ in their number of outputs alone from what does not fit at all.

    Returns:
        layer -> ``91 -> 2`` (outputs in the file and in the model), and the rest.
    """
    layers, rest = {}, []
    for name, theirs, ours in misshapen:
        if theirs and ours and tuple(theirs)[1:] == tuple(ours)[1:]:
            layers[name.rpartition(".")[0] or name] = f"{theirs[0]} -> {ours[0]}"
        else:
            rest.append((name, theirs, ours))
    return layers, rest


def report(
    source: str,
    total: int,
    *,
    missing: Iterable[str],
    unexpected: Iterable[str],
    misshapen: Iterable[Misshapen],
) -> str:
    """Return a table with one row per weight (or layer) that was not loaded.

    Args:
        source: the file, for the headline.
        total: number of entries in the model's state dict.
        missing: names that the model has and the file has not.
        unexpected: names that the file has and the model has not.
        misshapen: (name, shape in the file, shape in the model).

    Returns:
        Several lines; one line where everything fits but predictors of other classes.
    """
    unexpected, misshapen = list(unexpected), list(misshapen)
    other_shape = {name for name, _, _ in misshapen}  # fvcore counts them as missing, too
    missing = [name for name in missing if name not in other_shape]
    loaded = total - len(missing) - len(misshapen)
    lines = [f"Loaded {loaded} of the model's {total} weights from {source}"]
    predictors, rest = _other_classes(misshapen)
    rows = [
        (name, "another shape", f"file {tuple(theirs)}, model {tuple(ours)}: kept the model's")
        for name, theirs, ours in rest
    ]
    rows += [(name, "not in the file", "kept the model's") for name in _grouped(missing)]
    rows += [(name, "not in the model", "ignored") for name in _grouped(unexpected)]
    if predictors:
        changes = ", ".join(f"{layer} ({change})" for layer, change in predictors.items())
        lines[0] += f". New predictors, since the file's are for other classes: {changes}"
    shown = rows[:LIMIT]
    if shown:
        width = max(len(name) for name, _, _ in shown)
        lines += [f"  {name:<{width}}  {what:<16}  {done}" for name, what, done in shown]
    if len(rows) > LIMIT:
        lines.append(f"  ... and {len(rows) - LIMIT} more rows")
    return "\n".join(lines)


# Constants of the config, which some files hold and some do not.
_CONSTANTS = ("pixel_mean", "pixel_std")
_RUNNING = ("running_mean", "running_var", "num_batches_tracked")


def _is_constant(name: str) -> bool:
    return name.rpartition(".")[2] in _CONSTANTS or ".cell_anchors." in f".{name}"


class DetectionCheckpointer(Checkpointer):
    """Saves and loads a model and the state of its training.

    A checkpoint is a file of `torch.save`: ``{"model": ..., name of a checkpointable: its state,
    ..., "iteration": ..., "run": ..., "run_started": ...}``, which Detectron2 can read. It takes
    its name only when complete. Resuming looks at the files in `save_dir` and takes the newest one
    that is intact: of the training that began last, whatever older ones have left there. The file
    ``last_checkpoint`` is written for other tools and never read.

    Args:
        model: unwrapped if it is data-parallel.
        save_dir: folder to save to and to resume from.
        save_to_disk: whether this process saves; None: only rank 0.
        checkpointables: objects with ``state_dict()`` and ``load_state_dict()``.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str | os.PathLike[str] = "",
        *,
        save_to_disk: bool | None = None,
        **checkpointables: object,
    ) -> None:
        to_disk = comm.is_main_process() if save_to_disk is None else save_to_disk
        super().__init__(model, os.fspath(save_dir), save_to_disk=to_disk, **checkpointables)
        self.path_manager = PathManager
        self.logger = logging.getLogger(__name__)
        self.resumed_from = ""
        # names of the model that the file loaded last lacks; None: nothing was loaded
        self.not_loaded: list[str] | None = None
        self.run_started = time.time()
        self.run = 0  # number of this training in the folder; found when it first saves
        self._loaded_run = (0, 0.0)
        self._source = ""
        self._heuristics = False
        self._trusted: dict[Path, tuple[int, int]] = {}

    # ---- saving

    def save(self, name: str, **kwargs: object) -> None:
        """Write a checkpoint; does nothing without `save_dir` or where `save_to_disk` is False.

        Args:
            name: file name without suffix; with the suffix ``.safetensors`` only the weights are
                written, in that format.
            kwargs: further entries, e.g. ``iteration``.

        Raises:
            ValueError: if `name` has a folder in it.
            TypeError: if some state holds an object that could not be loaded safely.
            OSError: if the file cannot be written; the older ones are untouched.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        if os.path.basename(name) != name or not name:
            raise ValueError(f"a checkpoint's name must be a plain file name, got '{name}'")
        only_weights = name.endswith(".safetensors")
        path = Path(self.save_dir) / (name if only_weights else f"{name}.pth")
        content: Any
        if only_weights:
            content = write_safetensors(self.model.state_dict())
        else:
            states = {key: obj.state_dict() for key, obj in self.checkpointables.items()}
            states.update(kwargs)
            content = {key: plain_state(value, key) for key, value in states.items()}
            content = {"model": self.model.state_dict(), **content}
            self.run = self.run or last_run(path.parent) + 1
            content |= {"run": self.run, "run_started": self.run_started}
        path.parent.mkdir(parents=True, exist_ok=True)
        self.logger.info("Saving checkpoint to %s", path)
        with atomic_write(path) as file:
            if only_weights:
                file.write(content)
            else:
                torch.save(content, file)
        if not only_weights:
            status = path.stat()
            self._trusted[path] = (status.st_size, status.st_mtime_ns)
            self.tag_last_checkpoint(path.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Name the newest file in ``last_checkpoint``, for tools that look there.

        It is never read here: where it cannot be written, a warning says so once.
        """
        path = Path(self.save_dir) / "last_checkpoint"
        with auxiliary(path), atomic_write(path, "w") as file:
            file.write(last_filename_basename)

    # ---- finding

    def get_checkpoint_file(self) -> str:
        """Return the newest intact checkpoint of `save_dir`, or ""."""
        if not self.save_dir:
            return ""
        found = newest_checkpoint(Path(self.save_dir), self._trusted)
        return str(found) if found else ""

    def has_checkpoint(self) -> bool:
        """Tell whether `save_dir` has an intact checkpoint."""
        return bool(self.get_checkpoint_file())

    def get_all_checkpoint_files(self) -> list[str]:
        """Return the paths of all checkpoints in `save_dir`, intact or not."""
        return sorted(str(path) for path in Path(self.save_dir).glob("*.pth"))

    def wrote(self, name: str) -> bool:
        """Tell whether this object has saved a checkpoint of that name, without suffix."""
        path = Path(self.save_dir) / f"{name}.pth"
        return path in self._trusted and path.exists()

    # ---- loading

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Continue from the newest intact checkpoint, or start from other weights.

        Rank 0 chooses the file for all processes; all must call this together. Afterwards
        `resumed_from` is the checkpoint's path, or "" where none was used.

        Args:
            path: weights to start from where nothing is resumed, see `load`; may be "".
            resume: whether to look in `save_dir`; then all checkpointables are loaded.

        Returns:
            What the file holds beyond weights and checkpointables.
        """
        self.resumed_from = ""
        if resume:
            found = self.get_checkpoint_file() if comm.is_main_process() else ""
            found = comm.all_gather(found)[0]
            if found:
                self.resumed_from = found
                rest = self.load(found)
                self.run, self.run_started = self._loaded_run
                return rest
            self.logger.info("Nothing to resume in '%s'", self.save_dir)
        return self.load(path, checkpointables=[])

    def load(
        self, path: str, checkpointables: list[str] | None = None, *args: object, **kwargs: object
    ) -> dict[str, Any]:
        """Load weights and, if the file has them, the states of checkpointables.

        Args:
            path: a file (``.pth``, ``.pkl`` of a model zoo, ``.safetensors``), a URL, a name
                ``detectron2://...`` or ``torchvision://...`` (see `catalog.find_weights`); with
                ``?matching_heuristics=True`` at the end names are matched by their ends. "" loads
                nothing.
            checkpointables: names of those to load; None: all.
            args: passed on to fvcore.
            kwargs: passed on to fvcore.

        Returns:
            What the file holds beyond weights and checkpointables.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged or none of its weights fits the model.
        """
        if not path:
            self.logger.info("No weights are given: the model keeps its initial ones")
            self.not_loaded = None
            return {}
        name, _, query = str(path).partition("?")
        if os.path.isfile(path):
            name, query = str(path), ""
        self._source = name
        self._heuristics = parse_qs(query).get("matching_heuristics") == ["True"]
        rest: dict[str, Any] = super().load(
            str(find_weights(name)), checkpointables, *args, **kwargs
        )
        self._loaded_run = (rest.pop("run", 0), rest.pop("run_started", 0.0))
        return rest

    def _torch_load(self, f: str) -> dict[str, Any]:
        """Read a file of any format, without executing anything; user classes override it."""
        return read_checkpoint(Path(f))

    def _load_file(self, filename: str) -> dict[str, Any]:
        checkpoint = self._torch_load(filename)
        if self._heuristics:
            checkpoint["matching_heuristics"] = True
        return checkpoint

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        weights = self._matched(checkpoint)
        ours = self.model.state_dict()
        names = [(name, name.removeprefix("module.")) for name in weights]
        if not any(short in ours for _, short in names):
            raise ValueError(
                f"none of the {len(weights)} weights of {self._source} fits the model: the file "
                f"has e.g. {sorted(weights)[:3]}, the model {sorted(ours)[:3]}"
            )
        shapes = [(weights[k].shape, ours[short].shape) for k, short in names if short in ours]
        if len(shapes) > 1 and all(tuple(a) != tuple(b) for a, b in shapes):
            raise ValueError(
                f"none of the {len(shapes)} weights of {self._source} that the model knows by name "
                f"has the model's shape, e.g. {tuple(shapes[0][0])} for {tuple(shapes[0][1])}"
            )
        _check_finite(self._source, weights, ours)
        checkpoint["model"] = weights
        found = super()._load_model(checkpoint)
        from_c2 = checkpoint.pop("__author__", "") == "Caffe2"
        checkpoint.pop("matching_heuristics", None)
        missing = _really_missing(self.model, found.missing_keys, weights, from_c2)
        unexpected = [name for name in found.unexpected_keys if not _is_constant(name)]
        return found._replace(missing_keys=missing, unexpected_keys=unexpected)

    def _matched(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Return the file's weights under the model's names, as far as they can be told."""
        # Loaded when weights come: tables of names, 8 ms of `import d2kit.engine`.
        from d2kit.checkpoint.c2_model_loading import (
            align_and_update_state_dicts,
            convert_torchvision_names,
            is_torchvision_resnet,
            recognise_naming,
            select_coco_classes,
            trained_classes,
        )

        weights = dict(checkpoint.pop("model"))
        ours = self.model.state_dict()
        from_c2 = checkpoint.get("__author__") == "Caffe2"
        naming = None if from_c2 or recognise_naming(ours) else recognise_naming(weights)
        if naming is not None:
            weights = naming.to_ours({k.removeprefix("module."): v for k, v in weights.items()})
            self.logger.info(
                "%s has the names of %s: %s", self._source, naming.title, naming.advice
            )
            if classes := trained_classes(checkpoint):
                self.logger.info("It knows %d classes: %s", len(classes), ", ".join(classes))
            weights, done = select_coco_classes(weights, ours)
            if done:
                self.logger.info(done)
        elif not from_c2 and is_torchvision_resnet(weights) and not is_torchvision_resnet(ours):
            weights = convert_torchvision_names(weights)
            self.logger.info(
                "Weights of a torchvision ResNet: they expect INPUT.FORMAT RGB, PIXEL_MEAN "
                "[123.675, 116.28, 103.53], PIXEL_STD [58.395, 57.12, 57.375] and "
                "MODEL.RESNETS.STRIDE_IN_1X1 False"
            )
        elif is_lite_file(weights):
            weights = rename_lite(weights, ours)
            self.logger.info(
                "Weights of EfficientNet-Lite0: they expect INPUT.FORMAT RGB, PIXEL_MEAN "
                "[127, 127, 127], PIXEL_STD [128, 128, 128] and MODEL.TIMM.NORM_EPS 0.001"
            )
        direct = any(name.removeprefix("module.") in ours for name in weights)
        if checkpoint.get("matching_heuristics") or not direct:
            weights = align_and_update_state_dicts(ours, weights, c2_conversion=from_c2)
        return weights

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        misshapen = {name for name, _, _ in incompatible.incorrect_shapes}
        self.not_loaded = sorted({*incompatible.missing_keys, *misshapen})
        text = report(
            self._source,
            len(self.model.state_dict()),
            missing=incompatible.missing_keys,
            unexpected=incompatible.unexpected_keys,
            misshapen=incompatible.incorrect_shapes,
        )
        level = logging.WARNING if "\n" in text else logging.INFO
        self.logger.log(level, text)


def _check_finite(
    source: str, weights: Mapping[str, Any], ours: Mapping[str, torch.Tensor]
) -> None:
    """Refuse weights that are no numbers, where the model takes them.

    Raises:
        ValueError: naming the first ones.
    """
    bad = []
    for name, value in weights.items():
        wanted = ours.get(name.removeprefix("module."))
        if wanted is None or tuple(value.shape) != tuple(wanted.shape):
            continue
        tensor = torch.as_tensor(value)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad.append(name)
    if bad:
        raise ValueError(
            f"{source}: {len(bad)} of {len(weights)} weights are not finite, e.g. "
            f"{', '.join(bad[:3])}: the file is damaged, or its training had failed"
        )


def _really_missing(
    model: nn.Module, missing: list[str], weights: Mapping[str, Any], from_c2: bool
) -> list[str]:
    """Leave out constants, other names of loaded tensors, and what Caffe2's norms do not have."""
    state = model.state_dict(keep_vars=True)
    names = set(missing)
    loaded = {id(tensor) for name, tensor in state.items() if name not in names}
    result = []
    for name in missing:
        layer, _, last = name.rpartition(".")
        folded = from_c2 and last in _RUNNING and f"{layer}.weight" in weights
        if not (folded or _is_constant(name) or (name in state and id(state[name]) in loaded)):
            result.append(name)
    return result
