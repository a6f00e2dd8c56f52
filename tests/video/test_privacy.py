"""Blurring: nothing of a region is left, in any frame, of anybody who should not be seen."""

import av
import cv2
import numpy as np
import pytest

from d2kit.tracking import Sighting
from d2kit.video import (
    DETECTIONS,
    LEAST_DIFFERENCE,
    Anonymizer,
    Frame,
    FrameDetections,
    TrackedFrame,
    track_video,
)
from d2kit.video.association import MaskPatch
from d2kit.video.overlay import track_color
from d2kit.video.privacy import head_of
from tests.support.clips import (
    detections_of,
    quiet,
    store_truth,
    tracking_cfg,
    ward_frames,
    write_video,
)

FRAMES = ward_frames(seconds=5.0)
WRITTEN = 0.75 * LEAST_DIFFERENCE  # after labels and lossy encoding


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    return write_video(folder / "clip.mp4", [image for image, _ in FRAMES])


def run(clip, output, **changes):
    """Track with every person detected in every frame; return kept and annotated frames."""
    store_truth(output, FRAMES, miss=0.0)
    track_video(tracking_cfg(), quiet(clip, output, keep_frames=True, crf=18, **changes))
    kept = [cv2.imread(str(p)) for p in sorted((output / "frames").glob("*.jpg"))]
    with av.open(str(output / "annotated.mp4")) as container:
        drawn = [f.to_ndarray(format="bgr24") for f in container.decode(video=0)]
    assert len(kept) == len(drawn) == len(FRAMES)
    return kept, drawn


def difference(image, original, mask):
    return np.abs(image.astype(int) - original)[mask].mean()


def head(mask):
    """The top fifth of a standing person, by rows."""
    rows = np.flatnonzero(mask.any(1))
    chosen = np.zeros_like(mask)
    chosen[rows[0] : rows[0] + max(2, len(rows) // 5)] = True
    return mask & chosen


def test_people(clip, tmp_path):
    kept, drawn = run(clip, tmp_path, blur="people")
    regions = 0
    for k, (image, people) in enumerate(FRAMES):
        for person in people:
            regions += 1
            assert difference(kept[k], image, person.mask) > WRITTEN
            assert difference(drawn[k], image, person.mask) > WRITTEN
        nobody = ~cv2.dilate(sum(p.mask for p in people).astype(np.uint8), np.ones((25, 25))) > 254
        assert difference(kept[k], image, nobody) < 12  # the room is as it was, but for encoding
    assert regions > len(FRAMES)


def test_bystanders(clip, tmp_path):
    """First a run that shows nobody, to learn the identity of the patient, then the one asked."""
    store_truth(tmp_path, FRAMES, miss=0.0)
    tracks = track_video(tracking_cfg(), quiet("", tmp_path, video=False))["tracks"]
    (patient,) = [t["id"] for t in tracks if t["class_name"] == "patient"]
    (tmp_path / DETECTIONS).unlink()
    kept, drawn = run(clip, tmp_path, blur="bystanders", subject=patient)
    for k, (image, people) in enumerate(FRAMES):
        for person in people:
            if person.category == 1:
                assert difference(kept[k], image, person.mask) > WRITTEN
                assert difference(drawn[k], image, person.mask) > WRITTEN
            elif k > 1:  # ByteTrack names the patient in the second frame
                assert difference(kept[k], image, person.mask) < WRITTEN
    assert any(p.category == 1 for _, people in FRAMES for p in people)


def test_faces(clip, tmp_path):
    kept, drawn = run(clip, tmp_path, blur="faces")
    seen = 0
    for k, (image, people) in enumerate(FRAMES):
        for person in people:
            tall = person.mask.any(1).sum() > 1.6 * person.mask.any(0).sum()
            if person.category == 1 and tall:  # staff who stand
                seen += 1
                assert difference(kept[k], image, head(person.mask)) > WRITTEN
                assert difference(drawn[k], image, head(person.mask)) > WRITTEN
                feet = person.mask & ~head(person.mask)
                assert (kept[k][feet] == kept[k][feet][0]).mean() < 0.9  # the body is not filled
    assert seen > 10


def tracked_frame(image, sightings=(), found=None, index=0):
    found = found or FrameDetections(index, 0.0, np.zeros((0, 4)), [], [])
    return TrackedFrame(Frame(index, 0.0, image), found, list(sightings), [None] * len(sightings))


def sighting(identity, box, mask=None, class_id=0):
    x0, y0, x1, y1 = box
    patch = None
    if mask is not None:
        patch = MaskPatch(x0, y0, np.ascontiguousarray(mask[y0:y1, x0:x1].astype(np.uint8)))
    return Sighting(identity, class_id, 0.9, box, ((x0 + x1) / 2, (y0 + y1) / 2), mask=patch)


def blob(box, size=(96, 128)):
    mask = np.zeros(size, bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


@pytest.mark.parametrize("identity", range(12))
@pytest.mark.parametrize("kind", ["own", "complement", "noise", "grey"])
def test_the_difference_is_large_whatever_the_original(identity, kind):
    """Also where the people have the very colour that they would be filled with."""
    color = np.array(track_color(identity))
    image = np.empty((96, 128, 3), np.uint8)
    fills = {"own": color, "complement": 255 - color, "grey": 128}
    image[:] = fills.get(kind, 0)
    if kind == "noise":
        image[:] = np.random.default_rng(identity).integers(0, 255, image.shape)
    boxes = [(10, 20, 40, 80), (30, 30, 70, 90), (100, 0, 128, 40)]
    people = [sighting(identity + i, box, blob(box)) for i, box in enumerate(boxes)]
    hide = Anonymizer("people", classes=[0])
    frame = tracked_frame(image, people)
    result = hide(frame, image.shape[:2])
    for _, region in hide.regions(frame, image.shape[:2]):
        whole = np.zeros(image.shape[:2], bool)
        height, width = region.bits.shape
        whole[region.y : region.y + height, region.x : region.x + width] = region.bits > 0
        assert difference(result, image, whole) >= LEAST_DIFFERENCE
    for box in boxes:
        assert len(np.unique(result[blob(box)], axis=0)) <= len(boxes)  # flat: nothing is left


def test_whom_tracks_do_not_have_is_hidden_too():
    """Detections without identity, boxes in gaps, models without masks."""
    image = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    found = FrameDetections(0, 0.0, [[5, 5, 30, 60], [60, 5, 90, 60]], [0.3, 0.1], [0, 0])
    gap = sighting(3, (95, 10, 120, 70))
    result = Anonymizer("people", classes=[0])(tracked_frame(image, [gap], found), (96, 128))
    assert difference(result, image, blob((5, 5, 30, 60))) > LEAST_DIFFERENCE
    assert difference(result, image, blob((95, 10, 120, 70))) > LEAST_DIFFERENCE
    assert difference(result, image, blob((62, 10, 88, 58))) == 0  # below the least score


def test_other_classes_stay():
    image = np.full((96, 128, 3), 90, np.uint8)
    box = (5, 5, 30, 60)
    result = Anonymizer("people", classes=[0])(
        tracked_frame(image, [sighting(1, box, blob(box), class_id=2)]), (96, 128)
    )
    np.testing.assert_array_equal(result, image)


def test_a_bystander_in_front_of_the_subject_is_hidden_to_the_last_pixel():
    image = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    front, back = blob((40, 20, 60, 90)), blob((10, 40, 120, 80))
    subject = sighting(1, (10, 40, 120, 80), back & ~front)
    other = sighting(2, (40, 20, 60, 90), front)
    twice = FrameDetections(0, 0.0, [[10, 40, 120, 80]], [0.6], [0])  # the subject once more
    hide = Anonymizer("bystanders", subject=1, classes=[0])
    result = hide(tracked_frame(image, [subject, other], twice), (96, 128))
    assert (result[front] == result[front][0]).all()
    np.testing.assert_array_equal(result[back & ~front], image[back & ~front])


@pytest.mark.parametrize(
    ("angle", "both"), [(0, False), (25, False), (-25, False), (85, True), (90, True)]
)
def test_head_end_of_a_body(angle, both):
    """An ellipse, upright at 0 degrees: its upper end, both where it lies."""
    canvas = np.zeros((200, 200), np.uint8)
    cv2.ellipse(canvas, (100, 100), (20, 80), angle, 0, 360, 1, -1)
    patch = head_of(MaskPatch(0, 0, canvas))
    direction = np.array([np.sin(np.radians(angle)), -np.cos(np.radians(angle))])

    def covered(end):
        x, y = np.round(100 + end * 70 * direction).astype(int)
        return bool(patch.bits[y, x])

    assert covered(1)
    assert covered(-1) is both
    assert not covered(-0.2)


def test_a_compact_body_is_all_head():
    disc = np.zeros((60, 60), np.uint8)
    cv2.circle(disc, (30, 30), 20, 1, -1)
    np.testing.assert_array_equal(head_of(MaskPatch(0, 0, disc)).bits, disc)
    dot = MaskPatch(3, 4, np.ones((1, 2), np.uint8))
    assert head_of(dot) is dot


@pytest.mark.parametrize(
    ("mode", "subject", "message"),
    [
        ("bystanders", None, "--subject ID"),
        ("people", 3, "--blur bystanders"),
        ("all", None, "faces"),
    ],
)
def test_settings_that_do_not_fit(mode, subject, message):
    with pytest.raises(ValueError, match=message):
        Anonymizer(mode, subject=subject, classes=[0])


def test_classes_that_do_not_exist(clip, tmp_path):
    store_truth(tmp_path, FRAMES)
    with pytest.raises(ValueError, match="nurse"):
        track_video(tracking_cfg(), quiet(clip, tmp_path, blur="people", blur_classes=("nurse",)))


def test_input_frame_is_not_changed():
    image, people = FRAMES[-1]
    before = image.copy()
    found = detections_of(people, 0, 0.0)
    hide = Anonymizer("people", classes=[0, 1])
    hide(tracked_frame(image, [], found), image.shape[:2])
    np.testing.assert_array_equal(image, before)
