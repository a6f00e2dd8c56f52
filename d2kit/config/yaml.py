"""The one function that reads YAML of others: values only, `_BASE_` from known folders."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import yaml

from d2kit.config.arithmetic import ArithmeticRefused, evaluate
from d2kit.utils.names import AssertedFileError, nearest_names

PACKAGE = Path(__file__).resolve().parents[1]
SUFFIXES = (".yaml", ".py")


def zoo_folder() -> Path:
    """Return the folder of the model zoo's configs.

    A wheel carries it inside the package (setup.py puts it there); in a checkout it is the folder
    ``configs`` at the top.
    """
    installed = PACKAGE / "model_zoo" / "configs"
    return installed if installed.is_dir() else PACKAGE.parent / "configs"


def zoo_names() -> list[str]:
    """Return the names of all configs in the zoo's folder."""
    root = zoo_folder()
    files = (file for suffix in SUFFIXES for file in root.rglob(f"*{suffix}"))
    return sorted(file.relative_to(root).as_posix() for file in files)


def nearest_zoo_names(name: str, candidates: list[str]) -> str:
    """Say which of the zoo's names are like `name`: first those of the same file, elsewhere."""
    same_file = [c for c in candidates if PurePosixPath(c).name == PurePosixPath(name).name]
    near = list(dict.fromkeys((*same_file, *nearest_names(name, candidates))))[:3]
    return f"nearest: {', '.join(near)}" if near else f"none of its {len(candidates)} is similar"


def find_zoo_file(name: str) -> Path | None:
    """Return the file of a name of the zoo, relative to its folder; None where there is none."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or path.suffix not in SUFFIXES:
        return None
    file = zoo_folder() / path
    return file if file.is_file() else None


BASE_KEY = "_BASE_"
LEAF_TYPES = (tuple, list, str, int, float, bool, type(None))

MAX_DEPTH = 50  # of sections and lists; configs of the model zoo have 4
MAX_VALUES = 100_000

TRUSTED = "D2KIT_TRUSTED_CONFIGS"
_REPOSITORY = (".git", ".hg", ".svn", "pyproject.toml", "setup.py")  # stands at a project's top

_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_SafeLoader):  # type: ignore[misc]
    """Plain YAML; behind the tag ``eval``, arithmetic over numbers (see `arithmetic`)."""


def _arithmetic(loader: object, node: yaml.Node) -> object:
    """Return the value of ``!!python/object/apply:eval ["expression"]``."""
    if isinstance(node, yaml.MappingNode):  # the long form of the tag: {args: ["..."]}
        named = {key.value: value for key, value in node.value}
        node = named["args"] if set(named) == {"args"} else node
    text = node.value[0] if isinstance(node, yaml.SequenceNode) and len(node.value) == 1 else None
    if not isinstance(text, yaml.ScalarNode) or text.tag != "tag:yaml.org,2002:str":
        raise yaml.constructor.ConstructorError(
            problem="'eval' expects one expression, as text in a list", problem_mark=node.start_mark
        )
    try:
        return evaluate(text.value)
    except ArithmeticRefused as error:
        raise yaml.constructor.ConstructorError(
            problem=f"'eval' computes with numbers only: {error}", problem_mark=node.start_mark
        ) from error


for _name in ("eval", "builtins.eval", "__builtin__.eval"):
    _Loader.add_constructor(f"tag:yaml.org,2002:python/object/apply:{_name}", _arithmetic)
_Loader.add_constructor(
    "tag:yaml.org,2002:python/tuple",
    lambda loader, node: tuple(loader.construct_sequence(node, deep=True)),
)


class Loaded(NamedTuple):
    """What a file and its bases say, and where each key was said last."""

    values: dict[str, Any]
    origins: dict[str, str]  # full key -> "file:line"


def _read_text(path: Path) -> str:
    if not path.exists():
        folder = path.parent
        if not folder.is_dir():
            raise AssertedFileError(f"config file '{path}' not found: no folder '{folder}'")
        near = nearest_names(path.name, sorted(f.name for f in folder.iterdir()))
        listed = f"nearest there: {', '.join(near)}" if near else f"looked in '{folder}'"
        raise AssertedFileError(f"config file '{path}' not found ({listed})")
    if path.is_dir():
        raise IsADirectoryError(f"config file '{path}' is a folder; name a .yaml file in it")
    if not path.is_file():
        raise ValueError(f"config file '{path}' is a pipe or device, not a file: write it to one")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8 ({error.reason})") from error


def _check_form(text: str, path: Path) -> None:
    """Raise ValueError for a file that is made to exhaust whoever reads it.

    Looks at one event after the other; the parser proper calls itself for what is inside. An alias
    counts as the values that it stands for: a few lines of aliases of aliases are millions.
    """
    sizes: dict[str | None, int] = {}  # of each anchor that is complete
    open_parts: list[tuple[str | None, int]] = []  # anchor and size so far, outermost first
    size = 0
    for event in yaml.parse(text, Loader=_Loader):
        mark: Any = event.start_mark
        if isinstance(event, yaml.CollectionStartEvent):
            open_parts.append((event.anchor, size))
            size = 0
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_parts.pop()
            sizes[anchor] = size + 1
            size += before + 1
        elif isinstance(event, yaml.ScalarEvent):
            sizes[event.anchor] = 1
            size += 1
        elif isinstance(event, yaml.AliasEvent):
            if any(event.anchor == anchor for anchor, _ in open_parts):
                raise ValueError(
                    f"{path}:{mark.line + 1}: *{event.anchor} stands inside of what it "
                    "names, which would hold itself"
                )
            size += sizes.get(event.anchor, 0)
        if len(open_parts) > MAX_DEPTH or size > MAX_VALUES:
            raise ValueError(
                f"{path}:{mark.line + 1}: nested more than {MAX_DEPTH} deep, or more "
                f"than {MAX_VALUES:,} values with aliases (*name) written out; no config needs "
                "that: refused"
            )


def parse_yaml(text: str, path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values of a YAML text and the place of each key, "path:line".

    Args:
        text: of one file.
        path: of the file, for places and messages.

    Raises:
        ValueError: for malformed YAML, or a tag that would run code.
    """
    loader = _Loader(text)
    try:
        _check_form(text, path)
        node = loader.get_single_node()
        _check_doubles(node, path)  # before aliases of whole sections (<<) are written out
        values = {} if node is None else loader.construct_document(node)
    except yaml.constructor.ConstructorError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise ValueError(
            f"{path}:{line}: {error.problem}; config files hold plain YAML values only, nothing "
            "in them is executed: write the value out (allow_unsafe has no effect)"
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error).replace("\n", " ")
        raise ValueError(f"{place}: malformed YAML: {problem}") from error
    finally:
        loader.dispose()
    if not isinstance(values, dict):
        raise ValueError(
            f"{path}: expected 'KEY: value' lines, got a {type(values).__name__} at the top"
        )
    lines: dict[str, str] = {}
    if node is not None:
        _collect_lines(node, "", str(path), lines)
    _check_leaves(values, "", str(path), lines)
    return values, lines


def _check_doubles(node: yaml.Node | None, path: Path) -> None:
    """Raise ValueError where a mapping says a key twice: YAML would keep the last, silently."""
    pending, seen = [node], set()
    while pending:
        part = pending.pop()
        if not isinstance(part, yaml.CollectionNode) or id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, yaml.SequenceNode):
            pending += part.value
            continue
        lines: dict[str, int] = {}
        for key, value in part.value:
            line = key.start_mark.line + 1
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name in lines:
                raise ValueError(
                    f"{path}:{line}: key '{name}' is said twice in one section, in line "
                    f"{lines[name]} and in line {line}; only the last would count: join them"
                )
            if name is not None and name != "<<":
                lines[name] = line
            pending.append(value)


def _collect_lines(node: yaml.MappingNode, prefix: str, path: str, lines: dict[str, str]) -> None:
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        lines[key] = f"{path}:{key_node.start_mark.line + 1}"
        if isinstance(value_node, yaml.MappingNode):
            _collect_lines(value_node, f"{key}.", path, lines)


def _check_leaves(values: Mapping[Any, Any], prefix: str, path: str, lines: dict[str, str]) -> None:
    for key, value in values.items():
        full = f"{prefix}{key}"
        if not isinstance(key, str):
            raise ValueError(f"{lines.get(full, path)}: key {full!r} is not a name")
        if isinstance(value, dict):
            _check_leaves(value, f"{full}.", path, lines)
        elif not isinstance(value, LEAF_TYPES):
            raise ValueError(
                f"{lines.get(full, path)}: {full} is a {type(value).__name__} ({value}); expected "
                "a number, string, bool, list or null (quote it to make it a string)"
            )


def _roots(first: Path) -> list[Path]:
    """Return the folders that bases of `first` may lie in.

    These are the user's own: the repository that the file lies in, the working folder, where the
    file lies below it, and what the environment variable ``D2KIT_TRUSTED_CONFIGS`` lists; the
    nearest folder named ``configs`` above the file, or its own folder where there is none; the
    ``configs`` folders that stand beside one of the folders above it (a project's configs extend
    those of the repository that it lives in); and the configs of d2kit itself.
    """
    nearest = next((f for f in first.parents if f.name == "configs"), first.parent)
    above = [f / "configs" for f in nearest.parents if (f / "configs").is_dir()]
    marked = (f for f in first.parents if any((f / name).exists() for name in _REPOSITORY))
    own = [*itertools.islice(marked, 1), Path.cwd().resolve()]
    listed = [Path(f).expanduser() for f in os.environ.get(TRUSTED, "").split(os.pathsep) if f]
    everything = (Path(first.anchor), Path.home().resolve())  # too wide to be one's tree of configs
    own = [f for f in own if first.is_relative_to(f) and f not in everything]
    return [*own, nearest, *above, *(f.resolve() for f in listed), zoo_folder().resolve()]


def _resolve_base(base: object, file: Path, roots: list[Path], where: str) -> Path:
    if not isinstance(base, str) or not base:
        raise ValueError(f"{where}: {BASE_KEY} expects a path or a list of paths, got {base!r}")
    if "://" in base:
        raise ValueError(f"{where}: {BASE_KEY} '{base}' is not a local path; download it yourself")
    target = (file.parent / os.path.expanduser(base)).resolve()
    if not target.exists():
        target = (find_zoo_file(base) or target).resolve()
    if not any(target.is_relative_to(root) for root in roots):
        raise ValueError(
            f"{where}: {BASE_KEY} '{base}' leads to '{target}', outside of the config tree "
            f"'{roots[0]}'; keep both files in one repository or below one folder named "
            f"'configs', list the folder in {TRUSTED}, or name a config of the model zoo "
            "(COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml)"
        )
    return target


def _merge(source: Loaded, into: Loaded) -> None:
    """Let the values of `source` replace those of `into`, section by section."""

    def walk(new: dict[str, Any], old: dict[str, Any], prefix: str) -> None:
        for key, value in new.items():
            full = f"{prefix}{key}"
            if isinstance(value, dict) and key in old:
                if not isinstance(old[key], dict):
                    raise ValueError(
                        f"{source.origins.get(full)}: {full} is a section here but a value in "
                        f"its base ({into.origins.get(full)})"
                    )
                walk(value, old[key], f"{full}.")
            else:
                old[key] = value

    walk(source.values, into.values, "")
    into.origins.update(source.origins)


def load_yaml(filename: str | os.PathLike[str]) -> Loaded:
    """Read a config file and the files that it names as `_BASE_`.

    Args:
        filename: a local path.

    Returns:
        The merged values, those of a file before those of its bases, and their places.

    Raises:
        FileNotFoundError: if a file is missing; the nearest names are listed.
        ValueError: for a URL, malformed YAML, a tag that would run code, a base outside of the
            tree of configs, or bases in a circle; the message starts with file and line.
    """
    if "://" in str(filename):
        raise ValueError(f"config file '{filename}': expected a local path, got a URL")
    first = Path(filename).resolve()
    return _load(Path(filename), first, _roots(first), ())


def _load(shown: Path, file: Path, roots: list[Path], above: tuple[Path, ...]) -> Loaded:
    if file in above:
        chain = " -> ".join(str(f) for f in (*above[above.index(file) :], file))
        raise ValueError(f"{above[-1]}: {BASE_KEY} files form a circle: {chain}")
    values, lines = parse_yaml(_read_text(shown), shown)
    where = lines.pop(BASE_KEY, str(shown))
    bases = values.pop(BASE_KEY, [])
    merged = Loaded({}, {})
    for base in bases if isinstance(bases, list) else [bases]:
        target = _resolve_base(base, file, roots, where)
        _merge(_load(target, target, roots, (*above, file)), merged)
    _merge(Loaded(values, lines), merged)
    return merged
