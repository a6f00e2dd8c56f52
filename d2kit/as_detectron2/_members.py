"""What a class of somebody's takes for granted of the class of d2kit that it extends."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

__all__ = ["missing_members"]

Resolve = Callable[[str], Any]


def missing_members(
    tree: ast.Module, modules: Mapping[str, str], resolve: Resolve
) -> Iterator[tuple[int, str, str]]:
    """Yield each member that a class uses of d2kit's class above it, and that is not there.

    Looked at are protected members through ``self`` and ``cls``, and all through ``super()``.

    Args:
        tree: the module's syntax tree.
        modules: name in the module -> dotted name of Detectron2.
        resolve: dotted name of Detectron2 -> object of d2kit; AttributeError where there is none.

    Returns:
        Line, ``Class.member``, and the full name of the class that should have it.
    """
    classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    for node in classes.values():
        bases = list(_bases(node, classes, modules, resolve, ()))
        if not bases:
            continue
        own = _defined(node, classes, ())
        for line, member, through_super in _used(node):
            if member in own and not through_super:
                continue
            if not any(_has(base, member) for base in bases):
                place = f"{bases[0].__module__}.{bases[0].__qualname__}"
                yield line, f"{bases[0].__name__}.{member}", place


def _bases(
    node: ast.ClassDef,
    classes: Mapping[str, ast.ClassDef],
    modules: Mapping[str, str],
    resolve: Resolve,
    above: tuple[str, ...],
) -> Iterator[type]:
    """Yield the classes of d2kit that a class extends, through others of the same module too."""
    for base in node.bases:
        chain = ast.unparse(base).split(".")
        if chain[0] in modules:
            try:
                found = resolve(".".join([modules[chain[0]], *chain[1:]]))
            except AttributeError:
                continue
            if isinstance(found, type):
                yield found
        elif len(chain) == 1 and chain[0] in classes and chain[0] not in above:
            yield from _bases(classes[chain[0]], classes, modules, resolve, (*above, chain[0]))


def _defined(
    node: ast.ClassDef, classes: Mapping[str, ast.ClassDef], above: tuple[str, ...]
) -> set[str]:
    """Return the methods and attributes that a class and those above it in the module define."""
    names = set(_written(node))
    for base in node.bases:
        name = ast.unparse(base)
        if name in classes and name not in above:
            names |= _defined(classes[name], classes, (*above, name))
    return names


def _written(node: ast.AST) -> Iterator[str]:
    """Yield the names of methods, of class attributes and of what is set on ``self``."""
    for part in ast.walk(node):
        if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield part.name
        elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            yield part.id
        elif isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
            yield part.attr
        elif isinstance(part, ast.Call) and part.args:
            # register_buffer("name", ...), add_module("name", ...), setattr(self, "name", ...)
            for argument in part.args[:2]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield argument.value


def _used(node: ast.ClassDef) -> Iterator[tuple[int, str, bool]]:
    """Yield line, member, and whether it is asked of ``super()``."""
    for part in ast.walk(node):
        if not isinstance(part, ast.Attribute) or not isinstance(part.ctx, ast.Load):
            continue
        dunder = part.attr.startswith("__")
        owner = part.value
        if isinstance(owner, ast.Name) and owner.id in ("self", "cls"):
            if part.attr.startswith("_") and not dunder:
                yield part.lineno, part.attr, False
        elif isinstance(owner, ast.Call) and ast.unparse(owner.func) == "super" and not dunder:
            yield part.lineno, part.attr, True


def _has(cls: type, member: str) -> bool:
    return hasattr(cls, member) or any(member in _set_by(base) for base in cls.__mro__)


@cache
def _set_by(cls: type) -> frozenset[str]:
    """Return the attributes that the methods of a class set on its objects."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return frozenset()
    return frozenset(_written(tree))
