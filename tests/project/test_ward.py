"""The synthetic ward: deterministic, exact, and with the motion that it claims."""

import numpy as np
import pytest

from project.patient_video.motion import POSTURES, draw_patient_script
from project.patient_video.ward import PATIENT, STAFF, WardVideo


@pytest.fixture(scope="module")
def ward() -> WardVideo:
    return WardVideo(seed=3, video=1, seconds=8.0)


def test_frames_are_functions_of_seed_video_and_index(ward):
    again = WardVideo(seed=3, video=1, seconds=8.0)
    for index in (40, 3):  # not in order: no hidden state
        image, people = ward.render(index)
        image2, people2 = again.render(index)
        np.testing.assert_array_equal(image, image2)
        for a, b in zip(people, people2, strict=True):
            assert a.identity == b.identity
            np.testing.assert_array_equal(a.mask, b.mask)
    other, _ = WardVideo(seed=3, video=2, seconds=8.0).render(3)
    assert np.abs(other.astype(int) - image.astype(int)).mean() > 5


def test_masks_are_disjoint_and_boxes_are_tight(ward):
    for index in range(0, len(ward), 17):
        image, people = ward.render(index)
        assert image.shape == (240, 320, 3)
        assert image.dtype == np.uint8
        assert people[0].identity == 1
        assert people[0].category == PATIENT
        assert all(p.category == STAFF for p in people[1:])
        assert sum(p.mask.astype(int) for p in people).max() <= 1
        for person in people:
            x0, y0, x1, y1 = person.box.astype(int)
            assert person.mask[y0:y1, x0:x1].sum() == person.mask.sum()
            assert person.mask[y0].any()
            assert person.mask[y1 - 1].any()
            assert person.mask[:, x0].any()
            assert person.mask[:, x1 - 1].any()


def test_staff_walk_through_and_occlude():
    occluded = []
    for index in range(3):
        video = WardVideo(seed=0, video=index, seconds=16.0)
        alone = WardVideo(seed=0, video=index, seconds=16.0)
        alone.visits = ()
        for frame in range(0, len(video), 12):
            whole = alone.render(frame)[1][0].mask.sum()
            occluded.append(1 - video.render(frame)[1][0].mask.sum() / whole)
    assert max(occluded) > 0.15, "somebody in front hides part of the patient"
    assert min(occluded) == 0


def test_shaking_has_the_stated_frequency():
    rng = np.random.default_rng(5)
    script = draw_patient_script(rng, (160.0, 150.0), 20.0, spells=1)
    (spell,) = script.spells
    times = np.arange(spell.start + 1, spell.end - 1, 1 / 60)
    wrist = np.array([script.pose(t).near_arm[1] for t in times])
    wrist -= np.convolve(np.pad(wrist, 30, "edge"), np.ones(61) / 61, "valid")
    spectrum = np.abs(np.fft.rfft(wrist * np.hanning(len(wrist)), 4096))
    frequency = np.fft.rfftfreq(4096, 1 / 60)[spectrum.argmax()]
    assert frequency == pytest.approx(spell.frequency, abs=0.4)
    assert spell.envelope(spell.start - 0.1) == 0
    assert spell.envelope((spell.start + spell.end) / 2) == 1


def test_postures_blend_without_jumps():
    script = draw_patient_script(np.random.default_rng(1), (160.0, 150.0), 30.0, spells=0)
    assert {name for _, name in script.turns} <= set(POSTURES)
    vectors = np.stack([script.pose(t).vector() for t in np.arange(0, 30, 1 / 30)])
    assert np.abs(np.diff(vectors, axis=0)).max() < 12  # degrees per frame


@pytest.mark.parametrize(
    ("arguments", "field"), [({"fps": 10.0}, "fps"), ({"size": (320, 200)}, "size")]
)
def test_bad_arguments_are_named(arguments, field):
    with pytest.raises(ValueError, match=field):
        WardVideo(0, 0, **arguments)
