"""Signatures: our public names take what Detectron2's take, by the same names in the same order."""

import enum
import importlib
import inspect
import json
import re

import pytest

from tests.support.reference_files import reference_path
from tests.support.scope import out_of_scope

API = json.loads(reference_path("api.json").read_text())


def entries(module):
    """Yield (dotted name, documented signature) of everything of a module that is in scope."""
    for name, entry in API[module].items():
        if out_of_scope(f"d2kit.{module}.{name}"):
            continue
        if isinstance(entry, str):
            yield name, entry
        else:
            yield name, entry["signature"]
            for member, signature in entry["members"].items():
                yield f"{name}.{member}", signature


def documented_parameters(signature):
    """Return [(name, keyword-only)] of a signature's text."""
    inner = signature[1 : signature.rindex(")")]
    inner = re.sub(r"<[^<>]*>", "0", inner)
    for _ in range(6):  # nested brackets, innermost first
        inner = re.sub(r"\[[^\[\]]*\]|\([^()]*\)|\{[^{}]*\}", "", inner)
    inner = re.sub(r"'[^']*'", "", inner)
    names, keyword_only = [], False
    for part in inner.split(","):
        name = re.split(r"[:=]", part)[0].strip()
        if name.startswith("*"):
            keyword_only = True
        if name and not name.startswith("*") and name != "/":
            names.append((name, keyword_only))
    return names


def find(module, name):
    found = importlib.import_module(f"d2kit.{module}")
    for part in name.split("."):
        found = getattr(found, part)
    return found


def mistakes(documented, function):
    """Return what a call written for the documented signature would trip over."""
    parameters = inspect.signature(function).parameters
    kinds = {p.kind for p in parameters.values()}
    wanted = [p for p in documented_parameters(documented) if p[0] not in ("self", "cls")]
    found = []
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        found += [f"no parameter '{name}'" for name, _ in wanted if name not in parameters]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        order = [
            name
            for name, p in parameters.items()
            if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD and name not in ("self", "cls")
        ]
        positional = [name for name, keyword_only in wanted if not keyword_only]
        if order[: len(positional)] != positional:
            found.append(f"order {order[: len(positional)]}, documented {positional}")
    return found


@pytest.mark.parametrize(
    ("signature", "names"),
    [
        ("()", []),
        ("(self, x, *, y=None)", [("self", False), ("x", False), ("y", True)]),
        (
            "(a: Dict[str, List[int]] = {}, b=(1, 2)) -> Tuple[int, str]",
            [("a", False), ("b", False)],
        ),
        ("(mode=<ColorMode.IMAGE: 0>, *args, z='a, b', **kwargs)", [("mode", False), ("z", True)]),
    ],
)
def test_documented_parameters(signature, names):
    assert documented_parameters(signature) == names


def test_mistakes_are_found():
    def ours(a, c, *, k=1):
        return a, c, k

    assert mistakes("(a, c, *, k=2)", ours) == []
    assert mistakes("(a, *, k=2)", ours) == []
    assert mistakes("(a, *, x=2)", ours) == ["no parameter 'x'"]
    assert mistakes("(c, a)", ours) == ["order ['a', 'c'], documented ['c', 'a']"]


@pytest.mark.parametrize("module", sorted(API))
def test_signatures(module):
    if out_of_scope(f"d2kit.{module}"):
        pytest.skip(out_of_scope(f"d2kit.{module}"))
    wrong = []
    for name, signature in entries(module):
        try:
            found = find(module, name)
        except AttributeError:
            wrong.append(f"{name}: missing")
            continue
        is_enum = isinstance(found, type) and issubclass(found, enum.Enum)
        if signature.startswith("(") and not is_enum:
            wrong += [f"{name}: {mistake}" for mistake in mistakes(signature, found)]
    assert not wrong, "\n".join(wrong)
