"""HOTA, IDF1, MOTA: known cases by hand, every form of input, mistakes."""

import json

import pytest

from d2kit.evaluation.track_evaluation import METRICS, evaluate_tracks

PERFECT = {"HOTA": 100, "IDF1": 100, "MOTA": 100, "IDSW": 0, "FP": 0, "FN": 0}


def walk(identity, frames, x=10.0, shift=2.0):
    """Return rows (frame from 0, identity, x, y, w, h) of somebody who walks."""
    return [(k, identity, x + shift * k, 20.0, 30.0, 60.0) for k in frames]


def mot(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{k + 1},{i},{x},{y},{w},{h},1,1,1" for k, i, x, y, w, h in rows]
    path.write_text("\n".join(lines) + ("\n" if lines else ""))
    return path


def coco(path, videos):
    """Write COCO-video JSON of {name: rows}."""
    images, annotations = [], []
    for v, rows in enumerate(videos.values()):
        frames = range(1 + max(row[0] for row in rows))
        images += [{"id": 1000 * v + k, "frame_id": k, "video_id": v} for k in frames]
        annotations += [
            {"image_id": 1000 * v + k, "track_id": i, "bbox": box, "category_id": 1 + i % 2}
            for k, i, *box in rows
        ]
    data = {
        "videos": [{"id": v, "name": name} for v, name in enumerate(videos)],
        "categories": [{"id": 1, "name": "even"}, {"id": 2, "name": "odd"}],
        **{"images": images, "annotations": annotations},
    }
    path.write_text(json.dumps(data))
    return path


def run_folder(path, rows, name="clip.mp4", **video):
    """Write the folder of a run of track_video, as far as it is read."""
    path.mkdir(parents=True)
    data = {
        "videos": [{"id": 1, "name": name, **video}],
        "categories": [{"id": 1, "name": "even"}, {"id": 2, "name": "odd"}],
        "annotations": [
            {"frame": k, "track_id": i, "bbox": box, "score": 0.9, "category_id": 1 + i % 2}
            for k, i, *box in rows
        ],
    }
    (path / "tracks.json").write_text(json.dumps(data))
    return path


TRUTH = walk(1, range(20)) + walk(2, range(5, 20), x=150.0, shift=-1.0)


def check(result, expected):
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, abs=0.01), name


def test_perfect_tracks_in_every_form(tmp_path):
    truths = [mot(tmp_path / "gt.txt", TRUTH), coco(tmp_path / "gt.json", {"clip": TRUTH})]
    found = [mot(tmp_path / "clip.txt", TRUTH), run_folder(tmp_path / "run", TRUTH)]
    found.append(found[1] / "tracks.json")
    for truth in truths:
        for results in found:
            result = evaluate_tracks(truth, results)
            check(result["overall"], PERFECT)
            assert list(result["overall"]) == list(METRICS)
            assert result["overall"] == next(iter(result["videos"].values()))
            assert result["overall"]["frames"] == 20


def test_a_switch_of_identity(tmp_path):
    """One person, 20 frames, another name from the 11th on: IDF1 50 by the definition."""
    truth = mot(tmp_path / "gt.txt", walk(1, range(20)))
    found = mot(tmp_path / "a.txt", walk(1, range(10)) + walk(7, range(10, 20)))
    result = evaluate_tracks(truth, found)["overall"]
    check(result, {"IDSW": 1, "IDF1": 50, "MOTA": 95, "DetA": 100, "AssA": 50, "HOTA": 70.711})


def test_misses_and_ghosts(tmp_path):
    truth = mot(tmp_path / "gt.txt", walk(1, range(20)))
    found = mot(tmp_path / "a.txt", walk(1, range(15)) + walk(2, range(4), x=300.0))
    check(evaluate_tracks(truth, found)["overall"], {"FN": 5, "FP": 4, "MOTA": 100 * (20 - 9) / 20})


def test_nothing_found(tmp_path):
    truth = coco(tmp_path / "gt.json", {"a": TRUTH, "b": TRUTH})
    run_folder(tmp_path / "runs/a", [], name="a.mp4")
    run_folder(tmp_path / "runs/b", TRUTH, name="b.mp4")
    result = evaluate_tracks(truth, tmp_path / "runs")
    check(result["videos"]["a"], {"HOTA": 0, "IDF1": 0, "MOTA": 0, "FN": 35})
    check(result["videos"]["b"], PERFECT)
    check(result["overall"], {"FN": 35, "MOTA": 50, "IDR": 50})


def test_every_third_frame_is_compared_with_every_third_frame(tmp_path):
    rows = [row for row in TRUTH if row[0] % 3 == 0]
    found = run_folder(tmp_path / "run", rows, stride=3, first_frame=0, last_frame=18)
    for truth in (mot(tmp_path / "gt.txt", TRUTH), coco(tmp_path / "gt.json", {"clip": TRUTH})):
        check(evaluate_tracks(truth, found)["overall"], PERFECT)


def test_classes(tmp_path):
    truth = coco(tmp_path / "gt.json", {"clip": TRUTH})
    found = run_folder(tmp_path / "run", walk(1, range(20)))
    check(evaluate_tracks(truth, found)["overall"], {"FN": 15})
    check(evaluate_tracks(truth, found, classes=["odd"])["overall"], PERFECT)
    with pytest.raises(ValueError, match=r"no class nurse; there are \['even', 'odd'\]"):
        evaluate_tracks(truth, found, classes=["nurse"])
    with pytest.raises(ValueError, match="--classes"):
        evaluate_tracks(mot(tmp_path / "gt.txt", TRUTH), found, classes=["odd"])


def test_folders_in_the_layout_of_mot_challenge(tmp_path):
    for name in ("one", "two"):
        mot(tmp_path / "truth" / name / "gt/gt.txt", TRUTH)
        mot(tmp_path / "found" / f"{name}.txt", TRUTH)
    result = evaluate_tracks(tmp_path / "truth", tmp_path / "found")
    assert sorted(result["videos"]) == ["one", "two"]
    check(result["overall"], {**PERFECT, "frames": 40})


def test_mistakes_are_named(tmp_path):
    truth = coco(tmp_path / "gt.json", {"a": TRUTH, "b": TRUTH})
    with pytest.raises(FileNotFoundError, match="none"):
        evaluate_tracks(truth, tmp_path / "none")
    run_folder(tmp_path / "runs/a", TRUTH, name="a.mp4")
    with pytest.raises(ValueError, match="no tracks of b"):
        evaluate_tracks(truth, tmp_path / "runs")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no tracks in the folder"):
        evaluate_tracks(truth, tmp_path / "empty")
    for text, message in (
        ("{", "not valid JSON"),
        ("[]", "annotations"),
        ('{"annotations": [{}]}', "lacks"),
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            evaluate_tracks(tmp_path / "bad.json", tmp_path / "runs")
    far = run_folder(tmp_path / "far", TRUTH, stride=1, first_frame=500, last_frame=600)
    with pytest.raises(ValueError, match="no ground truth in the frames"):
        evaluate_tracks(mot(tmp_path / "gt.txt", TRUTH), far)


TRACK = {"frame": 0, "track_id": 1, "bbox": [1, 2, 3, 4], "category_id": 1, "id": 7}
RUN = {"videos": [{"name": "a.mp4"}], "annotations": [TRACK]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"annotations": [7]}, "an annotation must be an object, got 7"),
        ({"annotations": [{**TRACK, "bbox": [1, 2, 3]}]}, "annotation 7: bbox must be a list of 4"),
        ({"annotations": [{**TRACK, "bbox": 5}]}, "annotation 7: bbox must be a list of 4"),
        ({"annotations": [{**TRACK, "bbox": [1, 2, 0, 4]}]}, "annotation 7: width and height"),
        ({"annotations": [{**TRACK, "bbox": [1, 2, 1e9, 4]}]}, "annotation 7: width and height"),
        ({"annotations": [{**TRACK, "bbox": [1, 2, "x\ny", 4]}]}, r"width must be a number, got"),
        ({"annotations": [{**TRACK, "frame": -1}]}, r"frame must be a whole number in \[0"),
        ({"annotations": [{**TRACK, "frame": 10**400}]}, r"frame must be a whole number in \[0"),
        ({"annotations": [{**TRACK, "frame": 1.5}]}, r"frame must be a whole number in \[0"),
        ({"annotations": [{**TRACK, "track_id": None}]}, "annotation 7: id must be a number"),
        ({"annotations": [{**TRACK, "track_id": 1.5}]}, "annotation 7: id must be a whole number"),
        ({"annotations": [{**TRACK, "category_id": {}}], "categories": []}, None),
        ({"videos": []}, "lacks"),
        ({"videos": [7]}, "a video must be an object"),
        ({"videos": [{"stride": 1, "first_frame": "0"}]}, "first_frame must be a whole number"),
        ({"images": [7], "videos": []}, "an image must be an object"),
        ({"images": [{"id": 1}], "videos": []}, "lacks 'frame_id'"),
    ],
)
def test_a_bad_entry_of_json_is_named(tmp_path, changes, said):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({**RUN, **changes}))
    truth = mot(tmp_path / "truth.txt", TRUTH)
    if said is None:  # a class that cannot be looked up matters only where classes are chosen
        data = {**RUN, **changes, "categories": [{"id": 1, "name": "even"}]}
        path.write_text(json.dumps(data))
        with pytest.raises(ValueError, match="lacks"):
            evaluate_tracks(path, path, classes=["even"])
        return
    with pytest.raises(ValueError, match=said) as error:
        evaluate_tracks(truth, path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
