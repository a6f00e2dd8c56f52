"""Which methods a subclass replaces, so that a faster path does not pass them by."""

__all__ = ["overrides"]


def overrides(obj: object, base: type, *names: str) -> bool:
    """Tell whether the class of `obj` has its own version of one of the methods.

    Asked once, when the object is made: a path that works on all images and levels at once is
    taken only where no subclass has replaced one of the steps that it joins.

    Args:
        obj: an object of `base` or a subclass.
        base: the class whose path it is.
        names: methods of `base`.
    """
    return any(getattr(type(obj), name) is not getattr(base, name) for name in names)
