"""The page of a run: accuracy, errors, pictures and origin in one HTML file; and two compared."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from d2kit.evaluation.report.compare import Comparison, compare_runs
from d2kit.evaluation.report.figures import evaluate_results
from d2kit.evaluation.report.page import MARK, make_run_page
from d2kit.evaluation.report.run_files import Dataset, Run, read_run, record_run
from d2kit.utils.file_io import atomic_write

__all__ = ["Comparison", "compare_runs", "write_page", "write_report"]

logger = logging.getLogger(__name__)

WORST, BEST, LABELS = 8, 4, 4
"""Pictures of each kind, 20 to 60 kB each side."""


def write_report(run: str | os.PathLike[str], output: str | os.PathLike[str] | None = None) -> Path:
    """Write the page of a run, and its model card as README.md in the run's folder.

    The page needs nothing else: no network, no other file. It shows what is there: without stored
    results (``inference/coco_instances_results.json``) or without the annotations of the test set,
    losses and origin only, and says why.

    Args:
        run: OUTPUT_DIR of a training.
        output: the HTML file; None: ``report.html`` in the run's folder.

    Returns:
        The file.

    Raises:
        FileNotFoundError: `run` is no folder of a training.
        ValueError: its files are damaged, or `output` is a file that no report wrote.
    """
    from d2kit.evaluation.report.page import CARD_MARK, make_card
    from d2kit.evaluation.report.pictures import choose, draw_pairs

    found = read_run(run)
    target = Path(output) if output is not None else found.folder / "report.html"
    test, note = _test_set(found)
    figures, pictures = None, {}
    if test is not None:
        results = found.results or []
        sigmas = found.cfg.TEST.KEYPOINT_OKS_SIGMAS if found.cfg is not None else ()
        figures = evaluate_results(test.json_file, results, sigmas)
        coco = json.loads(Path(test.json_file).read_text(encoding="utf-8-sig"))
        worst, best = choose(figures, WORST, BEST)
        suspects = list(dict.fromkeys(e["image_id"] for e in figures.label_errors))[:LABELS]
        chosen = {"worst": worst, "best": best, "labels": suspects}
        pictures = {
            key: draw_pairs(ids, figures, coco, results, test.image_root)
            for key, ids in chosen.items()
        }
    write_page(target, make_run_page(found, figures, pictures, note))
    card = found.folder / "README.md"
    if card.exists() and CARD_MARK not in card.read_text(encoding="utf-8", errors="replace"):
        logger.warning("%s is not of a report: it stays, and no model card is written", card)
    else:
        with atomic_write(card, "w") as file:
            file.write(make_card(found, figures))
    record_run(found)
    logger.info("Results page: %s", target)
    return target


def write_page(target: Path, text: str) -> None:
    """Write a page, over an earlier one but over nobody else's file.

    Raises:
        ValueError: there is a file that no report wrote.
    """
    if target.exists() and MARK not in target.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise ValueError(
            f"{target} exists and was not written by `d2kit report`; choose another --output"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target, "w") as file:
        file.write(text)


def _test_set(run: Run) -> tuple[Dataset | None, str]:
    """Return the test set that the stored results are of, and why there is none."""
    if run.results is None:
        return None, (
            "No COCO results are stored in this run (inference/coco_instances_results.json): "
            "evaluate it, with --eval-only, to see accuracy, errors and pictures."
        )
    if any(len(r["bbox"]) != 4 for r in run.results[:1]):
        return None, "The boxes are rotated: losses and origin are shown, not their errors."
    seen = {r["image_id"] for r in run.results}
    for one in run.test:
        if one.json_file:
            coco = json.loads(Path(one.json_file).read_text(encoding="utf-8-sig"))
            if seen <= {image["id"] for image in coco["images"]}:
                several = len(run.test) > 1
                return one, f"Shown: {one.name}, whose results are stored." if several else ""
    names = ", ".join(one.name for one in run.test) or "none is named in config.yaml"
    return None, (
        f"The annotations of the test set ({names}) were not found, or are not those of the stored "
        "results: register it (DATASETS.REGISTER_COCO) and write the report again."
    )
