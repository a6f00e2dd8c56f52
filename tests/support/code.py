"""The project's own source as data, for the tests of its architecture."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
FOLDERS = ("d2kit", "project", "tools", "datasets", "tests")


class Source(NamedTuple):
    """One file: path relative to the repository, dotted module name, lines and syntax tree."""

    path: str
    module: str
    text: str
    tree: ast.Module


@functools.cache
def sources(*folders: str) -> tuple[Source, ...]:
    """Parse all Python files of some folders (by default of all that hold code)."""
    found = []
    for folder in folders or FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            path = file.relative_to(ROOT)
            parts = path.with_suffix("").parts
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            text = file.read_text(encoding="utf-8")
            found.append(Source(str(path), module, text, ast.parse(text)))
    return tuple(found)


@functools.cache
def module_names() -> frozenset[str]:
    return frozenset(source.module for source in sources())


@functools.cache
def imports(source: Source) -> tuple[tuple[str, int], ...]:
    """Return (module, line) of each import anywhere in a file, functions included.

    ``from a.b import c`` counts as an import of a.b.c where that is a module of ours, of a.b
    otherwise.
    """
    package = source.module
    if not source.path.endswith("__init__.py"):
        package = package.rpartition(".")[0]
    found: list[tuple[str, int]] = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.append((full if full in module_names() else base, node.lineno))
    return tuple(found)


def functions(tree: ast.AST) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield (qualified name, node) of every function and method, nested ones included."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                name = f"{prefix}{child.name}"
                if not isinstance(child, ast.ClassDef):
                    yield name, child
                yield from walk(child, f"{name}.")
            else:
                yield from walk(child, prefix)

    yield from walk(tree, "")


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Return the nodes of one cycle of a directed graph, or an empty list."""
    state: dict[str, int] = {}

    def visit(node: str, trail: list[str]) -> list[str]:
        state[node] = 1
        for follower in sorted(graph.get(node, ())):
            if state.get(follower) == 1:
                return [*trail[trail.index(follower) :], follower]
            if follower not in state:
                found = visit(follower, [*trail, follower])
                if found:
                    return found
        state[node] = 2
        return []

    for start in sorted(graph):
        if start not in state:
            found = visit(start, [start])
            if found:
                return found
    return []
