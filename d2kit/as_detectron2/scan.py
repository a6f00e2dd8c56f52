"""Reads somebody's code, without running it, and tells what of it d2kit supports."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import json
import pkgutil
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from d2kit.as_detectron2.redirect import ABSENT, ABSENT_NAMES, MOVED, ORIGINAL, real_name
from d2kit.utils.file_io import load_json
from d2kit.utils.registry import FIXED_NAMES, nearest_names

REGISTRIES = {
    "MODEL.META_ARCHITECTURE": "META_ARCH_REGISTRY",
    "MODEL.BACKBONE.NAME": "BACKBONE_REGISTRY",
    "MODEL.PROPOSAL_GENERATOR.NAME": "PROPOSAL_GENERATOR_REGISTRY",
    "MODEL.RPN.HEAD_NAME": "RPN_HEAD_REGISTRY",
    "MODEL.ANCHOR_GENERATOR.NAME": "ANCHOR_GENERATOR_REGISTRY",
    "MODEL.ROI_HEADS.NAME": "ROI_HEADS_REGISTRY",
    "MODEL.ROI_BOX_HEAD.NAME": "ROI_BOX_HEAD_REGISTRY",
    "MODEL.ROI_MASK_HEAD.NAME": "ROI_MASK_HEAD_REGISTRY",
    "MODEL.ROI_KEYPOINT_HEAD.NAME": "ROI_KEYPOINT_HEAD_REGISTRY",
    "MODEL.SEM_SEG_HEAD.NAME": "SEM_SEG_HEADS_REGISTRY",
}
"""Config key -> name of the registry, in `d2kit.modeling`, that its value must be in."""


@dataclass(frozen=True)
class Use:
    """One name of Detectron2 that the code uses.

    Attributes:
        where: ``file:line``.
        kind: ``symbol``, ``member``, ``config key``, ``registry name``, ``exception``,
            ``probe`` or ``file``.
        name: as the code has it.
        supported: whether it works here.
        fix: what to do where it does not.
    """

    where: str
    kind: str
    name: str
    supported: bool
    fix: str = ""


@dataclass
class _Found:
    """What the files say, before it is judged."""

    symbols: list[tuple[str, str]] = field(default_factory=list)
    keys: list[tuple[str, str]] = field(default_factory=list)
    values: list[tuple[str, str, str]] = field(default_factory=list)
    own_keys: set[str] = field(default_factory=set)
    own_names: set[str] = field(default_factory=set)
    adders: set[str] = field(default_factory=set)
    judged: list[Use] = field(default_factory=list)


def scan(paths: Sequence[Path]) -> list[Use]:
    """Find and judge the uses of Detectron2 in Python files, notebooks and YAML files.

    Args:
        paths: files, and folders searched recursively.

    Returns:
        Each distinct name once per file, in the order of the files.
    """
    found = _Found()
    for path in _files(paths):
        try:
            if path.suffix == ".py":
                _read_python(path.read_text(encoding="utf-8"), _Places(path), found)
            elif path.suffix == ".ipynb":
                _read_notebook(path, found)
            else:
                _read_yaml(path, found)
        except (SyntaxError, ValueError, UnicodeDecodeError) as error:
            reason = str(error).splitlines()[0]
            found.judged.append(Use(str(path), "file", "cannot be read", False, reason))
    uses = [_judge_symbol(where, name) for where, name in found.symbols]
    known = _known_keys(found.adders) if found.keys else {}
    uses += [_judge_key(where, name, found.own_keys, known) for where, name in found.keys]
    uses += [_judge_value(*value, found.own_names) for value in found.values]
    return _once_per_file([*uses, *found.judged])


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            inside = (
                p for p in sorted(path.rglob("*")) if p.suffix in (".py", ".ipynb", ".yaml", ".yml")
            )
            left_out = {".git", ".ipynb_checkpoints"}
            yield from (p for p in inside if p.is_file() and not left_out & set(p.parts))
        else:
            yield path


def _once_per_file(uses: list[Use]) -> list[Use]:
    seen: set[tuple[str, str, str]] = set()
    kept = []
    for use in uses:
        key = (_file_of(use.where), use.kind, use.name)
        if key not in seen:
            seen.add(key)
            kept.append(use)
    return kept


# ---------------------------------------------------------------- Python


@dataclass
class _Places:
    """Where the lines of a text stand: in a file, or in the cells of a notebook."""

    path: Path
    starts: list[int] = field(default_factory=list)

    def of(self, line: int) -> str:
        """Return ``file:line``, or ``file:cell:line``."""
        if not self.starts:
            return f"{self.path}:{line}"
        cell = sum(start <= line for start in self.starts)
        return f"{self.path}:cell {cell}:{line - self.starts[cell - 1] + 1}"


def _read_notebook(path: Path, found: _Found) -> None:
    """Read the code cells as one text, without the lines for IPython (``%magic``, ``!command``)."""
    content = load_json(path)
    lines: list[str] = []
    places = _Places(path)
    for cell in content.get("cells", ()) if isinstance(content, dict) else ():
        if cell.get("cell_type") != "code":
            continue
        source = cell.get("source", "")
        text = source if isinstance(source, str) else "".join(source)
        places.starts.append(len(lines) + 1)
        magic = text.lstrip().startswith("%%")
        for line in text.splitlines() or [""]:
            command = re.match(r"(\s*)(?:[%!?]|\w+\s*=\s*[%!]|.*\?$)", line)
            lines.append(f"{command[1]}pass" if command else "" if magic else line)
    _read_python("\n".join(lines), places, found)


def _read_python(text: str, places: _Places, found: _Found) -> None:
    tree = ast.parse(text, filename=str(places.path))
    modules: dict[str, str] = {}  # name in the file -> module or symbol of Detectron2
    for node in ast.walk(tree):
        where = places.of(getattr(node, "lineno", 0))
        if isinstance(node, ast.Import | ast.ImportFrom):
            _read_import(node, where, modules, found)
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            _read_registration(node, where, found)
        elif isinstance(node, ast.Call):
            _read_call(node, where, found)
    for line, name, place in _missing_members(tree, modules):
        fix = f"{place} has no such member: write the step in the subclass"
        found.judged.append(Use(places.of(line), "member", name, False, fix))
    for line, name, raised in _wrongly_caught(tree, modules):
        fix = f"{name} raises {raised} here, no AssertionError: catch both"
        found.judged.append(Use(places.of(line), "exception", f"except around {name}", False, fix))
    _read_chains(places, tree, modules, found)


def _read_import(
    node: ast.Import | ast.ImportFrom, where: str, modules: dict[str, str], found: _Found
) -> None:
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name.split(".")[0] == ORIGINAL:
                found.symbols.append((where, alias.name))
                modules[alias.asname or ORIGINAL] = alias.name if alias.asname else ORIGINAL
    elif not node.level and (node.module or "").split(".")[0] == ORIGINAL:
        for alias in node.names:
            full = (node.module or "") if alias.name == "*" else f"{node.module}.{alias.name}"
            found.symbols.append((where, full))
            modules[alias.asname or alias.name] = full
            if alias.name.startswith("add_") and alias.name.endswith("_config"):
                found.adders.add(full)


def _read_registration(node: ast.ClassDef | ast.FunctionDef, where: str, found: _Found) -> None:
    """Note what is registered; a name that Detectron2's registry holds is taken there too."""
    for decorator in node.decorator_list:
        text = ast.unparse(decorator)
        if "REGISTRY" not in text:
            continue
        found.own_names.add(node.name)
        registry = text.split("_REGISTRY")[0].rpartition(".")[2]
        if node.name in FIXED_NAMES.get(registry, "").split():
            fix = f"{registry} of Detectron2 holds this name already: give the class another one"
            found.judged.append(Use(where, "registry name", node.name, False, fix))


def _read_call(node: ast.Call, where: str, found: _Found) -> None:
    """Note probes for the installed distribution that nothing answers here."""
    name = ast.unparse(node.func).rpartition(".")[2]
    first = node.args[0] if node.args else None
    named = isinstance(first, ast.Constant) and first.value == ORIGINAL
    if name in ("get_distribution", "require") and named:
        fix = "pkg_resources is gone from setuptools: ask importlib.metadata.version('detectron2')"
        found.judged.append(Use(where, "probe", f"{name}('{ORIGINAL}')", False, fix))


def _read_chains(places: _Places, tree: ast.Module, modules: dict[str, str], found: _Found) -> None:
    """Collect ``comm.get_rank`` and ``cfg.MODEL.DEVICE``, each whole chain once."""
    inner = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or id(node) in inner:
            continue
        chain = ast.unparse(node).split(".")
        where = places.of(node.lineno)
        if chain[0] in modules and all(part.isidentifier() for part in chain):
            full = ".".join([modules[chain[0]], *chain[1:]])
            found.symbols.append((where, full))
        keys = _config_key(chain)
        if keys and isinstance(node.ctx, ast.Store):
            found.own_keys.add(keys)
        elif keys:
            found.keys.append((where, keys))


def _config_key(chain: list[str]) -> str:
    """Return ``MODEL.DEVICE`` of ``self.cfg.MODEL.DEVICE.lower``, or an empty string."""
    for i, part in enumerate(chain[:-1]):
        if part.lower().endswith("cfg") or part in ("_C", "config"):
            keys = []
            for name in chain[i + 1 :]:
                if not (name.isidentifier() and name == name.upper()):
                    break
                keys.append(name)
            return ".".join(keys)
    return ""


# ---------------------------------------------------------------- members of the classes above


def _missing_members(
    tree: ast.Module, modules: Mapping[str, str]
) -> Iterator[tuple[int, str, str]]:
    """Yield each member that a class uses of d2kit's class above it, and that is not there.

    Looked at are protected members through ``self`` and ``cls``, and all through ``super()``.

    Args:
        tree: the module's syntax tree.
        modules: name in the module -> dotted name of Detectron2.

    Returns:
        Line, ``Class.member``, and the full name of the class that should have it.
    """
    classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    for node in classes.values():
        bases = list(_bases(node, classes, modules, ()))
        if not bases:
            continue
        own = _defined(node, classes, ())
        for line, member, through_super in _used(node):
            if member in own and not through_super:
                continue
            if not any(has_member(base, member) for base in bases):
                place = f"{bases[0].__module__}.{bases[0].__qualname__}"
                yield line, f"{bases[0].__name__}.{member}", place


def _bases(
    node: ast.ClassDef,
    classes: Mapping[str, ast.ClassDef],
    modules: Mapping[str, str],
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
            yield from _bases(classes[chain[0]], classes, modules, (*above, chain[0]))


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


def has_member(cls: type, member: str) -> bool:
    """Tell whether a class, or a method of it, defines a member of its objects."""
    return hasattr(cls, member) or any(member in _set_by(base) for base in cls.__mro__)


@cache
def _set_by(cls: type) -> frozenset[str]:
    """Return the attributes that the methods of a class set on its objects."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return frozenset()
    return frozenset(_written(tree))


# ---------------------------------------------------------------- exceptions


def _wrongly_caught(tree: ast.Module, modules: Mapping[str, str]) -> Iterator[tuple[int, str, str]]:
    """Yield line, call and our types, where `except AssertionError` no longer catches.

    Only assertions are looked at: where Detectron2 asserts, d2kit may raise another type. What
    torch or the system raises is the same in both.
    """
    for node in ast.walk(tree):
        if not isinstance(node, ast.Try) or not node.handlers:
            continue
        kinds = [handler.type for handler in node.handlers]
        caught = {ast.unparse(kind).strip("()") for kind in kinds if kind is not None}
        if None in kinds or caught != {"AssertionError"}:
            continue
        calls = (n for part in node.body for n in ast.walk(part) if isinstance(n, ast.Call))
        for call in calls:
            chain = ast.unparse(call.func).split(".")
            if chain[0] not in modules or not all(part.isidentifier() for part in chain):
                continue
            try:
                called = resolve(".".join([modules[chain[0]], *chain[1:]]))
            except AttributeError:
                continue  # the missing name itself is told
            raised = _raised_by(called)
            if raised and not any(issubclass(kind, AssertionError) for kind in raised):
                names = " or ".join(sorted({kind.__name__ for kind in raised}))
                yield call.lineno, ".".join(chain), names


def _raised_by(called: Any) -> list[type[BaseException]]:
    """Return the exceptions that a function, or the constructor of a class, raises itself."""
    made_by = vars(called).get("__init__") if inspect.isclass(called) else called
    if made_by is None:
        return []  # the constructor of a class above
    function = inspect.unwrap(made_by)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return []
    known = {**vars(builtins), **getattr(function, "__globals__", {})}
    made = [n.exc for n in ast.walk(tree) if isinstance(n, ast.Raise) and n.exc is not None]
    found = [known.get(ast.unparse(m.func if isinstance(m, ast.Call) else m)) for m in made]
    return [k for k in found if isinstance(k, type) and issubclass(k, BaseException)]


# ---------------------------------------------------------------- YAML


def _read_yaml(path: Path, found: _Found) -> None:
    from d2kit.config.yaml import parse_yaml

    text = path.read_text(encoding="utf-8")
    try:
        content, places = parse_yaml(text, path)
    except ValueError:
        if re.search(r"^(MODEL|SOLVER|DATASETS|_BASE_|INPUT)\b", text, re.MULTILINE):
            raise
        return  # no config of Detectron2
    if not isinstance(content, dict) or not {"MODEL", "SOLVER", "DATASETS", "_BASE_"} & set(
        content
    ):
        return  # no config of Detectron2
    for key, value in _flat(content):
        where = places.get(key, f"{path}:0")
        if key != "_BASE_":
            found.keys.append((where, key))
        if key in REGISTRIES and isinstance(value, str):
            found.values.append((where, key, value))


def _flat(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# ---------------------------------------------------------------- judging


def resolve(name: str) -> Any:
    """Return what a dotted name of Detectron2 stands for here.

    Raises:
        AttributeError: if there is nothing; the message says why, or lists the nearest names.
    """
    tail = name.split(".")[1:]
    for path in (".".join(tail[:i]) for i in range(1, len(tail) + 1)):
        if reason := ABSENT.get(path, ABSENT_NAMES.get(path)):
            raise AttributeError(reason)
    if ".".join(tail) in MOVED:
        return getattr(importlib.import_module(f"d2kit.{MOVED['.'.join(tail)]}"), tail[-1])
    owner: Any = importlib.import_module("d2kit")
    for depth in range(1, len(tail) + 1):
        path = real_name(".".join(tail[:depth]))
        try:
            owner = pkgutil.resolve_name(path)
        except (ImportError, AttributeError):
            near = ", ".join(nearest_names(tail[depth - 1], dir(owner)))
            place = path.rpartition(".")[0]
            raise AttributeError(
                f"not in {place}" + (f"; nearest: {near}" if near else "")
            ) from None
    return owner


def _judge_symbol(where: str, name: str) -> Use:
    try:
        resolve(name)
    except AttributeError as error:
        return Use(where, "symbol", name, False, str(error))
    return Use(where, "symbol", name, True)


def _known_keys(adders: set[str]) -> Any:
    """Return the default config with the keys of those projects whose ``add_*_config`` is used."""
    from d2kit.config import get_cfg

    cfg = get_cfg()
    for name in sorted(adders):
        try:
            resolve(name)(cfg)
        except AttributeError:
            continue  # the missing function itself is told
    return cfg


def _judge_key(where: str, key: str, own: set[str], node: Any) -> Use:
    if any(key == mine or key.startswith(f"{mine}.") for mine in own):
        return Use(where, "config key", key, True)
    for part in key.split("."):
        if not isinstance(node, dict):
            break
        if part not in node:
            from d2kit.config.keys import KEYS

            near = ", ".join(nearest_names(key, KEYS))
            fix = f"add it to the config before it is read; nearest: {near or 'none'}"
            return Use(where, "config key", key, False, fix)
        node = node[part]
    return Use(where, "config key", key, True)


def _judge_value(where: str, key: str, value: str, own: set[str]) -> Use:
    from d2kit import modeling
    from d2kit.modeling import proposal_generator, roi_heads

    places = (
        modeling,
        proposal_generator,
        roi_heads,
        proposal_generator.rpn,
        modeling.anchor_generator,
    )
    registry = next(
        getattr(place, REGISTRIES[key]) for place in places if hasattr(place, REGISTRIES[key])
    )
    known = [name for name, _ in registry]
    if value in known or value in own or value == "PrecomputedProposals":
        return Use(where, "registry name", f"{key}: {value}", True)
    near = ", ".join(nearest_names(value, known))
    fix = f"register it ({REGISTRIES[key]}.register()); nearest: {near or 'none'}"
    return Use(where, "registry name", f"{key}: {value}", False, fix)


def _file_of(where: str) -> str:
    return re.sub(r"(:cell \d+)?:\d+$", "", where)


def as_json(uses: Sequence[Use]) -> str:
    """Return the uses as a JSON list of objects with the attributes of `Use`."""
    return json.dumps([asdict(use) for use in uses], indent=2)


def report(uses: Sequence[Use]) -> str:
    """Return a sentence, the counts by kind, and a table of what is not supported."""
    from tabulate import tabulate

    missing = [use for use in uses if not use.supported]
    kinds = list(dict.fromkeys(use.kind for use in uses))
    counts = [
        [k, sum(u.kind == k and u.supported for u in uses), sum(u.kind == k for u in missing)]
        for k in kinds
    ]
    files = {_file_of(use.where) for use in missing}
    verdict = (
        f"{len(missing)} of {len(uses)} uses of Detectron2 need a change, in {len(files)} files."
        if missing
        else f"All {len(uses)} uses of Detectron2 that were found work on d2kit as they are."
    )
    lines = [verdict, tabulate(counts, ["kind", "supported", "not"], tablefmt="github")]
    if missing:
        rows = [[use.where, use.name, use.fix] for use in missing]
        widths = [None, 48, 60]  # a place that is cut in two cannot be clicked
        lines.append(tabulate(rows, ["where", "not supported", "fix"], maxcolwidths=widths))
    if not uses:
        return "No use of Detectron2 was found."
    return "\n\n".join(lines)
