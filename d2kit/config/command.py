"""``d2kit config`` and ``python -m d2kit.config``: explain, diff and print; executes nothing.

explain KEY ...        meaning, unit, default, type and origin of keys, sections and patterns
  --config-file F      also the value there, and the file and line that set it
diff A B               the keys that differ; exit code 0: none, 1: some, 2: an error
print CONFIG           the whole config as YAML; --changed: what differs from the defaults; --json

A config is a YAML file, the folder of a run, a name of the model zoo, or (`d2kit config`) a
checkpoint. Without arguments: the text of docs/config.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from tabulate import tabulate

from d2kit.config.cfg_node import CfgNode, upgrade_values
from d2kit.config.config import _C
from d2kit.config.keys import KEYS, OWN_KEYS, markdown
from d2kit.config.yaml import find_zoo_file, load_yaml, nearest_zoo_names, parse_yaml, zoo_names
from d2kit.utils.names import flatten, nearest_names

COMMAND_LINE = "the command line"
WEIGHTS = (".pth", ".pt", ".pkl", ".safetensors")


@dataclass(frozen=True)
class Source:
    """A config that was read.

    Args:
        title: what was read, for people.
        values: full key -> value; of a config of Detectron2's kind all keys, of a lazy one those
            that are written there.
        origins: full key -> "file:line" or `COMMAND_LINE`, of the keys that something set.
        cfg: the config; None for a lazy one.
    """

    title: str
    values: dict[str, Any]
    origins: dict[str, str]
    cfg: CfgNode | None


def _find(name: str) -> Path:
    """Return the file that a config's name means.

    Raises:
        FileNotFoundError: if there is none; the nearest names are listed.
        ValueError: if it is a Python program.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / "config.yaml").is_file():
            raise FileNotFoundError(
                f"'{name}' is a folder without config.yaml: expected the folder of a run, or name "
                "a file in it"
            )
        path = path / "config.yaml"
    elif not path.exists():
        found = find_zoo_file(name)
        if found is None and path.parent.is_dir() and path.parent != Path():
            return path  # whose reader lists the nearest files there
        if found is None:
            raise FileNotFoundError(
                f"'{name}' is neither a file, the folder of a run, nor a name of the model zoo "
                f"({nearest_zoo_names(name, zoo_names())})"
            )
        path = found
    if path.suffix == ".py":
        raise ValueError(
            f"'{path}' is a Python config: a program, which is not executed here. Give the "
            'config.yaml of a run that was trained with it, or, if you trust it: python -c "from '
            f"d2kit.config import LazyConfig as L; print(L.to_py(L.load('{path}', trust=True)))\""
        )
    return path


def _shown(place: str) -> str:
    """Return a place "file:line" relative to the working folder, where it lies below."""
    file, _, line = place.rpartition(":")
    path = os.path.relpath(file) if os.path.isabs(file) else file
    return f"{file if path.startswith('..') else path}:{line}"


def _is_lazy(values: Mapping[str, Any]) -> bool:
    """Tell whether a YAML file is a lazy config: described calls, or none of our sections."""
    sections = {key.partition(".")[0] for key in KEYS}
    described = any(key.rpartition(".")[2] == "_target_" for key in flatten(values))
    return described or (bool(values) and not sections & set(values))


def read_source(
    name: str,
    overrides: Sequence[str] = (),
    *,
    any_key: bool = False,
    recorded: Callable[[Path], str] | None = None,
) -> Source:
    """Read a config and where its values come from; nothing is executed.

    Args:
        name: a YAML file, the folder of a run, a name of the model zoo, or a checkpoint.
        overrides: ``KEY VALUE`` pairs of a command line.
        any_key: keep keys that do not exist here (of another version or project); otherwise they
            are an error.
        recorded: checkpoint -> YAML of the config that it was trained with; None: checkpoints are
            refused.

    Raises:
        FileNotFoundError: if there is no such config; the nearest names are listed.
        KeyError: if a key does not exist; the nearest ones are listed.
        ValueError: for a Python config, a malformed file or a value of a wrong type.
    """
    path = _find(name)
    if path.suffix in WEIGHTS:
        if recorded is None:
            raise ValueError(
                f"'{path}' is a checkpoint, which `d2kit config` reads; here, give the folder of "
                "its run"
            )
        values, origins = parse_yaml(recorded(path), path)
        origins = dict.fromkeys(origins, f"the config in {path}")
    else:
        values, origins = load_yaml(str(path))
        origins = {key: _shown(place) for key, place in origins.items()}
    if _is_lazy(values):
        if overrides:
            raise ValueError(f"'{path}' is a lazy config: KEY VALUE pairs are for the other kind")
        found = flatten(values)
        return Source(name, found, {k: v for k, v in origins.items() if k in found}, None)
    values = upgrade_values(values, str(path), origins)
    node = _C.clone()
    node.set_new_allowed(any_key)
    node._merge(values, str(path), origins)
    node.set_new_allowed(False)
    node.merge_from_list(overrides)
    origins |= dict.fromkeys(overrides[::2], COMMAND_LINE)
    found = flatten(node)
    return Source(name, found, {k: v for k, v in origins.items() if k in found}, node)


WIDTH = 44  # of a value in the table of differences
ABSENT = "(no such key)"


def matching_keys(name: str) -> list[str]:
    """Return the keys that a key, a section or a pattern with ``*`` and ``?`` means.

    Raises:
        KeyError: if there is none; the message lists the nearest.
    """
    if name in KEYS:
        return [name]
    found = [
        key for key in KEYS if key.startswith(f"{name.rstrip('.')}.") or fnmatchcase(key, name)
    ]
    if found:
        return found
    same = [key for key in KEYS if key.rpartition(".")[2] == name.upper()]
    sections = {key.rpartition(".")[0] for key in KEYS} - {""}
    near = list(dict.fromkeys((*same, *nearest_names(name, [*sorted(sections), *KEYS]))))
    listed = f"nearest: {', '.join(near)}" if near else 'none is similar; try a pattern, "*NMS*"'
    raise KeyError(f"unknown config key '{name}' ({listed})")


def _flow(value: object) -> str:
    """Return a value as YAML on one line."""
    plain = json.loads(json.dumps(value)) if isinstance(value, (list, tuple)) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=sys.maxsize, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def explain(name: str, source: Source | None = None) -> str:
    """Return what one key means, and its value and origin in a config.

    Args:
        name: a full key name of `KEYS`.
        source: a config.
    """
    default, meaning = KEYS[name]
    kind = "null or anything" if default is None else type(default).__name__
    owner = "ours" if name in OWN_KEYS else "Detectron2's"
    lines = [f"{name}: {_flow(default)}  ({kind}, {owner})", f"    {meaning}"]
    if source is not None:
        value = _flow(source.values.get(name, ABSENT))
        by = f"set by {source.origins[name]}" if name in source.origins else "the default"
        lines.append(f"    here: {value}, {by}")
    return "\n".join(lines)


def changed_yaml(source: Source) -> str:
    """Return the keys that differ from the defaults as YAML, their origins as comments.

    Args:
        source: a config; of a lazy one all keys.
    """
    lines: list[str] = []
    open_sections: list[str] = []
    for key, value in _changed(source).items():
        *sections, last = key.split(".")
        common = 0
        while common < len(sections) and sections[: common + 1] == open_sections[: common + 1]:
            common += 1
        for depth in range(common, len(sections)):
            lines.append(f"{'  ' * depth}{sections[depth]}:")
        open_sections = sections
        origin = f"  # {source.origins[key]}" if key in source.origins else ""
        lines.append(f"{'  ' * len(sections)}{last}: {_flow(value)}{origin}")
    return "\n".join(lines) + "\n" if lines else "{}\n"


def _changed(source: Source) -> dict[str, Any]:
    if source.cfg is None:
        return source.values
    return {
        key: value
        for key, value in source.values.items()
        if key not in KEYS or KEYS[key].default != value
    }


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, last = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return tree


def _run_explain(args: argparse.Namespace, read: Callable[..., Source]) -> int:
    source = read(args.config_file, args.opts) if args.config_file else None
    if args.opts and source is None:
        raise ValueError("--opts changes a config: give --config-file too")
    keys = dict.fromkeys(key for name in args.keys for key in matching_keys(name))
    print("\n".join(explain(key, source) for key in keys))
    return 0


def _run_diff(args: argparse.Namespace, read: Callable[..., Source]) -> int:
    a, b = (read(name, any_key=True) for name in (args.a, args.b))
    if (a.cfg is None) != (b.cfg is None):
        raise ValueError(f"one of '{a.title}' and '{b.title}' is a lazy config: nothing in common")
    rows = []
    for key in dict.fromkeys((*a.values, *b.values)):
        both = [side.values.get(key, ABSENT) for side in (a, b)]
        if both[0] != both[1]:
            rows.append([key, *(ABSENT if v == ABSENT else _flow(v) for v in both)])
    if rows:
        headers = ["key", a.title, b.title]
        print(tabulate(rows, headers, maxcolwidths=[None, WIDTH, WIDTH], disable_numparse=True))
    return int(bool(rows))


def _run_print(args: argparse.Namespace, read: Callable[..., Source]) -> int:
    source = read(args.config, args.opts)
    if args.json:
        print(json.dumps(_nested(_changed(source) if args.changed else source.values), indent=2))
    elif args.changed:
        print(changed_yaml(source), end="")
    else:
        text = source.cfg.dump() if source.cfg is not None else changed_yaml(source)
        print(text, end="")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="d2kit config",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command")
    one = commands.add_parser("explain", help="what keys mean, and who set them")
    one.add_argument("keys", nargs="+", metavar="KEY", help="a key, a section, or a pattern (*)")
    one.add_argument("--config-file", metavar="CONFIG", help="also tell the value there")
    one.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="changes of it")
    one.set_defaults(run=_run_explain)
    two = commands.add_parser("diff", help="what differs between two configs")
    two.add_argument("a", metavar="A")
    two.add_argument("b", metavar="B")
    two.set_defaults(run=_run_diff)
    three = commands.add_parser("print", help="a config with its bases and changes")
    three.add_argument("config", metavar="CONFIG")
    three.add_argument("opts", nargs="*", metavar="KEY VALUE")
    three.add_argument("--changed", action="store_true", help="only what is not the default")
    three.add_argument("--json", action="store_true")
    three.set_defaults(run=_run_print)
    return parser


def main(argv: Sequence[str], recorded: Callable[[Path], str] | None = None) -> int:
    """Do what a command line says.

    Args:
        argv: the words after the name of the script.
        recorded: reads the config of a checkpoint, see `read_source`.

    Returns:
        Exit code: 0; 1: `diff` found a difference; 2: a mistake, which is printed.
    """
    if not argv:
        sys.stdout.write(markdown())
        return 0
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.command == "print" and not rest[0].startswith("-"):
        args.opts += rest  # KEY VALUE after an option
    elif rest or args.command is None:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")

    def read(name: str, opts: Sequence[str] = (), *, any_key: bool = False) -> Source:
        return read_source(name, opts, any_key=any_key, recorded=recorded)

    try:
        code = int(args.run(args, read))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, KeyError, OSError) as error:
        text = error.args[0] if isinstance(error, KeyError) else error
        print(f"error: {text}", file=sys.stderr)
        return 2
