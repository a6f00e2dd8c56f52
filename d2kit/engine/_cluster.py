"""What torchrun and SLURM say about the processes of a job."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Place", "find_place"]


@dataclass(frozen=True)
class Place:
    """A process among those of its job.

    Args:
        rank: index among all, in [0, world_size).
        world_size: number of processes.
        local_rank: index among those of its machine.
        local_size: number of processes on its machine.
        address: host name of rank 0.
        port: where rank 0 listens.
        source: who said so, for messages.
    """

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    address: str
    port: int
    source: str


def find_place(env: Mapping[str, str] = os.environ) -> Place | None:
    """Read this process's place from the environment of torchrun or of a SLURM job step.

    Args:
        env: environment variables.

    Returns:
        None where neither started this process.

    Raises:
        ValueError: if a variable that belongs to it is missing.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        return _from_torchrun(env)
    if "SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return _from_slurm(env)
    return None


def _need(env: Mapping[str, str], name: str, source: str) -> str:
    if name not in env:
        raise ValueError(f"the environment of {source} lacks {name}; start with torchrun or srun")
    return env[name]


def _from_torchrun(env: Mapping[str, str]) -> Place:
    world = int(env["WORLD_SIZE"])
    return Place(
        rank=int(env["RANK"]),
        world_size=world,
        local_rank=int(_need(env, "LOCAL_RANK", "torchrun") if world > 1 else "0"),
        local_size=int(env.get("LOCAL_WORLD_SIZE", str(world))),
        address=_need(env, "MASTER_ADDR", "torchrun"),
        port=int(_need(env, "MASTER_PORT", "torchrun")),
        source="torchrun",
    )


def _from_slurm(env: Mapping[str, str]) -> Place:
    # "4(x2),3" means 4, 4, 3 tasks; machines of a job step must have as many tasks each.
    tasks = env.get("SLURM_STEP_TASKS_PER_NODE") or _need(env, "SLURM_TASKS_PER_NODE", "SLURM")
    counts = re.findall(r"(\d+)(?:\(x\d+\))?", tasks)
    if len(set(counts)) > 1:
        raise ValueError(f"SLURM runs {tasks} tasks per node; all nodes need the same number")
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST")
    nodes = nodes or _need(env, "SLURM_JOB_NODELIST", "SLURM")
    job = int(env.get("SLURM_JOB_ID", "0"))
    return Place(
        rank=int(env["SLURM_PROCID"]),
        world_size=int(env["SLURM_STEP_NUM_TASKS"]),
        local_rank=int(_need(env, "SLURM_LOCALID", "SLURM")),
        local_size=int(counts[0]),
        address=env.get("MASTER_ADDR") or first_host(nodes),
        port=int(env.get("MASTER_PORT") or 20000 + job % 20000),
        source="SLURM",
    )


def first_host(nodelist: str) -> str:
    """Return the first host of a SLURM node list, e.g. ``gpu007`` of ``gpu[007-009,12],login``.

    Args:
        nodelist: hosts with ranges in one or more pairs of brackets, separated by commas.

    Raises:
        ValueError: if it cannot be read.
    """
    # the first of each range: "r[1-2]n[03,07]" -> "r1n03"
    plain = re.sub(r"\[(\w+)(?:[-,][\w,-]*)?\]", r"\1", nodelist)
    host = plain.partition(",")[0]
    if not re.fullmatch(r"[\w.-]+", host):
        raise ValueError(f"cannot read the SLURM node list '{nodelist}'")
    return host
