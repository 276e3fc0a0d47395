"""Synthetic scenes with labels of seven tasks, exact and consistent with each other.

    scene = render_scene(seed=0, index=7, size=(128, 160))
    scene.image_HW3, scene.labels["depth"]

Rooms and meadows with people-like figures, balls, crates, pillars, tables and trees. The labels come from
the same z-buffer as the image: a pixel's labels are those of the surface that its centre sees.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from teachercache.pipeline.records.strict import Size
from teachercache.student.datasets.synthetic.person import PARTS, person
from teachercache.student.datasets.synthetic.renderer import Canvas, Floats, Paint, Shape, Solid, Surface
from teachercache.student.datasets.synthetic.textures import (
    Rng,
    bricks,
    mottled,
    plain,
    random_colours,
    random_paint,
    value_noise,
)

CLASSES = ("wall", "floor", "ceiling", "ground", "sky", "person", "ball", "crate", "pillar", "table", "tree")
THINGS = CLASSES[5:]
_ID = {name: number for number, name in enumerate(CLASSES)}
_FAR = 40.0  # metres; everything beyond counts as sky
_FACES = 6  # instances 1 to 6 are those of the room or the ground; things come after


@dataclass(frozen=True)
class Scene:
    """`image_HW3` uint8; `labels` as in `teachercache.student.datasets.labels`.

    semseg: `CLASSES`. parts: `person.PARTS`. saliency: all people or, if there are none in sight, the thing
    that fills most of the image. depth: metres, 0 in the sky. normals: x right, y down, z forward, towards
    the camera; zero in the sky. boundary: where the pixel on the right or below is another thing or wall.
    """

    image_HW3: NDArray[np.uint8]
    labels: dict[str, NDArray]


def render_scene(seed: int, index: int, size: Size) -> Scene:
    """Scene `index` of those with this seed: the same in every call, in any order, at any size."""
    rng = np.random.default_rng([seed, index])
    canvas = Canvas(size, focal=max(size) * rng.uniform(0.95, 1.25))
    world = _World(rng, canvas)
    world.draw_surroundings()
    for kind in world.choose_things():
        world.draw_thing(kind)
    return Scene(world.shade(), world.labels())


class _World:
    """Axes: x right, y down, z away from the camera, which is at the origin and looks down a little."""

    def __init__(self, rng: Rng, canvas: Canvas) -> None:
        self.rng, self.canvas = rng, canvas
        self.indoors = bool(rng.random() < 0.55)
        self.eye = rng.uniform(1.2, 1.7)
        pitch = np.radians(rng.uniform(2, 12))
        self.to_camera = np.array(
            [[1, 0, 0], [0, np.cos(pitch), -np.sin(pitch)], [0, np.sin(pitch), np.cos(pitch)]]
        )
        self.light = np.array([rng.uniform(-0.8, 0.8), -1.0, rng.uniform(-0.9, -0.3)])
        self.light /= np.sqrt(self.light @ self.light)
        self.room: tuple[Floats, Floats, Floats] | None = None  # centre, directions and halves of the sides
        self.footprints: list[
            tuple[float, float, float]
        ] = []  # of the things, as their instances are numbered

    def draw_surroundings(self) -> None:
        rng = self.rng
        if not self.indoors:
            grass = np.array([0.30, 0.46, 0.18]) * rng.uniform(0.8, 1.2, 3)
            soil = np.array([0.48, 0.40, 0.26]) * rng.uniform(0.8, 1.2, 3)
            other = soil if rng.random() < 0.5 else grass * 0.6
            paint = mottled(grass, other, 0.7, int(rng.integers(1 << 30)))
            self._draw("plane", np.array([0, self.eye, 0]), np.eye(3), paint, Surface(1, _ID["ground"]))
            return
        width, depth, height = rng.uniform((4.5, 6, 2.5), (8, 9, 3.2))
        yaw = np.radians(rng.uniform(-35, 35))
        centre = np.array([0, self.eye - height / 2, depth / 2 - 1.5])
        half = np.array([width, height, depth]) / 2
        self.room = centre, _about_y(yaw), half
        names = ("wall", "wall", "ceiling", "floor", "wall", "wall")
        surfaces = [Surface(face, _ID[name]) for face, name in enumerate(names, 1)]
        self._draw("room", centre, _about_y(yaw) * half, self._room_paint(height / 2), *surfaces)

    def _room_paint(self, half_height: float) -> Paint:
        """Separate paints for walls, floor and ceiling."""
        rng = self.rng
        seed = int(rng.integers(1 << 30))
        wood = np.array([0.60, 0.42, 0.26]) * rng.uniform(0.7, 1.25)
        tile, other = random_colours(rng)
        floor = (
            bricks(wood, wood * 0.5, 1.2, 0.16, seed)
            if rng.random() < 0.5
            else bricks(0.4 + 0.5 * tile, other, 0.5, 0.5, seed)
        )
        colour = 0.45 + 0.5 * rng.uniform(size=3)
        walls = (
            plain(colour),
            bricks(np.array([0.62, 0.34, 0.26]), np.array([0.75, 0.72, 0.68]), 0.5, 0.18, seed),
            mottled(colour, colour * 0.85, 0.5, seed),
            bricks(colour, colour * 0.8, 0.35, 9.0, seed),
        )
        wall = walls[rng.integers(len(walls))]
        ceiling = np.full(3, rng.uniform(0.8, 0.95))

        def paint(points_N3: Floats, normals_N3: Floats) -> Floats:
            level_N = normals_N3[:, 1, None]
            colours_N3 = np.where(level_N < 0, floor(points_N3, normals_N3), wall(points_N3, normals_N3))
            skirting_N = (level_N == 0) & (points_N3[:, 1, None] > half_height - 0.1)
            colours_N3 = np.where(skirting_N, ceiling * 0.9, colours_N3)
            return np.where(level_N > 0, ceiling, colours_N3)

        return paint

    def choose_things(self) -> list[str]:
        people = int(self.rng.choice(4, p=[0.15, 0.4, 0.3, 0.15]))
        others = ("ball", "crate", "pillar", "table") if self.indoors else ("ball", "crate", "pillar", "tree")
        return ["person"] * people + [str(kind) for kind in self.rng.choice(others, self.rng.integers(1, 5))]

    def draw_thing(self, kind: str) -> None:
        """Draw one more thing on free ground in sight, if there is room for it."""
        rng = self.rng
        radius = {"person": 0.4, "table": 0.8, "tree": 0.6}.get(kind, 0.35)
        spot = self._free_spot(radius, 2.4 if kind == "person" else 2.0, 9.0 if kind == "tree" else 5.0)
        if spot is None:
            return
        self.footprints.append((spot[0], spot[2], radius))
        surface = Surface(_FACES + len(self.footprints), _ID[kind])
        getattr(self, f"_draw_{kind}")(spot, surface, _about_y(rng.uniform(0, 2 * np.pi)))

    def _free_spot(self, radius: float, nearest: float, farthest: float) -> Floats | None:
        """A place on the ground, in sight, clear of all others and inside the room."""
        half_width = self.canvas.size[1] / 2 / self.canvas.focal
        for _ in range(20):
            z = self.rng.uniform(nearest, farthest)
            x = self.rng.uniform(-0.85, 0.85) * half_width * z
            foot = np.array([x, self.eye, z])
            is_clear = all(np.hypot(x - a, z - b) > radius + r for a, b, r in self.footprints)
            if self.room is not None:
                centre, turn, half = self.room
                spare = half - radius - np.abs((foot - centre) @ turn)
                is_clear = is_clear and spare[0] > 0 and spare[2] > 0
            if is_clear:
                return foot
        return None

    def _draw(self, shape: Shape, centre: Floats, axes: Floats, paint: Paint, *surfaces: Surface) -> None:
        """`centre` and `axes` in the world."""
        self.canvas.draw(Solid(shape, self.to_camera @ centre, self.to_camera @ axes, surfaces, paint))

    def _draw_person(self, foot: Floats, surface: Surface, turn: Floats) -> None:
        facing = _about_y(self.rng.uniform(-np.pi / 2, np.pi / 2) if self.rng.random() < 0.8 else np.pi)
        axes = self.to_camera @ facing @ np.diag([1.0, -1, -1])  # up is -y, and it looks at the camera
        for solid in person(self.rng, surface, self.to_camera @ foot, axes):
            self.canvas.draw(solid)

    def _draw_ball(self, foot: Floats, surface: Surface, turn: Floats) -> None:
        radius = self.rng.uniform(0.14, 0.34)
        paint = random_paint(self.rng, radius / 2)
        self._draw("sphere", foot - (0, radius, 0), turn * radius, paint, surface)

    def _draw_crate(self, foot: Floats, surface: Surface, turn: Floats) -> None:
        half = self.rng.uniform(0.16, 0.34, 3)
        self._draw("cube", foot - (0, half[1], 0), turn * half, random_paint(self.rng, 0.12), surface)

    def _draw_pillar(self, foot: Floats, surface: Surface, turn: Floats) -> None:
        radius, half = self.rng.uniform((0.1, 0.3), (0.24, 1.1))
        paint = random_paint(self.rng, 0.15)
        self._draw("cylinder", foot - (0, half, 0), turn * (radius, half, radius), paint, surface)

    def _draw_table(self, foot: Floats, surface: Surface, turn: Floats) -> None:
        length, depth, height = self.rng.uniform((0.4, 0.3, 0.6), (0.7, 0.45, 0.8))
        paint = random_paint(self.rng, 0.1)
        self._draw("cube", foot - (0, height, 0), turn * (length, 0.025, depth), paint, surface)
        for x in (-1, 1):
            for z in (-1, 1):
                leg = foot + turn @ (x * (length - 0.05), -height / 2, z * (depth - 0.05))
                self._draw("cube", leg, turn * (0.03, height / 2, 0.03), paint, surface)

    def _draw_tree(self, foot: Floats, surface: Surface, turn: Floats) -> None:
        rng = self.rng
        height, radius = rng.uniform((1.4, 0.07), (2.4, 0.15))
        seed = int(rng.integers(1 << 30))
        bark = mottled(np.array([0.35, 0.25, 0.17]), np.array([0.20, 0.14, 0.10]), 0.1, seed)
        trunk = turn * (radius, height / 2, radius)
        self._draw("cylinder", foot - (0, height / 2, 0), trunk, bark, surface)
        leaf = np.array([0.22, 0.45, 0.16]) * rng.uniform(0.7, 1.3, 3)
        leaves = mottled(leaf, leaf * 0.45, 0.12, seed)
        for _ in range(6):
            centre = foot - (0, height + 0.2, 0) + rng.normal(0, (0.33, 0.25, 0.33))
            size = rng.uniform(0.35, 0.6)
            self._draw("sphere", centre, turn * (size, size * 0.8, size), leaves, surface)

    def shade(self) -> NDArray[np.uint8]:
        """The image: lamplight or sun, soft shadows under the things, haze, and the noise of a camera."""
        canvas, rng = self.canvas, self.rng
        seen_HW = canvas.depth_HW < _FAR
        points_HW3 = canvas.rays_HW3 * np.where(seen_HW, canvas.depth_HW, 0)[..., None]
        normals_HW3 = canvas.normals_HW3 @ self.to_camera  # in the world: the inverse is the transpose
        lit_HW = np.maximum(normals_HW3 @ self.light, 0)
        sky_HW = 0.5 - 0.5 * normals_HW3[..., 1]
        light_HW = 0.36 + 0.55 * lit_HW + 0.22 * sky_HW
        light_HW *= self._contact_shadows(points_HW3 @ self.to_camera, normals_HW3[..., 1] < -0.9)
        if self.indoors:
            light_HW *= 1.3 - 0.05 * np.minimum(canvas.depth_HW, 8)
        image_HW3 = canvas.albedo_HW3 * light_HW[..., None]
        gloss_HW = np.maximum(lit_HW - 0.93, 0) * 3 * (canvas.instance_HW > _FACES)
        image_HW3 += gloss_HW[..., None]
        if not self.indoors:
            sky_HW3 = self._sky()
            haze_HW = np.where(seen_HW, np.minimum(canvas.depth_HW, _FAR) / _FAR, 1) ** 1.5
            image_HW3 += haze_HW[..., None] * (sky_HW3 - image_HW3)
        image_HW3 = self._softened(image_HW3) ** (1 / 1.5) * rng.uniform(0.85, 1.1)
        image_HW3 = image_HW3 * 255 + rng.normal(0, 2.0, image_HW3.shape)
        return np.clip(np.rint(image_HW3), 0, 255).astype(np.uint8)

    def _contact_shadows(self, points_HW3: Floats, level_HW: NDArray[np.bool_]) -> Floats:
        shadow_HW = np.ones(self.canvas.size)
        for x, z, radius in self.footprints:
            shift = self.light * radius * 0.5
            square_HW = (points_HW3[..., 0] - x + shift[0]) ** 2 + (points_HW3[..., 2] - z + shift[2]) ** 2
            shadow_HW *= 1 - 0.55 * np.exp(-square_HW / (0.6 * radius) ** 2)
        return np.where(level_HW & (self.canvas.instance_HW <= _FACES), shadow_HW, 1)

    def _sky(self) -> Floats:
        rays_HW3 = self.canvas.rays_HW3 @ self.to_camera
        up_HW = np.clip(-rays_HW3[..., 1], 0, 1)
        white, blue = np.array([[0.80, 0.86, 0.92], [0.35, 0.55, 0.85]])
        blue = blue * self.rng.uniform(0.8, 1.1)
        sky_HW3: Floats = white + np.sqrt(up_HW)[..., None] * (blue - white)
        flat_HW = 3 * rays_HW3[..., 0] / (up_HW + 0.3), 3 / (up_HW + 0.3)
        cloud_HW = value_noise(*flat_HW, int(self.rng.integers(1 << 30)))
        sky_HW3 += (np.maximum(cloud_HW - 0.55, 0) * 1.2 * np.minimum(4 * up_HW, 1))[..., None]
        return sky_HW3

    def _softened(self, image_HW3: Floats) -> Floats:
        """Mix edges between surfaces with their neighbours, as a lens and a sensor do."""
        padded = np.pad(np.clip(image_HW3, 0, 1), ((1, 1), (1, 1), (0, 0)), mode="edge")
        across = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
        blurred_HW3 = (across[:-2] + 2 * across[1:-1] + across[2:]) / 16
        ids_HW = self.canvas.instance_HW.astype(np.int64) * len(PARTS) + self.canvas.part_HW
        edge_HW = np.zeros(self.canvas.size, bool)
        for a, b in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:])):
            differ = ids_HW[a] != ids_HW[b]
            edge_HW[a] |= differ
            edge_HW[b] |= differ
        return np.where(edge_HW[..., None], blurred_HW3, padded[1:-1, 1:-1])

    def labels(self) -> dict[str, NDArray]:
        canvas = self.canvas
        seen_HW = canvas.depth_HW < _FAR
        instance_HW = np.where(seen_HW, canvas.instance_HW, 0)
        boundary_HW = np.zeros(canvas.size, np.uint8)
        boundary_HW[:, :-1] |= instance_HW[:, :-1] != instance_HW[:, 1:]
        boundary_HW[:-1] |= instance_HW[:-1] != instance_HW[1:]
        normals_HW3 = np.where(seen_HW[..., None], canvas.normals_HW3, 0)
        number_HW = np.maximum(instance_HW.astype(np.int32) - _FACES, 0)
        thing_HW = canvas.semantic_HW.astype(np.int32) - _ID[THINGS[0]] + 1
        return {
            "semseg": np.where(seen_HW, canvas.semantic_HW, _ID["sky"]).astype(np.uint8),
            "parts": canvas.part_HW.copy(),
            "saliency": self._salient(instance_HW),
            "depth": np.where(seen_HW, canvas.depth_HW, 0).astype(np.float32),
            "normals": np.ascontiguousarray(normals_HW3.transpose(2, 0, 1)).astype(np.float32),
            "boundary": boundary_HW,
            "instances": np.where(number_HW > 0, 256 * number_HW + thing_HW, 0),
        }

    def _salient(self, instance_HW: NDArray[np.uint8]) -> NDArray[np.uint8]:
        salient_HW = (self.canvas.semantic_HW == _ID["person"]) & (instance_HW > _FACES)
        if not salient_HW.any():
            areas = np.bincount(instance_HW.ravel(), minlength=_FACES + 2)
            areas[: _FACES + 1] = 0
            salient_HW = (instance_HW == areas.argmax()) & (instance_HW > _FACES)
        return np.asarray(salient_HW, np.uint8)


def _about_y(angle: float) -> Floats:
    return np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])
