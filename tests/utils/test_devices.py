"""Devices by their usual names, and what they compute natively."""

import copy
import logging
import os

import pytest
import torch

from d2kit.utils.devices import (
    Constants,
    available_cores,
    choose_device,
    choose_inference_dtype,
    computes_bfloat16,
    exact_dtype,
    use_device,
)


@pytest.mark.parametrize("name", ["cpu", "CPU", "", "cpu:0", torch.device("cpu")])
def test_the_cpu(name):
    assert choose_device(name).type == "cpu"


@pytest.mark.parametrize("name", ["cuda", "gpu", "GPU:1", 0, "1", "cuda:3", torch.device("cuda")])
def test_without_cuda_the_cpu_and_a_word(name, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.WARNING):
        assert choose_device(name) == torch.device("cpu")
    assert "no CUDA device: using the CPU" in caplog.text


@pytest.mark.parametrize(("name", "index"), [("cuda:1", 1), (1, 1), ("gpu", None), ("0", 0)])
def test_cuda_by_number(name, index, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device(name) == torch.device("cuda" if index is None else f"cuda:{index}")
    with pytest.raises(ValueError, match="this machine has 2 CUDA devices: cuda:0 to cuda:1"):
        choose_device("cuda:2")


@pytest.mark.parametrize("name", ["cudda", "cuda:x", -1, None, "cuda:-1"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="expected cpu, cuda, cuda:N, mps or auto, got"):
        choose_device(name)


@pytest.mark.parametrize(
    ("avx512", "amx", "capability", "native"),
    [(False, False, "AVX2", False), (False, False, "AVX512", False)]
    + [(True, False, "AVX512", True), (False, True, "AVX512", True)],
)
def test_the_processor_is_asked(avx512, amx, capability, native, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert computes_bfloat16(torch.device("cpu")) is native


@pytest.mark.parametrize(
    ("name", "device", "native", "dtype"),
    [
        ("float32", "cpu", False, torch.float32),
        ("bfloat16", "cpu", True, torch.bfloat16),
        ("bfloat16", "cpu", False, torch.float32),
        ("float16", "cpu", True, torch.float32),
        ("float16", "cuda", False, torch.float16),
    ],
)
def test_inference_is_in_half_precision_where_it_is_native(
    name, device, native, dtype, monkeypatch, caplog
):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert choose_inference_dtype(name, torch.device(device)) is dtype
    refused = name != "float32" and dtype is torch.float32
    told = f"TEST.DTYPE: this CPU does not compute {name} natively" in caplog.text
    assert told is refused


def test_another_precision_is_refused():
    with pytest.raises(ValueError, match="TEST.DTYPE: expected one of float32, .*got 'half'"):
        choose_inference_dtype("half", torch.device("cpu"))


def test_cores_are_those_this_process_may_use():
    assert 1 <= available_cores() <= (os.cpu_count() or 1)


def test_mps_has_no_float64():
    assert exact_dtype(torch.device("mps")) is torch.float32
    assert exact_dtype(torch.device("cpu")) is torch.float64


def test_the_current_cuda_device_is_that_of_the_model(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("cpu", "cuda", "cuda:1"):
        use_device(torch.device(name))
    assert chosen == [torch.device("cuda:1")]


def test_constants_are_made_once_for_each_question():
    made = []

    def make():
        made.append(torch.arange(3.0))
        return made[-1]

    constants = Constants()
    with torch.inference_mode():
        first = constants.kept(("cpu", 3), make)
    assert constants.kept(("cpu", 3), make) is first
    assert (first * torch.ones(3, requires_grad=True)).requires_grad  # not inference's alone
    for number in range(200):
        constants.kept(number, make)
    assert len(constants) <= 64
    assert len(made) == 201
    copied = copy.deepcopy(constants)
    assert torch.equal(copied.kept(199, make), first)
    assert len(made) == 201
