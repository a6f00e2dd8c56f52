"""The end of ``make demo``: follow a held-out ward video, measure the patient, compare."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from d2kit.config import CfgNode
from d2kit.video import DETECTIONS, Selection, VideoOptions, track_video
from project.patient_video.analyze import analyze, describe
from project.patient_video.compare import compare
from project.patient_video.report import write_report
from project.patient_video.tracks import read_tracks
from project.patient_video.truth import read_truth

LEAST_FPS = 12.5  # 6 Hz shaking aliases below
# Of a patient who sits, the detector also finds the upper and the lower half: IoU 0.4 with the
# whole. On 8 ward videos of seed 1 (neither training nor held out) ByteTrack kept one identity in
# 90 % of the frames at the detector's own 0.4, in 99.5 % at 0.3.
NMS_THRESHOLD = 0.3


def track_and_report(
    cfg: CfgNode,
    weights: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    video: str | None = None,
    draw: bool = True,
) -> str:
    """Track one held-out ward video with a trained model and report on its patient.

    Args:
        cfg: the trained experiment.
        weights: its checkpoint.
        data: the prepared ward (``datasets/data/patient_video``).
        output: folder for ``annotated.mp4``, the tracks, ``motion.png``, ``report.json``, ...
        video: name of a held-out video; by default the first one.
        draw: write ``annotated.mp4``.

    Returns:
        The report as text: how long the patient was followed, identities, intervals found and true,
        HOTA, IDF1.

    Raises:
        FileNotFoundError: the ward was not prepared.
        ValueError: there is no held-out video of that name.
    """
    name = _held_out(Path(data), video)
    people, spells = read_truth(Path(data) / "tracks" / f"{name}.json")
    fps = 1 / float(people.times[1] - people.times[0])
    options = VideoOptions(
        input=str(Path(data) / "videos" / f"{name}.mp4"),
        output=Path(output),
        selection=Selection(stride=max(1, int(fps / LEAST_FPS))),
        video=draw,
    )
    (options.output / DETECTIONS).unlink(missing_ok=True)  # those of a model of an earlier run
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = str(weights)
    cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST = NMS_THRESHOLD
    track_video(cfg, options)
    tracks = read_tracks(output)
    found = analyze(tracks)
    comparison = compare(tracks, found.subject, found.intervals, people, spells)
    content = write_report(found, output, name=name, truth=spells, comparison=comparison)
    return f"Held-out {name}, followed by the trained model\n\n{describe(content)}"


def _held_out(data: Path, video: str | None) -> str:
    """Return the name of the held-out video that is asked for, by default of the first one."""
    index = data / "test.json"
    if not index.is_file():
        raise FileNotFoundError(f"{index}: not there; run datasets/prepare_patient_video.py")
    names = [v["name"] for v in json.loads(index.read_text(encoding="utf-8"))["videos"]]
    if video is not None and video not in names:
        raise ValueError(f"video: expected one of the held-out {', '.join(names)}, got '{video}'")
    return video or names[0]


def main() -> None:
    """Follow held-out videos with a trained model and print the reports."""
    import project
    from d2kit.config import get_cfg
    from d2kit.engine import user_errors
    from project.datasets_root import datasets_root

    run = Path("output/patient_video_demo")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=run, help=f"trained run (default {run})")
    parser.add_argument("--output", type=Path, help="default: tracked/ in the run's folder")
    parser.add_argument("--videos", nargs="*", help="held-out videos by name; default: the first")
    parser.add_argument("--no-video", action="store_true", help="do not draw")
    args = parser.parse_args()
    with user_errors():
        project.register_all()
        cfg = get_cfg()
        cfg.merge_from_file(str(args.run / "config.yaml"))
        data, weights = datasets_root() / "patient_video", args.run / "model_final.pth"
        for name in args.videos or [None]:
            out = (args.output or args.run / "tracked") / (name or "")
            text = track_and_report(cfg, weights, data, out, video=name, draw=not args.no_video)
            print(f"{text}\n\nFiles: {out}\n")


if __name__ == "__main__":
    main()
