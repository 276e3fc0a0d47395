"""Paints of solids: colours by place, as functions of points in metres along a solid's axes."""

import numpy as np
from numpy.typing import NDArray

from teachercache.student.datasets.synthetic.renderer import Floats, Paint

Rng = np.random.Generator


def plain(colour: Floats) -> Paint:
    return lambda points_N3, normals_N3: np.broadcast_to(colour, points_N3.shape)


def checks(first: Floats, second: Floats, side: float) -> Paint:
    """A board of cubes, so that every face of a solid shows squares."""

    def paint(points_N3: Floats, normals_N3: Floats) -> Floats:
        odd_N = np.floor(points_N3 / side + 1e-6).sum(1) % 2 > 0
        return np.where(odd_N[:, None], first, second)

    return paint


def stripes(first: Floats, second: Floats, side: float, axis: int) -> Paint:
    def paint(points_N3: Floats, normals_N3: Floats) -> Floats:
        odd_N = np.floor(points_N3[:, axis] / side) % 2 > 0
        return np.where(odd_N[:, None], first, second)

    return paint


def bricks(stone: Floats, mortar: Floats, width: float, height: float, seed: int) -> Paint:
    """Rows along y, each shifted by half a brick, bricks a little lighter or darker; also planks."""

    def paint(points_N3: Floats, normals_N3: Floats) -> Floats:
        u_N, v_N = _on_face(points_N3, normals_N3)
        row_N = np.floor(v_N / height)
        u_N = u_N / width + 0.5 * (row_N % 2)
        column_N = np.floor(u_N)
        gap_N = ((u_N - column_N) * width < 0.02) | (v_N - row_N * height < 0.02)
        tone_N = 0.85 + 0.3 * _hash(column_N, row_N, seed)
        return np.where(gap_N[:, None], mortar, stone * tone_N[:, None])

    return paint


def mottled(first: Floats, second: Floats, side: float, seed: int) -> Paint:
    """Smooth noise of two octaves between two colours."""

    def paint(points_N3: Floats, normals_N3: Floats) -> Floats:
        u_N, v_N = _on_face(points_N3, normals_N3)
        noise_N = 0.65 * value_noise(u_N / side, v_N / side, seed)
        noise_N += 0.35 * value_noise(u_N / side * 3.1, v_N / side * 3.1, seed + 1)
        return first + noise_N[:, None] * (second - first)

    return paint


def face(skin: Floats, eyes: Floats) -> Paint:
    """A head (an ellipsoid that looks along its z): two eyes and a mouth."""

    def paint(points_N3: Floats, normals_N3: Floats) -> Floats:
        x_N, y_N, z_N = normals_N3.T
        eye_N = (np.abs(np.abs(x_N) - 0.34) < 0.13) & (np.abs(y_N + 0.05) < 0.09) & (z_N > 0)
        mouth_N = (np.abs(x_N) < 0.26) & (np.abs(y_N - 0.5) < 0.06) & (z_N > 0)
        colours_N3 = np.where(eye_N[:, None], eyes, skin)
        return np.where(mouth_N[:, None], skin * (0.75, 0.45, 0.45), colours_N3)

    return paint


def random_paint(rng: Rng, side: float = 0.15) -> Paint:
    """A paint of any kind, in two different colours."""
    first, second = random_colours(rng)
    seed = int(rng.integers(1 << 30))
    kinds = (
        plain(first),
        checks(first, second, side),
        stripes(first, second, side, int(rng.integers(3))),
        bricks(first, second, 3 * side, side, seed),
        mottled(first, second, 2 * side, seed),
    )
    return kinds[rng.integers(len(kinds))]


def random_colours(rng: Rng) -> tuple[Floats, Floats]:
    """Two colours of different lightness."""
    hue = rng.uniform(size=3)
    first = 0.15 + 0.75 * hue
    return first, np.clip(first * rng.uniform(0.35, 0.65) + rng.uniform(0, 0.12, 3), 0, 1)


def value_noise(u_N: Floats, v_N: Floats, seed: int) -> Floats:
    """Random values at whole numbers, smooth between them: 0 to 1."""
    u0_N, v0_N = np.floor(u_N), np.floor(v_N)
    a_N, b_N = (t_N * t_N * (3 - 2 * t_N) for t_N in (u_N - u0_N, v_N - v0_N))
    top_N = _hash(u0_N, v0_N, seed) * (1 - a_N) + _hash(u0_N + 1, v0_N, seed) * a_N
    bottom_N = _hash(u0_N, v0_N + 1, seed) * (1 - a_N) + _hash(u0_N + 1, v0_N + 1, seed) * a_N
    return top_N * (1 - b_N) + bottom_N * b_N


def _hash(i_N: Floats, j_N: Floats, seed: int) -> Floats:
    """A number in [0, 1) for each pair of whole numbers: integer arithmetic, the same on every machine."""
    x = i_N.astype(np.int64).astype(np.uint32) * np.uint32(0x9E3779B1)
    x ^= j_N.astype(np.int64).astype(np.uint32) * np.uint32(0x85EBCA77) + np.uint32(seed & 0xFFFFFFFF)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x2C1B3C6D)
    x = (x ^ (x >> np.uint32(12))) * np.uint32(0x297A2D39)
    return (x ^ (x >> np.uint32(15))) * 2.0**-32


def _on_face(points_N3: Floats, normals_N3: Floats) -> tuple[Floats, Floats]:
    """Two coordinates along the face of a point: those across its normal's largest component."""
    axis_N: NDArray[np.int64] = np.abs(normals_N3).argmax(1)
    u_N = np.where(axis_N == 0, points_N3[:, 2], points_N3[:, 0])
    v_N = np.where(axis_N == 1, points_N3[:, 2], points_N3[:, 1])
    return u_N, v_N
