"""People-like figures: a torso, a head and limbs from joint angles, each labelled with its part.

A figure has its own axes, in metres: x to its left side as seen from the front, y up, z where it looks.
"""

from dataclasses import replace

import numpy as np

from teachercache.student.datasets.synthetic.renderer import Floats, Paint, Solid, Surface
from teachercache.student.datasets.synthetic.textures import Rng, checks, face, plain, random_colours, stripes

PARTS = ("background", "head", "torso", "upper arm", "lower arm", "upper leg", "lower leg")
_HEAD, _TORSO, _UPPER_ARM, _LOWER_ARM, _UPPER_LEG, _LOWER_LEG = range(1, 7)

_SKINS = np.array([[0.96, 0.80, 0.69], [0.87, 0.67, 0.53], [0.68, 0.47, 0.34], [0.44, 0.29, 0.21]])
_HAIRS = np.array([[0.10, 0.08, 0.07], [0.28, 0.17, 0.10], [0.62, 0.44, 0.22], [0.55, 0.52, 0.50]])


def person(rng: Rng, surface: Surface, foot: Floats, to_camera: Floats) -> list[Solid]:
    """The solids of one figure in a random pose and dress.

    `foot` (3,): the ground under it; `to_camera` (3, 3): its axes (columns, without a scale) in camera
    coordinates. It is 1.5 to 1.9 m tall, and its lower foot touches the ground.
    """
    pieces = _pieces(rng)
    scale = rng.uniform(1.5, 1.9) / 1.75
    lowest = min(piece.centre[1] - np.sqrt((piece.axes[1] ** 2).sum()) for piece in pieces)
    origin = np.array([0, -lowest, 0])
    return [
        replace(
            piece,
            centre=foot + to_camera @ ((piece.centre + origin) * scale),
            axes=to_camera @ piece.axes * scale,
            surfaces=(surface,),
        )
        for piece in pieces
    ]


def _pieces(rng: Rng) -> list[Solid]:
    """The solids in the figure's axes, still without a surface."""
    skin = _SKINS[rng.integers(len(_SKINS))]
    hair = _HAIRS[rng.integers(len(_HAIRS))]
    shirt, shirt_too = random_colours(rng)
    trousers, shoes = random_colours(rng)
    shirts = (plain(shirt), stripes(shirt, shirt_too, 0.06, 1), checks(shirt, shirt_too, 0.07))
    cloth = shirts[rng.integers(len(shirts))]
    sleeves = plain(shirt if rng.random() < 0.5 else skin)
    legs = plain(trousers if rng.random() < 0.75 else skin)

    hip = np.array([0, 0.93, 0])
    lean, turn = np.radians(rng.uniform((-6, -8), (14, 8)))
    spine = _unit(np.array([np.sin(turn), 1, np.sin(lean)]))
    chest, neck, skull = hip + 0.33 * spine, hip + 0.5 * spine, hip + 0.70 * spine
    pieces = [
        _capsule(hip + 0.02 * spine, chest, (0.150, 0.10, 0.105), _TORSO, cloth),
        _ellipsoid(chest - 0.02 * spine, spine, (0.185, 0.17, 0.118), _TORSO, cloth),
        _ellipsoid(hip, spine, (0.162, 0.11, 0.115), _TORSO, plain(trousers)),
        _capsule(neck - 0.03 * spine, skull, (0.052, 0.052, 0.052), _TORSO, plain(skin)),
        *_head(rng, skull, skin, hair),
    ]
    stride = rng.uniform(-1, 1)
    for side in (-1, 1):
        pieces += _leg(rng, hip, side, stride * side, trousers, legs, shoes)
        pieces += _arm(rng, neck - 0.05 * spine, side, -stride * side, cloth, sleeves, skin)
    return pieces


def _head(rng: Rng, skull: Floats, skin: Floats, hair: Floats) -> list[Solid]:
    tilt, look = np.radians(rng.uniform((-12, -40), (12, 40)))
    front = np.array([np.sin(look) * np.cos(tilt), -np.sin(tilt), np.cos(look) * np.cos(tilt)])
    down = -_unit(np.array([0, 1, 0]) - front[1] * front)
    axes = np.stack([np.cross(down, front), down, front], axis=1)
    scalp = skull - 0.022 * down - 0.022 * front
    return [
        Solid("sphere", skull, axes * (0.083, 0.118, 0.098), (), face(skin, hair * 0.3), part=_HEAD),
        Solid("sphere", scalp, axes * (0.092, 0.112, 0.096), (), plain(hair), part=_HEAD),
    ]


def _leg(
    rng: Rng, hip: Floats, side: int, swing: float, trousers: Floats, lower: Paint, shoes: Floats
) -> list[Solid]:
    forward = np.radians(28 * swing + rng.uniform(-5, 8))
    bend = np.radians(rng.uniform(0, 12) + max(0.0, -swing) * rng.uniform(10, 40))
    outward = np.radians(rng.uniform(1, 7)) * side
    joint = hip + np.array([0.09 * side, -0.03, 0])
    knee = joint + 0.42 * _downwards(forward, outward)
    ankle = knee + 0.41 * _downwards(forward - bend, outward)
    toe = ankle + 0.15 * _downwards(forward - bend + np.pi / 2, 0.0) + np.array([0.02 * side, -0.01, 0])
    return [
        _capsule(joint, knee, (0.082, 0.07, 0.085), _UPPER_LEG, plain(trousers)),
        _capsule(knee, ankle, (0.058, 0.055, 0.060), _LOWER_LEG, lower),
        _capsule(ankle, toe, (0.046, 0.045, 0.046), _LOWER_LEG, plain(shoes)),
    ]


def _arm(
    rng: Rng, shoulders: Floats, side: int, swing: float, cloth: Paint, sleeve: Paint, skin: Floats
) -> list[Solid]:
    raised = rng.random() < 0.3
    forward = np.radians(rng.uniform(-20, 60) if raised else 32 * swing + rng.uniform(-10, 10))
    outward = np.radians(rng.uniform(60, 150) if raised else rng.uniform(8, 24)) * side
    bend = np.radians(rng.uniform(5, 100) if raised else rng.uniform(5, 45))
    shoulder = shoulders + np.array([0.185 * side, 0, 0])
    elbow = shoulder + 0.28 * _downwards(forward, outward)
    lower = _downwards(forward + (0 if raised else bend), outward + (side * 0.8 * bend if raised else 0.0))
    wrist = elbow + 0.24 * lower
    inside = shoulder - 0.02 * np.array([side, 0, 0])
    return [
        _ellipsoid(inside, np.array([0.0, 1, 0]), (0.075,) * 3, _UPPER_ARM, cloth),
        _capsule(shoulder, elbow, (0.052, 0.05, 0.052), _UPPER_ARM, cloth),
        _capsule(elbow, wrist, (0.042, 0.04, 0.042), _LOWER_ARM, sleeve),
        _ellipsoid(wrist + 0.06 * lower, -lower, (0.042, 0.075, 0.030), _LOWER_ARM, plain(skin)),
    ]


def _downwards(forward: float, outward: float) -> Floats:
    """The direction of a limb that hangs down, swung forward and then away from the body, in radians."""
    return np.array([np.sin(outward), -np.cos(forward) * np.cos(outward), np.sin(forward) * np.cos(outward)])


def _ellipsoid(centre: Floats, up: Floats, radii: tuple[float, ...], part: int, paint: Paint) -> Solid:
    return Solid("sphere", centre, _frame(up) * radii, (), paint, part=part)


def _capsule(start: Floats, end: Floats, radii: tuple[float, float, float], part: int, paint: Paint) -> Solid:
    """A limb, round at both joints; `radii` across it, along it (of the round ends), and in depth."""
    along = end - start
    length = float(np.sqrt(along @ along))
    axes = _frame(along / length) * radii
    return Solid("capsule", (start + end) / 2, axes, (), paint, stem=length / 2 / radii[1], part=part)


def _frame(y: Floats) -> Floats:
    """Three unit columns: the second is `y`, the first lies across the figure as far as possible."""
    z = _unit(np.cross([1.0, 0, 0], y)) if abs(y[0]) < 0.95 else _unit(np.cross([0, 0, 1.0], y))
    return np.stack([np.cross(y, z), y, z], axis=1)


def _unit(vector: Floats) -> Floats:
    return vector / np.sqrt(vector @ vector)
