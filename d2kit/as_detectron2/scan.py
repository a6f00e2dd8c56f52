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
    methods: list[tuple[str, str, str]] = field(default_factory=list)  # of subclasses alone
    asked: set[str] = field(default_factory=set)  # every attribute that some code reads


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
            found.judged.append(_unreadable(path, error))
    for where, name, place in found.methods:
        if name.partition(".")[2] not in found.asked:
            fix = f"nothing calls it: {place} has no such step, so that the override has no effect"
            found.judged.append(Use(where, "member", name, False, fix))
    uses = [_judge_symbol(where, name) for where, name in found.symbols]
    known = _known_keys(found.adders) if found.keys else {}
    uses += [_judge_key(where, name, found.own_keys, known) for where, name in found.keys]
    uses += [_judge_value(*value, found.own_names) for value in found.values]
    return _once_per_file([*uses, *found.judged])


def _unreadable(path: Path, error: Exception) -> Use:
    reason = str(error).splitlines()[0]
    named = re.match(rf"{re.escape(str(path))}:(\d+)", reason)
    line = named[1] if named else getattr(error, "lineno", None) or 1
    return Use(f"{path}:{line}", "file", "cannot be read", False, reason)


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            suffixes, left_out = (".py", ".ipynb", ".yaml", ".yml"), {".git", ".ipynb_checkpoints"}
            inside = (p for p in sorted(path.rglob("*")) if p.suffix in suffixes)
            yield from (p for p in inside if p.is_file() and not left_out & set(p.parts))
        else:
            yield path


def _once_per_file(uses: list[Use]) -> list[Use]:
    first: dict[tuple[str, str, str], Use] = {}
    for use in uses:
        first.setdefault((_file_of(use.where), use.kind, use.name), use)
    return list(first.values())


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


_OF_PYTHON = r"\s*%%(time|timeit|capture|prun|writefile\s+\S+\.py)\b"  # what follows is Python


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
        other = text.lstrip().startswith("%%") and not re.match(_OF_PYTHON, text)
        code = []
        for line in [] if other else text.splitlines():
            command = re.match(r"(\s*)(?:[%!?]|\w+\s*=\s*[%!]|.*\?$)", line)
            code.append(f"{command[1]}pass" if command else line)
        try:
            ast.parse("\n".join(code))
        except SyntaxError as error:  # the other cells are read all the same
            where = places.of(len(lines) + (error.lineno or 1))
            found.judged.append(Use(where, "file", "cannot be read", False, str(error)))
            code = []
        lines += code + [""] * (max(len(text.splitlines()), 1) - len(code))
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
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            found.asked.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.asked.add(node.value)
    for line, name, place, used in _missing_members(tree, modules):
        if used:
            fix = f"{place} has no such member: write the step in the subclass"
            found.judged.append(Use(places.of(line), "member", name, False, fix))
        else:
            found.methods.append((places.of(line), name, place))
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
        _note_registration(ast.unparse(decorator), node.name, where, found)


def _note_registration(registry: str, name: str, where: str, found: _Found) -> None:
    if "REGISTRY" not in registry:
        return
    found.own_names.add(name)
    registry = registry.partition("_REGISTRY")[0].rpartition(".")[2]
    if name in FIXED_NAMES.get(registry, "").split():
        fix = f"{registry} of Detectron2 holds this name already: give the class another one"
        found.judged.append(Use(where, "registry name", name, False, fix))


def _read_call(node: ast.Call, where: str, found: _Found) -> None:
    """Note registrations, keys in a list, and probes for the distribution without an answer."""
    name = ast.unparse(node.func).rpartition(".")[2]
    first = node.args[0] if node.args else None
    if name == "register" and isinstance(first, ast.Name):
        _note_registration(ast.unparse(node.func), first.id, where, found)
    if name == "merge_from_list" and isinstance(first, ast.List | ast.Tuple):
        keys = [part.value for part in first.elts[::2] if isinstance(part, ast.Constant)]
        found.keys += [(where, key) for key in keys if isinstance(key, str)]
    named = isinstance(first, ast.Constant) and first.value == ORIGINAL
    if name in ("get_distribution", "require") and named:
        fix = "pkg_resources is gone from setuptools: ask importlib.metadata.version('detectron2')"
        found.judged.append(Use(where, "probe", f"{name}('{ORIGINAL}')", False, fix))


_SECTION = re.compile(r"(MODEL|SOLVER|DATASETS|DATALOADER|INPUT|TEST)\b")  # others have a cfg, too


def _read_chains(places: _Places, tree: ast.Module, modules: dict[str, str], found: _Found) -> None:
    """Collect ``comm.get_rank`` and ``cfg.MODEL.DEVICE``, each whole chain once."""
    tree = _WithoutSubscripts().visit(tree)
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
        elif keys and (modules or _SECTION.match(keys)):
            found.keys.append((where, keys))


class _WithoutSubscripts(ast.NodeTransformer):
    """Writes ``cfg["MODEL"]`` as ``cfg.MODEL``."""

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:  # noqa: N802 - ast's name
        """Replace one subscript by an attribute, if it is a name in capitals."""
        self.generic_visit(node)
        key = node.slice.value if isinstance(node.slice, ast.Constant) else None
        if not (isinstance(key, str) and key.isidentifier() and key == key.upper()):
            return node
        made = ast.Attribute(value=node.value, attr=key, ctx=node.ctx)
        return ast.copy_location(made, node)


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
) -> Iterator[tuple[int, str, str, bool]]:
    """Yield each member that a class uses, or defines anew, and that no class above it has.

    Looked at are protected members through ``self`` and ``cls``, all through ``super()``, and the
    protected methods of classes above which stand classes of d2kit and of the module alone.

    Args:
        tree: the module's syntax tree.
        modules: name in the module -> dotted name of Detectron2.

    Returns:
        Line, ``Class.member``, the class of d2kit that should have it, and whether it is used.
    """
    classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    for node in classes.values():
        above = [list(_bases(ast.unparse(base), classes, modules, ())) for base in node.bases]
        bases = [base for found in above for base in found]
        if not bases:
            continue
        first, own = bases[0], _defined(node, classes, ())
        place = f"{first.__module__}.{first.__qualname__}"
        for line, member, through_super in _used(node):
            if member in own and not through_super:
                continue
            if not any(has_member(base, member) for base in bases):
                yield line, f"{first.__name__}.{member}", place, True
        for part in node.body if all(above) else ():
            if not isinstance(part, ast.FunctionDef) or not re.match(r"_(?!_)", part.name):
                continue
            if not any(has_member(base, part.name) for base in bases):
                yield part.lineno, f"{node.name}.{part.name}", place, False


def _bases(
    base: str,
    classes: Mapping[str, ast.ClassDef],
    modules: Mapping[str, str],
    above: tuple[str, ...],
) -> Iterator[type]:
    """Yield the classes of d2kit that `base` is or extends, through others of the module too."""
    chain = base.split(".")
    if chain[0] in modules:
        try:
            found = resolve(".".join([modules[chain[0]], *chain[1:]]))
        except AttributeError:
            return
        if isinstance(found, type):
            yield found
    elif base in classes and base not in above:
        for further in classes[base].bases:
            yield from _bases(ast.unparse(further), classes, modules, (*above, base))


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
    sections = {"MODEL", "SOLVER", "DATASETS", "_BASE_"}
    if not (isinstance(content, dict) and sections & set(content)):
        return
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


def _judge_key(where: str, key: str, own: set[str], node: object) -> Use:
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

    places = [modeling, proposal_generator, proposal_generator.rpn, roi_heads]
    places, name = [*places, modeling.anchor_generator], REGISTRIES[key]
    registry = next(getattr(place, name) for place in places if hasattr(place, name))
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
    return "\n\n".join(lines) if uses else "No use of Detectron2 was found."
