"""DETERMINISTIC: what `default_setup` switches on, and what it says."""

import os

import pytest
import torch

from d2kit.engine import default_argument_parser, default_setup
from tests.support import tiny_run as tiny


@pytest.fixture
def restored(monkeypatch):
    """Undo the settings afterwards."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    cudnn = torch.backends.cudnn
    before = (cudnn.benchmark, cudnn.deterministic)
    yield
    cudnn.benchmark, cudnn.deterministic = before
    torch.use_deterministic_algorithms(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def setup(folder, *options):
    default_setup(tiny.tiny_cfg(folder, *options), default_argument_parser().parse_args([]))


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("enabled", [False, True])
def test_key(tmp_path, enabled):
    setup(tmp_path, "DETERMINISTIC", enabled, "CUDNN_BENCHMARK", True)
    assert torch.are_deterministic_algorithms_enabled() is enabled
    assert torch.backends.cudnn.benchmark is not enabled
    assert torch.backends.cudnn.deterministic is enabled
    assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is enabled
    assert ("Deterministic algorithms" in (tmp_path / "log.txt").read_text()) is enabled


@pytest.mark.usefixtures("restored")
def test_an_operation_without_such_an_algorithm_does_not_end_the_run(tmp_path):
    setup(tmp_path, "DETERMINISTIC", True)
    assert torch.is_deterministic_algorithms_warn_only_enabled()
