"""Prints kind x format of docs/export.md: the largest differences on five pictures.

python -m tests.export.table [--formats onnx ...] [--kinds "mask FPN" ...] [--json FILE]
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from d2kit.export import export_model, load_exported
from d2kit.export.backends import FILES
from d2kit.export.folder import compare, worst
from d2kit.export.formats import DetectorGraph
from tests.export.kinds import KINDS, SIZES, model_of, picture
from tests.export.test_export import to_input

FORMATS = [name for name in FILES if name != "d2kit"]


def cell(form: str, kind: str) -> dict:
    """Export one small model and compare it on the five pictures; or tell why it cannot be."""
    model = model_of(kind)
    graph = DetectorGraph(model)
    image = picture("landscape").permute(1, 2, 0).byte().numpy()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            export_model(model, form, folder, image, to_input)
        except Exception as error:
            text = " ".join(str(error).split())
            return {"refused": f"{type(error).__name__}: {text[:600]}"}
        seconds = round(time.monotonic() - start, 1)
        exported = load_exported(folder, threads=1)
        reports = []
        for name in SIZES:
            given = picture(name)
            if form == "torch_export":  # see docs/export.md: 65 pixels are the least side
                missing = [max(0, 65 - side) for side in given.shape[1:]]
                given = F.pad(given, (0, missing[1], 0, missing[0]))
            values = graph(given)
            expected = dict(zip(graph.output_names, values, strict=True))
            try:
                found = exported.raw(given)
            except (RuntimeError, AssertionError) as error:
                reports.append({"problems": [f"{name}: does not run: {error}"[:300]]})
                continue
            reports.append(compare(expected, found, threshold=0.2))
    return {
        "problems": [p for report in reports for p in report["problems"]],
        "worst": worst(reports),
        "detections": [report.get("detections") for report in reports],
        "seconds": seconds,
    }


def text_of(found: dict) -> str:
    """Return a cell of the table."""
    if "refused" in found or found["problems"]:
        return "no"
    names = {"pred_boxes": "boxes", "proposal_boxes": "boxes", "scores": "scores"}
    names |= {"pred_masks": "masks", "pred_keypoint_heatmaps": "heat maps", "sem_seg": "pixels"}
    return ", ".join(f"{names[k]} {v:.0e}" for k, v in found["worst"].items() if k in names)


def main() -> None:
    """Run every cell, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--json", type=Path, help="every figure, one line per cell")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"| kind | {' | '.join(args.formats)} |\n|---|{'---|' * len(args.formats)}")
    for kind in args.kinds:
        found = {form: cell(form, kind) for form in args.formats}
        print(f"| {kind} | {' | '.join(map(text_of, found.values()))} |", flush=True)
        if args.json:
            with args.json.open("a", encoding="utf-8") as file:
                for form, value in found.items():
                    file.write(json.dumps({"format": form, "kind": kind, **value}) + "\n")


if __name__ == "__main__":
    main()
