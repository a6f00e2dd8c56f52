"""Which of Detectron2's public names d2kit leaves out, by the drop-in's tables."""

from d2kit.as_detectron2.redirect import ABSENT, ABSENT_NAMES


def out_of_scope(path: str) -> str:
    """Return why a public path need not resolve, or an empty string."""
    parts = path.split(".")[1:]
    places = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return next((why for p in places if (why := ABSENT.get(p) or ABSENT_NAMES.get(p))), "")
