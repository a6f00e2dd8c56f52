"""Jointed people: a pose is a set of joint angles, a look is a set of colours and sizes."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from project.patient_video.canvas import Canvas, Colour, Point

SKIN: tuple[Colour, ...] = (
    (241, 194, 160),
    (224, 172, 138),
    (198, 134, 98),
    (141, 92, 66),
    (96, 62, 48),
)
HAIR: tuple[Colour, ...] = (
    (40, 30, 26),
    (88, 58, 36),
    (150, 110, 60),
    (120, 120, 122),
    (172, 166, 160),
)
GOWN: tuple[Colour, ...] = (
    (120, 166, 204),
    (136, 188, 156),
    (206, 184, 122),
    (166, 140, 196),
    (208, 142, 142),
)
SCRUBS: tuple[Colour, ...] = (
    (38, 92, 128),
    (24, 120, 112),
    (70, 80, 140),
    (110, 46, 78),
    (236, 238, 240),
)


@dataclasses.dataclass(frozen=True)
class Look:
    """Colours and body size of one person; `size` scales every length."""

    skin: Colour
    hair: Colour
    cloth: Colour
    trousers: Colour
    size: float
    coat: bool = False

    @classmethod
    def patient(cls, rng: np.random.Generator) -> Look:
        """Draw the look of a patient: a light gown, bare arms and legs."""
        gown = _vary(GOWN[rng.integers(len(GOWN))], rng)
        skin = _vary(SKIN[rng.integers(len(SKIN))], rng, 6)
        return cls(skin, HAIR[rng.integers(len(HAIR))], gown, skin, float(rng.uniform(0.9, 1.1)))

    @classmethod
    def staff(cls, rng: np.random.Generator) -> Look:
        """Draw the look of a member of staff: scrubs, sometimes a white coat."""
        scrubs = _vary(SCRUBS[rng.integers(len(SCRUBS))], rng)
        skin = _vary(SKIN[rng.integers(len(SKIN))], rng, 6)
        hair = HAIR[rng.integers(len(HAIR))]
        coat = bool(rng.random() < 0.35)
        return cls(skin, hair, scrubs, scrubs, float(rng.uniform(0.92, 1.12)), coat)


@dataclasses.dataclass(frozen=True)
class Pose:
    """Joint angles in degrees; 0 points to the bed's foot end (+x), 90 up.

    `torso` and `head` are directions seen from hip and neck; arms and legs are (upper, lower)
    directions of the near and the far limb. The hip is at `hip`, in scene units.
    """

    hip: Point
    torso: float
    head: float
    near_arm: tuple[float, float]
    far_arm: tuple[float, float]
    near_leg: tuple[float, float]
    far_leg: tuple[float, float]

    def vector(self) -> np.ndarray:
        """Return all numbers of the pose as one (12,) array, for blending."""
        parts = (self.near_arm, self.far_arm, self.near_leg, self.far_leg)
        return np.array([*self.hip, self.torso, self.head, *(a for pair in parts for a in pair)])

    @classmethod
    def from_vector(cls, v: np.ndarray) -> Pose:
        """Return the pose of which `v` is the vector."""
        x = [float(a) for a in v]
        pairs = [(x[i], x[i + 1]) for i in range(4, 12, 2)]
        return cls((x[0], x[1]), x[2], x[3], *pairs)


def _vary(colour: Colour, rng: np.random.Generator, by: float = 12) -> Colour:
    return tuple(float(c) for c in np.clip(np.add(colour, rng.normal(0, by, 3)), 0, 255))  # type: ignore[return-value]


def _move(start: Point, angle: float, length: float) -> Point:
    turn = math.radians(angle)
    return start[0] + length * math.cos(turn), start[1] - length * math.sin(turn)


def _dark(colour: Colour, factor: float = 0.82) -> Colour:
    return tuple(c * factor for c in colour)  # type: ignore[return-value]


def draw_person(canvas: Canvas, look: Look, pose: Pose, label: int, clothed_legs: bool) -> None:
    """Draw a person, far limbs first, with every pixel labelled `label`.

    Args:
        canvas: surface to draw on.
        look: colours and size.
        pose: joint angles.
        label: object label of the person, 1..255.
        clothed_legs: trousers and shoes (staff) instead of bare legs (patient).
    """
    s = look.size
    neck = _move(pose.hip, pose.torso, 38 * s)
    shoulder = _move(pose.hip, pose.torso, 34 * s)
    upper = (236.0, 238.0, 240.0) if look.coat else look.cloth
    _arm(canvas, look, shoulder, pose.far_arm, _dark(upper), label, 0.82)
    _leg(canvas, look, pose.hip, pose.far_leg, label, clothed_legs, 0.82)
    if look.coat:  # the skirt of the coat hangs over the thighs
        canvas.limb(pose.hip, _move(pose.hip, -90, 18 * s), (10 * s, 11 * s), upper, label)
    _leg(canvas, look, pose.hip, pose.near_leg, label, clothed_legs, 1.0)
    canvas.limb(pose.hip, shoulder, (9.5 * s, 10.5 * s), upper, label)
    canvas.limb(neck, _move(neck, pose.head, 6 * s), (4 * s, 4 * s), look.skin, label)
    skull = _move(neck, pose.head, 12 * s)
    canvas.ellipse(skull, (10 * s, 8.4 * s), -pose.head, look.skin, label)
    crown = _move(skull, pose.head, 3.4 * s)
    crown = _move(crown, pose.head + 90, 2.2 * s)
    canvas.ellipse(crown, (7.4 * s, 7.6 * s), -pose.head, look.hair, label)
    _arm(canvas, look, shoulder, pose.near_arm, upper, label, 1.0)


def _arm(
    canvas: Canvas,
    look: Look,
    shoulder: Point,
    angles: tuple[float, float],
    sleeve: Colour,
    label: int,
    shade: float,
) -> None:
    s = look.size
    elbow = _move(shoulder, angles[0], 20 * s)
    wrist = _move(elbow, angles[1], 18 * s)
    skin = _dark(look.skin, shade)
    canvas.limb(elbow, wrist, (3.9 * s, 3.1 * s), skin, label)
    canvas.ellipse(_move(wrist, angles[1], 2 * s), (4 * s, 3.4 * s), -angles[1], skin, label)
    canvas.limb(shoulder, elbow, (5.4 * s, 4.6 * s), sleeve, label)


def _leg(
    canvas: Canvas,
    look: Look,
    hip: Point,
    angles: tuple[float, float],
    label: int,
    clothed: bool,
    shade: float,
) -> None:
    s = look.size
    knee = _move(hip, angles[0], 29 * s)
    ankle = _move(knee, angles[1], 28 * s)
    lower = _dark(look.trousers if clothed else look.skin, shade)
    foot = (46.0, 44.0, 48.0) if clothed else lower
    toe = _move(ankle, angles[1] + (70 if clothed else 60), 8 * s)
    canvas.limb(ankle, toe, (3.6 * s, 3.0 * s), foot, label)
    canvas.limb(knee, ankle, (5.6 * s, 4.2 * s), lower, label)
    thigh = _dark(look.trousers if clothed else look.cloth, shade)
    canvas.limb(hip, knee, (8.6 * s, 6.2 * s), thigh, label)
