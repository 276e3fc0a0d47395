"""A small renderer: solids in perspective into a z-buffer, with exact depth and normals.

    canvas = Canvas((96, 128), focal=120.0)
    canvas.draw(Solid("sphere", centre, axes, Surface(instance=3, semantic=6), paint))
    canvas.depth_HW, canvas.normals_HW3, canvas.instance_HW

Camera coordinates: x right, y down, z forward, in metres; the camera is at the origin. A pixel's ray is
(u, v, 1), so the ray's parameter at a surface is its depth. A solid is a unit shape moved by an affine map:
rays are intersected in the shape's coordinates, where they keep that parameter.

H, W  the image     N  pixels that are drawn     p, n  points and normals in the shape's own coordinates
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from teachercache.pipeline.records.strict import Size

Floats = NDArray[np.float64]
Shape = Literal["sphere", "cube", "cylinder", "capsule", "room", "plane"]
Paint = Callable[[Floats, Floats], Floats]
"""(points (N, 3) in metres along the solid's axes, normals (N, 3) in its coordinates) → albedo (N, 3), 0…1"""

_NEAR = 0.05  # metres; nearer solids are drawn over the whole image, so that none is cut off


@dataclass(frozen=True)
class Surface:
    """What the labels say about a solid. The faces of a room are separate instances."""

    instance: int
    semantic: int


@dataclass(frozen=True)
class Solid:
    """`centre` (3,) and `axes` (3, 3), whose columns are the half axes, in camera coordinates.

    sphere, cube: from -1 to 1 on each axis. cylinder: along y, closed. capsule: radius 1 around the y axis
    from -`stem` to `stem`. room: a cube seen from inside. plane: y = 0, seen from the side of negative y.
    A room has six `surfaces`, for -x, x, -y, y, -z and z; all others have one. `part`: of a person, else 0.
    """

    shape: Shape
    centre: Floats
    axes: Floats
    surfaces: tuple[Surface, ...]
    paint: Paint
    stem: float = 0.0
    part: int = 0


class Canvas:
    """The buffers of one image; empty pixels have instance 0 and infinite depth."""

    def __init__(self, size: Size, focal: float) -> None:
        height, width = size
        self.focal = focal
        self.size = size
        self.rays_HW3 = np.ones((height, width, 3))
        self.rays_HW3[..., 0] = (np.arange(width) + 0.5 - width / 2) / focal
        self.rays_HW3[..., 1] = ((np.arange(height) + 0.5 - height / 2) / focal)[:, None]
        self.depth_HW = np.full(size, np.inf)
        self.normals_HW3, self.albedo_HW3 = np.zeros((2, *size, 3))
        self.instance_HW, self.semantic_HW, self.part_HW = np.zeros((3, *size), np.uint8)

    def draw(self, solid: Solid) -> None:
        """Draw the parts of `solid` that are in front of everything drawn before."""
        window = self._window(solid)
        if window is None:
            return
        rays_hw3, depth_hw = self.rays_HW3[window], self.depth_HW[window]
        inverse = np.linalg.inv(solid.axes)
        origin = -inverse @ solid.centre
        directions_hw3 = rays_hw3 @ inverse.T
        with np.errstate(divide="ignore", invalid="ignore"):
            t_hw = _INTERSECT[solid.shape](origin, directions_hw3, solid.stem)
            nearer_hw = (t_hw > 0) & (t_hw < depth_hw)
        t_N = t_hw[nearer_hw]
        if not t_N.size:
            return
        p_N3 = origin + t_N[:, None] * directions_hw3[nearer_hw]
        n_N3 = _normals(solid.shape, p_N3, solid.stem)
        normals_N3 = n_N3 @ inverse
        normals_N3 /= np.sqrt(np.einsum("nc,nc->n", normals_N3, normals_N3))[:, None]

        depth_hw[nearer_hw] = t_N
        self.normals_HW3[window][nearer_hw] = normals_N3
        lengths = np.sqrt((solid.axes**2).sum(0))
        self.albedo_HW3[window][nearer_hw] = solid.paint(p_N3 * lengths, n_N3)
        face_N = _faces(n_N3) if len(solid.surfaces) > 1 else 0
        for name in ("instance", "semantic"):
            values = np.array([getattr(surface, name) for surface in solid.surfaces], np.uint8)
            getattr(self, f"{name}_HW")[window][nearer_hw] = values[face_N]
        self.part_HW[window][nearer_hw] = solid.part

    def _window(self, solid: Solid) -> tuple[slice, slice] | None:
        """The pixels that the solid can cover: the projection of the corners of a box around it."""
        everywhere = slice(None), slice(None)
        if solid.shape in ("room", "plane"):
            return everywhere
        extent = np.array([1, 1 + solid.stem, 1])
        corners_83 = solid.centre + (_CORNERS_83 * extent) @ solid.axes.T
        if corners_83[:, 2].min() < _NEAR:
            return everywhere if corners_83[:, 2].max() > 0 else None
        points_82 = corners_83[:, :2] / corners_83[:, 2:] * self.focal + np.array(self.size[::-1]) / 2
        low, high = np.floor(points_82.min(0)).astype(int), np.ceil(points_82.max(0)).astype(int)
        left, top = np.maximum(low, 0)
        right, bottom = np.minimum(high, self.size[::-1])
        return (slice(top, bottom), slice(left, right)) if left < right and top < bottom else None


_CORNERS_83 = np.array(np.meshgrid(*[[-1.0, 1.0]] * 3)).reshape(3, 8).T


def _quadratic(a: Floats, half_b: Floats, c: float | Floats) -> Floats:
    """The smaller root of a t² + 2 half_b t + c, or inf."""
    discriminant = half_b**2 - a * c
    return np.where(discriminant > 0, (-half_b - np.sqrt(np.maximum(discriminant, 0))) / a, np.inf)


def _sphere(o: Floats, d: Floats, stem: float) -> Floats:
    return _quadratic((d * d).sum(-1), d @ o, o @ o - 1)


def _cube(o: Floats, d: Floats, stem: float) -> Floats:
    near, far = _slabs(o, d)
    enter, leave = near.max(-1), far.min(-1)
    return np.where(enter < leave, enter, np.inf)


def _slabs(o: Floats, d: Floats) -> tuple[Floats, Floats]:
    below, above = (-1 - o) / d, (1 - o) / d
    return np.minimum(below, above), np.maximum(below, above)


def _side(o: Floats, d: Floats) -> tuple[Floats, Floats]:
    """The endless cylinder around the y axis: t, and y there."""
    t = _quadratic(
        d[..., 0] ** 2 + d[..., 2] ** 2, d[..., 0] * o[0] + d[..., 2] * o[2], o[0] ** 2 + o[2] ** 2 - 1
    )
    return t, o[1] + t * d[..., 1]


def _cylinder(o: Floats, d: Floats, stem: float) -> Floats:
    t, y = _side(o, d)
    t = np.where(np.abs(y) <= 1, t, np.inf)
    cap = (-np.sign(d[..., 1]) - o[1]) / d[..., 1]  # the lid that the ray meets first
    x, z = o[0] + cap * d[..., 0], o[2] + cap * d[..., 2]
    return np.minimum(t, np.where(x * x + z * z <= 1, cap, np.inf))


def _capsule(o: Floats, d: Floats, stem: float) -> Floats:
    t, y = _side(o, d)
    t = np.where(np.abs(y) <= stem, t, np.inf)
    for end in (-stem, stem):
        t = np.minimum(t, _sphere(o - np.array([0, end, 0]), d, 0))
    return t


_INTERSECT: dict[Shape, Callable[[Floats, Floats, float], Floats]] = {
    "sphere": _sphere,
    "cube": _cube,
    "cylinder": _cylinder,
    "capsule": _capsule,
    "room": lambda o, d, stem: _slabs(o, d)[1].min(-1),
    "plane": lambda o, d, stem: -o[1] / d[..., 1],
}


def _normals(shape: Shape, p_N3: Floats, stem: float) -> Floats:
    """Outward normals (inward for a room, towards negative y for a plane), of any length."""
    if shape == "sphere":
        return p_N3
    if shape == "plane":
        return np.broadcast_to([0.0, -1.0, 0.0], p_N3.shape)
    n_N3 = p_N3.copy()
    if shape == "capsule":
        n_N3[:, 1] -= np.clip(p_N3[:, 1], -stem, stem)
    elif shape == "cylinder":
        on_lid_N = np.abs(p_N3[:, 1]) > 1 - 1e-9
        n_N3[:, 1] = np.where(on_lid_N, np.sign(p_N3[:, 1]), 0)
        n_N3[on_lid_N, 0] = n_N3[on_lid_N, 2] = 0
    else:
        axis_N1 = np.abs(p_N3).argmax(1)[:, None]
        n_N3[:] = 0
        sign = -1 if shape == "room" else 1
        np.put_along_axis(n_N3, axis_N1, sign * np.sign(np.take_along_axis(p_N3, axis_N1, 1)), 1)
    return n_N3


def _faces(n_N3: Floats) -> NDArray[np.int64]:
    """The face of a room, among -x, x, -y, y, -z, z, that an inward normal belongs to."""
    axis_N = np.abs(n_N3).argmax(1)
    return 2 * axis_N + (n_N3[np.arange(len(n_N3)), axis_N] < 0)
