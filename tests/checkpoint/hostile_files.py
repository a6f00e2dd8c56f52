"""Files that were made to do harm, and damaged ones: name -> how to write it, and what to say.

Every gadget would leave the word PWNED in a command, a source or a file name.
"""

import functools
import importlib
import io
import json
import operator
import os
import pickle
import struct
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

COMMAND = "touch PWNED"
SOURCE = "open('PWNED', 'w')"


class Case(NamedTuple):
    """One file: its name decides who reads it."""

    file: str
    content: Callable[[], bytes]
    reason: str  # pattern of the message


class Gadget:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


class Stateful:
    """Pickles as an object with a state."""

    def __setstate__(self, state):
        raise AssertionError("a state was set")

    def __getstate__(self):
        return {"x": 1}


GADGETS = {
    "os.system": lambda: Gadget(os.system, COMMAND),
    "eval": lambda: Gadget(eval, SOURCE),
    "exec": lambda: Gadget(exec, SOURCE),
    "subprocess.Popen": lambda: Gadget(subprocess.Popen, COMMAND, -1),
    "functools.partial": lambda: functools.partial(os.system, COMMAND),
    "getattr": lambda: Gadget(getattr, Gadget(importlib.import_module, "os"), "system"),
    "__import__": lambda: Gadget(__import__, "antigravity"),
    "open": lambda: Gadget(open, "PWNED", "w"),
    "operator.methodcaller": lambda: operator.methodcaller("system", COMMAND),
    "numpy.load": lambda: Gadget(np.load, "PWNED.npy"),
    "object with a state": Stateful,
}


def _zoo() -> bytes:
    """A sound file of the model zoo."""
    weights = {f"layer{i}.weight": np.ones((8, 8), np.float32) for i in range(4)}
    return pickle.dumps({"model": weights, "__author__": "zoo"}, protocol=2)


def _torch(value, **kwargs) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **kwargs)
    return file.getvalue()


def _sound() -> bytes:
    return _torch({"model": {"weight": torch.ones(300, 8), "bias": torch.ones(8)}})


def _part(content: Callable[[], bytes], tenths: float) -> Callable[[], bytes]:
    return lambda: content()[: int(len(content()) * tenths / 10)]


def _zip(*members: tuple[str | zipfile.ZipInfo, bytes], packed: bool = False) -> bytes:
    file = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return file.getvalue()


def _changed_torch(old: bytes, new: bytes) -> bytes:
    """A file of torch.save whose pickle was edited; all checksums are right."""
    with zipfile.ZipFile(io.BytesIO(_torch({"model": {"w": torch.ones(7)}}))) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    edited = [(n, c.replace(old, new) if n.endswith("data.pkl") else c) for n, c in members]
    assert edited != members
    return _zip(*edited)


def _script() -> bytes:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    return file.getvalue()


def _tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        info = tarfile.TarInfo("../PWNED")
        archive.addfile(info, io.BytesIO(b""))
    return file.getvalue()


def _npz() -> bytes:
    file = io.BytesIO()
    objects = np.array([GADGETS["os.system"]()], dtype=object)
    np.savez(file, ids=objects, boxes=objects, objectness_logits=objects)
    return file.getvalue()


def _link() -> bytes:
    info = zipfile.ZipInfo("link")
    info.external_attr = 0o120777 << 16
    return _zip((info, b"/etc/passwd"))


def _nested(levels: int) -> bytes:
    value: list = []
    for _ in range(levels):
        value = [value]
    return b"]" * (levels + 1) + b"a" * levels + b"."


def _safetensors(header: dict, length: int | None = None, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _bomb(text: str, more: str, end: str) -> bytes:
    """Nine levels of nine references: 400 million leaves in 600 bytes."""
    lines = [f"a0: &a0 {text}"]
    for i in range(1, 10):
        inside = ", ".join(more.format(k=k, before=i - 1) for k in range(9))
        lines.append(f"a{i}: &a{i} {end[0]}{inside}{end[1]}")
    return "\n".join(lines).encode()


def _yaml(text: str) -> Callable[[], bytes]:
    return text.encode


def _bytes(content: bytes) -> Callable[[], bytes]:
    return lambda: content


_BUILD = b"c_codecs\nencode\n}S'x'\nI1\nsb."
_LYING = pickle.dumps({"model": {"w": np.zeros(4, np.uint8)}}, 2).replace(
    b"K\x04\x85", b"K\x09\x85"
)

PICKLES = {
    **{
        f"pickle of {name}": Case(
            "a.pkl", lambda make=make: pickle.dumps({"model": make()}), r"names"
        )
        for name, make in GADGETS.items()
    },
    "opcode INST": Case("a.pkl", _bytes(b"(S'touch PWNED'\nios\nsystem\n."), r"'os\.system'"),
    "opcode OBJ": Case("a.pkl", _bytes(b"(cos\nsystem\nS'touch PWNED'\no."), r"'os\.system'"),
    "opcode STACK_GLOBAL": Case(
        "a.pkl",
        _bytes(b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0btouch PWNED\x85R."),
        "os.system",
    ),
    "opcode EXT": Case("a.pkl", _bytes(b"\x80\x02\x82\x01."), "not a readable pickle"),
    "persistent id": Case("a.pkl", _bytes(b"Pabc\n."), "pickle"),
    "function changed": Case("a.pkl", _bytes(_BUILD), "change a function"),
    "dotted name": Case("a.pkl", _bytes(b"cnumpy\ncore.multiarray._reconstruct\n."), "names"),
    "array with a lying size": Case("a.pkl", _bytes(_LYING), "do not fit shape"),
    "structured dtype": Case(
        "a.pkl", lambda: pickle.dumps({"model": np.zeros(2, [("a", "i4")])}, 2), "dtype"
    ),
    "terabyte from ten bytes": Case(
        "a.pkl", _bytes(b"cbuiltins\nbytearray\n(I1000000000000\ntR."), "bytearray"
    ),
    "memo of 34 GB from five bytes": Case(
        "a.pkl", _bytes(b"\x80\x02Nr\xff\xff\xff\xff."), "more memory than there is"
    ),
    "terabyte of bytes": Case(
        "a.pkl", _bytes(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x."), "pickle"
    ),
    "nested 100,000 deep": Case("a.pkl", lambda: _nested(100_000), "recursion"),
    "no dict": Case("a.pkl", lambda: pickle.dumps([1, 2]), "expected a dict"),
    "no arrays": Case("a.pkl", lambda: pickle.dumps({"a": 1}), "no arrays found"),
    "web page as pickle": Case("a.pkl", _bytes(b"<html>404</html>"), "not a readable pickle"),
    "nothing": Case("a.pkl", _bytes(b""), "not a readable pickle"),
    **{
        f"pickle cut at {i}/10": Case("a.pkl", _part(_zoo, i + 0.5), "not a readable pickle|pickle")
        for i in range(10)
    },
}

TORCH = {
    **{
        f"torch file with {name}": Case(
            "a.pth", lambda make=make: _torch({"model": make()}), "nothing was executed"
        )
        for name, make in GADGETS.items()
        if name != "functools.partial"
    },
    "torch file with functools.partial": Case(
        "a.pth", lambda: _torch({"model": GADGETS["functools.partial"]()}), "functools|partial"
    ),
    "old torch file with os.system": Case(
        "a.pth",
        lambda: _torch(GADGETS["os.system"](), _use_new_zipfile_serialization=False),
        "nothing was executed",
    ),
    "MMEngine's log beside os.system": Case(
        "a.pth",
        lambda: _torch({"mmengine.": GADGETS["os.system"]()}),
        "posix.system.*nothing was executed",
    ),
    "whole module": Case(
        "a.pth", lambda: _torch(torch.nn.Linear(2, 2)), "torch.nn.modules.linear.Linear"
    ),
    "tensor larger than its storage": Case(
        "a.pth", lambda: _changed_torch(b"K\x07\x85", b"K\x77\x85"), "storage|size"
    ),
    "storage larger than its record": Case(
        "a.pth", lambda: _changed_torch(b"cpuq\x08K\x07", b"cpuq\x08K\x77"), "readable file"
    ),
    "TorchScript": Case("a.pth", _script, "TorchScript"),
    "zip without a pickle": Case("a.pth", lambda: _zip(("../PWNED", b"x")), "readable file"),
    "zip in a zip": Case("a.pth", lambda: _zip(("a/inner.zip", _sound())), "readable file"),
    "tar": Case("a.pth", _tar, "readable file"),
    "list of tensors": Case("a.pth", lambda: _torch([torch.ones(2)]), "expected a dict"),
    "web page": Case("a.pth", _bytes(b"<html>404</html>"), "readable file"),
    "empty": Case("a.pth", _bytes(b""), "readable file"),
    **{
        f"torch file cut at {i}/10": Case("a.pth", _part(_sound, i + 0.5), "readable file")
        for i in range(10)
    },
}

TENSORS = {
    "header longer than the file": Case(
        "a.safetensors", lambda: _safetensors({}, length=1 << 60), "not a readable safetensors"
    ),
    "offsets beyond the file": Case(
        "a.safetensors",
        lambda: _safetensors({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}),
        "not a readable safetensors",
    ),
    "shape that lies": Case(
        "a.safetensors",
        lambda: _safetensors(
            {"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}, data=b"1234"
        ),
        "not a readable safetensors",
    ),
}

PROPOSALS = {
    "proposals of os.system": Case(
        "proposals.pkl", lambda: pickle.dumps({"ids": GADGETS["os.system"]()}), "posix.system"
    ),
    "proposals with objects": Case("proposals.npz", _npz, "proposals.npz"),
    "proposals cut": Case("proposals.npz", lambda: _npz()[:100], "proposals.npz"),
    "proposals of another length": Case(
        "proposals.json",
        _bytes(b'{"ids": [1], "boxes": [[[0, 0, 1, 1]]], "objectness_logits": [[1, 2]]}'),
        "1 boxes and 2 scores",
    ),
    "proposals that are a list": Case("proposals.json", _bytes(b"[1, 2]"), "proposals.json"),
    "proposals that are no JSON": Case("proposals.json", _bytes(b"[1, 2"), "proposals.json"),
}

YAML = {
    "tag apply": Case(
        "a.yaml",
        _yaml(f"SEED: !!python/object/apply:os.system ['{COMMAND}']"),
        "a.yaml:1.*executed",
    ),
    "tag new": Case(
        "a.yaml",
        _yaml("SEED: !!python/object/new:subprocess.Popen [['touch', 'PWNED']]"),
        "a.yaml:1.*executed",
    ),
    "tag eval": Case(
        "a.yaml", _yaml(f'SEED: !!python/object/apply:eval ["{SOURCE}"]'), "a.yaml:1.*executed"
    ),
    "tag name": Case("a.yaml", _yaml("SEED: !!python/name:os.system"), "a.yaml:1.*executed"),
    "tag module": Case("a.yaml", _yaml("SEED: !!python/module:antigravity"), "a.yaml:1.*executed"),
    "tag at the top": Case(
        "a.yaml", _yaml(f"!!python/object/apply:os.system ['{COMMAND}']"), "a.yaml:1.*executed"
    ),
    "base from the network": Case(
        "a.yaml", _yaml("_BASE_: http://127.0.0.1:9/x.yaml"), "local path"
    ),
    "base from the system": Case("a.yaml", _yaml("_BASE_: /etc/passwd"), "outside"),
    "base above": Case("a.yaml", _yaml("_BASE_: ../../../../etc/passwd"), "outside"),
    "base that is itself": Case("a.yaml", _yaml("_BASE_: a.yaml"), "circle"),
    "alias bomb of sections": Case(
        "a.yaml", lambda: _bomb("{x: 1}", "k{k}: *a{before}", "{}"), "aliases"
    ),
    "alias bomb of lists": Case("a.yaml", lambda: _bomb("[1]", "*a{before}", "[]"), "aliases"),
    "lists nested 100,000 deep": Case("a.yaml", _bytes(b"SEED: " + b"[" * 100_000), "deep|depth"),
    "sections nested 5,000 deep": Case(
        "a.yaml", _bytes(b"{a: " * 5000 + b"1" + b"}" * 5000), "deep|depth"
    ),
    "section that holds itself": Case("a.yaml", _yaml("SEED: &a\n  b: *a\n"), "aliases|itself"),
    "binary": Case("a.yaml", _bytes(b"\xff\xfe\x00\x01"), "UTF-8"),
    "bytes of zero": Case("a.yaml", _bytes(b"SEED: \x00\x00"), "malformed"),
    "cut": Case("a.yaml", _yaml("SOLVER: {BASE_LR: [1, "), "malformed"),
    "a list": Case("a.yaml", _yaml("- 1"), "list"),
}

ARCHIVES = {
    "member above": Case("a.zip", lambda: _zip(("../PWNED", b"x")), "points outside"),
    "member of the system": Case("a.zip", lambda: _zip(("/tmp/PWNED", b"x")), "points outside"),
    "link": Case("a.zip", _link, "link"),
    "bomb": Case("a.zip", lambda: _zip(("a", bytes(1 << 22)), packed=True), "bomb"),
    "archive cut": Case("a.zip", lambda: _zip(("a", bytes(4096)))[:3000], "not a readable zip"),
}

CASES = {**PICKLES, **TORCH, **TENSORS, **PROPOSALS, **YAML, **ARCHIVES}
