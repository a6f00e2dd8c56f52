"""One readable table of what did not fit when weights were loaded."""

from collections import defaultdict
from collections.abc import Iterable

__all__ = ["report"]

LIMIT = 40  # rows; a file of another architecture would print hundreds

Misshapen = tuple[str, tuple[int, ...], tuple[int, ...]]


def _grouped(names: Iterable[str]) -> list[str]:
    """Write ``a.weight``, ``a.bias`` as ``a.{bias,weight}``."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        head, _, tail = name.rpartition(".")
        groups[head].append(tail)
    rows = []
    for head, tails in groups.items():
        last = tails[0] if len(tails) == 1 else "{" + ",".join(sorted(tails)) + "}"
        rows.append(f"{head}.{last}" if head else last)
    return sorted(rows)


def _other_classes(misshapen: Iterable[Misshapen]) -> tuple[dict[str, str], list[Misshapen]]:
    """Tell predictors that differ in their number of outputs alone from what does not fit at all.

    Returns:
        layer -> ``91 -> 2`` (outputs in the file and in the model), and the rest.
    """
    layers, rest = {}, []
    for name, theirs, ours in misshapen:
        if theirs and ours and tuple(theirs)[1:] == tuple(ours)[1:]:
            layers[name.rpartition(".")[0] or name] = f"{theirs[0]} -> {ours[0]}"
        else:
            rest.append((name, theirs, ours))
    return layers, rest


def report(
    source: str,
    total: int,
    *,
    missing: Iterable[str],
    unexpected: Iterable[str],
    misshapen: Iterable[Misshapen],
) -> str:
    """Return a table with one row per weight (or layer) that was not loaded.

    Args:
        source: the file, for the headline.
        total: number of entries in the model's state dict.
        missing: names that the model has and the file has not.
        unexpected: names that the file has and the model has not.
        misshapen: (name, shape in the file, shape in the model).

    Returns:
        Several lines; one line where everything fits but predictors of other classes.
    """
    unexpected, misshapen = list(unexpected), list(misshapen)
    other_shape = {name for name, _, _ in misshapen}  # fvcore counts them as missing, too
    missing = [name for name in missing if name not in other_shape]
    loaded = total - len(missing) - len(misshapen)
    lines = [f"Loaded {loaded} of the model's {total} weights from {source}"]
    predictors, rest = _other_classes(misshapen)
    rows = [
        (name, "another shape", f"file {tuple(theirs)}, model {tuple(ours)}: kept the model's")
        for name, theirs, ours in rest
    ]
    rows += [(name, "not in the file", "kept the model's") for name in _grouped(missing)]
    rows += [(name, "not in the model", "ignored") for name in _grouped(unexpected)]
    if predictors:
        changes = ", ".join(f"{layer} ({change})" for layer, change in predictors.items())
        lines[0] += f". New predictors, since the file's are for other classes: {changes}"
    shown = rows[:LIMIT]
    if shown:
        width = max(len(name) for name, _, _ in shown)
        lines += [f"  {name:<{width}}  {what:<16}  {done}" for name, what, done in shown]
    if len(rows) > LIMIT:
        lines.append(f"  ... and {len(rows) - LIMIT} more rows")
    return "\n".join(lines)
