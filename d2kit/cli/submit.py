r"""Send a training to a SLURM cluster, through submitit (pip install 'd2kit[slurm]').

d2kit submit --partition gpu --nodes 2 --gpus 8 --time 24:00:00 --requeue -- \
    --config-file configs/X.yaml OUTPUT_DIR output/x

What follows -- goes to `d2kit train`. --dry-run prints the batch script and stops;
--local runs the same job on this machine.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d2kit.engine import user_errors
from d2kit.engine.launch import TrainingProcess

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


def argument_parser() -> argparse.ArgumentParser:
    """Return the parser of what comes before ``--``."""
    parser = argparse.ArgumentParser(
        prog="d2kit submit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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


def main(argv: list[str] | None = None, train: Sequence[str] = TRAIN) -> int:
    """Submit, or print what would be submitted; return the exit code.

    Args:
        argv: the command line; None: that of the process.
        train: what Python runs in each process.
    """
    argv = sys.argv[1:] if argv is None else argv
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argument_parser()
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
