"""Sending trainings to SLURM: the script, the messages, and real jobs on a pretended cluster."""

import argparse
import json
import os
import sys
import time

import pytest

from d2kit.engine.launch import Place, find_place, local_variables
from tests.support import tiny_run as tiny
from tests.tools.test_scripts import REPO, _script

submitit = pytest.importorskip("submitit")

FAKE_SBATCH = """#!/bin/sh
# runs the script at once, as the batch step of a job on this machine; like SLURM it copies the
# script while it is submitted, for submitit renames the file as soon as it has the job's number
export SLURM_JOB_ID=$$ SLURM_NTASKS=2 SLURM_JOB_NODELIST=localhost
cp "$1" "$FAKE_SLURM/batch.sh"
bash "$FAKE_SLURM/batch.sh" > "$FAKE_SLURM/batch.log" 2>&1 &
echo "Submitted batch job $$"
"""
FAKE_SRUN = """#!/bin/sh
# two tasks of one step; submitit gives --unbuffered and --output FILE
shift 3
for i in 0 1; do
    SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE=2 \\
        SLURM_STEP_NODELIST=localhost "$@" > "$FAKE_SLURM/task$i.log" 2>&1 &
done
wait
"""


@pytest.fixture
def script():
    return _script("submit")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("1:00:00", 60), ("24:00:01", 1441), ("2-12:00:00", 3600), ("0:00:05", 1)],
)
def test_time_limits(script, text, expected):
    assert script.minutes(text) == expected


@pytest.mark.parametrize("text", ["", "0", "-5", "1:30", "soon", "1h"])
def test_other_time_limits_are_refused(script, text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected MINUTES"):
        script.minutes(text)


def flags_of(text):
    """The #SBATCH lines: name -> value, True without one."""
    words = [
        line[10:].partition("=") for line in text.splitlines() if line.startswith("#SBATCH --")
    ]
    return {name: value or True for name, _, value in words}


def test_dry_run_prints_the_script(script, tmp_path, capsys):
    options = ["--partition", "gpu", "--nodes", "2", "--gpus", "8", "--time", "1-00:00:00"]
    options += ["--setup", "module load cuda", "--folder", str(tmp_path / "logs"), "--mem", "64GB"]
    words = ["--", "--config-file", "x.yaml", "OUTPUT_DIR", "a b"]
    assert script.main([*options, "--requeue", "--dry-run", *words]) == 0
    text = capsys.readouterr().out
    expected = {"partition": "gpu", "nodes": "2", "ntasks-per-node": "8", "gpus-per-node": "8"}
    expected |= {"time": "1440", "requeue": True, "signal": "USR1@120", "mem": "64GB"}
    found = flags_of(text)
    assert {name: found.get(name) for name in expected} == expected
    assert "no-requeue" not in found
    assert found["output"] == f"{tmp_path}/logs/%j_0_log.out"
    assert text.index("module load cuda") < text.index("srun ")
    command = f"{REPO}/tools/train_net.py --resume --config-file x.yaml OUTPUT_DIR 'a b'"
    assert text.strip().endswith(command)
    assert not (tmp_path / "logs").exists()


def test_without_requeue_a_run_ends_with_its_job(script, capsys):
    options = ["--gpus", "0", "--processes", "3", "--grace", "30", "--dry-run"]
    assert script.main([*options, "--", "--config-file", "x.yaml"]) == 0
    text = capsys.readouterr().out
    found = flags_of(text)
    assert (found["no-requeue"], found["signal"], found["time"]) == (True, "TERM@30", "60")
    assert found["ntasks-per-node"] == "3"
    assert not {"requeue", "gpus-per-node", "partition"} & set(found)
    assert "--resume" not in text


def test_the_printed_script_is_the_one_that_is_sent(script, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: f"/fake/{name}")
    options = ["--requeue", "--nodes", "3", "--folder", str(tmp_path)]
    args = script.argument_parser().parse_args(options)
    executor = submitit.SlurmExecutor(str(tmp_path))
    executor.update_parameters(**script.sbatch_parameters(args))
    sent = executor._make_submission_file_text(executor._submitit_command_str, "0")
    assert script.batch_script(args) == sent


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "1"], "give the arguments of `d2kit train` after --"),
        (["--nodes", "0", "--", "x"], "must be at least 1"),
        (["--local", "--nodes", "2", "--", "x"], "--local is one node"),
        (["--time", "soon", "--", "x"], "expected MINUTES"),
    ],
)
def test_wrong_arguments_are_named(script, words, message, capsys):
    with pytest.raises(SystemExit) as error:
        script.main(words)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_a_machine_without_slurm_is_named(script, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    args = script.argument_parser().parse_args(["--folder", str(tmp_path / "logs")])
    with pytest.raises(ValueError, match="sbatch and srun not found: run this on a login node"):
        script.submit(args, ["/bin/true"])
    assert not (tmp_path / "logs").exists()


def test_without_submitit_the_extra_is_named(script, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert script.main(["--dry-run", "--", "x"]) == 1
    assert "pip install 'd2kit[slurm]'" in capsys.readouterr().err


def test_local_processes_know_their_place():
    env = {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_NTASKS": "4"}
    env |= {"SUBMITIT_LOCAL_GLOBALID": "3", "SUBMITIT_LOCAL_LOCALID": "3"}
    env |= {"SUBMITIT_LOCAL_JOB_ID": "40123"}
    place = Place(3, 4, 3, 4, "127.0.0.1", 20123, "torchrun")
    assert find_place(local_variables(env)) == place
    assert local_variables({**env, "SUBMITIT_EXECUTOR": "slurm"}) == {}
    assert local_variables({}) == {}


def two_ranks(folder, seconds=120):
    """Wait for what `tests.support.distributed` writes in each process."""
    files = [folder / f"rank{rank}.json" for rank in (0, 1)]
    end = time.monotonic() + seconds
    while time.monotonic() < end and not all(f.exists() and f.stat().st_size for f in files):
        time.sleep(0.2)
    logs = [path.read_text()[-1500:] for path in folder.rglob("*.log") if path.is_file()]
    assert all(f.exists() for f in files), "\n".join(logs)
    return [json.loads(f.read_text()) for f in files]


@pytest.mark.slow
@pytest.mark.parametrize("local", [False, True])
def test_two_processes_of_a_job_train_together(script, tmp_path, monkeypatch, local):
    """Through submitit to a pretended SLURM, and through its executor for one machine."""
    (tmp_path / "images").mkdir()
    tiny.records(tmp_path / "images")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("sbatch", FAKE_SBATCH), ("srun", FAKE_SRUN)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("FAKE_SLURM", str(tmp_path))
    options = ["--gpus", "0", "--processes", "2", "--folder", str(tmp_path / "jobs")]
    args = script.argument_parser().parse_args([*options, *["--local"] * local])
    command = [sys.executable, "-m", "tests.support.distributed", str(tmp_path)]
    job = script.submit(args, command)
    assert job.job_id.isdecimal()
    facts = two_ranks(tmp_path)
    assert [fact["world"] for fact in facts] == [2, 2]
    assert [fact["local_rank"] for fact in facts] == [0, 1]
    assert len(facts[0]["losses"]) == 4
    assert (tmp_path / "two/model_final.pth").is_file()
    if local:
        assert job._process.wait(60) == 0
