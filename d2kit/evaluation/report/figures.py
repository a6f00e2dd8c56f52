"""The figures of a report: what hotcoco says of the stored results of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from d2kit.evaluation.backend import load_ground_truth
from d2kit.evaluation.coco_results import derive_results
from d2kit.evaluation.groups import OVERALL, GroupAP, ap_by_group
from d2kit.utils.text import html_text

if TYPE_CHECKING:
    from pycocotools.coco import COCO

__all__ = ["ERRORS", "Figures", "Threshold", "evaluate_results", "interval_of", "prepare"]


STYLE = """
:root{color-scheme:light dark;--page:#f5f6f8;--card:#fff;--ink:#1c2430;--dim:#5b6675;--rule:#dde2e9;
--accent:#1a6fd6;--bad:#c2410c;--c0:#1a6fd6;--c1:#d1495b;--c2:#2f855a;--c3:#8d5a97;--c4:#b7791f;
--c5:#0f8b8d;--c6:#7a6c5d;--c7:#d53f8c;--heat:26,111,214}
@media(prefers-color-scheme:dark){:root{--page:#12161c;--card:#1b212a;--ink:#e6eaf0;--dim:#9aa7b8;
--rule:#313a47;--accent:#6cb0ff;--bad:#ff9a5c;--c0:#6cb0ff;--c1:#ff8896;--c2:#68d391;--c3:#c9a0d4;
--c4:#f6c667;--c5:#5fd3d5;--c6:#bfae9b;--c7:#f687b3;--heat:108,176,255}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1320px;margin:0 auto;padding:20px 16px 48px}
h1{font-size:26px;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:19px;margin:36px 0 10px}h3{font-size:15px;margin:0 0 8px}
p{margin:6px 0;max-width:78ch}small,.dim{color:var(--dim);font-size:13px}a{color:var(--accent)}
code{font-size:13px;overflow-wrap:anywhere}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;margin:12px 0;font-size:14px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:16px 0}
.tile,.card{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:14px}
.tile b{display:block;font-size:26px;line-height:1.2;font-variant-numeric:tabular-nums}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,390px),1fr));gap:14px;
align-items:start}
.card{min-width:0}.wide{grid-column:1/-1}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;
font-size:14px}
th,td{padding:4px 14px 4px 0;text-align:right;border-bottom:1px solid var(--rule);
white-space:nowrap}
th{font-weight:600;color:var(--dim)}tr:last-child td{border-bottom:0}
th:first-child,td:first-child{text-align:left;white-space:normal;overflow-wrap:anywhere;
min-width:7em;max-width:24em}
table.words td,table.words th{text-align:left;white-space:normal;overflow-wrap:anywhere;
vertical-align:top}
.matrix td,.matrix th{padding:6px 10px;text-align:center;border:1px solid var(--rule)}
.matrix th,.matrix th:first-child{min-width:5em;max-width:10em;
white-space:normal;overflow-wrap:break-word}
.matrix tr:last-child td{border-bottom:1px solid var(--rule)}
svg{display:block;width:100%;height:auto;max-width:520px}
svg text{fill:var(--dim);font-size:12px}.middle{text-anchor:middle}.end{text-anchor:end}
.grid{stroke:var(--rule);fill:none}.axis{stroke:var(--dim);fill:none}
.line{fill:none;stroke-width:2;stroke-linejoin:round}
path.reference{stroke:var(--dim);stroke-dasharray:4 4;stroke-width:1.2}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:13px;margin-top:6px}
.legend span{overflow-wrap:anywhere}
.legend i{display:inline-block;width:14px;height:3px;margin:0 6px 4px 0;border-radius:2px}
i.reference{background:var(--dim)}
.bar{display:grid;grid-template-columns:minmax(6em,34%) 1fr minmax(8.5em,auto);gap:10px;
align-items:center;padding:3px 0;font-size:14px}
.bar span:first-child{overflow-wrap:anywhere}.bar span:last-child{font-variant-numeric:tabular-nums}
.track{background:var(--rule);border-radius:4px;height:10px;overflow:hidden}
.track i{display:block;height:100%;background:var(--accent)}
.pairs{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,560px),1fr));gap:14px}
figure{margin:0;background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:10px}
.panes{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,230px),1fr));gap:8px}
.panes img{display:block;width:100%;border-radius:5px}.panes span{font-size:13px;color:var(--dim)}
figcaption{font-size:13px;margin-top:6px;overflow-wrap:anywhere}
.key i{display:inline-block;width:11px;height:11px;border-radius:3px;margin:0 5px 0 12px}
.note{border-left:3px solid var(--bad);padding-left:10px}
pre{overflow:auto;max-height:420px;font-size:12.5px;line-height:1.45}
summary{cursor:pointer;font-weight:600}
""" + "".join(f".c{i}{{stroke:var(--c{i})}}i.c{i}{{background:var(--c{i})}}" for i in range(8))


WIDTH, HEIGHT = 400, 250
"""Of the drawing, in the units of its text: 12 units high, 10 pixels on a telephone."""
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 12, 38
COLORS = 8
"""Classes ``c0`` ... ``c7`` of the style sheet."""


@dataclass
class Series:
    """A line of a chart: its name and (N,) values of both axes; dashed where it is a reference."""

    name: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    dashed: bool = False


def lines(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    title: str,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    y_logarithmic: bool = False,
) -> str:
    """Draw lines with a legend below.

    Args:
        series: at least one, in the order of the colours; values that are not finite are gaps.
        x_label: below the axis.
        y_label: beside the axis.
        title: read by screen readers, and shown on hover.
        x_range: lowest and highest value; None: of the data.
        y_range: as `x_range`.
        y_logarithmic: whether y is drawn on a logarithmic scale (values above 0).
    """
    points = [
        (np.asarray(one.x, np.float64).reshape(-1), np.asarray(one.y, np.float64).reshape(-1))
        for one in series
    ]
    if y_logarithmic:
        points = [(x, np.log10(np.where(y > 0, y, np.nan))) for x, y in points]
    x_low, x_high = x_range or _range([x for x, _ in points])
    y_low, y_high = y_range or _range([y for _, y in points])
    parts = [_axes((x_low, x_high), (y_low, y_high), x_label, y_label, y_logarithmic)]
    for index, (one, (x, y)) in enumerate(zip(series, points, strict=True)):
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        path, pen = [], "M"
        for a, b in zip(across.tolist(), down.tolist(), strict=True):
            if not (np.isfinite(a) and np.isfinite(b)):
                pen = "M"
                continue
            path.append(f"{pen}{a:.1f} {b:.1f}")
            pen = "L"
        style = "reference" if one.dashed else f"c{index % COLORS}"
        text = html_text(one.name)
        parts.append(f'<path class="line {style}" d="{"".join(path)}"><title>{text}</title></path>')
    return _svg(parts, title) + _legend(series)


def bars(
    names: Sequence[str],
    values: Sequence[float],
    *,
    unit: str,
    title: str,
    notes: Sequence[str] = (),
    highest: float | None = None,
) -> str:
    """Draw horizontal bars with their values.

    Args:
        names: one per bar.
        values: not below 0; nan is drawn as an empty bar.
        unit: behind each value.
        title: read by screen readers.
        notes: a few words behind each value.
        highest: value of a full bar; None: the largest.
    """
    top = highest or max((v for v in values if np.isfinite(v)), default=0) or 1
    rows = []
    for index, (name, value) in enumerate(zip(names, values, strict=True)):
        known = bool(np.isfinite(value))
        share = 100 * min(1.0, value / top) if known else 0
        note = f" <small>{html_text(notes[index])}</small>" if notes else ""
        figure = f"{value:.1f}{unit}" if known else "none"
        rows.append(
            f'<div class="bar"><span>{html_text(name)}</span>'
            f'<span class="track"><i style="width:{share:.1f}%"></i></span>'
            f"<span>{figure}{note}</span></div>"
        )
    label = html_text(title)
    return f'<div class="bars" role="img" aria-label="{label}">{"".join(rows)}</div>'


def _range(values: Sequence[np.ndarray]) -> tuple[float, float]:
    data = np.concatenate([np.zeros(0), *values])
    data = data[np.isfinite(data)]
    if not len(data):
        return 0.0, 1.0
    low, high = float(data.min()), float(data.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float) -> list[float]:
    """Return three to six round numbers inside a range."""
    rough = (high - low) / 5
    power = 10.0 ** np.floor(np.log10(rough))
    step = float(power * next(m for m in (1, 2, 5, 10) if power * m >= rough * 0.999))
    first = np.ceil(low / step - 1e-9) * step
    return [float(t) for t in np.arange(first, high + step * 1e-6, step)]


def _axes(
    x: tuple[float, float], y: tuple[float, float], x_label: str, y_label: str, logarithmic: bool
) -> str:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for tick in _ticks(*x):
        at = LEFT + (tick - x[0]) / (x[1] - x[0]) * (right - LEFT)
        parts.append(f'<text x="{at:.1f}" y="{bottom + 16}" class="middle">{_number(tick)}</text>')
    for tick in _ticks(*y):
        at = bottom - (tick - y[0]) / (y[1] - y[0]) * (bottom - TOP)
        value = _number(10**tick if logarithmic else tick)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{right}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" class="end">{value}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>')
    middle = (LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" class="middle">{html_text(x_label)}</text>')
    parts.append(
        f'<text transform="translate(11 {(TOP + bottom) / 2}) rotate(-90)" class="middle">'
        f"{html_text(y_label)}</text>"
    )
    return "".join(parts)


def _number(value: float) -> str:
    if abs(value) < 1e-12:
        return "0"
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.3g}"


def _svg(parts: Sequence[str], title: str) -> str:
    label = html_text(title)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{label}</title>'
        f"{''.join(parts)}</svg>"
    )


def _legend(series: Sequence[Series]) -> str:
    if len(series) < 2:
        return ""
    entries = "".join(
        f'<span><i class="{"reference" if s.dashed else f"c{i % COLORS}"}"></i>'
        f"{html_text(s.name)}</span>"
        for i, s in enumerate(series)
    )
    return f'<div class="legend">{entries}</div>'


TASKS = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}
ERRORS = {
    "Cls": "wrong class",
    "Loc": "badly placed",
    "Both": "wrong class and badly placed",
    "Dupe": "found twice",
    "Bkg": "background taken for an object",
    "Miss": "missed",
}
"""hotcoco's names of TIDE's error kinds -> ours."""
IOU = 0.5
SAMPLES = 200
MOST_CLASSES = 20
"""Of more classes, no interval per class is computed: each costs a bootstrap of its own."""
MOST_GROUPS = 60
SIDES = (0, 16, 32, 64, 96, 192, math.inf)
"""Edges of the bins of object size: square root of the area, pixels."""


@dataclass
class Threshold:
    """The score at which F1 is highest, and what it gives there, all in [0, 1]; nan: undefined."""

    score: float = math.nan
    precision: float = math.nan
    recall: float = math.nan
    f1: float = math.nan


@dataclass
class Figures:
    """What is shown of one test set.

    Attributes:
        names: K classes, by rising category id.
        truths: K, annotations that are no crowd.
        ap: task -> metric -> percent, see `COCOEvaluator`.
        intervals: task -> (low, high) of AP, percent.
        over: what was drawn again for the intervals, ``images`` or ``videos``.
        class_intervals: class -> (low, high) of box AP, percent.
        groups: video -> figures, of boxes; empty where there is one video only.
        curves: class -> (101,) precision at recall 0, 0.01, ... 1, boxes, IoU 0.5.
        thresholds: class -> `Threshold`; ``all`` for all together.
        confusion: (K + 1, K + 1) truth by prediction at the threshold of all; background last.
        tide: task -> hotcoco's ``tide_errors``.
        calibration: hotcoco's ``calibration``.
        sizes: (label, objects, share found at the threshold of all in [0, 1]) by size.
        errors: image id -> (right, wrong, missed) at the threshold of all.
        label_errors: hotcoco's candidates, most certain first.
        right: indices of results that match an annotation of their class.
        found: annotation ids that are found at the threshold of all.
    """

    names: list[str]
    truths: list[int]
    ap: dict[str, dict[str, float]] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    over: str = "images"
    class_intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    groups: dict[str, GroupAP] = field(default_factory=dict)
    curves: dict[str, np.ndarray] = field(default_factory=dict)
    thresholds: dict[str, Threshold] = field(default_factory=dict)
    confusion: np.ndarray = field(default_factory=lambda: np.zeros((1, 1), np.int64))
    tide: dict[str, dict[str, Any]] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    sizes: list[tuple[str, int, float]] = field(default_factory=list)
    errors: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    label_errors: list[dict[str, Any]] = field(default_factory=list)
    right: set[int] = field(default_factory=set)
    found: set[int] = field(default_factory=set)

    @property
    def threshold(self) -> float:
        """Score at which pictures, confusion and sizes count; 0.5 where none is best."""
        score = self.thresholds["all"].score
        return score if math.isfinite(score) else 0.5


def prepare(
    truth: COCO, results: Sequence[Mapping[str, Any]], task: str, sigmas: Sequence[float] = ()
) -> Any:
    """Match results with a ground truth.

    Args:
        truth: ``hotcoco.COCO``.
        results: in COCO's format; detection i gets the id i + 1.
        task: ``bbox``, ``segm`` or ``keypoints``.
        sigmas: of the keypoints; empty for COCO's.

    Returns:
        ``hotcoco.COCOeval``, evaluated and accumulated.
    """
    import hotcoco

    keys: tuple[str, ...] = ("image_id", "category_id", "score", TASKS[task])
    keys += ("bbox",) if task == "keypoints" else ()
    found = truth.load_res([{k: r[k] for k in keys if k in r} for r in results])
    evaluation = hotcoco.COCOeval(truth, found, task)
    if task == "keypoints" and sigmas:
        evaluation.params.kpt_oks_sigmas = list(sigmas)
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


def interval_of(evaluation: Any, samples: int = SAMPLES) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of AP over images, percent.

    hotcoco draws the images again for the difference of two evaluations; the other one found
    nothing, so that the difference is the AP itself.
    """
    import hotcoco

    truth = evaluation.coco_gt
    nothing = hotcoco.COCOeval(truth, truth.load_res([]), evaluation.params.iouType)
    nothing.params.catIds = evaluation.params.catIds
    nothing.evaluate()
    bounds = hotcoco.compare(nothing, evaluation, n_bootstrap=samples)["ci"]["AP"]
    return 100 * bounds["lower"], 100 * bounds["upper"]


def evaluate_results(
    json_file: str, results: Sequence[Mapping[str, Any]], sigmas: Sequence[float] = ()
) -> Figures:
    """Compute everything that a report shows of a test set.

    Args:
        json_file: COCO annotations.
        results: COCO results of its images.
        sigmas: of keypoints.
    """
    truth = load_ground_truth(json_file, True)
    categories = sorted(truth.dataset["categories"], key=lambda c: c["id"])
    objects = [a for a in truth.dataset["annotations"] if not a.get("iscrowd", 0)]
    counts = np.bincount(
        np.searchsorted([c["id"] for c in categories], [a["category_id"] for a in objects]),
        minlength=len(categories),
    )
    figures = Figures([str(c["name"]) for c in categories], counts.tolist())
    boxes = None
    for task in _tasks(results, objects):
        evaluation = prepare(truth, results, task, sigmas)
        figures.ap[task] = derive_results(evaluation, task, figures.names)
        if objects:
            figures.intervals[task] = interval_of(evaluation)
        if task != "keypoints":
            figures.tide[task] = evaluation.tide_errors(pos_thr=IOU)
        boxes = boxes or evaluation
    _add_groups(figures, truth.dataset, results)
    if boxes is not None:
        _add_curves(figures, boxes)
        _add_detections(figures, boxes, results, objects, [c["id"] for c in categories])
        figures.confusion = np.asarray(
            boxes.confusion_matrix(iou_thr=IOU, min_score=figures.threshold)["matrix"], np.int64
        )
        figures.calibration = boxes.calibration(n_bins=10, iou_threshold=IOU)
        if 1 < len(figures.names) <= MOST_CLASSES:
            _add_class_intervals(figures, truth, results, categories)
    return figures


def _tasks(results: Sequence[Mapping[str, Any]], objects: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the tasks that both results and annotations can answer; boxes always."""
    have = {key for r in results[:1] for key in r} & {key for a in objects[:1] for key in a}
    return [task for task, key in TASKS.items() if task == "bbox" or key in have]


def _add_groups(
    figures: Figures, coco: Mapping[str, Any], results: Sequence[Mapping[str, Any]]
) -> None:
    """Add AP by video and, where there are videos, draw them and not their images."""
    from d2kit.data.records import group_images

    found = group_images(coco)
    if not 1 < len(found) <= MOST_GROUPS or len(found) == len(coco["images"]) or not results:
        return
    figures.groups = ap_by_group(coco, results, samples=SAMPLES)
    figures.over = "videos"
    for task in figures.intervals.keys() & {"bbox", "segm"}:
        overall = (
            figures.groups
            if task == "bbox"
            else ap_by_group(coco, results, iou_type=task, samples=SAMPLES)
        )[OVERALL]
        figures.intervals[task] = (overall["low"], overall["high"])


def _add_curves(figures: Figures, evaluation: Any) -> None:
    precision = np.asarray(evaluation.eval["precision"])  # (T, R, K, A, M), T = 0 is IoU 0.5
    for k, name in enumerate(figures.names):
        curve = precision[0, :, k, 0, -1]
        if (curve > -1).all():
            figures.curves[name] = curve


def _add_class_intervals(
    figures: Figures,
    truth: COCO,
    results: Sequence[Mapping[str, Any]],
    categories: Sequence[Mapping[str, Any]],
) -> None:
    import hotcoco

    boxes = [
        {k: r[k] for k in ("image_id", "category_id", "score", "bbox") if k in r} for r in results
    ]
    found = truth.load_res(boxes)
    for category, name, count in zip(categories, figures.names, figures.truths, strict=True):
        if count:
            one = hotcoco.COCOeval(truth, found, "bbox")
            one.params.catIds = [category["id"]]
            one.evaluate()
            figures.class_intervals[name] = interval_of(one)


def _add_detections(
    figures: Figures,
    evaluation: Any,
    results: Sequence[Mapping[str, Any]],
    objects: Sequence[Mapping[str, Any]],
    ids: Sequence[int],
) -> None:
    """Add what follows from each detection's being right or wrong at IoU 0.5."""
    found = evaluation.image_diagnostics(iou_thr=IOU, score_thr=0.5)
    scores = np.array([r["score"] for r in results], np.float64)
    classes = np.array([r["category_id"] for r in results], np.int64)
    status = np.array([found["dt_status"].get(i + 1, "") for i in range(len(results))], object)
    right, counted = status == "tp", (status == "tp") | (status == "fp")
    for name, category, count in zip(figures.names, ids, figures.truths, strict=True):
        mine = counted & (classes == category)
        figures.thresholds[name] = best_threshold(scores[mine], right[mine], count)
    figures.thresholds["all"] = best_threshold(scores[counted], right[counted], len(objects))
    kept = counted & (scores >= figures.threshold)
    figures.right = set(np.flatnonzero(right).tolist())
    hit = {found["dt_match"][i + 1] for i in np.flatnonzero(kept & right).tolist()}
    figures.found = hit
    tally = {image["id"]: [0, 0, 0] for image in evaluation.coco_gt.dataset["images"]}
    for i in np.flatnonzero(kept).tolist():
        tally[results[i]["image_id"]][0 if right[i] else 1] += 1
    for a in objects:
        tally[a["image_id"]][2] += a["id"] not in hit
    figures.errors = {image: (r, w, m) for image, (r, w, m) in tally.items()}
    figures.label_errors = sorted(found["label_errors"], key=lambda e: -e["dt_score"])
    sides = np.sqrt([max(0.0, float(a.get("area") or _area(a))) for a in objects])
    is_hit = np.array([a["id"] in hit for a in objects], bool)
    for low, high in zip(SIDES[:-1], SIDES[1:], strict=True):
        mine = (sides >= low) & (sides < high)
        if mine.any():
            label = f"{low:g} to {high:g} px" if math.isfinite(high) else f"{low:g} px and more"
            figures.sizes.append((label, int(mine.sum()), float(is_hit[mine].mean())))


def _area(annotation: Mapping[str, Any]) -> float:
    return float(annotation["bbox"][2] * annotation["bbox"][3])


def best_threshold(scores: np.ndarray, right: np.ndarray, truths: int) -> Threshold:
    """Find the score that keeps the detections with the highest F1.

    Args:
        scores: (R,) of detections.
        right: (R,) bool.
        truths: number of objects there are.
    """
    if not truths or not len(scores):
        return Threshold()
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], right[order].cumsum()
    kept = np.arange(1, len(scores) + 1)
    last = np.append(scores[1:] != scores[:-1], True)  # a tie is kept or dropped as a whole
    f1 = np.where(last, 2 * hits / (truths + kept), -1)
    i = int(f1.argmax())
    return Threshold(
        float(scores[i]), float(hits[i] / kept[i]), float(hits[i] / truths), float(f1[i])
    )
