"""The command line ``d2kit VERB ...``: a table of verbs."""

from __future__ import annotations

import importlib
import sys

TYPE_CHECKING = False  # `d2kit --help` loads neither typing nor argparse
if TYPE_CHECKING:
    import argparse

__all__ = ["VERBS", "main", "verb_parser"]

GROUPS = {
    "Train": {
        "train": (
            "train.train_main",
            "from a folder of pictures (--data) or a config (--config-file)",
        ),
        "recipe": ("train.recipe_main", "print the config that --data would use, with its reasons"),
        "train-lazy": ("jobs.train_lazy_main", "train from a lazy config, a Python or YAML file"),
        "submit": ("jobs.submit_main", "send a training to a SLURM cluster"),
        "replay": ("jobs.replay_main", "do a step again whose loss was not finite"),
    },
    "Use a model": {
        "predict": ("predict.predict_main", "pictures or folders in; overlays and COCO JSON out"),
        "track": ("predict.track_main", "follow objects through hours of video"),
        "export": ("weights.export_main", "TorchScript, ONNX, torch.export or OpenVINO, checked"),
    },
    "Judge a model": {
        "report": ("evaluate.report_main", "the results page of a run, or two runs compared"),
        "evaluate-groups": (
            "evaluate.evaluate_groups_main",
            "AP per video, with confidence intervals",
        ),
        "evaluate-tracks": ("evaluate.evaluate_tracks_main", "HOTA, IDF1, MOTA, identity switches"),
        "visualize-results": (
            "visualize.visualize_results_main",
            "draw COCO results beside the truth",
        ),
        "verify-zoo": ("weights.verify_zoo_main", "AP of published models beside the published AP"),
    },
    "Data": {
        "check": ("data.check_main", "every defect of a dataset as a line; --fix repairs a copy"),
        "convert": ("data.convert_main", "between COCO JSON, VOC, YOLO, labelme, CVAT, mask PNGs"),
        "split": ("data.split_main", "into parts that keep videos whole; finds leaks"),
        "visualize": (
            "visualize.visualize_main",
            "draw what the model is fed, or a page of thumbnails",
        ),
    },
    "Configs and weights": {
        "config": ("config.config_main", "explain keys, compare and print configs"),
        "convert-weights": (
            "weights.convert_weights_main",
            "Detectron2, torchvision, MMDetection, safetensors",
        ),
        "analyze": ("analyze.analyze_main", "multiply-adds, activations, parameters, structure"),
        "benchmark": ("benchmark.benchmark_main", "speed and memory beside torchvision"),
    },
}
"""Title -> verb -> (module of this package and its function of ``argv``, one line of help)."""

VERBS = {
    verb: tuple(place.split(".")) for group in GROUPS.values() for verb, (place, _) in group.items()
}
"""Verb -> (module of this package, its function)."""


def main(argv: list[str] | None = None) -> int | None:
    """Run a verb; only its own module is imported.

    Args:
        argv: verb and its options; None: the command line of the process.

    Returns:
        Exit code: that of the verb; 2 if there is no such verb.
    """
    verb, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if verb in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if verb in ("-V", "--version"):
        from d2kit import __version__

        print(f"d2kit {__version__}")
        return 0
    if verb not in VERBS:
        from d2kit.utils.names import nearest_names

        near = nearest_names(verb.replace("_", "-"), VERBS)
        named = f"nearest: {', '.join(near)}" if near else "`d2kit --help` lists them"
        print(f"error: d2kit has no verb '{verb}' ({named})", file=sys.stderr)
        return 2
    module, function = VERBS[verb]
    code: int | None = getattr(importlib.import_module(f"d2kit.cli.{module}"), function)(rest)
    return code


def help_text() -> str:
    """Return the table of verbs."""
    width = max(map(len, VERBS)) + 2
    lines = ["usage: d2kit VERB [options]", "", "`d2kit VERB --help` tells the options of a verb."]
    for title, group in GROUPS.items():
        lines += ["", title]
        lines += [f"  {verb:{width}}{text}" for verb, (_, text) in group.items()]
    lines += ["", "First steps: d2kit train --data FOLDER; then d2kit predict, d2kit report."]
    return "\n".join(lines)


def verb_parser(verb: str, about: str) -> argparse.ArgumentParser:
    """Return a parser without arguments, whose help shows `about` as it is written."""
    import argparse

    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"d2kit {verb}", description=about, formatter_class=raw)
