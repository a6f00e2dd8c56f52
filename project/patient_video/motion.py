"""What happens in a ward video: who moves where, how, and when the patient shakes."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from project.patient_video.canvas import Point
from project.patient_video.figures import Look, Pose

BEND = 6.0  # seconds that a change of posture may take at most


@dataclasses.dataclass(frozen=True)
class Spell:
    """An interval of rhythmic shaking: seconds, Hz, degrees."""

    start: float
    end: float
    frequency: float
    amplitude: float

    def envelope(self, time: float) -> float:
        """Return the strength of the shaking at `time`: 0 outside, 1 half a second inside."""
        if not self.start <= time <= self.end:
            return 0.0
        return min(1.0, (time - self.start) / 0.5 + 0.35, (self.end - time) / 0.5 + 0.35)


@dataclasses.dataclass(frozen=True)
class Visit:
    """One member of staff walks from `x0` to `x1`, pauses on the way, and leaves.

    `feet` is the height (y) of the ground under the feet; `front` tells on which side of the bed.
    """

    look: Look
    start: float
    x0: float
    x1: float
    stop_x: float
    pause: float
    speed: float
    feet: float
    front: bool

    def position(self, time: float) -> tuple[float, float] | None:
        """Return (x, walking phase in radians) at `time`, or None before and after the visit."""
        t = time - self.start
        first, second = abs(self.stop_x - self.x0), abs(self.x1 - self.stop_x)
        t_stop, t_go = first / self.speed, first / self.speed + self.pause
        if t < 0 or t > t_go + second / self.speed:
            return None
        walked = self.speed * (min(t, t_stop) + max(0.0, t - t_go))
        if t <= t_stop:
            x = self.x0 + math.copysign(walked, self.stop_x - self.x0)
        else:
            x = self.stop_x + math.copysign(walked - first, self.x1 - self.stop_x)
        return x, walked / 9.0

    def pose(self, time: float) -> Pose | None:
        """Return the pose at `time`, or None where the person is not in the room."""
        place = self.position(time)
        if place is None:
            return None
        x, phase = place
        s = self.look.size
        swing = 0.0 if self.pausing(time) else math.sin(phase)
        reach = 42.0 * self._care(time)
        towards = 1.0 if self.stop_x > self.x0 else -1.0
        leg, arm = 24.0 * swing * towards, 20.0 * swing * towards
        knee = 14.0 * max(0.0, math.cos(phase)) * towards * (swing != 0)
        hip = (x, self.feet - 57 * s + 1.2 * abs(swing))
        return Pose(
            hip=hip,
            torso=90 - 0.45 * reach * towards,
            head=90 - 0.7 * reach * towards,
            near_arm=(-90 - arm + reach * towards, -90 - arm + 2 * reach * towards),
            far_arm=(-90 + arm + reach * towards, -90 + arm + 1.7 * reach * towards),
            near_leg=(-90 + leg, -90 + leg - knee),
            far_leg=(-90 - leg, -90 - leg - knee),
        )

    def pausing(self, time: float) -> bool:
        """Tell whether the person stands still at `time`."""
        arrived = self.start + abs(self.stop_x - self.x0) / self.speed
        return arrived < time < arrived + self.pause

    def _care(self, time: float) -> float:
        """Return how far the person leans towards the bed, 0..1."""
        arrived = self.start + abs(self.stop_x - self.x0) / self.speed
        t = time - arrived
        if not 0 < t < self.pause:
            return 0.0
        return min(1.0, t / 0.8, (self.pause - t) / 0.8)


POSTURES: dict[str, Pose] = {
    "back": Pose((0, 0), 178, 168, (-8, -4), (10, 4), (2, -2), (-1, 1)),
    "propped": Pose((0, 0), 152, 150, (-38, -2), (-30, 6), (4, -3), (0, 0)),
    "knees": Pose((0, 0), 174, 160, (-12, 10), (16, 8), (42, -46), (34, -40)),
    "side": Pose((0, 0), 172, 186, (30, -24), (38, -10), (24, -40), (16, -34)),
    "sitting": Pose((0, 2), 104, 96, (-52, -8), (-46, 4), (4, -4), (0, -2)),
    "leaning": Pose((0, 2), 122, 104, (-70, 10), (-56, 16), (30, -34), (22, -28)),
}


@dataclasses.dataclass(frozen=True)
class PatientScript:
    """The patient's part: postures in turn, fidgeting, and the spells of shaking.

    Attributes:
        look: colours and size.
        hip: resting place of the hip on the mattress, scene units.
        turns: (time in seconds, posture name), the first at 0.
        spells: intervals of shaking.
        fidget: (12, 3, 3) amplitudes, frequencies (Hz, below 0.7) and phases of small motion.
        shake: (12, 2) amplitude factor and phase of each number of the pose while shaking.
    """

    look: Look
    hip: Point
    turns: tuple[tuple[float, str], ...]
    spells: tuple[Spell, ...]
    fidget: np.ndarray
    shake: np.ndarray

    def pose(self, time: float) -> Pose:
        """Return the patient's pose at `time` seconds."""
        vector = self._posture(time)
        amplitude, frequency, phase = self.fidget
        vector = vector + (amplitude * np.sin(2 * np.pi * frequency * time + phase)).sum(-1)
        for spell in self.spells:
            strength = spell.envelope(time)
            if strength > 0:
                beat = np.sin(2 * np.pi * spell.frequency * time + self.shake[:, 1])
                vector = vector + strength * spell.amplitude * self.shake[:, 0] * beat
        vector[:2] += self.hip
        return Pose.from_vector(vector)

    def _posture(self, time: float) -> np.ndarray:
        index = max(i for i, (start, _) in enumerate(self.turns) if start <= time)
        start, name = self.turns[index]
        now = POSTURES[name].vector()
        if index == 0:
            return now
        before = POSTURES[self.turns[index - 1][1]].vector()
        u = min(1.0, (time - start) / 2.0)
        u = u * u * (3 - 2 * u)  # smooth start and stop
        return before + (now - before) * u


def draw_patient_script(
    rng: np.random.Generator, hip: Point, duration: float, spells: int
) -> PatientScript:
    """Draw what a patient does during `duration` seconds, with `spells` spells of shaking."""
    turns = [(0.0, str(rng.choice(["back", "propped", "knees", "side"])))]
    while turns[-1][0] + 4 < duration:
        names = [name for name in POSTURES if name != turns[-1][1]]
        turns.append((turns[-1][0] + float(rng.uniform(4, 9)), str(rng.choice(names))))
    slot = duration / max(1, spells)
    drawn = []
    for i in range(spells):
        longest = min(8.0, slot * 0.6)
        length = float(rng.uniform(min(4.5, 0.75 * longest), longest))
        start = i * slot + float(rng.uniform(0.1 * slot, slot - length - 0.1 * slot))
        frequency, amplitude = float(rng.uniform(2.4, 5.2)), float(rng.uniform(9, 15))
        drawn.append(Spell(start, start + length, frequency, amplitude))
    scale = np.array([0.5, 0.35, 1.6, 3.0, 5, 7, 5, 7, 2.5, 3, 2.5, 3])[:, None]
    fidget = np.stack(
        [
            scale * rng.uniform(0.3, 1.0, (12, 3)),
            rng.uniform(0.05, 0.65, (12, 3)),
            rng.uniform(0, 2 * np.pi, (12, 3)),
        ]
    )
    part = np.array([0.12, 0.10, 0.35, 0.8, 1.3, 1.7, 1.2, 1.6, 0.7, 0.9, 0.7, 0.9])
    shake = np.stack([part * rng.uniform(0.8, 1.2, 12), rng.uniform(-0.5, 0.5, 12)], axis=1)
    look = Look.patient(rng)
    return PatientScript(look, hip, tuple(turns), tuple(drawn), fidget, shake)


def draw_visits(
    rng: np.random.Generator, bed: tuple[float, float], floor: tuple[float, float], duration: float
) -> tuple[Visit, ...]:
    """Draw the staff's visits.

    Args:
        rng: source of randomness.
        bed: left and right end of the bed, scene units.
        floor: ground height (y) behind and in front of the bed.
        duration: seconds.
    """
    visits = []
    time = float(rng.uniform(-3, 2))
    while time < duration - 2:
        front = bool(rng.random() < 0.55)
        leftwards = bool(rng.random() < 0.5)
        x0, x1 = (-25.0, 345.0) if not leftwards else (345.0, -25.0)
        if rng.random() < 0.4:  # comes in and goes back out by the same side
            x1 = x0
        stop_x = float(rng.uniform(bed[0] + 10, bed[1] - 10))
        feet = (
            float(floor[1] + rng.uniform(-3, 8)) if front else float(floor[0] + rng.uniform(-3, 3))
        )
        pause, speed = float(rng.uniform(1, 5)), float(rng.uniform(55, 95))
        visits.append(Visit(Look.staff(rng), time, x0, x1, stop_x, pause, speed, feet, front))
        time += float(rng.uniform(4.5, 9))
    return tuple(visits)
