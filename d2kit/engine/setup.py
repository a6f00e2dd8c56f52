"""Arguments, logging, seeds and data-parallel wrapping, which every training script needs."""

from __future__ import annotations

import argparse
import errno
import inspect
import logging
import os
import sys
import traceback
from collections.abc import Mapping
from contextlib import ContextDecorator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import yaml
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops import RoIPool

from d2kit.config import CfgNode, LazyConfig, get_cfg
from d2kit.engine.preflight.data import check_output_dir, check_weights
from d2kit.engine.resolve import choose_seed
from d2kit.engine.safety.run_lock import hold_output_dir
from d2kit.utils import comm
from d2kit.utils.devices import available_cores
from d2kit.utils.env import seed_all_rng
from d2kit.utils.events import (
    CommonMetricPrinter,
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
)
from d2kit.utils.file_io import atomic_write
from d2kit.utils.logger import setup_logger
from d2kit.utils.remote_writers import MLflowWriter, WandbWriter, require_package
from d2kit.utils.text import one_line

DEBUG_VARIABLE = "D2KIT_DEBUG"
MISTAKES = (ValueError, KeyError, OSError)
# Where the messages that we write come from; elsewhere such an exception is a bug.
PACKAGES = ("d2kit", "project", "__main__")


class user_errors(ContextDecorator):  # noqa: N801 - used like a function
    """Context manager and decorator for the main function of a script.

    A `ValueError`, `KeyError` or `OSError` (which `FileNotFoundError` is) that the library raised
    becomes one printed message and exit code 1, and so does a full disk, whoever met it. All else
    passes.

    Args:
        debug: let the exception pass, for its traceback; so does ``D2KIT_DEBUG=1``.
    """

    def __init__(self, *, debug: bool = False) -> None:
        self.debug = debug

    def __enter__(self) -> user_errors:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not isinstance(error, MISTAKES) or not (_is_ours(trace) or _is_of_the_disk(error)):
            return
        if self.debug or os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
            return
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        text = "\n".join(one_line(line, None, shown=True) for line in text.split("\n"))
        rank = f"[rank {comm.get_rank()}] " if comm.get_rank() else ""
        print(f"{rank}error: {text}", file=sys.stderr)
        if not rank:
            print(f"(for the traceback: {DEBUG_VARIABLE}=1)", file=sys.stderr)
        raise SystemExit(1) from None


def _is_of_the_disk(error: BaseException) -> bool:
    """Tell whether the disk is full or must not be written."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
    return isinstance(error, OSError) and error.errno in numbers


def _is_ours(trace: TracebackType | None) -> bool:
    """Tell whether the innermost frame is our code or the script itself, not another library."""
    frames = list(traceback.walk_tb(trace))
    if not frames:
        return False
    name = frames[-1][0].f_globals.get("__name__", "")
    return name.partition(".")[0] in PACKAGES


def check_tracking_services(cfg: CfgNode) -> None:
    """Make sure that the packages of the services that a config asks for are installed.

    Raises:
        ValueError: if one is not; the message names the pip command.
    """
    for package, section in (("wandb", cfg.WRITERS.WANDB), ("mlflow", cfg.WRITERS.MLFLOW)):
        if section.ENABLED:
            require_package(package, f"WRITERS.{package.upper()}.ENABLED")


def build_tracker_writers(cfg: CfgNode) -> list[EventWriter]:
    """Return the writers of ``WRITERS``; put them before TensorBoard's, which clears the pictures.

    Args:
        cfg: a full config, sent along.
    """
    found: list[EventWriter] = []
    config = yaml.safe_load(cfg.dump())
    wandb, mlflow = cfg.WRITERS.WANDB, cfg.WRITERS.MLFLOW
    if wandb.ENABLED:
        found.append(
            WandbWriter(
                cfg.OUTPUT_DIR,
                project=wandb.PROJECT,
                name=wandb.NAME,
                entity=wandb.ENTITY,
                mode=wandb.MODE,
                config=config,
            )
        )
    if mlflow.ENABLED:
        found.append(
            MLflowWriter(
                cfg.OUTPUT_DIR,
                tracking_uri=mlflow.TRACKING_URI,
                experiment=mlflow.EXPERIMENT,
                name=mlflow.NAME,
                config=config,
            )
        )
    return found


EPILOG = """
Examples:

one machine:
  %(prog)s --config-file cfg.yaml [--num-gpus 8] [KEY VALUE ...]
without a GPU, several processes:
  %(prog)s --config-file cfg.yaml --num-processes 2
change some config keys:
  %(prog)s --config-file cfg.yaml MODEL.WEIGHTS /path/to/weights.pth SOLVER.BASE_LR 0.001
several machines:
  (machine 0) %(prog)s --num-machines 2 --machine-rank 0 --dist-url tcp://ADDRESS:PORT ...
  (machine 1) %(prog)s --num-machines 2 --machine-rank 1 --dist-url tcp://ADDRESS:PORT ...
or: torchrun --nproc-per-node 8 SCRIPT --config-file cfg.yaml
"""


def default_argument_parser(epilog: str | None = None) -> argparse.ArgumentParser:
    """Return a parser with the arguments of training scripts.

    Args:
        epilog: text after the help; None shows examples.
    """
    parser = argparse.ArgumentParser(
        epilog=epilog or EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="path of the config")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the newest intact checkpoint in OUTPUT_DIR, if there is one",
    )
    parser.add_argument("--eval-only", action="store_true", help="only evaluate")
    parser.add_argument(
        "--allow-untrained",
        action="store_true",
        help="with --eval-only: evaluate without weights, or with weights that fit in part",
    )
    parser.add_argument("--num-gpus", type=int, default=1, help="number of GPUs *per machine*")
    parser.add_argument(
        "--num-processes",
        type=int,
        default=0,
        help="number of processes on this machine without GPUs (gloo); they share the cores",
    )
    parser.add_argument("--num-machines", type=int, default=1, help="number of machines")
    parser.add_argument("--machine-rank", type=int, default=0, help="index of this machine")
    parser.add_argument(
        "--dist-url",
        default="auto",
        help="where machine 0 listens, tcp://ADDRESS:PORT; auto: a free port, for one machine",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks of user errors")
    parser.add_argument(
        "opts",
        help="config keys to change, KEY VALUE pairs separated by spaces, at the end",
        default=None,
        nargs=argparse.REMAINDER,
    )
    return parser


def _try_get_key(cfg: object, *keys: str, default: object = None) -> Any:
    """Return the first of some dotted keys that the config has, or `default`."""
    for key in keys:
        node = cfg
        for part in key.split("."):
            node = node[part] if isinstance(node, Mapping) and part in node else None
            if node is None:
                break
        if node is not None:
            return node
    return default


def _highlight(code: str, filename: str) -> str:
    """Colour a config for a terminal, if Pygments is installed."""
    try:
        from pygments import highlight
        from pygments.formatters import Terminal256Formatter
        from pygments.lexers import PythonLexer, YamlLexer
    except ImportError:
        return code
    lexer = PythonLexer() if filename.endswith(".py") else YamlLexer()
    return str(highlight(code, lexer, Terminal256Formatter()))


def _changed_keys(cfg: CfgNode, base: CfgNode, prefix: str = "") -> list[str]:
    """Return ``KEY: value`` for each key that differs from the defaults."""
    lines = []
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            inner = base.get(key)
            inner = inner if isinstance(inner, CfgNode) else CfgNode()
            lines += _changed_keys(value, inner, f"{prefix}{key}.")
        elif key not in base or base[key] != value:
            lines.append(f"{prefix}{key}: {value}")
    return lines


def _set_seed(cfg: Any, seed: int) -> None:
    """Write the seed of the run into a config, where it has a place for it."""
    if not isinstance(cfg, CfgNode):
        if "train" in cfg:
            cfg.train.seed = seed
        return
    frozen = cfg.is_frozen()
    cfg.defrost()
    cfg.merge_from_list(["SEED", seed])
    if frozen:
        cfg.freeze()


def default_setup(cfg: object, args: object) -> None:
    """Check the folders and files of a run, set up logging and seeds, write the config.

    Where SEED is negative a random one is drawn, written into `cfg` and logged, so that
    ``config.yaml`` repeats the run; a resumed run takes that of its checkpoint.

    Args:
        cfg: the full config; frozen ones stay frozen. Of a lazy config the section ``train`` is
            read: output_dir, init_checkpoint, seed, cudnn_benchmark, float32_precision.
        args: what the argument parser returned (`resume`, `eval_only`, `config_file` are used).

    Raises:
        OSError: if OUTPUT_DIR cannot be written to, or another run is writing there.
        FileNotFoundError: if MODEL.WEIGHTS is a path without a file.
    """
    from d2kit.data import register_datasets

    output = _try_get_key(cfg, "OUTPUT_DIR", "output_dir", "train.output_dir", default="./output")
    register_datasets(_try_get_key(cfg, "DATASETS.REGISTER_COCO", default=()))
    rank = comm.get_rank()
    resume = bool(getattr(args, "resume", False))
    eval_only = bool(getattr(args, "eval_only", False))
    check_output_dir(output)
    hold_output_dir(output)  # also to evaluate: config.yaml and the results have fixed names
    if not resume:
        check_weights(_try_get_key(cfg, "MODEL.WEIGHTS", "train.init_checkpoint", default=""))
    setup_logger(output, distributed_rank=rank, name="fvcore")
    setup_logger(output, distributed_rank=rank, name="project")
    logger = setup_logger(output, distributed_rank=rank)

    given = _try_get_key(cfg, "SEED", "train.seed", default=-1)
    seed = choose_seed(given, output, resume=resume)
    if seed != given:
        _set_seed(cfg, seed)
    seed_all_rng(seed + rank)
    # torch counts the machine's cores, also where a container or scheduler allows fewer
    torch.set_num_threads(min(torch.get_num_threads(), available_cores()))

    if comm.is_main_process():
        log_start(cfg, args, logger, output)
        logger.info("%d processes; seed %d", comm.get_world_size(), seed)
    if not eval_only:
        fastest = _try_get_key(cfg, "CUDNN_BENCHMARK", "train.cudnn_benchmark", default=False)
        torch.backends.cudnn.benchmark = fastest
    if _try_get_key(cfg, "DETERMINISTIC", "train.deterministic", default=False):
        strict = _try_get_key(cfg, "DETERMINISTIC_STRICT", "train.deterministic_strict")
        use_deterministic_algorithms(strict=bool(strict))
        logger.info(
            "Deterministic algorithms: the same numbers on the same machine and versions, slower; "
            "an operation that has none %s",
            "is refused" if strict else "is named in a warning",
        )
    elif not eval_only and torch.cuda.is_available():
        logger.info(
            "Without DETERMINISTIC a training on CUDA gives other last digits in every run, so a "
            "resumed one is not bit for bit the same"
        )
    precision = _try_get_key(cfg, "FLOAT32_PRECISION", "train.float32_precision", default="")
    if precision:
        torch.set_float32_matmul_precision(precision)


def use_deterministic_algorithms(*, strict: bool = False) -> None:
    """Let torch, cuDNN and cuBLAS choose algorithms that give the same numbers in every run.

    Call it before the first operation on a GPU. Where torch has no such algorithm for an operation
    it warns and takes the usual one.

    Args:
        strict: raise there instead.

    Source: torch's notes on reproducibility.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True, warn_only=not strict)


def check_deterministic(model: nn.Module) -> list[str]:
    """Name the operations of a training that differ from run to run although they should not.

    Args:
        model: its modules say so by an attribute `not_deterministic_on_cuda`.

    Returns:
        A line for each kind of module; none where the model is not on CUDA, or algorithms need not
        be deterministic. They are logged as warnings too.

    Raises:
        ValueError: if there is one, and only deterministic ones are allowed (DETERMINISTIC_STRICT).
    """
    if not torch.are_deterministic_algorithms_enabled() or not next(model.parameters()).is_cuda:
        return []
    known: dict[type[nn.Module], str] = {RoIPool: "torchvision::roi_pool (backward)"}
    lines = sorted(
        {
            f"{type(part).__name__}: {operation}"
            for part in model.modules()
            if (operation := getattr(part, "not_deterministic_on_cuda", known.get(type(part))))
        }
    )
    if lines and not torch.is_deterministic_algorithms_warn_only_enabled():
        raise ValueError(
            f"DETERMINISTIC_STRICT is set, but on CUDA these have no deterministic algorithm: "
            f"{'; '.join(lines)}. Choose other parts for the model, train on the CPU, or set "
            "DETERMINISTIC_STRICT False"
        )
    for line in lines:
        logging.getLogger(__name__).warning(
            "DETERMINISTIC: not the same in every run on CUDA: %s", line
        )
    return lines


def log_start(cfg: object, args: object, logger: logging.Logger, output_dir: str) -> None:
    """Log machine, arguments and changed keys; write the whole config into `output_dir`."""
    from d2kit.utils.collect_env import collect_env_info

    logger.info("Machine:\n%s", collect_env_info())
    given = {
        key: value
        for key, value in sorted(getattr(args, "__dict__", {}).items())
        if value not in (None, [], "")
    }
    logger.info("Command: %s", " ".join(sys.argv))
    logger.info("Arguments: %s", given)
    path = Path(output_dir) / "config.yaml"
    if isinstance(cfg, CfgNode):
        changed = "\n  ".join(_changed_keys(cfg, get_cfg()))
        logger.info("Config keys that differ from the defaults:\n  %s", changed)
        with atomic_write(path, "w") as file:
            file.write(cfg.dump())
    else:
        logger.info("Config:\n%s", LazyConfig.to_py(cfg))
        LazyConfig.save(cfg, str(path))
    logger.info("Full config in %s", path)


def default_writers(output_dir: str, max_iter: int | None = None) -> list[EventWriter]:
    """Return the usual writers: the log line, ``metrics.json`` and TensorBoard.

    Args:
        output_dir: their folder, created if need be.
        max_iter: for the estimated time of arrival.
    """
    os.makedirs(output_dir, exist_ok=True)
    return [
        CommonMetricPrinter(max_iter),
        JSONWriter(os.path.join(output_dir, "metrics.json")),
        TensorboardXWriter(output_dir),
    ]


def create_ddp_model(
    model: nn.Module, *, fp16_compression: bool = False, **kwargs: Any
) -> nn.Module:
    """Wrap a model for several processes; for one process return it as it is.

    Args:
        model: on this process's device.
        fp16_compression: send gradients as float16.
        kwargs: of `torch.nn.parallel.DistributedDataParallel`.
    """
    if comm.get_world_size() == 1:
        return model
    device = next(model.parameters()).device
    if "device_ids" not in kwargs and device.type == "cuda":
        kwargs["device_ids"] = [device]
    new_name = "forward_sync_buffers"  # of `broadcast_buffers`, since torch 2.15
    if new_name in inspect.signature(DistributedDataParallel.__init__).parameters:
        kwargs = {new_name if k == "broadcast_buffers" else k: v for k, v in kwargs.items()}
    ddp = DistributedDataParallel(model, **kwargs)
    if fp16_compression:
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

        ddp.register_comm_hook(state=None, hook=default_hooks.fp16_compress_hook)
    return ddp
