#!/usr/bin/env python3
"""Send a training to a SLURM cluster: `d2kit submit`, whose jobs run tools/train_net.py."""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from d2kit.cli.jobs import batch_script, minutes, sbatch_parameters, submit, submit_main
from d2kit.cli.jobs import submit_parser as argument_parser

__all__ = ["argument_parser", "batch_script", "main", "minutes", "sbatch_parameters", "submit"]

main = partial(submit_main, train=(str(Path(__file__).resolve().with_name("train_net.py")),))

if __name__ == "__main__":
    sys.exit(main())
