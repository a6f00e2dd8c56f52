"""Where the configs of d2kit itself lie, and their names."""

from pathlib import Path, PurePosixPath

from d2kit.utils.registry import nearest_names

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
