"""From a ward video and detections, or a model, to the report at the end of the demo."""

import json

import pytest

from d2kit.config import get_cfg
from d2kit.video import DETECTIONS, DetectionStore, VideoOptions, track_video
from project.patient_video import WardSpec, generate
from project.patient_video.analyze import analyze
from project.patient_video.calibrate import DETECTORS, cases, score
from project.patient_video.compare import compare
from project.patient_video.degrade import Detector, degrade, store_detections
from project.patient_video.demo import CONFIG, SHORTER, fitting_recipe
from project.patient_video.shaking import ShakingParams
from project.patient_video.track_demo import track_and_report
from project.patient_video.tracks import read_tracks
from project.patient_video.truth import read_truth
from tests.support import tiny_detector


@pytest.fixture(scope="module")
def ward(tmp_path_factory):
    root = tmp_path_factory.mktemp("ward")
    generate(root, WardSpec(train_videos=1, test_videos=1, seconds=14.0, width=160), workers=1)
    return root


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "expected"), [(0.0, SHORTER), (1e9, CONFIG)])
def test_the_demo_takes_the_recipe_that_the_machine_has_time_for(limit, expected, capsys):
    small = ["INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MAX_SIZE_TRAIN", "96"]
    assert fitting_recipe(small, limit) == expected
    told = capsys.readouterr().out
    assert expected.name in told
    assert ("the shorter recipe" in told) == (expected == SHORTER)
    cfg = get_cfg()
    cfg.merge_from_file(str(expected))
    assert cfg.DATASETS.TEST == ("patient_video_test",)
    assert cfg.OUTPUT_DIR == "output/patient_video_demo"


def test_the_patient_of_bad_detections_is_followed_and_the_shaking_found(ward, tmp_path):
    people, spells = read_truth(ward / "tracks/video01.json")
    seen = degrade(people, Detector(jitter=1.5), seed=0)
    video = ward / "videos/video01.mp4"
    store_detections(seen, tmp_path / DETECTIONS, video)
    assert sum(len(frame) for frame in DetectionStore(tmp_path / DETECTIONS)) == len(seen)
    options = VideoOptions(
        input=str(video), output=tmp_path, from_detections=True, video=False, progress=False
    )
    track_video(get_cfg(), options)
    tracks = read_tracks(tmp_path)
    assert tracks.names == people.names
    assert len(tracks.frames) == len(people.frames)
    found = analyze(tracks)
    result = compare(tracks, found.subject, found.intervals, people, spells)
    assert result.followed >= 0.95
    assert result.identities == 1
    assert result.iou[0] >= 0.7
    assert result.false_intervals == 0
    assert result.idf1 > 90


def test_with_a_model(tmp_path):
    """A model of random weights: what it finds is nothing; every step runs, twice."""
    ward, out = tmp_path / "ward", tmp_path / "out"
    generate(ward, WardSpec(train_videos=1, test_videos=1, seconds=2.0, width=160), workers=1)
    weights = tiny_detector.save_weights(tmp_path / "tiny.pth")
    cfg = tiny_detector.detector_cfg(weights)
    cfg.freeze()
    for _ in range(2):
        text = track_and_report(cfg, weights, ward, out, draw=False)
    assert "Held-out video01" in text
    for words in ("patient followed with one identity", "temporal IoU", "HOTA", "IDF1"):
        assert words in text
    report = json.loads((out / "report.json").read_text())
    (spell,) = read_truth(ward / "tracks/video01.json")[1]
    assert report["truth"][0]["start"] == pytest.approx(spell.start, abs=1e-3)
    assert (out / "motion.png").is_file()


def test_what_is_missing_is_said(ward, tmp_path):
    with pytest.raises(FileNotFoundError, match="prepare_patient_video"):
        track_and_report(get_cfg(), "w.pth", tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="held-out video01, got 'video00'"):
        track_and_report(get_cfg(), "w.pth", ward, tmp_path / "out", video="video00")


@pytest.mark.slow
@pytest.mark.parametrize("shaking", [True, False])
def test_thresholds_hold_in_rooms_of_another_seed(shaking):
    params = ShakingParams()
    result = score(list(cases(range(4), WardSpec(seed=5), params, shaking)), params)
    assert set(result) == set(DETECTORS)
    for mean, _, share, false in result.values():
        assert false <= 1
        if shaking:
            assert mean > 0.8
            assert share >= 0.75
