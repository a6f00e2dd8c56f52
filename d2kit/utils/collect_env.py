"""What a bug report needs to say about the machine: ``python -m d2kit.utils.collect_env``."""

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import torch

from d2kit.utils.env import ENV_MODULE_VARIABLE

__all__ = ["collect_env_info", "collect_torch_env", "get_env_module"]

_PACKAGES = (
    "numpy",
    "torchvision",
    "hotcoco",
    "pycocotools",
    "opencv-python",
    "pillow",
    "fvcore",
    "iopath",
    "supervision",
    "trackers",
    "av",
)


def get_env_module() -> tuple[str, str | None]:
    """Return the name of the variable for a custom environment module, and its value."""
    return ENV_MODULE_VARIABLE, os.environ.get(ENV_MODULE_VARIABLE)


def collect_torch_env() -> str:
    """Return how torch was built, over several lines."""
    return torch.__config__.show()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[tuple[str, str]]:
    if not torch.cuda.is_available():
        return [("GPU", "none that torch can use")]
    rows = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        rows.append(
            (
                f"GPU {index}",
                f"{properties.name}, {memory:.1f} GiB, "
                f"compute capability {properties.major}.{properties.minor}",
            )
        )
    return rows


def collect_env_info() -> str:
    """Return a table of versions, devices and settings, then torch's build settings."""
    from tabulate import tabulate

    variable, value = get_env_module()
    package = Path(__file__).parent.parent
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else "none"
    rows = [
        ("system", platform.platform()),
        ("Python", sys.version.replace("\n", " ")),
        ("d2kit", f"{_version('d2kit')} @{package}"),
        ("PyTorch", f"{torch.__version__} @{Path(torch.__file__).parent}"),
        ("debug build", torch.version.debug),
        ("CUDA of PyTorch", torch.version.cuda or "none"),
        ("cuDNN", cudnn),
        *_devices(),
        ("CPU", f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads"),
        *((name, _version(name)) for name in _PACKAGES),
        (variable, value or "<not set>"),
        *(
            (n, os.environ[n])
            for n in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
            if n in os.environ
        ),
    ]
    return f"{tabulate(rows)}\n{collect_torch_env()}"


if __name__ == "__main__":
    print(collect_env_info())
