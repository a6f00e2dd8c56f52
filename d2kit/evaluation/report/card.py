"""A model card: what a run made, from what, and how well it works, as Markdown."""

from __future__ import annotations

import math

from d2kit.evaluation.report.figures import ERRORS, Figures
from d2kit.evaluation.report.page import TASK_NAMES, number, schedule
from d2kit.evaluation.report.run_files import Dataset, Run

__all__ = ["CARD_MARK", "make_card"]

CARD_MARK = "<!-- written by `d2kit report`; remove this line to keep your own text -->"


def make_card(run: Run, figures: Figures | None) -> str:
    """Write the card of a run.

    Args:
        run: what lies in its folder.
        figures: of its test set; None where no results are stored.
    """
    parts = [CARD_MARK, f"# {_plain(run.name)}", _what(run)]
    if figures is not None:
        parts += ["## Accuracy", _accuracy(run, figures), "## Limits", _limits(figures)]
    parts += ["## Data", _data(run), "## Training", _rows(schedule(run))]
    parts += ["## Machine and versions", _rows(list(run.machine.items())), "## Use", _use(run)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _plain(text: str) -> str:
    """Take the meaning of Markdown and HTML from a text of others, and its line breaks."""
    text = " ".join(str(text).split())
    for letter in "\\`*_[]<>|#!":
        text = text.replace(letter, "\\" + letter if letter not in "<>" else f"&#{ord(letter)};")
    return text


def _rows(rows: list[tuple[str, str]]) -> str:
    return "\n".join(f"- {_plain(name)}: {_plain(value)}" for name, value in rows)


def _what(run: Run) -> str:
    if run.cfg is None:
        return "A model trained with d2kit; its config was not kept."
    names = ", ".join(_plain(one.name) for one in run.train)
    return (
        f"{run.cfg.MODEL.META_ARCHITECTURE} ({run.cfg.MODEL.BACKBONE.NAME}), trained with d2kit on "
        f"{names}. All results with pictures: report.html beside this file."
    )


def _accuracy(run: Run, figures: Figures) -> str:
    lines = ["| | AP | 95 % interval | AP50 | AP75 |", "|---|---|---|---|---|"]
    for task, values in figures.ap.items():
        low, high = figures.intervals.get(task, (math.nan, math.nan))
        cells = [number(values["AP"]), f"{number(low)} to {number(high)}"]
        cells += [number(values["AP50"]), number(values["AP75"])]
        lines.append(f"| {TASK_NAMES[task]} | {' | '.join(cells)} |")
    lines += ["", "| class | objects | AP of boxes | best score |", "|---|---|---|---|"]
    single = len(figures.names) == 1
    for name, count in zip(figures.names, figures.truths, strict=True):
        ap = figures.ap["bbox"].get("AP" if single else f"AP-{name}", math.nan)
        best = figures.thresholds.get(name)
        score = number(best.score, 2) if best else "–"
        lines.append(f"| {_plain(name)} | {count} | {number(ap)} | {score} |")
    tests = ", ".join(_plain(one.name) for one in run.test)
    lines += ["", f"Measured on {tests}; intervals by drawing {figures.over} again."]
    return "\n".join(lines)


def _limits(figures: Figures) -> str:
    lines = ["What this measurement shows, and no more:"]
    found = figures.tide.get("bbox")
    if found:
        kind = max(ERRORS, key=lambda k: float(found["delta_ap"][k]))
        cost = 100 * found["delta_ap"][kind]
        lines.append(f"- most AP50 is lost to objects of the kind: {ERRORS[kind]} ({cost:.1f})")
    if figures.sizes:
        label, count, share = min(figures.sizes, key=lambda row: row[2])
        lines.append(f"- of {count} objects of {label}, {100 * share:.0f} % are found")
    few = [n for n, c in zip(figures.names, figures.truths, strict=True) if c < 30]
    if few:
        names = ", ".join(map(_plain, few))
        lines.append(f"- fewer than 30 test objects, so that their AP says little: {names}")
    if figures.over == "images":
        lines.append("- one video, or pictures without one: other places were not tested")
    return "\n".join(lines)


def _data(run: Run) -> str:
    def line(role: str, one: Dataset) -> str:
        count = f"{one.images:,} images, {sum(one.instances.values()):,} instances"
        digest = f"SHA-256 of the annotations `{one.digest}`" if one.digest else "no file found"
        return f"- {role} {_plain(one.name)}: {count if one.images else 'unknown'}; {digest}"

    rows = [line("trained on", one) for one in run.train]
    return "\n".join(rows + [line("tested on", one) for one in run.test]) or "Unknown."


def _use(run: Run) -> str:
    weights = "model_final.pth"
    if (run.folder / "model_best.pth").exists():
        weights = "model_best.pth"
    return (
        "```bash\n"
        f"d2kit predict --input PICTURES --config-file config.yaml MODEL.WEIGHTS {weights}\n"
        "```"
    )
