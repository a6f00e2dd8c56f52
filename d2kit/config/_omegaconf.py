"""The one door to omegaconf, which only lazy configs need."""

from typing import Any


def require_omegaconf() -> Any:
    """Return the package omegaconf.

    Raises:
        ImportError: if it is not installed; the message says how to install it.
    """
    try:
        import omegaconf
    except ImportError as error:
        raise ImportError(
            "lazy configs need the package omegaconf: pip install 'd2kit[lazy]' "
            "(or: pip install 'omegaconf>=2.3')"
        ) from error
    return omegaconf


def _with_lists(value: Any) -> Any:
    """Return nested dicts and lists with lists for tuples.

    What omegaconf 2.4 keeps as a tuple can only be replaced by another sequence, and a number
    often stands where several could.
    """
    if type(value) is dict:
        return {key: _with_lists(item) for key, item in value.items()}
    return [_with_lists(item) for item in value] if type(value) in (list, tuple) else value


def as_config(value: Any) -> Any:
    """Return a dict as a DictConfig that may hold any object, and anything else unchanged."""
    if isinstance(value, dict):
        content = _with_lists(value)
        return require_omegaconf().DictConfig(content=content, flags={"allow_objects": True})
    return value


def sequence_type(value: Any) -> type | None:
    """Return list or tuple for a sequence of Python or of omegaconf, None for anything else."""
    if isinstance(value, (list, tuple)):
        return tuple if isinstance(value, tuple) else list
    omegaconf = require_omegaconf()
    if isinstance(value, omegaconf.ListConfig):
        return list
    tuples = getattr(omegaconf, "TupleConfig", None)  # since 2.4; a ListConfig before
    return tuple if tuples is not None and isinstance(value, tuples) else None
