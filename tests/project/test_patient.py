"""From tracks of a ward video to the patient, the motion and the report."""

import csv
import dataclasses
import json

import numpy as np
import pytest

from project.patient_video.analyze import analyze, main
from project.patient_video.calibrate import DETECTORS, cases
from project.patient_video.compare import compare, followed_share, tracking_metrics
from project.patient_video.dataset import WardSpec
from project.patient_video.degrade import Detector, degrade
from project.patient_video.report import INTERVAL_COLUMNS, MOTION_COLUMNS, notes, write_report
from project.patient_video.shaking import ShakingParams, Span, temporal_iou
from project.patient_video.signals import UNKNOWN, measure
from project.patient_video.subject import choose_subject, estimate_bed
from project.patient_video.tracks import as_json, from_annotations, read_tracks
from project.patient_video.truth import (
    NAMES,
    PATIENT_ID,
    read_truth,
    spans,
    ward_truth,
    write_coco_video,
)

SPEC = WardSpec(seconds=14.0)
INDEX = 2  # a training video


@pytest.fixture(scope="module")
def ward():
    """Return the exact tracks and the spells of a training video."""
    video = SPEC.video(INDEX)
    return ward_truth(video), spans(video.shaking())


def people(*who, frames=40, names=None, fps=10.0):
    """Return tracks of (identity, category, first, last, x0, y0, x1, y1), boxes only."""
    rows = [
        {
            "frame": k,
            "time_s": k / fps,
            "track_id": identity,
            "category_id": category,
            "score": 0.9,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
        }
        for k in range(frames)
        for identity, category, first, last, x0, y0, x1, y1 in who
        if first <= k < last
    ]
    return from_annotations(rows, names or NAMES, {"height": 100, "width": 200})


PATIENT_BOX, STAFF_BOX = (60, 50, 140, 80), (90, 10, 115, 95)


def with_tracks(tracks, rows, identity):
    """Return the tracks with another identity in some rows."""
    track = tracks.track.copy()
    track[rows] = identity
    return dataclasses.replace(tracks, track=track)


@pytest.mark.parametrize("detector", DETECTORS)
def test_shaking_is_found_in_exact_and_degraded_masks(ward, detector):
    exact, spells = ward
    tracks = exact
    if DETECTORS[detector] is not None:
        tracks = degrade(exact, DETECTORS[detector], seed=INDEX)
    found = analyze(tracks)
    result = compare(tracks, found.subject, found.intervals, exact, spells)
    assert result.iou[0] > 0.8
    assert result.false_intervals <= (detector == "poor")
    assert found.subject.tracks == (1,)
    best = max(found.intervals, key=lambda i: temporal_iou(i, spells[0]))
    assert best.frequency == pytest.approx(spells[0].frequency, abs=0.2)


def test_exact_tracks_score_perfectly(ward):
    exact, spells = ward
    found = analyze(exact)
    result = compare(exact, found.subject, found.intervals, exact, spells)
    assert (result.followed, result.followed_joined, result.identities) == (1.0, 1.0, 1)
    assert (result.hota, result.idf1, result.mota, result.switches) == (100.0, 100.0, 100.0, 0)


def test_no_shaking_is_found_where_the_patient_does_not_shake():
    video = SPEC.video(INDEX)
    video.patient = dataclasses.replace(video.patient, spells=())
    exact = ward_truth(video)
    assert analyze(exact).intervals == []
    assert analyze(degrade(exact, Detector(), seed=1)).intervals == []


def test_every_other_frame_is_not_enough_and_is_said(ward):
    exact, _ = ward
    half = _rows(exact, exact.frame % 2 == 0)
    found = analyze(half)
    assert len(half.frames) == 105
    assert any("7.5 frames per second" in note for note in notes(found))


def _rows(tracks, keep):
    """Return the tracks of some frames only, as if the others had not been looked at."""
    frames = np.unique(tracks.frame[keep])
    times = np.interp(frames, tracks.frames, tracks.times)
    return dataclasses.replace(tracks.only(keep), frames=frames, times=times)


def test_the_patient_is_the_one_of_that_class():
    tracks = people((1, 2, 0, 40, *STAFF_BOX), (2, PATIENT_ID, 5, 35, *PATIENT_BOX))
    subject = choose_subject(tracks)
    assert subject.tracks == (2,)
    assert "class 'patient'" in subject.reason
    assert (subject.rows >= 0).sum() == 30


def test_without_such_a_class_the_patient_is_who_stays_in_bed():
    names = {1: "person"}
    tracks = people(
        (1, 1, 0, 15, *STAFF_BOX),
        (2, 1, 0, 40, *PATIENT_BOX),
        (3, 1, 5, 38, 0, 5, 20, 95),
        names=names,
    )
    subject = choose_subject(tracks)
    assert subject.tracks == (2,)
    x0, y0, x1, y1 = subject.bed
    assert x0 == pytest.approx(60, abs=8)
    assert x1 == pytest.approx(140, abs=8)
    assert (y0 + y1) / 2 == pytest.approx(65, abs=8)
    elsewhere = choose_subject(tracks, bed=(0, 0, 25, 100))
    assert elsewhere.tracks == (3,)


def test_the_user_may_choose():
    tracks = people((1, 2, 0, 40, *STAFF_BOX), (2, 1, 0, 40, *PATIENT_BOX))
    assert choose_subject(tracks, [1]).tracks == (1,)
    with pytest.raises(ValueError, match="identity 7 is not in the video, which has 1, 2"):
        choose_subject(tracks, [7])
    with pytest.raises(ValueError, match="x0 < x1"):
        choose_subject(tracks, bed=(5, 5, 5, 9))


def test_pieces_of_the_patient_are_joined():
    tracks = people(
        (1, 1, 0, 12, *PATIENT_BOX),
        (4, 1, 14, 30, 62, 40, 120, 80),
        (9, 1, 30, 40, *PATIENT_BOX),
        (5, 2, 10, 16, *STAFF_BOX),
    )
    subject = choose_subject(tracks)
    assert subject.tracks == (4, 1, 9)
    assert (subject.rows >= 0).sum() == 38


def test_staff_are_never_joined():
    tracks = people((1, 1, 0, 12, *PATIENT_BOX), (5, 2, 13, 40, *STAFF_BOX))
    assert choose_subject(tracks).tracks == (1,)
    away = people((1, 1, 0, 12, *PATIENT_BOX), (5, 1, 13, 40, 150, 5, 199, 30))
    assert choose_subject(away).tracks == (5,), "longer, though elsewhere"
    assert choose_subject(away, bed=PATIENT_BOX).tracks == (1,)


def test_a_piece_that_the_detector_calls_staff_is_joined_where_it_is_the_patient():
    tracks = people((1, 1, 0, 20, *PATIENT_BOX), (5, 2, 21, 40, *PATIENT_BOX))
    assert choose_subject(tracks).tracks == (1, 5)


def test_at_once_means_two_people():
    tracks = people((1, 1, 0, 30, *PATIENT_BOX), (2, 1, 10, 30, 64, 50, 141, 82))
    assert choose_subject(tracks).tracks == (1,)


def test_nobody():
    nobody = from_annotations([], NAMES, {"height": 100, "width": 200})
    found = analyze(nobody)
    assert found.subject.tracks == ()
    assert found.intervals == []
    assert estimate_bed(nobody) is None
    assert len(found.motion.times) == 0


def test_one_frame():
    found = analyze(people((1, 1, 0, 1, *PATIENT_BOX), frames=1))
    assert found.subject.tracks == (1,)
    assert found.motion.area.tolist() == [80 * 30]
    assert found.intervals == []


def test_measures_of_a_moving_box():
    """10 frames per second, 4 pixels to the right per frame: 40 pixels per second."""
    rows = [
        {
            "frame": k,
            "time_s": k / 10,
            "track_id": 1,
            "category_id": 1,
            "bbox": [20 + 4 * k, 30, 40, 20],
        }
        for k in range(10)
        if k not in (4, 5)
    ]
    tracks = from_annotations(rows, NAMES, {"height": 100, "width": 200})
    motion = measure(tracks, choose_subject(tracks))
    assert motion.frames.tolist() == list(range(10))
    assert motion.observed.tolist() == [k not in (4, 5) for k in range(10)]
    np.testing.assert_allclose(motion.speed[1:], 40.0)
    np.testing.assert_allclose(motion.area, 800)
    np.testing.assert_allclose(motion.area_change[1:], 0.0)
    np.testing.assert_allclose(motion.mask_change[[1, 2, 3, 7, 8, 9]], 0.2)
    assert np.isnan(motion.mask_change[[0, 4, 5, 6]]).all(), "not across a gap"
    assert (motion.coverage[[4, 5]] == UNKNOWN).all()


def test_what_somebody_hides_is_not_known():
    tracks = people((1, 1, 0, 10, *PATIENT_BOX), (2, 2, 5, 10, *STAFF_BOX), frames=10)
    motion = measure(tracks, choose_subject(tracks))
    hidden = (motion.coverage == UNKNOWN).mean(1)
    assert (hidden[:5] == 0).all()
    assert (hidden[5:] > 0.2).all()
    assert not motion.channels().size, "the steps at the rim of the visitor are no motion"


def test_filled_gaps_are_not_observed():
    tracks = people((1, 1, 0, 10, *PATIENT_BOX), frames=10)
    filled = dataclasses.replace(tracks, interpolated=tracks.frame == 4)
    motion = measure(filled, choose_subject(filled))
    assert motion.track.tolist() == [1] * 10
    assert motion.observed.sum() == 9


def test_tracks_are_read_as_they_were_written(ward, tmp_path):
    exact, _ = ward
    write_coco_video(exact, tmp_path / "tracks.json")
    again = read_tracks(tmp_path)
    assert again.names == exact.names
    assert again.size == exact.size == (240, 320)
    for name in ("frame", "time", "track", "category", "box", "frames", "times"):
        np.testing.assert_allclose(getattr(again, name), getattr(exact, name), atol=1e-9)
    found, wanted = analyze(again), analyze(exact)
    np.testing.assert_array_equal(found.motion.coverage, wanted.motion.coverage)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (None, FileNotFoundError, "d2kit track"),
        ("{", ValueError, "not complete JSON"),
        ('{"annotations": []}', ValueError, "no field 'categories'"),
        ('{"annotations": [{"frame": 1}], "categories": []}', ValueError, "no field 'track_id'"),
    ],
)
def test_bad_tracks_are_explained(tmp_path, text, error, message):
    if text is not None:
        (tmp_path / "tracks.json").write_text(text)
    with pytest.raises(error, match=message):
        read_tracks(tmp_path)


def test_followed_share_counts_one_identity(ward):
    exact, _ = ward
    own = np.flatnonzero(exact.track == 1)
    broken = with_tracks(exact, own[60:], 77)
    subject = choose_subject(broken)
    one, joined = followed_share(broken, subject, exact)
    assert one == pytest.approx(1 - 60 / len(own))
    assert joined == 1.0
    assert subject.tracks == (77, 1)
    assert tracking_metrics(broken, exact)["switches"] == 1
    assert tracking_metrics(broken, exact)["idf1"] < 100


def test_metrics_of_tracks_at_a_stride(ward):
    exact, _ = ward
    third = _rows(exact, exact.frame % 3 == 1)
    assert tracking_metrics(third, exact)["hota"] == pytest.approx(100)
    assert followed_share(third, choose_subject(third), exact)[0] == 1.0


def test_metrics_of_a_poor_detector(ward):
    exact, _ = ward
    found = tracking_metrics(degrade(exact, DETECTORS["poor"], seed=0), exact)
    assert 50 < found["hota"] < 95
    assert 80 < found["mota"] < found["idf1"] < 99


def test_report(ward, tmp_path):
    exact, spells = ward
    found = analyze(exact)
    comparison = compare(exact, found.subject, found.intervals, exact, spells)
    content = write_report(found, tmp_path, name="x", truth=spells, comparison=comparison)
    assert json.loads((tmp_path / "report.json").read_text()) == content
    assert content["comparison"]["hota"] == 100.0
    with open(tmp_path / "motion.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == MOTION_COLUMNS
    assert len(rows) == 210
    (interval,) = found.intervals
    shaking = [float(r["time_s"]) for r in rows if r["shaking"] == "1"]
    assert min(shaking) == pytest.approx(interval.start, abs=0.07)
    assert max(shaking) == pytest.approx(interval.end, abs=0.07)
    with open(tmp_path / "intervals.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert tuple(row) == INTERVAL_COLUMNS
    assert float(row["frequency_hz"]) == pytest.approx(spells[0].frequency, abs=0.2)
    assert (tmp_path / "motion.png").read_bytes().startswith(b"\x89PNG")


def test_report_without_a_patient(tmp_path):
    nobody = from_annotations([], NAMES, {"height": 100, "width": 200})
    content = write_report(analyze(nobody), tmp_path)
    assert content["subject"]["identities"] == []
    assert "No patient" in content["notes"][0]
    assert (tmp_path / "motion.csv").read_text().count("\n") == 1
    assert (tmp_path / "motion.png").stat().st_size > 1000


def test_command_line(ward, tmp_path, capsys):
    exact, _ = ward
    (tmp_path / "tracks.json").write_text(json.dumps(as_json(exact)))
    main(["--tracks", str(tmp_path), "--output", str(tmp_path / "out"), "--subject", "1"])
    printed = capsys.readouterr().out
    assert "identity 1 (chosen by --subject)" in printed
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *("motion.csv", "intervals.csv", "report.json", "motion.png")
    }
    with pytest.raises(SystemExit):
        main(["--tracks", str(tmp_path), "--subject", "99"])
    assert "identity 99 is not in the video" in capsys.readouterr().err


def test_ground_truth_is_reachable_for_held_out_videos(tmp_path):
    from project.patient_video import generate

    spec = WardSpec(train_videos=1, test_videos=1, seconds=2.0)
    generate(tmp_path, spec, workers=1)
    found, spells = read_truth(tmp_path / "tracks/video01.json")
    video = spec.video(1)
    wanted = ward_truth(video)
    np.testing.assert_array_equal(found.track, wanted.track)
    np.testing.assert_allclose(found.box, wanted.box)
    assert spells == spans(video.shaking())
    assert len(found.frames) == 30
    with pytest.raises(FileNotFoundError, match="prepare_patient_video"):
        read_truth(tmp_path / "tracks/video00.json")
    with pytest.raises(ValueError, match="one ward video"):
        read_truth(tmp_path / "spec.json")


def test_limbs_inside_of_the_outline_are_seen_in_the_video(tmp_path):
    """A light that moves inside of a body that stands still: only the video shows it."""
    import av

    times = np.arange(0, 10, 1 / 15)
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=15)
        stream.width, stream.height, stream.pix_fmt = 200, 100, "yuv420p"
        for time in times:
            image = np.full((100, 200, 3), 90, np.uint8)
            x = 100 + round(12 * np.sin(2 * np.pi * 3 * time) * (3 <= time <= 8))
            image[60:70, x - 6 : x + 6] = 200
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    tracks = people((1, 1, 0, 150, *PATIENT_BOX), frames=150, fps=15.0)
    assert analyze(tracks).intervals == []
    (interval,) = analyze(tracks, video=tmp_path / "a.mp4").intervals
    assert interval.frequency == pytest.approx(3.0, abs=0.15)
    assert temporal_iou(interval, Span(3.0, 8.0, 3.0)) > 0.85
    with pytest.raises(FileNotFoundError, match="b.mp4"):
        analyze(tracks, video=tmp_path / "b.mp4")
    small = dataclasses.replace(tracks, size=(50, 100))
    with pytest.raises(ValueError, match="is it the video that was tracked"):
        analyze(small, video=tmp_path / "a.mp4")


def test_thresholds_are_chosen_on_training_videos_alone():
    with pytest.raises(ValueError, match="held out"):
        next(cases([SPEC.train_videos], SPEC, ShakingParams()))


def test_degrading_is_reproducible_and_as_bad_as_asked(ward):
    exact, _ = ward
    a, b = (degrade(exact, Detector(jitter=3.0, miss=0.2), seed=5) for _ in range(2))
    np.testing.assert_array_equal(a.box, b.box)
    assert len(a) / len(exact) == pytest.approx(0.8, abs=0.05)
    other = degrade(exact, Detector(jitter=3.0, miss=0.0), seed=5)
    inner = (exact.box[:, 0] > 12) & (exact.box[:, 2] < 308)
    assert (other.box - exact.box)[inner, 0].std() == pytest.approx(3.0, rel=0.2)
