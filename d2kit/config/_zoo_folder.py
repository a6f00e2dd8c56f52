"""Where the configs of d2kit itself lie."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def zoo_folder() -> Path:
    """Return the folder of the model zoo's configs.

    A wheel carries it inside the package (setup.py puts it there); in a checkout it is the folder
    ``configs`` at the top.
    """
    installed = PACKAGE / "model_zoo" / "configs"
    return installed if installed.is_dir() else PACKAGE.parent / "configs"
