"""The page of a report: one HTML file that needs nothing else."""

from __future__ import annotations

import html
import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from d2kit.evaluation.groups import OVERALL
from d2kit.evaluation.report.figures import ERRORS, IOU, STYLE, Figures, Series, bars, lines
from d2kit.evaluation.report.pictures import Pair
from d2kit.evaluation.report.run_files import Dataset, Run
from d2kit.utils.text import html_text, one_line

__all__ = ["MARK", "document", "make_run_page", "number", "table"]


CARD_MARK = "<!-- written by `d2kit report`; remove this line to keep your own text -->"


def make_card(run: Run, figures: Figures | None) -> str:
    """Write the card of a run.

    Args:
        run: what lies in its folder.
        figures: of its test set; None where no results are stored.
    """
    parts = [CARD_MARK, f"# {_plain(run.name)}", _what(run)]
    if figures is not None:
        parts += ["## Accuracy", _accuracy_lines(run, figures), "## Limits", _limits(figures)]
    parts += ["## Data", _data(run), "## Training", _rows(schedule(run))]
    parts += ["## Machine and versions", _rows(list(run.machine.items())), "## Use", _use(run)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _plain(text: str) -> str:
    """Take the meaning of Markdown and HTML from a text of others, and its line breaks."""
    text = one_line(" ".join(str(text).split()), None, shown=True)
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


def _accuracy_lines(run: Run, figures: Figures) -> str:
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
    folder = shlex.quote(one_line(str(run.folder)))
    return f"```bash\nd2kit predict --config-file {folder} --input PICTURES\n```"


MARK = '<meta name="generator" content="d2kit report">'
"""Tells a page that may be written over from a file of somebody else."""
TASK_NAMES = {"bbox": "boxes", "segm": "masks", "keypoints": "keypoints"}
MOST_CURVES = 7
MOST_IN_MATRIX = 15
MOST_POINTS = 400
"""Points of a loss curve; of more, the mean of equal stretches is drawn."""


def number(value: float | None, digits: int = 1) -> str:
    """Return a number as text; "–" where nothing defines it."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], kind: str = "") -> str:
    """Return a table; every cell is escaped.

    Args:
        head: of the columns.
        rows: cells, as text by ``str``.
        kind: class of the style sheet.
    """
    top = "".join(f"<th>{html_text(str(h))}</th>" for h in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{html_text(str(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    name = f' class="{kind}"' if kind else ""
    return f'<div class="scroll"><table{name}><tr>{top}</tr>{body}</table></div>'


def document(title: str, body: str) -> str:
    """Return a whole page."""
    name = html_text(title)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'{MARK}<link rel="icon" href="data:,"><title>{name}</title>'
        f"<style>{STYLE}</style></head><body><main>{body}</main></body></html>\n"
    )


def make_run_page(
    run: Run,
    figures: Figures | None,
    pictures: Mapping[str, Sequence[Pair]],
    note: str = "",
) -> str:
    """Lay out the page of a run.

    Args:
        run: what lies in its folder.
        figures: of its test set; None where no results are stored.
        pictures: ``worst``, ``best`` and ``labels``.
        note: why something is missing.
    """
    sections: list[tuple[str, str, str]] = []
    if figures is not None:
        sections += [
            ("accuracy", "Accuracy", _accuracy(figures)),
            ("errors", "Errors", _errors(figures)),
            ("scores", "Scores", _scores(figures)),
        ]
        for key, title in (("worst", "Worst pictures"), ("best", "Best pictures")):
            if pictures.get(key):
                sections.append((key, title, _pairs(pictures[key])))
        if figures.label_errors:
            sections.append(("labels", "Probable label errors", _label_errors(figures, pictures)))
    if run.rows:
        sections.append(("training", "Training", _training(run.rows)))
    sections.append(("origin", "What was trained on", _origin(run)))
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in sections)
    body = "".join(f'<h2 id="{key}">{title}</h2>{part}' for key, title, part in sections)
    test = ", ".join(one.name for one in run.test) or "no test set"
    head = (
        f"<h1>{html_text(run.name)}</h1>"
        f'<div class="dim">{html_text(_model_of(run))} · evaluated on {html_text(test)} · '
        f"{html_text(run.machine.get('date', ''))}</div>"
    )
    warning = f'<p class="note">{html_text(note)}</p>' if note else ""
    tiles = _tiles(figures) if figures is not None else ""
    return document(f"{run.name}: results", f"{head}{warning}{tiles}<nav>{links}</nav>{body}")


def _model_of(run: Run) -> str:
    if run.cfg is None:
        return "model unknown (no config.yaml)"
    model = run.cfg.MODEL
    return f"{model.META_ARCHITECTURE}, {model.BACKBONE.NAME}"


def _tiles(figures: Figures) -> str:
    tiles = []
    for task, values in figures.ap.items():
        low, high = figures.intervals.get(task, (math.nan, math.nan))
        tiles.append(
            (f"AP of {TASK_NAMES[task]}", number(values["AP"]), f"{number(low)} to {number(high)}")
        )
    best = figures.thresholds.get("all")
    if best is not None:
        at = f"at score {number(figures.threshold, 2)}"
        tiles.append(("found", f"{number(100 * best.recall, 0)} %", f"of the objects, {at}"))
        tiles.append(("right", f"{number(100 * best.precision, 0)} %", f"of the detections, {at}"))
    boxes = "".join(
        f'<div class="tile">{html_text(name)}<b>{html_text(value)}</b>'
        f"<small>{html_text(text)}</small></div>"
        for name, value, text in tiles
    )
    return f'<div class="tiles">{boxes}</div>'


def _card(title: str, content: str, wide: bool = False) -> str:
    kind = "card wide" if wide else "card"
    return f'<div class="{kind}"><h3>{html_text(title)}</h3>{content}</div>'


def _cards(parts: Sequence[str]) -> str:
    return f'<div class="cards">{"".join(p for p in parts if p)}</div>'


def _interval(pair: tuple[float, float] | None) -> str:
    low, high = pair or (math.nan, math.nan)
    return f"{number(low)} to {number(high)}" if math.isfinite(low) else "–"


def _accuracy(figures: Figures) -> str:
    metrics = ["AP", "AP50", "AP75", "APs", "APm", "APl"]
    rows = [
        [TASK_NAMES[task], *(number(v.get(m)) for m in metrics), _interval(figures.intervals[task])]
        if task in figures.intervals
        else [TASK_NAMES[task], *(number(v.get(m)) for m in metrics), "–"]
        for task, v in figures.ap.items()
    ]
    how = (
        f"<p><small>Interval: 95 %, by drawing {figures.over} again. s, m, l: objects below 32², "
        "below 96², and of more pixels.</small></p>"
    )
    parts = [_card("AP", table(["", *metrics, "interval"], rows) + how, wide=True)]
    parts.append(_card("Per class", _class_table(figures), wide=True))
    if figures.groups:
        parts.append(_card("Per video (boxes)", _group_table(figures)))
    if figures.curves:
        parts.append(_card("Precision and recall (boxes, IoU 0.5)", _curves(figures)))
    if figures.sizes:
        parts.append(
            _card(
                "Found, by size (square root of the area)",
                bars(
                    [label for label, _, _ in figures.sizes],
                    [100 * share for _, _, share in figures.sizes],
                    unit=" %",
                    title="Share of the objects found, by size",
                    notes=[f"of {count}" for _, count, _ in figures.sizes],
                    highest=100,
                ),
            )
        )
    return _cards(parts)


def _class_table(figures: Figures) -> str:
    tasks = list(figures.ap)
    single = len(figures.names) == 1
    rows = []
    for name, count in zip(figures.names, figures.truths, strict=True):
        aps = [number(figures.ap[t].get("AP" if single else f"AP-{name}")) for t in tasks]
        best = figures.thresholds.get(name)
        rest = (
            [number(best.score, 2), number(100 * best.precision, 0), number(100 * best.recall, 0)]
            if best
            else ["–"] * 3
        )
        interval = figures.intervals.get("bbox") if single else figures.class_intervals.get(name)
        rows.append([name, count, *aps, _interval(interval), *rest])
    head = ["class", "objects", *(f"AP {TASK_NAMES[t]}" for t in tasks), "interval"]
    text = (
        "<p><small>Best score: where F1 is highest, IoU 0.5; precision and recall there, in "
        "percent. Interval: of the boxes, by drawing images again.</small></p>"
    )
    return table([*head, "best score", "precision", "recall"], rows) + text


def _group_table(figures: Figures) -> str:
    rows = [
        [name, g["images"], number(g["AP"]), number(g["AP50"]), _interval((g["low"], g["high"]))]
        for name, g in sorted(figures.groups.items(), key=lambda item: item[0] == OVERALL)
    ]
    return table(["video", "images", "AP", "AP50", "interval"], rows)


def _curves(figures: Figures) -> str:
    recall = np.linspace(0, 1, 101)
    aps = sorted(figures.curves, key=lambda n: float(figures.curves[n].mean()))
    shown = aps[:MOST_CURVES]
    series = [Series(name, recall, figures.curves[name]) for name in shown]
    if len(aps) > 1:
        mean = np.mean([figures.curves[name] for name in aps], axis=0)
        series.append(Series(f"mean of {len(aps)}", recall, mean, dashed=True))
    chart = lines(
        series,
        x_label="recall",
        y_label="precision",
        title="Precision against recall",
        x_range=(0, 1),
        y_range=(0, 1),
    )
    left_out = len(aps) - len(shown)
    more = f"<p><small>The {len(shown)} weakest; {left_out} more are not drawn.</small></p>"
    return chart + (more if left_out else "")


def _errors(figures: Figures) -> str:
    parts = []
    for task, found in figures.tide.items():
        kinds = sorted(ERRORS, key=lambda kind: -found["delta_ap"][kind])
        chart = bars(
            [ERRORS[kind] for kind in kinds],
            [100 * found["delta_ap"][kind] for kind in kinds],
            unit="",
            title="AP lost by kind of error",
            notes=[f"({found['counts'][kind]})" for kind in kinds],
        )
        text = (
            "<p><small>AP50 that would be gained if this kind of error alone were gone, and how "
            "many there are (TIDE, Bolya et al. 2020).</small></p>"
        )
        parts.append(_card(f"What the errors cost: {TASK_NAMES[task]}", chart + text))
    parts.append(_card(f"Confusion, at score {number(figures.threshold, 2)}", _confusion(figures)))
    return _cards(parts)


def _confusion(figures: Figures) -> str:
    matrix, names = figures.confusion, [*figures.names, "nothing"]
    if len(figures.names) > MOST_IN_MATRIX:
        wrong = matrix.copy()
        np.fill_diagonal(wrong, 0)
        order = np.argsort(-wrong, axis=None)[:20]
        rows = [
            [names[i], names[j], int(wrong[i, j])]
            for i, j in (np.unravel_index(flat, wrong.shape) for flat in order)
            if wrong[i, j]
        ]
        return table(["truth", "found as", "times"], rows)
    top = "".join(f"<th>{html_text(n)}</th>" for n in names)
    rows_text = []
    for name, row in zip(names, matrix, strict=True):
        total = int(row.sum()) or 1
        cells = "".join(
            f'<td style="background:rgba(var(--heat),{0.65 * int(v) / total:.2f})">{int(v)}</td>'
            for v in row
        )
        rows_text.append(f"<tr><th>{html_text(name)}</th>{cells}</tr>")
    return (
        f'<div class="scroll"><table class="matrix"><tr><th>truth \\ found</th>{top}</tr>'
        f"{''.join(rows_text)}</table></div><p><small>Boxes, IoU {IOU}. Last column: missed; "
        "last row: background taken for an object.</small></p>"
    )


def _scores(figures: Figures) -> str:
    bins = [b for b in figures.calibration["bins"] if b["count"]]
    confidence, accuracy = _columns(bins, "avg_confidence", "avg_accuracy")
    chart = lines(
        [
            Series("found", confidence, accuracy),
            Series("ideal", [0, 1], [0, 1], dashed=True),
        ],
        x_label="score",
        y_label="share that is right",
        title="Calibration of the scores",
        x_range=(0, 1),
        y_range=(0, 1),
    )
    gap = figures.calibration["ece"]
    reliable = "surer than it is right" if _overconfident(bins) else "righter than it is sure"
    text = (
        f"<p><small>Mean gap {100 * gap:.1f} percentage points (ECE, boxes, IoU 0.5); on the "
        f"whole the model is {reliable}.</small></p>"
    )
    counts = bars(
        [f"{b['bin_lower']:.1f} to {b['bin_upper']:.1f}" for b in bins],
        [float(b["count"]) for b in bins],
        unit="",
        title="Detections by score",
    ).replace(".0</span>", "</span>")
    return _cards([_card("Calibration", chart + text), _card("Detections by score", counts)])


def _columns(rows: Sequence[Mapping[str, Any]], *keys: str) -> list[list[float]]:
    return [[float(row[key]) for row in rows] for key in keys]


def _overconfident(bins: Sequence[Mapping[str, Any]]) -> bool:
    return bool(sum(b["count"] * (b["avg_confidence"] - b["avg_accuracy"]) for b in bins) > 0)


def _pairs(pairs: Sequence[Pair]) -> str:
    key = (
        '<p class="key dim">Left the truth, right the prediction.'
        '<i style="background:#1a73f2"></i>right<i style="background:#ff7300"></i>missed or wrong'
        "</p>"
    )
    return key + f'<div class="pairs">{"".join(map(_figure, pairs))}</div>'


def _figure(pair: Pair) -> str:
    name = html_text(pair.name)
    panes = "".join(
        f'<div><img alt="{kind} of {name}" src="{url}"></div>'
        for kind, url in (("truth", pair.truth), ("prediction", pair.prediction))
        if url
    )
    missing = "" if panes else " · the picture could not be read"
    return (
        f'<figure><div class="panes">{panes}</div><figcaption>{name}: '
        f"{html_text(pair.caption)}{missing}</figcaption></figure>"
    )


def _label_errors(figures: Figures, pictures: Mapping[str, Sequence[Pair]]) -> str:
    rows = [
        [
            f"image {e['image_id']}",
            f"annotation {e['gt_id']}: {e['gt_category']}"
            if e.get("gt_id") is not None
            else "no annotation",
            f"{e['dt_category']} ({100 * e['dt_score']:.0f} %)",
            number(e.get("iou"), 2),
        ]
        for e in figures.label_errors[:15]
    ]
    text = (
        f"<p>{len(figures.label_errors)} detections of a score above 0.5 contradict an annotation "
        "or stand where there is none. Some are errors of the model: look before changing.</p>"
    )
    drawn = _pairs(pictures["labels"]) if pictures.get("labels") else ""
    head = ["where", "annotated", "found", "IoU"]
    return (
        text + _card("The most certain", table(head, rows, "words"), wide=True) + "<p></p>" + drawn
    )


def _training(rows: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    names = sorted({k for row in rows for k in row if "loss" in k and "/" not in k})
    total = _series(rows, "total_loss", "total loss")
    validation = _series(rows, "validation/total_loss", "validation")
    drawn = [s for s in (total, validation) if len(s.x)]
    if drawn:
        parts.append(_card("Loss", _loss_chart(drawn)))
    losses = [_series(rows, n, n) for n in names if n != "total_loss"]
    losses = [one for one in losses if len(one.x)]
    if losses:
        parts.append(_card("Its parts", _loss_chart(losses[:8], logarithmic=True)))
    aps = [_series(rows, f"{t}/AP", TASK_NAMES[t]) for t in TASK_NAMES]
    aps = [one for one in aps if len(one.x) > 1]
    if aps:
        chart = lines(aps, x_label="iteration", y_label="AP", title="AP while it learns")
        parts.append(_card("AP while it learns", chart))
    rate = _series(rows, "lr", "learning rate")
    if len(rate.x) > 1:
        chart = lines([rate], x_label="iteration", y_label="rate", title="Learning rate")
        parts.append(_card("Learning rate", chart))
    return _cards(parts) if parts else "<p>metrics.json holds no losses.</p>"


def _series(rows: Sequence[Mapping[str, Any]], key: str, name: str) -> Series:
    data = np.array(
        [(r["iteration"], r[key]) for r in rows if isinstance(r.get(key), int | float)], np.float64
    ).reshape(-1, 2)
    if len(data) > MOST_POINTS:
        parts = np.array_split(data, MOST_POINTS)
        data = np.array([part.mean(0) for part in parts])
    return Series(name, data[:, 0], data[:, 1])


def _loss_chart(series: Sequence[Series], logarithmic: bool = False) -> str:
    return lines(
        series,
        x_label="iteration",
        y_label="loss (logarithmic)" if logarithmic else "loss",
        title="Losses of the training",
        y_range=None if logarithmic else (0, max(float(np.nanmax(s.y)) for s in series) or 1.0),
        y_logarithmic=logarithmic,
    )


def _origin(run: Run) -> str:
    rows = [_dataset_row("trained on", one) for one in run.train]
    rows += [_dataset_row("tested on", one) for one in run.test]
    head = ["", "dataset", "images", "instances", "SHA-256 of the annotations"]
    data = table(head, rows, "words") if rows else "<p>No config.yaml: the data are unknown.</p>"
    machine = table(["", ""], run.machine.items(), "words")
    parts = [_card("Data", data, wide=True), _card("Machine and versions", machine)]
    if run.cfg is not None:
        parts.append(_card("Schedule", table(["", ""], schedule(run), "words")))
        dump: Callable[[], str] = run.cfg.dump
        text = f"<details><summary>config.yaml</summary><pre>{html.escape(dump())}</pre></details>"
        parts.append(f'<div class="card wide">{text}</div>')
    return _cards(parts)


def schedule(run: Run) -> list[tuple[str, str]]:
    """Return the choices of the config that a reader asks for first."""
    if run.cfg is None:
        return []
    solver, inputs = run.cfg.SOLVER, run.cfg.INPUT
    done = max((int(row["iteration"]) for row in run.rows), default=0)
    return [
        ("iterations", f"{solver.MAX_ITER:,} ({done:,} in metrics.json)"),
        ("images per iteration", str(solver.IMS_PER_BATCH)),
        ("optimizer", f"{solver.get('OPTIMIZER', 'SGD')}, rate {solver.BASE_LR:g}"),
        ("precision", solver.AMP.get("PRECISION", "mixed") if solver.AMP.ENABLED else "float32"),
        ("short side, training", f"{tuple(inputs.MIN_SIZE_TRAIN)} px"),
        ("short side, test", f"{inputs.MIN_SIZE_TEST} px"),
        ("started from", str(run.cfg.MODEL.WEIGHTS) or "random weights"),
        ("seed", str(run.cfg.SEED)),
    ]


def _dataset_row(role: str, one: Dataset) -> list[str]:
    counts = sorted(one.instances.items(), key=lambda item: -item[1])
    text = ", ".join(f"{name} {count:,}" for name, count in counts[:12])
    more = f" and {len(counts) - 12} more classes" if len(counts) > 12 else ""
    images = f"{one.images:,}" if one.images else "–"
    return [role, one.name, images, text + more or "–", one.digest or "no annotation file found"]
