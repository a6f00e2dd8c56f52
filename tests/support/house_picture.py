"""Draws the house for CONTRIBUTING.md: rooms of d2kit as boxes, imports between them as arrows.

python -m tests.support.house_picture docs/pictures/house.svg
"""

import sys
from collections import Counter, defaultdict
from pathlib import Path

from tests.support.code import imports, sources
from tests.test_architecture import RANKS, part

WIDTH, HEIGHT, GAP = 2.05, 0.62, 0.35


def arrows() -> Counter[tuple[str, str]]:
    """Return (room, room it imports) -> number of import statements, the root package left out."""
    found: Counter[tuple[str, str]] = Counter()
    for source in sources("d2kit"):
        here = part(source.module)
        for target, _ in imports(source):
            there = part(target)
            if here and there and here != there and target.startswith("d2kit."):
                found[here, there] += 1
    return found


def places() -> dict[str, tuple[float, float]]:
    """Return the centre of each room: ranks from the ground up."""
    floors: dict[int, list[str]] = defaultdict(list)
    for room, rank in RANKS.items():
        floors[rank].append(room)
    centres = {}
    for level, rank in enumerate(sorted(floors)):
        rooms = floors[rank]
        for k, room in enumerate(rooms):
            centres[room] = ((k - (len(rooms) - 1) / 2) * (WIDTH + GAP), level * 1.25)
    return centres


def main(path: str) -> None:
    """Write the picture."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "d2kit"
    import matplotlib.pyplot as plt

    files, lines = Counter(), Counter()
    for source in sources("d2kit"):
        files[part(source.module)] += 1
        lines[part(source.module)] += len(source.text.splitlines())
    centres = places()
    figure, axes = plt.subplots(figsize=(13, 10))
    for (here, there), count in sorted(arrows().items()):
        (x0, y0), (x1, y1) = centres[here], centres[there]
        style = {"arrowstyle": "-|>", "lw": min(0.4 + count / 25, 2.5), "color": "#5b7a99"}
        bend = f"arc3,rad={0.12 if x0 <= x1 else -0.12}"
        start, end = (x0, y0 - HEIGHT / 2), (x1, y1 + HEIGHT / 2)
        style |= {"connectionstyle": bend, "alpha": 0.45, "shrinkA": 0, "shrinkB": 1}
        axes.annotate("", xy=end, xytext=start, arrowprops=style)
    for room, (x, y) in centres.items():
        corner = (x - WIDTH / 2, y - HEIGHT / 2)
        box = plt.Rectangle(corner, WIDTH, HEIGHT, fc="#fdf6e3", ec="#33475b", lw=1.2, zorder=3)
        axes.add_patch(box)
        axes.text(x, y + 0.1, room, ha="center", va="center", weight="bold", zorder=4)
        size = f"{files[room]} files, {lines[room]:,} lines"
        axes.text(x, y - 0.15, size, ha="center", va="center", fontsize=7.5, zorder=4)
    axes.set_title("d2kit: each room imports only from the floors below it", fontsize=14)
    axes.autoscale_view()
    axes.margins(0.03)
    axes.axis("off")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:] or [str(Path(__file__).parents[2] / "docs/pictures/house.svg")])
