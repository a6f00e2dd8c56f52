"""What DESIGN says about the shape of the code, held by tests."""

import ast
import csv
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from d2kit import MOVED, RENAMED
from d2kit.as_detectron2.redirect import real_name
from tests.support.code import cycle, functions, imports, sources
from tests.support.reference_files import reference_path
from tests.support.scope import out_of_scope

ROOT = Path(__file__).resolve().parents[1]

RANKS = {
    "utils": 0,
    "config": 1,
    "layers": 2,
    "structures": 3,
    **dict.fromkeys(("data", "modeling", "solver", "checkpoint", "tracking"), 4),
    "visualization": 4,
    **dict.fromkeys(("evaluation", "model_zoo", "contrib", "curate", "export"), 5),
    "predict": 6,
    "engine": 7,
    "video": 8,
    "cli": 9,
    "__main__": 10,
    "as_detectron2": 10,
}
DOORS = {
    *("d2kit.utils.analysis", "d2kit.utils.testing"),
    *(f"d2kit.{name}" for name in (*MOVED, *RENAMED)),
}
"""They exist because user code imports them there, or are only names: nobody inside uses them."""

HEAVY = {"cv2", "matplotlib", "tensorboard", "pycocotools", "supervision", "scipy"}
MAX_FILE, MAX_FUNCTION = 600, 60
# Detectron2's public functions with a parameter `cfg`, other than from_config, build_*, default_*
API_WITH_CFG = {
    *("verify_results", "upgrade_config", "downgrade_config", "set_global_cfg"),
    *("maybe_add_gradient_clipping", "add_export_config"),
}


READERS_OF_CFG = {
    *("write_report", "compare_runs", "_what", "_model_of", "schedule", "_datasets", "read_run"),
    *("preflight_report", "schedule_warnings", "object_warnings", "_train_counts", "_class_table"),
    *("_anchor_text", "_shape_of_output", "_rate_text", "_memory_text"),
    *("draw_evaluation_pictures", "full_results", "learned_parts", "number_of_classes"),
    *("read_oks_sigmas", "read_expected_results", "check_tracking_services", "log_start"),
    *("register_listed_datasets", "_weights_text", "start_score"),
}
"""What else may read a config, beside builders and what has Detectron2's names."""


def part(module: str) -> str:
    """Return the second part of a d2kit module's name, empty for d2kit itself."""
    return (module.split(".") + [""])[1]


def test_imports_go_down_the_ranks():
    wrong = []
    for source in sources("d2kit"):
        if source.module in DOORS:
            continue
        for target, line in imports(source):
            if not target.startswith("d2kit") or part(target) == part(source.module) != "":
                continue
            if target == "d2kit" and source.module != "d2kit":
                continue  # the version
            here, there = part(source.module), part(target)
            if not here or RANKS[there] >= RANKS[here]:
                wrong.append(f"{source.path}:{line} ({here}) imports {target}")
    assert not wrong, "\n".join(wrong)


def test_every_part_has_a_rank():
    assert {part(s.module) for s in sources("d2kit")} - {""} <= set(RANKS)


def test_the_library_imports_no_script_experiment_or_test():
    wrong = [
        f"{source.path}:{line} imports {target}"
        for source in sources("d2kit")
        for target, line in imports(source)
        if target.split(".")[0] in {"project", "tools", "datasets", "tests"}
    ]
    assert not wrong, "\n".join(wrong)


def test_nobody_inside_uses_the_doors():
    wrong = [
        f"{source.path}:{line} imports {target}"
        for source in sources("d2kit")
        for target, line in imports(source)
        if any(target == door or target.startswith(f"{door}.") for door in DOORS)
        and source.module != "d2kit.cli.analyze"  # the verb that prints those counts
    ]
    assert not wrong, "\n".join(wrong)


def test_no_import_cycle():
    graph = {
        source.module: {target for target, _ in imports(source) if target != source.module}
        for source in sources("d2kit", "project")
    }
    assert not cycle(graph), " -> ".join(cycle(graph))


@pytest.mark.parametrize(
    ("graph", "found"),
    [
        ({}, []),
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, ["b", "c", "b"]),
        ({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}, []),
    ],
)
def test_cycles_are_found(graph, found):
    assert cycle(graph) == found


def test_no_file_is_too_long():
    lengths = {source.path: len(source.text.splitlines()) for source in sources()}
    assert not {path: n for path, n in lengths.items() if n > MAX_FILE}


def test_no_function_is_too_long():
    wrong = [
        f"{source.path}:{node.lineno} {name}: {node.end_lineno - node.lineno + 1} lines"
        for source in sources()
        for name, node in functions(source.tree)
        if node.end_lineno - node.lineno + 1 > MAX_FUNCTION
    ]
    assert not wrong, "\n".join(wrong)


def may_read_cfg(names: list[str]) -> bool:
    """Tell whether code inside these classes and functions, outermost first, may read a config."""
    return any(
        name.startswith(("build_", "_build_", "default_", "_default_", "Default"))
        or name in {"from_config", *API_WITH_CFG, *READERS_OF_CFG}
        for name in names
    )


def config_reads(tree: ast.AST) -> list[tuple[int, list[str], str]]:
    """Return (line, enclosing names, key) of each ``cfg.KEY``, ``self.cfg.KEY``, ``cfg["KEY"]``.

    A function that is given as ``@configurable(from_config=...)`` counts as ``from_config``.
    """
    found = []
    makers = {
        keyword.value.id
        for keyword in ast.walk(tree)
        if isinstance(keyword, ast.keyword)
        and keyword.arg == "from_config"
        and isinstance(keyword.value, ast.Name)
    }

    def is_cfg(node: ast.AST) -> bool:
        if isinstance(node, ast.Attribute):
            return node.attr in {"cfg", "_cfg"}
        return isinstance(node, ast.Name) and node.id in {"cfg", "_cfg"}

    def walk(node: ast.AST, names: list[str]) -> None:
        if isinstance(node, ast.Attribute) and is_cfg(node.value) and node.attr.isupper():
            found.append((node.lineno, names, node.attr))
        elif isinstance(node, ast.Subscript) and is_cfg(node.value):
            found.append((node.lineno, names, ast.unparse(node.slice)))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names = [*names, "from_config" if node.name in makers else node.name]
        for child in ast.iter_child_nodes(node):
            walk(child, names)

    walk(tree, [])
    return found


def test_configs_are_read_in_builders_only():
    wrong = [
        f"{source.path}:{line} {'.'.join(names)} reads cfg.{key}"
        for source in sources("d2kit")
        # a command line is where a config begins
        if part(source.module) not in {"config", "cli"} or source.module == "d2kit.config.config"
        for line, names, key in config_reads(source.tree)
        if not may_read_cfg(names)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("code", "fine"),
    [
        ("def from_config(cls, cfg):\n return cfg.MODEL", True),
        ("def build_it(cfg):\n def inner():\n  return cfg.MODEL.X\n return inner", True),
        ("class DefaultTrainer:\n def test(cls, cfg):\n  return cfg.TEST", True),
        ("def helper(cfg):\n return cfg.clone()", True),
        ("def f(cfg):\n return cfg.X\n@configurable(from_config=f)\ndef g(): ...", True),
        ("def helper(cfg):\n return cfg.MODEL", False),
        ("class A:\n def run(self):\n  return self.cfg.MODEL.X", False),
        ("def helper(cfg):\n return cfg['MODEL']", False),
    ],
)
def test_config_reads_are_found(code, fine):
    reads = config_reads(ast.parse(code))
    assert all(may_read_cfg(names) for _, names, _ in reads) is fine


def test_functions_with_cfg_are_those_of_the_api():
    api = json.loads(reference_path("api.json").read_text())
    with_cfg = {
        name
        for names in api.values()
        for name, entry in names.items()
        if isinstance(entry, str) and "(cfg" in entry
    }
    imported = {path.rpartition(".")[2] for path in public_paths()}
    assert with_cfg | imported >= API_WITH_CFG


FORBIDDEN_CALLS = {
    *("eval", "exec", "pickle.load", "pickle.Unpickler", "marshal.load"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "shelve.open"),
}


RUNS_FILES = {"exec_module", "run_path", "run_module"}
MAY_RUN_FILES = {
    "d2kit/config/lazy.py",  # Python configs that the caller trusts
    "d2kit/as_detectron2/__main__.py",  # the user's own script, named on the command line
}


def test_nothing_runs_code_out_of_files():
    wrong = []
    for source in sources("d2kit", "project", "tools", "datasets"):
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            safe_load = any(
                k.arg == "weights_only" and getattr(k.value, "value", None) is True
                for k in node.keywords
            )
            runs = name.split(".")[-1] in RUNS_FILES and source.path not in MAY_RUN_FILES
            if runs or name in FORBIDDEN_CALLS or (name == "torch.load" and not safe_load):
                wrong.append(f"{source.path}:{node.lineno} calls {name}")
    assert not wrong, "\n".join(wrong)


MOST_BARE_ANY = 0.03


def test_few_signatures_say_any():
    """Where any value will do, `object` says so and is checked; `Any` switches checks off."""
    annotations = [
        annotation
        for source in sources("d2kit")
        for _, node in functions(source.tree)
        for annotation in (
            *(a.annotation for a in ast.walk(node.args) if isinstance(a, ast.arg)),
            node.returns,
        )
        if annotation is not None
    ]
    bare = sum(ast.unparse(annotation).strip("'\"") == "Any" for annotation in annotations)
    assert len(annotations) > 5000
    assert bare / len(annotations) < MOST_BARE_ANY, f"{bare} of {len(annotations)}"


def test_import_is_cheap():
    code = (
        "import sys, json; import d2kit; first = sorted(m for m in sys.modules if '.' not in m);"
        "import d2kit.engine; second = sorted(m for m in sys.modules if '.' not in m);"
        "print(json.dumps([first, second]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    first, second = json.loads(run.stdout)
    assert "torch" not in first
    assert "torch" in second
    assert not HEAVY & set(second)


def public_paths() -> list[str]:
    with open(reference_path("symbols.csv"), encoding="utf-8") as file:
        return [row["path"] for row in csv.DictReader(file)]


def resolve(path: str) -> object:
    """Import the longest module that a path starts with, then follow its attributes."""
    parts = (real_name(path[6:]) if path[5:] else path).split(".")
    for end in range(len(parts), 0, -1):
        name = ".".join(parts[:end])
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            continue
        for attribute in parts[end:]:
            found = getattr(found, attribute)
        return found
    raise ModuleNotFoundError(path)


@pytest.mark.parametrize("path", [p for p in public_paths() if not out_of_scope(p)])
def test_public_name_resolves(path):
    resolve(path)


@pytest.mark.parametrize("path", [p for p in public_paths() if out_of_scope(p)])
def test_scope_has_no_stale_entry(path):
    """What is there by now must be taken off the list, so that it is tested from then on."""
    with pytest.raises((AttributeError, ImportError)):
        resolve(path)


@pytest.mark.parametrize(
    "script",
    sorted(
        p.relative_to(ROOT).as_posix()
        for f in ("tools", "datasets")
        for p in (ROOT / f).glob("*.py")
    ),
)
def test_a_script_finds_its_checkout_without_an_installation(script):
    """Python puts a script's own folder on the path, and the wheel holds no `project`."""
    lines = (ROOT / script).read_text().splitlines()
    ours = next(
        i for i, line in enumerate(lines) if re.match(r" *(from|import) (d2kit|project)\b", line)
    )
    insert = "sys.path.insert(0, str(Path(__file__).resolve().parents[1]))"
    assert insert in lines[:ours]
