"""Two runs on the same images, by paired bootstrap."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from d2kit.evaluation.backend import load_ground_truth
from d2kit.evaluation.report.figures import TASKS, prepare
from d2kit.evaluation.report.page import TASK_NAMES, document, number, table
from d2kit.evaluation.report.run_files import Run, read_run
from d2kit.utils.file_io import load_json
from d2kit.utils.text import html_text, one_line

if TYPE_CHECKING:
    from pycocotools.coco import COCO

__all__ = ["Comparison", "compare_runs"]

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
SAMPLES = 1000


@dataclass
class Comparison:
    """What two runs differ in.

    Attributes:
        names: of the runs.
        images: how many both were evaluated on.
        metrics: task -> metric -> {``a``, ``b``, ``low``, ``high``} in percent, the last two of
            b - a, and ``better``: share of the samples in which b is better, in [0, 1].
        classes: task -> class -> (AP of a, AP of b), percent.
        groups: video -> (box AP of a, of b), percent; empty where there is one.
    """

    names: tuple[str, str]
    images: int
    metrics: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    classes: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    groups: dict[str, tuple[float, float]] = field(default_factory=dict)

    def rows(self, task: str) -> list[list[str]]:
        """Return metric, both values, difference, interval and share, as text."""
        found = []
        for metric, value in self.metrics[task].items():
            if not math.isnan(value["a"]) or not math.isnan(value["b"]):
                found.append(
                    [
                        metric,
                        number(value["a"]),
                        number(value["b"]),
                        f"{value['b'] - value['a']:+.1f}",
                        f"{value['low']:+.1f} to {value['high']:+.1f}",
                        f"{100 * value['better']:.0f} %",
                    ]
                )
        return found

    def verdict(self, task: str) -> str:
        """Say in a sentence whether the difference in AP is more than chance."""
        value = self.metrics[task]["AP"]
        if value["low"] > 0 or value["high"] < 0:
            better = self.names[1] if value["low"] > 0 else self.names[0]
            return f"{better} is better in AP of {TASK_NAMES[task]}: the interval leaves out 0."
        return (
            f"AP of {TASK_NAMES[task]}: no difference that these images could show (the interval "
            "holds 0)."
        )

    def text(self) -> str:
        """Return the comparison as tables for a terminal."""
        from tabulate import tabulate

        head = ["", "A", "B", "B - A", "95 % interval", "B better in"]
        first, second = map(one_line, self.names)
        parts = [f"A: {first}\nB: {second}\n{self.images} images"]
        for task in self.metrics:
            rows = tabulate(self.rows(task), head, tablefmt="github", disable_numparse=True)
            parts.append(f"{TASK_NAMES[task]}\n{rows}\n{self.verdict(task)}")
        return "\n\n".join(parts)

    def page(self) -> str:
        """Return the comparison as an HTML page."""
        names = [html_text(name) for name in self.names]
        body = [f"<h1>{names[0]} and {names[1]}</h1>"]
        body.append(
            f"<p>A: {names[0]} · B: {names[1]} · {self.images} images, the same for both</p>"
        )
        head = ["", "A", "B", "B − A", "95 % interval", "B better in"]
        for task in self.metrics:
            body.append(f"<h2>{TASK_NAMES[task].capitalize()}</h2>")
            body.append(f'<div class="cards"><div class="card">{table(head, self.rows(task))}')
            body.append(f"<p>{html_text(self.verdict(task))}</p></div>")
            body.append(_pairs_card("class", self.classes[task]))
            if task == "bbox" and self.groups:
                body.append(_pairs_card("video", self.groups))
            body.append("</div>")
        body.append(
            "<p><small>Paired bootstrap: the images are drawn again, the same for both. Frames of "
            "one video are not independent: with few videos look at the table per video too."
            "</small></p>"
        )
        return document(f"{self.names[0]} and {self.names[1]}", "".join(body))


def _pairs_card(what: str, values: Mapping[str, tuple[float, float]]) -> str:
    rows = [[name, number(a), number(b), f"{b - a:+.1f}"] for name, (a, b) in values.items()]
    return f'<div class="card">{table([what, "AP of A", "AP of B", "B − A"], rows)}</div>'


def compare_runs(
    a: str | os.PathLike[str], b: str | os.PathLike[str], *, samples: int = SAMPLES
) -> Comparison:
    """Compare the stored results of two runs on the same images.

    Args:
        a: OUTPUT_DIR of a training.
        b: of another, evaluated on the same test set.
        samples: of the paired bootstrap.

    Raises:
        FileNotFoundError: a folder, its results or its annotations are not there.
        ValueError: the runs were evaluated on different data.
    """
    import hotcoco

    runs = read_run(a), read_run(b)
    json_file = _common_truth(runs)
    truth = load_ground_truth(json_file, True)
    results = [run.results or [] for run in runs]
    names = (runs[0].name, runs[1].name)
    if names[0] == names[1]:
        names = (str(runs[0].folder), str(runs[1].folder))
    found = Comparison(names, len(truth.dataset["images"]))
    sigmas = runs[0].cfg.TEST.KEYPOINT_OKS_SIGMAS if runs[0].cfg is not None else ()
    objects = truth.dataset["annotations"][:1]
    for task, key in TASKS.items():
        have = [key in one for part in (*results, objects) for one in part[:1]]
        if task != "bbox" and not (have and all(have)):
            continue
        pair = [prepare(truth, part, task, sigmas) for part in results]
        both = hotcoco.compare(pair[0], pair[1], n_bootstrap=samples)
        found.metrics[task] = {
            m: {
                "a": _percent(both["metrics_a"][m]),
                "b": _percent(both["metrics_b"][m]),
                "low": 100 * both["ci"][m]["lower"],
                "high": 100 * both["ci"][m]["upper"],
                "better": both["ci"][m]["prob_positive"],
            }
            for m in METRICS
            if m in both["metrics_a"]
        }
        found.classes[task] = {
            c["cat_name"]: (_percent(c["ap_a"]), _percent(c["ap_b"])) for c in both["per_category"]
        }
        if task == "bbox":
            found.groups = _by_group(truth, pair)
    return found


def _by_group(truth: COCO, pair: list[Any]) -> dict[str, tuple[float, float]]:
    from d2kit.data.records import group_images

    groups = group_images(truth.dataset)
    if not 1 < len(groups) < len(truth.dataset["images"]):
        return {}
    one, other = (evaluation.slice_by(groups) for evaluation in pair)
    return {name: (_percent(one[name]["AP"]), _percent(other[name]["AP"])) for name in groups}


def _percent(value: float) -> float:
    return 100 * value if value >= 0 else math.nan


def _common_truth(runs: tuple[Run, Run]) -> str:
    """Return the annotation file that both runs were evaluated on."""
    for run in runs:
        if run.results is None:
            raise FileNotFoundError(
                f"{run.folder} holds no inference/coco_instances_results.json; evaluate it first "
                "(--eval-only)"
            )
    digests = [{one.digest: one for one in run.test if one.digest} for run in runs]
    for run, known in zip(runs, digests, strict=True):
        if not known:
            raise FileNotFoundError(
                f"{run.folder}: the annotations of its test set were not found; register it "
                "(DATASETS.REGISTER_COCO in its config.yaml)"
            )
    common = [digests[0][d] for d in digests[0] if d in digests[1]]
    if not common:
        sets = [", ".join(one.name for one in run.test) for run in runs]
        raise ValueError(
            f"{runs[0].folder} was evaluated on {sets[0]}, {runs[1].folder} on {sets[1]}, and the "
            "annotation files differ: evaluate both on the same test set (--eval-only "
            "DATASETS.TEST ...)"
        )
    for one in common:
        if one.json_file:
            ids = {image["id"] for image in load_json(one.json_file)["images"]}
            if all(r["image_id"] in ids for run in runs for r in run.results or ()):
                return one.json_file
    raise ValueError(
        f"the stored results of {runs[0].folder} and {runs[1].folder} are not of the same test set"
    )
