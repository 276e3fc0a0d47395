"""Synthetic scenes: labels that agree with each other, with geometry, and with themselves in every run."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from teachercache.pipeline.errors import RecipeError, SourceError
from teachercache.pipeline.sources import open_source
from teachercache.student.datasets import open_dataset
from teachercache.student.datasets.scenes import write_scenes
from teachercache.student.datasets.synthetic.person import PARTS
from teachercache.student.datasets.synthetic.renderer import Canvas, Floats, Shape, Solid, Surface
from teachercache.student.datasets.synthetic.scene_renderer import CLASSES, Scene, render_scene
from teachercache.student.datasets.synthetic.textures import plain

SIZE = (96, 128)
INDICES = range(16)


@cache
def scene(index: int) -> Scene:
    return render_scene(5, index, SIZE)


def solid(shape: Shape, stem: float = 0.0) -> Solid:
    """A stretched, turned solid in front of the camera, away from its axis."""
    rng = np.random.default_rng(7)
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    centre = np.array([0.3, -0.2, 4.0])
    surfaces = (Surface(1, 1),) * (6 if shape == "room" else 1)
    lengths = np.array([3.0, 4.0, 6.0]) if shape == "room" else np.array([0.8, 0.5, 1.1])
    return Solid(shape, centre, turn * lengths, surfaces, plain(np.ones(3)), stem)


def in_shape(shape: Shape, p_N3: Floats, stem: float) -> NDArray[np.bool_]:
    """Whether points in the solid's coordinates lie in it."""
    x, y, z = p_N3.T
    if shape in ("cube", "room"):
        inside_N = np.abs(p_N3).max(1) <= 1
    elif shape == "cylinder":
        inside_N = (x * x + z * z <= 1) & (np.abs(y) <= 1)
    else:
        inside_N = x * x + np.maximum(np.abs(y) - stem, 0) ** 2 + z * z <= 1
    return np.asarray(inside_N, bool)


@pytest.mark.parametrize(
    ("shape", "stem"), [("sphere", 0.0), ("cube", 0.0), ("cylinder", 0.0), ("capsule", 1.3), ("room", 0.0)]
)
def test_depth_is_where_a_walk_along_the_ray_enters_the_solid(shape: Shape, stem: float) -> None:
    """Against a twin that only knows which points are inside, and walks each ray by millimetres."""
    thing = solid(shape, stem)
    canvas = Canvas((24, 32), focal=40.0)
    canvas.draw(thing)
    steps = np.arange(0.05, 12, 0.001)
    inverse = np.linalg.inv(thing.axes)
    for row in range(0, 24, 3):
        for column in range(0, 32, 3):
            points = canvas.rays_HW3[row, column] * steps[:, None]
            inside = in_shape(shape, (points - thing.centre) @ inverse.T, stem)
            wanted = ~inside if shape == "room" else inside
            depth = canvas.depth_HW[row, column]
            assert np.isfinite(depth) == wanted.any()
            if wanted.any():
                assert depth == pytest.approx(steps[wanted.argmax()], abs=0.0011)
    assert np.isfinite(canvas.depth_HW).mean() > 0.03


@pytest.mark.parametrize(
    ("shape", "stem"), [("sphere", 0.0), ("cube", 0.0), ("cylinder", 0.0), ("capsule", 1.3), ("room", 0.0)]
)
def test_normals_are_across_the_surface_that_depth_describes(shape: Shape, stem: float) -> None:
    canvas = Canvas((96, 128), focal=160.0)
    canvas.draw(solid(shape, stem))
    errors = normal_errors(canvas.depth_HW, canvas.normals_HW3, canvas.focal, limit=0.02)
    assert len(errors) > 200
    assert np.percentile(errors, 90) < 0.5
    assert np.median(errors) < 0.1


def normal_errors(depth_HW: Floats, normals_HW3: Floats, focal: float, limit: float) -> Floats:
    """Degrees between normals and those of depth by central differences, where depth is smooth.

    Smooth: the normals of the neighbours differ by less than `limit`.
    """
    height, width = depth_HW.shape
    u = (np.arange(width) + 0.5 - width / 2) / focal
    v = (np.arange(height) + 0.5 - height / 2) / focal
    with np.errstate(invalid="ignore"):
        points = np.stack(np.broadcast_arrays(u, v[:, None], 1.0), -1) * depth_HW[..., None]
        along = points[1:-1, 2:] - points[1:-1, :-2]
        down = points[2:, 1:-1] - points[:-2, 1:-1]
        estimate = np.cross(down, along)
        estimate /= np.linalg.norm(estimate, axis=-1, keepdims=True)
        near = np.ones(estimate.shape[:2], bool)
        for rows, columns in ((1, 0), (1, 2), (0, 1), (2, 1)):
            other = normals_HW3[rows : rows + height - 2, columns : columns + width - 2]
            near &= np.linalg.norm(other - normals_HW3[1:-1, 1:-1], axis=-1) < limit
        near &= np.isfinite(estimate).all(-1) & (np.linalg.norm(normals_HW3[1:-1, 1:-1], axis=-1) > 0.5)
        cosine = (estimate * normals_HW3[1:-1, 1:-1]).sum(-1)[near]
    return np.asarray(np.degrees(np.arccos(np.clip(cosine, -1, 1))))


def test_what_is_nearer_hides_what_is_behind_in_any_order() -> None:
    near = Solid("sphere", np.array([0, 0, 3.0]), np.eye(3), (Surface(1, 1),), plain(np.ones(3)), part=2)
    far = Solid("cube", np.array([0.5, 0, 6.0]), np.eye(3) * 1.5, (Surface(2, 7),), plain(np.zeros(3)))
    canvases = [Canvas(SIZE, 120.0) for _ in range(2)]
    for canvas, order in zip(canvases, ((near, far), (far, near)), strict=True):
        for thing in order:
            canvas.draw(thing)
    for name in ("depth_HW", "normals_HW3", "albedo_HW3", "instance_HW", "semantic_HW", "part_HW"):
        assert np.array_equal(getattr(canvases[0], name), getattr(canvases[1], name))
    assert set(np.unique(canvases[0].instance_HW)) == {0, 1, 2}
    assert canvases[0].depth_HW.min() == pytest.approx(2, abs=1e-3)


def test_a_solid_outside_of_the_image_or_behind_the_camera_is_not_drawn() -> None:
    for centre in ((0, 0, -5.0), (40.0, 0, 3.0), (0, -30.0, 3.0)):
        canvas = Canvas(SIZE, 120.0)
        canvas.draw(Solid("sphere", np.array(centre), np.eye(3), (Surface(1, 1),), plain(np.ones(3))))
        assert not canvas.instance_HW.any()


def test_a_window_holds_all_of_a_solid() -> None:
    """Drawn in its window or over the whole image, a solid is the same."""
    for shape, stem in (("sphere", 0.0), ("cube", 0.0), ("cylinder", 0.0), ("capsule", 1.3)):
        windowed, whole = Canvas(SIZE, 90.0), Canvas(SIZE, 90.0)
        windowed.draw(solid(shape, stem))  # type: ignore[arg-type]
        whole._window = lambda solid: (slice(None), slice(None))  # type: ignore[method-assign]
        whole.draw(solid(shape, stem))  # type: ignore[arg-type]
        assert np.array_equal(windowed.depth_HW, whole.depth_HW)


@pytest.mark.parametrize("index", INDICES)
def test_labels_are_what_they_say_they_are(index: int) -> None:
    labels = scene(index).labels
    assert scene(index).image_HW3.dtype == np.uint8
    assert scene(index).image_HW3.shape == (*SIZE, 3)
    for task in ("semseg", "parts", "saliency", "boundary"):
        assert labels[task].dtype == np.uint8
        assert labels[task].shape == SIZE
    assert labels["semseg"].max() < len(CLASSES)
    assert labels["parts"].max() < len(PARTS)
    assert labels["depth"].dtype == labels["normals"].dtype == np.float32

    sky = labels["semseg"] == CLASSES.index("sky")
    length = np.linalg.norm(labels["normals"], axis=0)
    assert np.array_equal(labels["depth"] == 0, sky)
    assert np.array_equal(length == 0, sky)
    np.testing.assert_allclose(length[~sky], 1, atol=1e-6)
    person = labels["semseg"] == CLASSES.index("person")
    assert np.array_equal(labels["parts"] > 0, person)
    if person.any():
        assert np.array_equal(labels["saliency"] > 0, person)


@pytest.mark.parametrize("index", INDICES)
def test_a_boundary_is_at_every_change_of_class_and_depth_jumps_only_there(index: int) -> None:
    labels = scene(index).labels
    boundary = labels["boundary"] > 0
    for a, b in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:])):
        changes = labels["semseg"][a] != labels["semseg"][b]
        assert (boundary[a] | ~changes).all()
    flat = np.isin(labels["semseg"], [CLASSES.index(name) for name in ("wall", "floor", "ceiling")])
    depth = np.where(flat, labels["depth"], np.nan)
    jump = np.abs(np.diff(depth, axis=1)) > 0.5
    assert not (jump & ~boundary[:, :-1]).any()
    assert 0.005 < boundary.mean() < 0.3


def test_normals_agree_with_depth_in_scenes() -> None:
    """The focal length is not stored: of all that a scene may have, one explains its normals."""
    for index in range(6):
        labels = scene(index).labels
        normals = labels["normals"].transpose(1, 2, 0).astype(np.float64)
        depth = np.where(labels["depth"] > 0, labels["depth"], np.nan).astype(np.float64)
        focals = np.linspace(0.95, 1.25, 61) * max(SIZE)
        errors = [np.median(normal_errors(depth, normals, focal, limit=1e-3)) for focal in focals]
        assert min(errors) < 0.2


def test_scenes_show_what_stage_2_needs() -> None:
    classes, parts = (
        set(np.unique(np.stack([scene(index).labels[task] for index in INDICES])))
        for task in ("semseg", "parts")
    )
    assert classes == set(range(len(CLASSES)))
    assert parts == set(range(len(PARTS)))
    salient = [scene(index).labels["saliency"].mean() for index in INDICES]
    assert np.mean([share > 0 for share in salient]) > 0.9
    assert 0.02 < np.mean(salient) < 0.4
    brightness = np.mean([scene(index).image_HW3.mean() for index in INDICES])
    assert 80 < brightness < 180


def test_a_scene_is_the_same_in_every_run_and_another_for_every_seed_and_number() -> None:
    again = render_scene(5, 3, SIZE)
    assert np.array_equal(again.image_HW3, scene(3).image_HW3)
    assert all(np.array_equal(again.labels[task], scene(3).labels[task]) for task in again.labels)
    for other in (render_scene(6, 3, SIZE), scene(4)):
        assert (other.image_HW3 != scene(3).image_HW3).mean() > 0.5
        assert not np.array_equal(other.labels["depth"], scene(3).labels["depth"])


def test_a_larger_image_shows_the_same_scene() -> None:
    for index in range(6):
        large = render_scene(5, index, (3 * SIZE[0], 3 * SIZE[1])).labels
        middles = large["depth"][1::3, 1::3]  # of 3×3 pixels, the middle one has the small pixel's ray
        np.testing.assert_allclose(middles, scene(index).labels["depth"], rtol=1e-5)
        for task in ("semseg", "parts", "saliency"):
            assert (large[task][1::3, 1::3] != scene(index).labels[task]).mean() < 1e-3


@pytest.mark.parametrize("size", [(1, 1), (40, 200), (131, 67)])
def test_any_size_can_be_rendered(size: tuple[int, int]) -> None:
    small = render_scene(0, 1, size)
    assert small.image_HW3.shape == (*size, 3)
    assert small.labels["normals"].shape == (3, *size)


def test_a_written_set_is_read_as_it_was_rendered_and_joins_a_cache_by_key(tmp_path: Path) -> None:
    write_scenes(tmp_path, train=2, val=1, size=(32, 40), seed=9)
    train, val = open_dataset("scenes", tmp_path), open_dataset("scenes", tmp_path, "val")
    assert (train.keys, val.keys) == (["000000", "000001"], ["000002"])
    for dataset, index, number in ((train, 1, 1), (val, 0, 2)):
        expected = render_scene(9, number, (32, 40))
        assert np.array_equal(np.array(dataset.image(index)), expected.image_HW3)
        read = dataset.labels(index)
        assert read.keys() == dataset.tasks.keys() == expected.labels.keys() - {"instances"}
        assert all(np.array_equal(read[task], expected.labels[task]) for task in read)
    assert list(train.labels(0, ["depth"])) == ["depth"]
    source = open_source(tmp_path / "images/train")
    assert source.scan()["key"].to_pylist() == train.keys
    assert all(finding.found == finding.expected for finding in train.check())


def test_a_smaller_set_leaves_nothing_of_a_larger_one(tmp_path: Path) -> None:
    write_scenes(tmp_path, train=3, val=2, size=(8, 8))
    (tmp_path / "images/train/mine.png").write_bytes(b"")
    write_scenes(tmp_path, train=1, val=1, size=(8, 8))
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {
        "images/train/000000.png", "images/train/mine.png", "images/val/000001.png",
        "labels/train/000000.safetensors", "labels/val/000001.safetensors", "train.txt", "val.txt",
    }  # fmt: skip


def test_images_of_another_data_set_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "images/val").mkdir(parents=True)
    theirs = tmp_path / "images/val/000042.png"
    theirs.write_bytes(b"theirs")
    with pytest.raises(RecipeError, match=r"another data set(.|\n)*000042\.png"):
        write_scenes(tmp_path, train=1, val=1, size=(8, 8))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [theirs]
    assert theirs.read_bytes() == b"theirs"


def test_a_damaged_label_file_is_named(tmp_path: Path) -> None:
    write_scenes(tmp_path, train=1, val=0, size=(8, 8))
    (tmp_path / "labels/train/000000.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(SourceError, match="depth labels of 000000"):
        open_dataset("scenes", tmp_path).labels(0, ["depth"])


def test_the_command_writes_a_set_and_another_process_the_same_pixels(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "teachercache.student.datasets.scenes", str(tmp_path / "set")]
    options = ["--train", "1", "--val", "1", "--size", "96", "128", "--seed", "5"]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    written = np.array(open_dataset("scenes", tmp_path / "set", "val").image(0))
    assert np.array_equal(written, scene(1).image_HW3)
