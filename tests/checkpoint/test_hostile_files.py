"""Hostile and damaged weights, proposals, configs, archives: refused, and nothing is executed."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoint import hostile_files, read_hostile_files
from tests.checkpoint.hostile_files import CASES

USER_ERRORS = {"ValueError", "KeyError", "FileNotFoundError"}
REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What happened to every file, in one process under an audit hook."""
    folder = tmp_path_factory.mktemp("hostile")
    for number, case in enumerate(CASES.values()):
        place = folder / f"{number:03}"
        place.mkdir()
        (place / case.file).write_bytes(case.content())
    run = subprocess.run(
        [sys.executable, "-m", read_hostile_files.__name__, str(folder)],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert not list(folder.rglob("PWNED*"))
    assert not (REPO / "PWNED").exists()
    found = json.loads(run.stdout.splitlines()[-1])
    return dict(zip(CASES, (found[f"{i:03}"] for i in range(len(CASES))), strict=True))


def test_there_are_many():
    assert len(CASES) >= 40
    for table in ("PICKLES", "TORCH", "PROPOSALS", "YAML", "ARCHIVES"):
        assert len(getattr(hostile_files, table)) >= 5


@pytest.mark.faults(29, 30, fast=True)
@pytest.mark.parametrize("name", CASES)
def test_refused_with_the_reason_and_nothing_executed(outcomes, name):
    kind, message, events = outcomes[name]
    assert kind in USER_ERRORS, (kind, message)
    assert CASES[name].file in message
    assert re.search(CASES[name].reason, message, re.DOTALL), message
    assert events == []
