"""Where the public datasets lie."""

import os

__all__ = ["dataset_root"]


def dataset_root() -> str:
    """Return the folder of the public datasets.

    That is the environment variable D2KIT_DATASETS, or DETECTRON2_DATASETS, or `datasets` in the
    working folder.
    """
    names = ("D2KIT_DATASETS", "DETECTRON2_DATASETS")
    return os.path.expanduser(next(filter(None, map(os.environ.get, names)), "datasets"))
