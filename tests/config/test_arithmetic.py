"""Arithmetic behind the eval tag: Python's values, and nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest

from d2kit.config import get_cfg
from d2kit.config.arithmetic import ArithmeticRefused, evaluate

HARMLESS = [
    "[int(x * 0.1 * 1024) for x in range(5, 21)]",
    "[[s, s * 2**(1.0/3), s * 2**(2.0/3)] for s in [32, 64, 128, 256, 512]]",
    "[100 * k // 3 % 7 for k in range(5) if k != 2]",
    "[a + b for a, b in [(1, 2), (3, 4)]]",
    "(1, -2, +3.5, 2e-3)",
    "[1] * 3 + [2]",
    "max([round(1.26, 1), min(3, 4)]) + len((1, 2)) + sum(x for x in range(4)) + abs(-2)",
    "list(range(10, 0, -3))",
    "sorted([3, 1, 2])",
    "float(3) / 7 - 2 ** -2",
    "2 ** 40",
    "[]",
]

HOSTILE = r"""
import os|__import__('os')|__import__('os').mkdir('made')|open('made', 'w')|exec('1')|eval('1')
[open('made') for x in range(1)]|compile('1', '', 'eval')|globals()|locals()|vars()|dir()|input()
(1).__class__|(1).__class__.__base__.__subclasses__()|[].append(1)|[1].__len__()|(1.0).hex()|cfg
int.__subclasses__()|int.from_bytes([1])|range(3).index(1)|print(1)|getattr(1, 'real')|type(1)
lambda: 1|(lambda: 1)()|f'{1}'|'a' * 10|'a'|b'a' * 3|'%s' % 1|[y := 1 for x in range(1)]|(y := 3)
{1: 2}|{1, 2}|{x for x in range(3)}|{x: x for x in range(3)}|[*range(3)]|(*[1],)|1 if 2 else 3
[1, 2][0]|[1, 2][::-1]|1 and 2|1 or 2|not 1|~1|1 << 70|1 >> 1|1 & 1|1 ^ 1|1 @ 1|1j|...
None|True|yield 1|await x|[x async for x in range(3)]|x = 1|import os; os|1; 2|def f(): pass
9**9**9|9**99999999|10**64|(-9)**9999|2**2**2**2**2**2|1e308 * 1e308|1e999|0.1**-400|(-8)**0.5
9e999 - 9e999|[x for x in range(10**11)]|range(10**30)|list(range(10**9))|[0] * 10**11|(0,) * 10**10
[[0] * 9999] * 9999|[[[y for y in range(9999)] for x in range(9999)]]|sum([[1]] * 9999, [])|1 / 0
[a for a in range(999) for b in range(999) for c in range(999)]|max([])|1 % 0|int('9')|float('1')
[[x] * 99 for x in range(999)]|[x for x in range(3) if print(x)]|round(1.5, 10**9)|int(1e300)|len(3)
[x for x in range(9) if x in [1]]|[x.y for x in [1]]|[x for x.y in [1]]|[x for x in 3]
min(1, key=int)|max(*[1, 2])
int(x=1)|round(number=2)|range()|range(1, 2, 0)|breakpoint()|exit()|quit()|help()
id(1)|memoryview(1)|bytearray(10**10)|bytes(10**10)|object()|super()|__builtins__|__name__|__file__|int
[list(range(9999)) for x in range(9)]|sorted([3, [1]])|complex(1, 2)|pow(9, 9**9)|divmod(1, 2)
"""


@pytest.mark.parametrize("text", HARMLESS)
def test_the_value_is_pythons(text):
    assert evaluate(text) == eval(text)  # our own constant texts
    assert type(evaluate(text)) is type(eval(text))


def test_hostile_expressions_are_refused_at_once_and_nothing_is_done():
    """In a process of its own: an audit hook cannot be taken out again."""
    deep = ["(" * 900 + "1" + ")" * 900, "[" * 1500, "-" * 2000 + "1", "1" + "+1" * 900, "9" * 4000]
    deep += [
        "9**" * 900 + "9",
        "not " * 900 + "1",
        "[x for x in " * 99 + "[1]" + "]" * 99,
        "1" * 9999,
    ]
    texts = [t for t in HOSTILE.replace("\n", "|").split("|") if t.strip()] + deep
    texts += ["[x for a in range(9000) for x in range(0)]", "1 if 1 else " * 300 + "1"]
    texts += ["[x for x in range(9999) if x > 99999] * 2", "lambda:" * 500 + "1", "~" * 2000 + "1"]
    texts += ["1 | 1", "x\0", "", " ", "#", "max()", "sum()", "sorted()", "len()", "list(1)"]
    bomb = "[" * 6 + "1" + "] * 99" * 6  # few lists, each many times in the next
    texts += [bomb, f"[x for x in [1] if {bomb} == {bomb}]", f"max({bomb}, {bomb})"]
    texts += ["[[a for x in range(2900)] for a in [[0] * 5000]]", f"sorted([{bomb}, {bomb}])"]
    texts += ["[x for x in range(900) if [0] * 4000 == [0] * 4000]", "e\u0301", "\uff11 + 1"]
    assert len(texts) >= 100
    code = """
import sys, time, tracemalloc
from d2kit.config.arithmetic import ArithmeticRefused, evaluate
texts = eval(sys.stdin.read())
events, bad = [], []
sys.addaudithook(lambda name, args: events.append(name))
for text in texts:
    times = []
    for traced in (True, False, False):  # tracing makes it four times as slow
        if traced:
            tracemalloc.start()
        events.clear()
        start = time.process_time()
        try:
            value = evaluate(text)
            bad.append((text[:60], "taken", repr(value)[:40]))
        except ArithmeticRefused:
            pass
        times.append(time.process_time() - start)
        done = set(events) - {"compile", "cpython._PySys_ClearAuditHooks"}
        if traced:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    if min(times[1:]) > 0.05 or peak > 10e6 or done:
        bad.append((text[:60], times, peak, done))
print(bad)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], input=repr(texts), capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize(
    "tag", ["['[i for i in range(100, 400, 100)]']", "{args: ['list(range(100, 400, 100))']}"]
)
def test_both_forms_of_the_tag_in_a_file(tmp_path, tag):
    (tmp_path / "base.yaml").write_text(f"SOLVER: {{STEPS: !!python/object/apply:eval {tag}}}\n")
    (tmp_path / "x.yaml").write_text("_BASE_: base.yaml\nSEED: 3\n")
    cfg = get_cfg()
    cfg.merge_from_file(tmp_path / "x.yaml")
    assert tuple(cfg.SOLVER.STEPS) == (100, 200, 300)
    assert cfg.SEED == 3


@pytest.mark.parametrize(
    ("tag", "reason"),
    [
        ("['__import__(\"os\")']", "a call of '__import__'"),
        ("['1', '2']", "expects one expression"),
        ("[3]", "expects one expression"),
        ("{args: ['1'], state: {}}", "expects one expression"),
    ],
)
def test_a_refusal_names_place_and_reason(tmp_path, tag, reason):
    file = tmp_path / "x.yaml"
    file.write_text(f"SEED: 1\nSOLVER: {{STEPS: !!python/object/apply:eval {tag}}}\n")
    with pytest.raises(ValueError, match=r"x\.yaml:2: 'eval'.*" + reason):
        get_cfg().merge_from_file(file)


def test_an_error_of_arithmetic_is_a_refusal():
    with pytest.raises(ArithmeticRefused, match="cannot be computed"):
        evaluate("1 / 0")


class TestTrustedTrees:
    """`_BASE_` leads anywhere in a tree of the user's own."""

    @pytest.fixture
    def tree(self, tmp_path, monkeypatch):
        (tmp_path / "repo/exps/a").mkdir(parents=True)
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "repo/exps/base.yaml").write_text("SEED: 7\n")
        (tmp_path / "elsewhere/base.yaml").write_text("SEED: 8\n")
        (tmp_path / "repo/exps/a/x.yaml").write_text("_BASE_: ../base.yaml\n")
        (tmp_path / "repo/exps/a/y.yaml").write_text("_BASE_: ../../../elsewhere/base.yaml\n")
        monkeypatch.chdir(tmp_path / "elsewhere")
        return tmp_path

    @staticmethod
    def seed(file: Path) -> int:
        cfg = get_cfg()
        cfg.merge_from_file(file)
        return cfg.SEED

    def test_the_repository_of_the_file(self, tree):
        with pytest.raises(ValueError, match="D2KIT_TRUSTED_CONFIGS"):
            self.seed(tree / "repo/exps/a/x.yaml")
        (tree / "repo/.git").mkdir()
        assert self.seed(tree / "repo/exps/a/x.yaml") == 7
        with pytest.raises(ValueError, match="outside of the config tree"):
            self.seed(tree / "repo/exps/a/y.yaml")

    def test_the_working_folder(self, tree, monkeypatch):
        monkeypatch.chdir(tree / "repo")
        assert self.seed(Path("exps/a/x.yaml")) == 7

    def test_folders_that_are_listed(self, tree, monkeypatch):
        monkeypatch.setenv("D2KIT_TRUSTED_CONFIGS", f"/nowhere:{tree / 'elsewhere'}")
        assert self.seed(tree / "repo/exps/a/y.yaml") == 8
