"""What each process of a job that submitit started does: it becomes the training script."""

import os
import sys
from collections.abc import Mapping, Sequence

__all__ = ["TrainingProcess", "local_variables"]


def local_variables(env: Mapping[str, str]) -> dict[str, str]:
    """Return torchrun's variables for a process of submitit's executor for one machine.

    Args:
        env: environment variables.

    Returns:
        Empty elsewhere: SLURM tells its processes itself who they are.
    """
    if env.get("SUBMITIT_EXECUTOR") != "local":
        return {}
    count = env["SUBMITIT_LOCAL_NTASKS"]
    # all processes of the job must choose the same port without talking to each other
    port = 20000 + int(env["SUBMITIT_LOCAL_JOB_ID"]) % 20000
    return {
        "RANK": env["SUBMITIT_LOCAL_GLOBALID"],
        "LOCAL_RANK": env["SUBMITIT_LOCAL_LOCALID"],
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


class TrainingProcess:
    """Replaces the process by a command, which then gets the signals and sets the exit code.

    A child would share both with submitit, which would queue the job again by itself, beside the
    training that does so once its checkpoint is written.

    Args:
        command: program and arguments.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.command = list(command)

    def __call__(self) -> None:
        """Run the command; does not return."""
        env = {**os.environ, **local_variables(os.environ)}
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(self.command[0], self.command, env)
