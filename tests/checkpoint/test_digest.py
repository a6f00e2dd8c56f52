"""A flipped bit in a file that d2kit wrote is refused at every entrance."""

import hashlib
import random
import struct
from pathlib import Path

import pytest
import torch
from torch import nn

from d2kit.checkpoint import DetectionCheckpointer
from d2kit.checkpoint.c2_model_loading import convert_file
from d2kit.checkpoint.files import newest_checkpoint, read_checkpoint


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 32), nn.Conv2d(3, 4, 3))


def write(folder: Path, suffix: str) -> Path:
    """Write the weights of `net` as d2kit does."""
    checkpointer = DetectionCheckpointer(net(), folder)
    checkpointer.save("model.safetensors" if suffix == ".safetensors" else "model")
    if suffix == ".pkl":
        convert_file(folder / "model.pth", folder / "model.pkl", "d2kit")
    return folder / f"model{suffix}"


@pytest.mark.faults(33, fast=True)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pkl"])
def test_no_flipped_bit_loads_other_weights(tmp_path: Path, suffix: str) -> None:
    raw = write(tmp_path, suffix).read_bytes()
    rng, refused = random.Random(3), 0
    for _ in range(40):
        flipped = bytearray(raw)
        flipped[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        damaged = tmp_path / f"damaged{suffix}"
        damaged.write_bytes(flipped)
        other = net(1)
        try:
            DetectionCheckpointer(other).load(str(damaged))
        except (ValueError, KeyError) as error:
            refused += str(damaged) in str(error)
            continue
        pairs = zip(other.parameters(), net().parameters(), strict=True)
        equal = [torch.equal(a, b) for a, b in pairs]
        assert all(equal)
    assert refused > 10


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path: Path, value: float) -> None:
    state = net().state_dict()
    state["0.weight"][3, 4] = value
    torch.save({"model": state}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="1 of 4 weights are not finite.*0.weight"):
        DetectionCheckpointer(net()).load(str(tmp_path / "x.pth"))


def test_an_empty_model(tmp_path: Path) -> None:
    torch.save({"model": {}}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="holds no weights"):
        DetectionCheckpointer(net()).load(str(tmp_path / "x.pth"))


def test_no_shape_fits(tmp_path: Path) -> None:
    state = {name: torch.zeros(7, 7) for name in net().state_dict()}
    torch.save({"model": state}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="has the model's shape"):
        DetectionCheckpointer(net()).load(str(tmp_path / "x.pth"))


@pytest.mark.faults(36, fast=True)
@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[0,999999999999999999],"data_offsets":[0,0]}}',
        b'{"a":[1]}',
        b"[" * 4000,
        b"[]",
        b"{}",
    ],
    ids=["huge", "negative", "digits", "empty", "list", "deep", "no object", "none"],
)
def test_headers_of_safetensors_that_lie(
    tmp_path: Path, header: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    if header != b"{}":  # sound, but without weights
        native = lambda _: pytest.fail("native code was called")  # noqa: E731
        monkeypatch.setattr("safetensors.torch.load_file", native)
    with pytest.raises(ValueError, match="x.safetensors"):
        read_checkpoint(path)


def test_a_header_longer_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(ValueError, match="1,152,921,504,606,846,976 bytes"):
        read_checkpoint(path)


@pytest.mark.faults(33, fast=True)
def test_the_hash_in_a_name_is_checked(tmp_path: Path) -> None:
    made = write(tmp_path, ".pth").read_bytes()
    digest = hashlib.sha256(made).hexdigest()[:8]
    (tmp_path / f"net-{digest}.pth").write_bytes(made)
    wrong = "0a" * 4
    (tmp_path / f"net-{wrong}.pth").write_bytes(made)
    (tmp_path / "net-20260101.pth").write_bytes(made)  # a date
    assert read_checkpoint(tmp_path / f"net-{digest}.pth")["model"]
    assert read_checkpoint(tmp_path / "net-20260101.pth")["model"]
    with pytest.raises(ValueError, match="promises a SHA-256"):
        read_checkpoint(tmp_path / f"net-{wrong}.pth")


@pytest.mark.faults(38, fast=True)
def test_a_later_training_is_newer_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.time", lambda: 4e9)  # 2096
    DetectionCheckpointer(net(), tmp_path).save("model_0000099", iteration=99)
    monkeypatch.setattr("time.time", lambda: 1.7e9)
    later = DetectionCheckpointer(net(), tmp_path)
    later.save("model_0000004", iteration=4)
    assert newest_checkpoint(tmp_path, {}) == tmp_path / "model_0000004.pth"
    again = DetectionCheckpointer(net(), tmp_path)
    assert again.resume_or_load("")["iteration"] == 4
    assert again.run == 2
