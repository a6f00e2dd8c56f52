"""Readers of files of others under random damage: an error of ours, or a result; never a traceback.

`pytest -m fuzz` takes some minutes. ``D2KIT_FUZZ_SEED`` sets the first seed (1 without it, so that
the gate is the same every day; try others) and ``D2KIT_FUZZ_COUNT`` the mutations of each reader; a
failure names its seed. The readers by name: ``KINDS`` of kinds.py. Each reads in a process of its
own, so that a crash, a hang and a lack of memory are seen. The whole measure of docs/faults.md:
``D2KIT_FUZZ_SEED=1 D2KIT_FUZZ_COUNT=900 pytest -m fuzz tests/fuzz``.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import random
import resource
import shutil
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

from d2kit.engine import user_errors
from tests.fuzz.kinds import KINDS, UNREADABLE, pictures

pytestmark = pytest.mark.fuzz

SEED = int(os.environ.get("D2KIT_FUZZ_SEED", "1"))
COUNT = int(os.environ.get("D2KIT_FUZZ_COUNT", "100"))
SLOW = 20.0  # seconds for one file
MEMORY = 9 << 30  # bytes of addresses
TOKENS = [
    *(b"0", b"-1", b"1e999", b"-1e300", b"nan", b"inf", b"9" * 5000, b"1.5", b"null", b"true"),
    *(b"\xff\xfe", b"\x00", b"\x1b[31m", b"\n", b"\r\n", b"\t", b",", b";", b'"', b"'", b"\\"),
    *(b"[", b"]", b"{", b"}", b"<", b">", b"</", b"&x;", b"<!DOCTYPE a>", b"../", b"[" * 3000),
    *("é\u202e\u2028".encode(), b"=cmd", b"!!python/object:os.system", b"&a [*a]", b"${oc.env:X}"),
    *(b"99999999999999999999", b"2147483648", b'"x"', b"[]", b"{}", b"\xff\xff\xff\x7f"),
]


def damage(data: bytes, rng: random.Random) -> bytes:
    """Return bytes with one to four places changed, cut, doubled or replaced."""
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(data) + 1)
        end = min(len(data), place + rng.choice((0, 1, 1, 2, 5, 30)))
        kind = rng.randrange(8)
        if kind == 0:
            data = data[:place]
        elif kind == 1:
            data = data[:place] + data[end:]
        elif kind == 2:
            data = data[:place] + data[place:end] * rng.choice((2, 50)) + data[end:]
        elif kind == 3:
            data = data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]
        elif kind == 4:
            data = _other_value(data, rng)
        else:
            data = data[:place] + rng.choice(TOKENS) + data[end:]
    return data


def _other_value(data: bytes, rng: random.Random) -> bytes:
    """Replace a whole number or word, which keeps the file's form."""
    starts = [i for i in range(len(data)) if data[i : i + 1].isalnum()]
    if not starts:
        return data
    start = end = rng.choice(starts)
    while start and (data[start - 1 : start].isalnum() or data[start - 1 : start] in b".-"):
        start -= 1
    while end < len(data) and (data[end : end + 1].isalnum() or data[end : end + 1] in b"."):
        end += 1
    return data[:start] + rng.choice(TOKENS) + data[end:]


@dataclasses.dataclass
class Mutation:
    """A damaged copy of a folder of sound files."""

    good: Path
    work: Path
    kind: str
    seed: int

    def make(self) -> str:
        """Write it; return the name of the file that was damaged, "" for a sound folder."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.good, self.work)
        if self.seed < 0:
            return ""
        rng = random.Random(f"{self.kind} {self.seed}")
        found = sorted(self.work.rglob(KINDS[self.kind][2]))
        spared = ("images/1.png", "1.png", "out", "whole.json")
        names = [
            p for p in found if p.is_file() and p.relative_to(self.work).as_posix() not in spared
        ]
        file = rng.choice(names)
        file.write_bytes(damage(file.read_bytes(), rng))
        return file.name


def work_through(mutations: list[Mutation], pipe: Any) -> None:
    """Read one mutation after the other; tell the pipe of each as it begins, and of tracebacks."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    null = open(os.devnull, "w")  # noqa: SIM115 the process ends with it
    for mutation in mutations:
        name = mutation.make()
        pipe.send(("begins", mutation.seed, name))
        try:
            with contextlib.redirect_stderr(null), contextlib.redirect_stdout(null), user_errors():
                KINDS[mutation.kind][1](mutation.work)
        except SystemExit as error:
            if not name and mutation.kind not in UNREADABLE:
                pipe.send(("wrong", mutation.seed, f"sound files are refused: {error.__context__}"))
        except BaseException as error:  # noqa: BLE001 it is what is looked for
            last = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{error!r:.160} at {Path(last.filename).name}:{last.lineno}"
            pipe.send(("wrong", mutation.seed, f"{name}: {what}"))
    pipe.send(("done", 0, ""))


def tried(mutations: list[Mutation]) -> list[str]:
    """Read all mutations in a process of its own, a new one after each that dies or hangs."""
    context = multiprocessing.get_context("fork")
    wrong: list[str] = []
    rest = mutations
    while rest:
        ours, theirs = context.Pipe()
        process = context.Process(target=work_through, args=(rest, theirs))
        process.start()
        theirs.close()
        seed, name, fate = rest[0].seed, "", "ended"
        while True:
            if not ours.poll(SLOW):
                fate = f"took more than {SLOW:.0f} s"
                break
            try:
                what, number, said = ours.recv()
            except EOFError:
                process.join()
                fate = f"exit code {process.exitcode}"
                break
            if what == "begins":
                seed, name = number, said
            elif what == "wrong":
                wrong.append(f"seed {number}, {said}")
            else:
                fate = ""
                break
        if process.is_alive():
            process.kill()
        process.join()
        if not fate:
            return wrong
        wrong.append(f"seed {seed}, {name}: {fate}")
        rest = [m for m in rest if m.seed > seed]
    return wrong


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_an_error_of_ours_or_a_result(kind, tmp_path):
    make = KINDS[kind][0]
    print(f"{kind}: seeds {SEED} to {SEED + COUNT - 1}")
    good = tmp_path / "good"
    good.mkdir()
    pictures(good)
    make(good)
    start = time.monotonic()
    seeds = range(SEED, SEED + COUNT)
    wrong = tried([Mutation(good, tmp_path / "work", kind, seed) for seed in (-1, *seeds)])
    print(f"{kind}: {time.monotonic() - start:.0f} s, {len(wrong)} of {COUNT} wrong")
    assert not wrong, "\n".join([f"D2KIT_FUZZ_SEED={SEED}", *wrong[:20]])
