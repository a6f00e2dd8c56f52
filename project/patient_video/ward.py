"""A synthetic hospital room on video: every frame is a function of (seed, video, frame index).

Real recordings of patients are private. This generator gives the same task (a patient in bed who
lies, sits and has spells of rhythmic shaking; staff who walk through and occlude; changing light;
sensor noise) with exact boxes, masks, identities and shaking intervals.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from project.patient_video.canvas import Canvas, Colour
from project.patient_video.figures import GOWN, Look, Pose, draw_person
from project.patient_video.motion import (
    PatientScript,
    Visit,
    draw_patient_script,
    draw_visits,
)

PATIENT, STAFF = 0, 1
CLASS_NAMES = ("patient", "staff")
GENERATOR = 2  # raise it with every change of what is drawn: data of an older one is made anew
SCENE = (320.0, 240.0)  # scene units, width and height
MIN_AREA = 24  # visible pixels at 320 x 240 below which a person is not annotated


@dataclasses.dataclass(frozen=True)
class Person:
    """A visible person of one frame.

    Attributes:
        identity: track id within the video; the patient is 1.
        category: index into ``CLASS_NAMES``.
        mask: (H, W) bool, visible pixels.
        box: (4,) XYXY float, tight around the mask.
    """

    identity: int
    category: int
    mask: np.ndarray
    box: np.ndarray


@dataclasses.dataclass(frozen=True)
class Room:
    """Furniture, colours and light of one video, in scene units."""

    wall: Colour
    floor: Colour
    sheet: Colour
    blanket: Colour
    frame: Colour
    bed: tuple[float, float]  # left and right end of the mattress
    top: float  # y of the mattress surface
    window: tuple[float, float]
    monitor: float
    drip: float
    blanket_from: float  # along the legs, 0 = hip, 1 = knee; above 2: no blanket
    rail: bool
    mirrored: bool
    zoom: float  # of the camera, which looks at the middle of the bed
    light: np.ndarray  # (3, 3): amplitude, frequency (Hz), phase of slow changes
    lamp_times: tuple[float, ...]
    noise: float

    @classmethod
    def draw(cls, rng: np.random.Generator, duration: float) -> Room:
        """Draw a room."""
        tone = rng.uniform(0.75, 1.05)
        walls = [(214, 220, 214), (222, 214, 200), (200, 214, 226), (220, 220, 224)]
        floors = [(150, 140, 128), (120, 132, 140), (168, 150, 120), (140, 150, 138)]
        blankets = [(236, 236, 232), (120, 160, 196), (150, 186, 150), (206, 170, 140)]
        left = rng.uniform(44, 66)
        return cls(
            wall=_scaled(walls[rng.integers(4)], tone),
            floor=_scaled(floors[rng.integers(4)], tone),
            sheet=_scaled((232, 236, 240), rng.uniform(0.9, 1.0)),
            blanket=_scaled(blankets[rng.integers(4)], rng.uniform(0.85, 1.05)),
            frame=_scaled((150, 156, 164), rng.uniform(0.7, 1.1)),
            bed=(float(left), float(left + rng.uniform(186, 204))),
            top=float(rng.uniform(142, 154)),
            window=(float(rng.uniform(150, 230)), float(rng.uniform(50, 80))),
            monitor=float(rng.uniform(20, 60)),
            drip=float(rng.uniform(0.1, 0.9)),
            blanket_from=float(rng.choice([0.35, 0.8, 1.2, 9.0])),
            rail=bool(rng.random() < 0.5),
            mirrored=bool(rng.random() < 0.5),
            zoom=float(rng.uniform(1.15, 1.35)),
            light=np.stack(
                [rng.uniform(0.02, 0.06, 3), rng.uniform(0.03, 0.15, 3), rng.uniform(0, 6.3, 3)]
            ),
            lamp_times=tuple(np.sort(rng.uniform(0, duration, rng.integers(1, 4))).tolist()),
            noise=float(rng.uniform(2.0, 5.0)),
        )

    def corner(self) -> tuple[float, float]:
        """Return the scene point at the upper left corner of the picture."""
        width, height = SCENE[0] / self.zoom, SCENE[1] / self.zoom
        middle = (self.bed[0] + self.bed[1]) / 2
        return min(max(middle - width / 2, 0.0), SCENE[0] - width), SCENE[1] - height - 3


def _scaled(colour: Colour, factor: float) -> Colour:
    return tuple(min(255.0, c * factor) for c in colour)  # type: ignore[return-value]


class WardVideo:
    """One deterministic synthetic video.

    Args:
        seed: seed of the whole dataset.
        video: index of the video; each has its own room, patient and staff.
        seconds: length.
        fps: frames per second; at least 12.5, so that shaking up to 6 Hz can be seen.
        size: (width, height) in pixels, aspect 4:3.
        spells: number of spells of shaking.
    """

    def __init__(
        self,
        seed: int,
        video: int,
        *,
        seconds: float = 20.0,
        fps: float = 15.0,
        size: tuple[int, int] = (320, 240),
        spells: int = 1,
    ) -> None:
        if fps < 12.5:
            raise ValueError(f"fps: expected at least 12.5 (6 Hz shaking aliases), got {fps}")
        if size[0] * 3 != size[1] * 4:
            raise ValueError(f"size: expected a 4:3 (width, height), got {size}")
        rng = np.random.default_rng([seed, video])
        self.seed, self.video = seed, video
        self.seconds, self.fps, self.size = seconds, fps, size
        self.room = Room.draw(rng, seconds)
        hip = (self.room.bed[0] + 0.43 * (self.room.bed[1] - self.room.bed[0]), self.room.top - 2)
        self.patient: PatientScript = draw_patient_script(rng, hip, seconds, spells)
        self._shade = self._lens()
        # One field of noise serves all frames of a video, each from a random place in it.
        grain = rng.standard_normal(4 * size[0] * size[1] * 3, dtype=np.float32)
        self._grain = grain * np.float32(self.room.noise)
        floor = (self.room.top + 22, 226.0)
        self.visits: tuple[Visit, ...] = draw_visits(rng, self.room.bed, floor, seconds)

    def __len__(self) -> int:
        return round(self.seconds * self.fps)

    def shaking(self) -> list[dict[str, float]]:
        """Return the spells of shaking as dicts of start and end (s) and frequency (Hz)."""
        return [
            {"start": s.start, "end": s.end, "frequency": s.frequency} for s in self.patient.spells
        ]

    def render(self, index: int) -> tuple[np.ndarray, list[Person]]:
        """Return frame `index` as (H, W, 3) uint8 RGB, and the people visible in it."""
        time = index / self.fps
        unit = self.size[0] / SCENE[0] * self.room.zoom
        canvas = Canvas(*self.size, unit, self.room.corner())
        _background(canvas, self.room)
        staff = [(i + 2, v, v.pose(time)) for i, v in enumerate(self.visits)]
        present = [(i, v, pose) for i, v, pose in staff if pose is not None]
        for identity, visit, pose in present:
            if not visit.front:
                draw_person(canvas, visit.look, pose, identity, clothed_legs=True)
        _bed(canvas, self.room)
        body = self.patient.pose(time)
        draw_person(canvas, self.patient.look, body, 1, clothed_legs=False)
        _cover(canvas, self.room, self.patient.look, body)
        for identity, visit, pose in present:
            if visit.front:
                draw_person(canvas, visit.look, pose, identity, clothed_legs=True)
        identities = [(1, PATIENT), *((i, STAFF) for i, _, _ in present)]
        people = [p for p in (self._person(canvas, *who) for who in identities) if p]
        image = self._sensor(canvas.image(), time, index)
        if self.room.mirrored:
            image = np.ascontiguousarray(image[:, ::-1])
        return image, people

    def _person(self, canvas: Canvas, identity: int, category: int) -> Person | None:
        mask = canvas.mask(identity)
        if self.room.mirrored:
            mask = np.ascontiguousarray(mask[:, ::-1])
        if mask.sum() < MIN_AREA * (self.size[0] / SCENE[0]) ** 2:
            return None
        ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = np.array([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1], np.float64)
        return Person(identity, category, mask, box)

    def _sensor(self, image: np.ndarray, time: float, index: int) -> np.ndarray:
        """Apply the light of the moment, vignetting and the noise of the sensor."""
        amplitude, frequency, phase = self.room.light
        tint = 1 + amplitude * np.sin(2 * np.pi * frequency * time + phase)
        dimmed = sum(t <= time for t in self.room.lamp_times) % 2
        light = image * (self._shade * (tint * (0.72 if dimmed else 1.0)).astype(np.float32))
        rng = np.random.default_rng([self.seed, self.video, index])
        start = int(rng.integers(len(self._grain) - light.size))
        grain = self._grain[start : start + light.size].reshape(light.shape)
        noisy = light * np.float32(0.6 / 255)  # photon noise grows with the light
        noisy += np.float32(0.6)
        noisy *= grain
        noisy += light
        return np.clip(noisy, 0, 255, out=noisy).round(out=noisy).astype(np.uint8)

    def _lens(self) -> np.ndarray:
        """Return the (H, W, 1) float32 factor by which the picture darkens towards its corners."""
        width, height = self.size
        y, x = np.mgrid[0:height, 0:width].astype(np.float32)
        radius = np.hypot((x / width - 0.5) * 1.2, y / height - 0.5)
        return (1.06 - 0.32 * radius**2)[..., None].astype(np.float32)


def _background(canvas: Canvas, room: Room) -> None:
    width, height = SCENE
    horizon = room.top + 6
    canvas.rectangle(0, 0, width, horizon, room.wall)
    canvas.rectangle(0, horizon, width, height, room.floor)
    canvas.rectangle(0, horizon - 4, width, horizon, _scaled(room.wall, 0.8))
    x, w = room.window
    canvas.rectangle(x - 3, 17, x + w + 3, 83, _scaled(room.frame, 1.2))
    canvas.rectangle(x, 20, x + w, 80, (206, 226, 244))
    canvas.rectangle(x, 56, x + w, 80, (170, 190, 160))
    canvas.rectangle(x + w / 2 - 1, 20, x + w / 2 + 1, 80, _scaled(room.frame, 1.2))
    canvas.rectangle(room.monitor, 60, room.monitor + 34, 86, (40, 44, 50))
    canvas.rectangle(room.monitor + 2, 62, room.monitor + 32, 82, (12, 30, 26))
    for i in range(9):
        level = 74 - 8 * (i % 3 == 1)
        x0 = room.monitor + 3 + 3.2 * i
        canvas.rectangle(x0, level, x0 + 2.4, level + 1.4, (60, 220, 120))


def _bed(canvas: Canvas, room: Room) -> None:
    left, right = room.bed
    y = room.top
    for x in (left + 8, right - 10):
        canvas.rectangle(x, y + 20, x + 4, y + 56, _scaled(room.frame, 0.8))
        canvas.ellipse((x + 2, y + 58), (4, 4), 0, (40, 40, 44))
    canvas.rectangle(left - 7, y - 34, left, y + 30, room.frame)
    canvas.rectangle(right, y - 12, right + 6, y + 30, room.frame)
    lift = 8.0  # the far edge of the mattress is seen above the near edge
    near, far = _scaled(room.sheet, 0.86), room.sheet
    canvas.polygon([(left, y), (right, y), (right - 6, y - lift), (left + 6, y - lift)], far)
    canvas.rectangle(left, y, right, y + 16, near)
    canvas.rectangle(left, y + 16, right, y + 24, _scaled(room.frame, 0.9))
    canvas.rectangle(left + 14, y + 24, right - 14, y + 50, _scaled(room.frame, 0.75))
    pillow = (left + 24, y - 8)
    canvas.ellipse(pillow, (24, 9), 4, (246, 247, 250))
    if room.rail:  # the far one: it stands behind the patient
        rail = _scaled(room.frame, 1.15)
        x0, x1 = left + 0.34 * (right - left), left + 0.74 * (right - left)
        canvas.rectangle(x0, y - lift - 13, x1, y - lift - 10.5, rail)
        for i in range(5):
            x = x0 + i * (x1 - x0) / 4
            canvas.rectangle(x - 1, y - lift - 13, x + 1, y - lift, rail)
    x = left + room.drip * (right - left)
    canvas.rectangle(x, y - 86, x + 1.6, y - lift, (120, 124, 130))
    canvas.ellipse((x + 6, y - 78), (4.5, 8), 0, (220, 232, 236))


def _cover(canvas: Canvas, room: Room, look: Look, body: Pose) -> None:
    """Draw the blanket over the patient's legs."""
    left, right = room.bed
    y = room.top
    if room.blanket_from < 2:
        knee = _joint(body.hip, body.near_leg[0], 29 * look.size)
        ankle = _joint(knee, body.near_leg[1], 28 * look.size)
        share = min(1.0, room.blanket_from)
        start_x = body.hip[0] + share * (knee[0] - body.hip[0])
        start_y = body.hip[1] + share * (knee[1] - body.hip[1])
        ridge = [
            (start_x, start_y - 10 * look.size),
            (max(start_x + 2, knee[0]), knee[1] - 9 * look.size),
            (max(start_x + 4, ankle[0]), ankle[1] - 14 * look.size),
            (right - 2, y - 7),
        ]
        outline = [(start_x - 3, y + 13), *ridge, (right - 1, y + 18), (start_x + 4, y + 18)]
        canvas.polygon(outline, room.blanket)
        fold = _scaled(room.blanket, 0.86)
        canvas.polygon([(start_x - 3, y + 8), (right - 1, y + 9), *outline[-2:]], fold)


def _joint(start: tuple[float, float], angle: float, length: float) -> tuple[float, float]:
    turn = math.radians(angle)
    return start[0] + length * math.cos(turn), start[1] - length * math.sin(turn)


__all__ = ["CLASS_NAMES", "GOWN", "PATIENT", "STAFF", "Person", "Room", "WardVideo"]
