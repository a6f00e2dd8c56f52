"""Exceptions that are ours and Detectron2's at once: `except` of either type catches them.

Ours say what is wrong with the input; where Detectron2 asserts, or raises `RuntimeError`, code
written for it catches that type, so that the class is both.
"""

__all__ = [
    "AssertedFileError",
    "AssertedKeyError",
    "AssertedTypeError",
    "AssertedValueError",
    "NoStorageError",
    "NoWeightsError",
    "ZooError",
]


class AssertedValueError(ValueError, AssertionError):
    """A value that Detectron2 refuses by an assertion."""


class AssertedTypeError(TypeError, AssertionError):
    """A type that Detectron2 refuses by an assertion."""


class AssertedKeyError(KeyError, AssertionError):
    """A name that Detectron2 looks for by an assertion."""


class AssertedFileError(FileNotFoundError, AssertionError):
    """A file that Detectron2 looks for by an assertion."""


class NoStorageError(RuntimeError, AssertionError):
    """There is no `EventStorage` around the call."""


class ZooError(FileNotFoundError, RuntimeError):
    """A config or checkpoint that the model zoo does not have."""


class NoWeightsError(ValueError, RuntimeError):
    """There are no published weights for a config of the model zoo."""
