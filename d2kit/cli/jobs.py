"""Other ways to start a training: from a lazy config, on a SLURM cluster, one failed step again."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import math
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from d2kit import model_zoo
from d2kit.checkpoint import DetectionCheckpointer
from d2kit.checkpoint.files import read_checkpoint
from d2kit.cli import verb_parser
from d2kit.config import LazyConfig, get_cfg, instantiate
from d2kit.data import build_detection_train_loader
from d2kit.engine import (
    AMPTrainer,
    DefaultTrainer,
    SimpleTrainer,
    check_evaluated_weights,
    create_ddp_model,
    default_argument_parser,
    default_setup,
    default_writers,
    hooks,
    user_errors,
)
from d2kit.engine.launch import TrainingProcess, launch_as_asked
from d2kit.engine.resolve import choose_precision, start_loader_at
from d2kit.evaluation import inference_on_dataset, print_csv_format
from d2kit.solver import LRMultiplier
from d2kit.utils import comm
from d2kit.utils.env import derive_seed, seed_all_rng
from d2kit.utils.events import EventStorage
from d2kit.utils.file_io import load_json
from d2kit.utils.logger import setup_logger

if TYPE_CHECKING:
    from omegaconf import DictConfig

ABOUT_TRAIN_LAZY = """\
Train or evaluate what a lazy config describes: the whole loop on one page.

d2kit train-lazy --config-file COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py
d2kit train-lazy --config-file mine.py --trust-config [KEY=VALUE ...]
Go on / evaluate: --resume / --eval-only [train.init_checkpoint=FILE]

The config is a name of the model zoo or a file. A Python file is executed: say that you trust it.
It holds model, optimizer, lr_multiplier, dataloader (train, test, evaluator) and train, as
configs/common/train.py has it.
"""


logger = logging.getLogger("d2kit.lazy")


def build_model(cfg: DictConfig) -> torch.nn.Module:
    """Return the model on the device of the config, or on the CPU where CUDA is absent."""
    device = str(cfg.train.device)
    if device.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("train.device is %s, but CUDA is not available: using the CPU", device)
        device = "cpu"
    found: torch.nn.Module = instantiate(cfg.model).to(device)
    return found


def evaluate(cfg: DictConfig, model: torch.nn.Module) -> Mapping[str, Any]:
    """Return the metrics of the test set; empty without `dataloader.evaluator`."""
    if "evaluator" not in cfg.dataloader:
        return {}
    loader, evaluator = (instantiate(cfg.dataloader[name]) for name in ("test", "evaluator"))
    results = inference_on_dataset(model, loader, evaluator)
    if comm.is_main_process():
        print_csv_format(results)
    return results


def build_loader(cfg: DictConfig) -> Iterable[Any]:
    """Return the training loader; d2kit's own draws by the seed of the run."""
    loader = cfg.dataloader.train
    if loader["_target_"] is build_detection_train_loader and "seed" not in loader:
        loader.seed = cfg.train.seed
    made: Iterable[Any] = instantiate(loader)
    return made


def train(cfg: DictConfig, resume: bool) -> Mapping[str, Any]:
    """Train for `train.max_iter` steps, and return the metrics of the last evaluation."""
    model = build_model(cfg)
    logger.info("Model:\n%s", model)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    loader = build_loader(cfg)
    model = create_ddp_model(model, **cfg.train.ddp)
    precision = None
    if cfg.train.amp.enabled:
        device = next(model.parameters()).device
        precision = choose_precision(cfg.train.amp.get("precision", "float16"), device)
    if precision is None:
        trainer = SimpleTrainer(model, loader, optimizer)
    else:
        trainer = AMPTrainer(model, loader, optimizer, precision=precision)
    trainer.seed = cfg.train.seed
    checkpointer = DetectionCheckpointer(model, cfg.train.output_dir, trainer=trainer)
    schedule = LRMultiplier(optimizer, instantiate(cfg.lr_multiplier), cfg.train.max_iter)
    last: dict[str, Any] = {}

    def test() -> Mapping[str, Any]:
        last.clear()
        last.update(evaluate(cfg, model))
        return last

    main = comm.is_main_process()
    writers = default_writers(cfg.train.output_dir, cfg.train.max_iter) if main else []
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=schedule),
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer) if main else None,
            hooks.EvalHook(cfg.train.eval_period, test),
            hooks.PeriodicWriter(writers, period=cfg.train.log_period) if main else None,
            hooks.Preemption(checkpointer),
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint or "", resume=resume)
    start = trainer.iter + 1 if checkpointer.resumed_from else 0
    if start:
        start_loader_at(loader, start)
    trainer.train(start, cfg.train.max_iter)
    return last


def run(args: argparse.Namespace, register: Callable[[], None] | None = None) -> Mapping[str, Any]:
    """Train or evaluate in one process, and return the metrics.

    Args:
        args: of `lazy_parser`.
        register: makes datasets known by name.
    """
    with user_errors():
        if register is not None:
            register()
        if Path(args.config_file).is_file():
            cfg = LazyConfig.load(args.config_file, trust=args.trust_config)
        else:
            cfg = model_zoo.get_config(args.config_file)
        LazyConfig.apply_overrides(cfg, args.opts)
        default_setup(cfg, args)
        if not args.eval_only:
            return train(cfg, args.resume)
        model = build_model(cfg)
        checkpointer = DetectionCheckpointer(model, cfg.train.output_dir)
        checkpointer.resume_or_load(cfg.train.init_checkpoint or "", resume=args.resume)
        check_evaluated_weights(checkpointer, args.allow_untrained)
        return evaluate(cfg, create_ddp_model(model))


def lazy_parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments."""
    found = default_argument_parser(epilog=ABOUT_TRAIN_LAZY)
    found.prog = "d2kit train-lazy"
    found.add_argument(
        "--trust-config", action="store_true", help="execute --config-file, a Python program"
    )
    return found


@user_errors()
def train_lazy_main(
    argv: list[str] | None = None, register: Callable[[], None] | None = None
) -> None:
    """Start the processes that the command line asks for; each calls `run`.

    Args:
        argv: the command line; None: that of the process.
        register: makes datasets known by name, e.g. those of a checkout. Each process calls it.
    """
    args = lazy_parser().parse_args(argv)
    launch_as_asked(run, args, register)


ABOUT_SUBMIT = """\
Send a training to a SLURM cluster, through submitit (pip install 'd2kit[slurm]').

d2kit submit --partition gpu --nodes 2 --gpus 8 --time 24:00:00 --requeue -- \\
    --config-file configs/X.yaml OUTPUT_DIR output/x

What follows -- goes to `d2kit train`. --dry-run prints the batch script and stops;
--local runs the same job on this machine.
"""


TRAIN = ("-m", "d2kit", "train")


def minutes(text: str) -> int:
    """Return the minutes that a time limit of SLURM means, rounded up.

    Args:
        text: ``90``, ``24:00:00`` or ``2-12:00:00``.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text)
    if text.isdecimal() and int(text) > 0:
        return int(text)
    if not found:
        raise argparse.ArgumentTypeError(f"expected MINUTES, H:MM:SS or D-HH:MM:SS, got '{text}'")
    days, hours, mins, seconds = (int(part or 0) for part in found.groups())
    return max(1, (days * 24 + hours) * 60 + mins + (seconds > 0))


def submit_parser() -> argparse.ArgumentParser:
    """Return the parser of what comes before ``--``."""
    parser = verb_parser("submit", ABOUT_SUBMIT)
    add = parser.add_argument
    add("--name", default="d2kit", help="of the job")
    add("--partition", help="of the cluster; default: its own")
    add("--nodes", type=int, default=1, help="machines")
    add("--gpus", type=int, default=1, help="per node, one process each; 0: see --processes")
    add("--processes", type=int, default=1, help="per node, where --gpus is 0")
    add("--cpus", type=int, default=5, help="cores per process (default 5: four loader workers)")
    add("--mem", help="memory per node, e.g. 64GB")
    add("--time", type=minutes, default=60, metavar="LIMIT", help="minutes or D-HH:MM:SS")
    add("--account")
    add("--qos")
    add("--constraint", help="features that the nodes must have")
    add("--setup", action="append", default=[], metavar="LINE", help="shell line that runs before")
    add("--requeue", action="store_true", help="go on in a new job after the limit or preemption")
    add("--grace", type=int, default=120, metavar="SECONDS", help="for the last checkpoint")
    add("--folder", default="output/slurm", help="for scripts and logs; all nodes must see it")
    add("--local", action="store_true", help="run on this machine, without SLURM")
    add("--dry-run", action="store_true", help="print the batch script, and stop")
    return parser


def sbatch_parameters(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `submitit.SlurmExecutor.update_parameters`."""
    # SIGUSR1 makes the training queue its job again, SIGTERM does not
    again = {"requeue": True} if args.requeue else {"no-requeue": True}
    signal = f"{'USR1' if args.requeue else 'TERM'}@{args.grace}"
    optional = {
        "partition": args.partition,
        "mem": args.mem,
        "account": args.account,
        "qos": args.qos,
        "constraint": args.constraint,
        "gpus_per_node": args.gpus or None,
        "setup": args.setup or None,
    }
    return {
        "job_name": args.name,
        "nodes": args.nodes,
        "ntasks_per_node": args.gpus or args.processes,
        "cpus_per_task": args.cpus,
        "time": args.time,
        "stderr_to_stdout": True,
        "additional_parameters": {"signal": signal, **again},
        **{key: value for key, value in optional.items() if value is not None},
    }


def train_command(
    args: argparse.Namespace, words: list[str], train: Sequence[str] = TRAIN
) -> list[str]:
    """Return what each process runs; a job that may come again resumes."""
    resume = ["--resume"] if args.requeue and "--resume" not in words else []
    return [sys.executable, *train, *resume, *words]


def batch_script(args: argparse.Namespace) -> str:
    """Return the script that would be given to sbatch."""
    from submitit.slurm.slurm import _make_sbatch_string

    command = f"{sys.executable} -u -m submitit.core._submit {shlex.quote(folder_of(args))}"
    return _make_sbatch_string(command=command, folder=folder_of(args), **sbatch_parameters(args))


def folder_of(args: argparse.Namespace) -> str:
    """Return the absolute folder of scripts and logs."""
    return str(Path(args.folder).expanduser().absolute())


def submit(args: argparse.Namespace, command: list[str]) -> Any:
    """Send a command to the cluster, or run it here.

    Returns:
        The job.

    Raises:
        ValueError: if this machine has no SLURM.
    """
    import submitit

    if args.local:
        executor: Any = submitit.LocalExecutor(folder_of(args))
        executor.update_parameters(
            tasks_per_node=args.gpus or args.processes,
            gpus_per_node=args.gpus,
            timeout_min=args.time,
            stderr_to_stdout=True,
            setup=args.setup,
        )
    else:
        missing = [name for name in ("sbatch", "srun") if shutil.which(name) is None]
        if missing:
            raise ValueError(
                f"{' and '.join(missing)} not found: run this on a login node of the cluster, or "
                "use --dry-run (prints the script) or --local (runs here)"
            )
        executor = submitit.SlurmExecutor(folder_of(args))
        executor.update_parameters(**sbatch_parameters(args))
    return executor.submit(TrainingProcess(command))


def submit_main(argv: list[str] | None = None, train: Sequence[str] = TRAIN) -> int:
    """Submit, or print what would be submitted; return the exit code.

    Args:
        argv: the command line; None: that of the process.
        train: what Python runs in each process.
    """
    argv = sys.argv[1:] if argv is None else argv
    split = argv.index("--") if "--" in argv else len(argv)
    parser = submit_parser()
    args = parser.parse_args(argv[:split])
    words = argv[split + 1 :]
    if not words:
        parser.error("nothing to train: give the arguments of `d2kit train` after --")
    if min(args.nodes, args.processes, args.cpus) < 1 or args.gpus < 0:
        parser.error("--nodes, --processes and --cpus must be at least 1, --gpus at least 0")
    if args.local and args.nodes > 1:
        parser.error("--local is one node")
    try:
        import submitit  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "submitit":
            raise
        print("error: submitit is not installed: pip install 'd2kit[slurm]'", file=sys.stderr)
        return 1
    command = train_command(args, words, train)
    if args.dry_run:
        print(batch_script(args))
        print(f"# each process runs: {shlex.join(command)}")
        return 0
    with user_errors():
        job = submit(args, command)
    print(f"job {job.job_id}; log of the first process: {job.paths.stdout}")
    if args.local:
        return int(job._process.wait())
    return 0


def replay_step(
    dump: Path, trainer_class: type[DefaultTrainer] = DefaultTrainer
) -> list[dict[str, float]]:
    """Do the forward passes of a failed step again, of one process after the other.

    What a process divides by a mean over all processes is here its own; so its losses may differ
    by a factor from those of the dump.

    Args:
        dump: folder that a failed training has written; the datasets of its config are registered.
        trainer_class: what was trained with.

    Returns:
        The losses of each process.

    Raises:
        FileNotFoundError: if the folder is no dump.
        ValueError: if the loader yields other images than the step had.
    """
    if not (dump / "failure.json").is_file():
        raise FileNotFoundError(f"'{dump}' has no failure.json: give the folder failed_step_...")
    facts = load_json(dump / "failure.json")
    cfg = get_cfg()
    cfg.merge_from_file(str(dump / "config.yaml"))
    with tempfile.TemporaryDirectory() as scratch:
        cfg.OUTPUT_DIR = scratch
        cfg.DATALOADER.NUM_WORKERS = 0
        trainer = trainer_class(cfg)
        trainer.checkpointer.load(str(dump / "state.pth"), checkpointables=[])
        state = read_checkpoint(dump / "state.pth")["trainer"]
        trainer._trainer.load_state_dict({**state["_trainer"], "iteration": 0})
        start_loader_at(trainer.data_loader, facts["iteration"])
        batch = list(next(iter(trainer.data_loader)))
        with EventStorage(facts["iteration"]):
            return [
                _forward(trainer, _take(batch, rank["images"]), facts, index)
                for index, rank in enumerate(facts["ranks"])
            ]


def _take(batch: list[Any], images: list[Any]) -> list[Any]:
    """Remove the samples of these images from a batch, and return them in this order."""
    found = []
    for image in images:
        place = next(
            (
                k
                for k, sample in enumerate(batch)
                if image in (sample.get("image_id"), sample.get("file_name"))
            ),
            None,
        )
        if place is None:
            raise ValueError(
                f"image {image!r} of the failed step is not in the batch of its iteration: the "
                "dataset or its order has changed since"
            )
        found.append(batch.pop(place))
    return found


def _forward(
    trainer: DefaultTrainer, batch: list[Any], facts: dict[str, Any], rank: int
) -> dict[str, float]:
    """Return the losses of a process's batch, under its random numbers; log them."""
    seed_all_rng(derive_seed(facts["seed"], facts["iteration"], rank))
    trainer.model.train()
    inner = trainer._trainer
    with torch.no_grad(), inner._forward_context():
        found = trainer.model(batch)
    losses = found if isinstance(found, dict) else {"total_loss": found}
    numbers = {name: float(value) for name, value in losses.items()}
    then = facts["ranks"][rank]["losses"]
    for name, value in sorted(numbers.items()):
        mark = "" if math.isfinite(value) else "  <- not finite"
        logging.getLogger(__name__).info(
            "rank %d %s: %.6g (then %s)%s", rank, name, value, then.get(name), mark
        )
    return numbers


ABOUT_REPLAY = """\
Do a training step again whose loss was not finite.

d2kit replay output/failed_step_0001234 [--import my_datasets] [--trainer my.train:Trainer]

The folder was written by the training that failed; it is named in its log.
"""


def replay_main(argv: list[str] | None = None, register: Callable[[], None] | None = None) -> int:
    """Return 0 if the step fails again, 1 if its losses are finite now.

    Args:
        argv: the command line; None: that of the process.
        register: makes datasets known by name, e.g. those of a checkout.
    """
    parser = verb_parser("replay", ABOUT_REPLAY)
    parser.add_argument("dump", type=Path, help="folder failed_step_... of a training")
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="module that registers datasets or models",
    )
    parser.add_argument("--trainer", default="", metavar="MODULE:CLASS", help="own trainer")
    args = parser.parse_args(argv)
    with user_errors():
        setup_logger()
        if register is not None:
            register()
        for name in args.modules:
            importlib.import_module(name)
        kind = DefaultTrainer
        if args.trainer:
            module, _, name = args.trainer.partition(":")
            kind = getattr(importlib.import_module(module), name)
        losses = replay_step(args.dump, kind)
    print(json.dumps(losses))
    again = any(not math.isfinite(value) for rank in losses for value in rank.values())
    print("the step fails again" if again else "all losses are finite now")
    return 0 if again else 1
