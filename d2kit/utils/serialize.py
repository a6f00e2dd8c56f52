"""Objects that plain pickle refuses, on their way to another process of the same run."""

from typing import Any

__all__ = ["PicklableWrapper"]


def _same(value: Any) -> Any:
    return value


class PicklableWrapper:
    """Wraps an object so that closures and lambdas can be sent to workers.

    Pickling goes through cloudpickle where it is installed; the receiver gets the object itself,
    without the wrapper. Attributes and calls are those of the object.

    Args:
        obj: the object, for example a dataset mapper defined inside a function.
    """

    def __init__(self, obj: Any) -> None:
        if isinstance(obj, PicklableWrapper):
            obj = obj._obj
        self._obj: Any = obj

    def __reduce__(self) -> tuple[Any, tuple[Any]]:
        try:
            import cloudpickle
        except ImportError:
            return _same, (self._obj,)
        return cloudpickle.loads, (cloudpickle.dumps(self._obj),)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the object."""
        return self._obj(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "_obj":  # not set yet, while being copied
            raise AttributeError(name)
        return getattr(self._obj, name)
