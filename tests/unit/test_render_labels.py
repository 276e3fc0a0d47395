"""Labels move as their image does: against a slow twin, and against a picture of the coordinates."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from teachercache.pipeline.records.view_policy import ViewPolicy
from teachercache.pipeline.views import View, draw_view, render_view
from teachercache.student.datasets.labels import IGNORE, render_labels
from teachercache.student.losses.tasks import TASK_LOSSES

WIDTH, HEIGHT = 70, 50
SIZE = (48, 64)


def some_labels(seed: int = 0) -> dict[str, NDArray]:
    rng = np.random.default_rng(seed)
    normals = rng.normal(size=(3, HEIGHT, WIDTH)).astype(np.float32)
    return {
        "semseg": rng.integers(0, 21, (HEIGHT, WIDTH), np.uint8),
        "parts": rng.integers(0, 7, (HEIGHT, WIDTH), np.uint8),
        "saliency": rng.integers(0, 2, (HEIGHT, WIDTH), np.uint8),
        "boundary": rng.integers(0, 2, (HEIGHT, WIDTH), np.uint8),
        "depth": rng.uniform(1, 10, (HEIGHT, WIDTH)).astype(np.float32),
        "normals": normals / np.linalg.norm(normals, axis=0),
    }


def slow_twin(labels: dict[str, NDArray], view: View) -> dict[str, NDArray]:
    """One pixel after the other, by the words of the contract."""
    (left, top, right, bottom), (height, width) = view.box, view.size
    step_x, step_y = (right - left) / width, (bottom - top) / height
    out = {
        task: np.full((*array.shape[:-2], height, width), IGNORE[task], array.dtype)
        for task, array in labels.items()
    }
    for y in range(height):
        for x in range(width):
            seen_x = width - 1 - x if view.flip else x
            corner_x, corner_y = left + seen_x * step_x, top + y * step_y
            margin_x, margin_y = 1e-3 * step_x, 1e-3 * step_y
            if (
                corner_x < -margin_x
                or corner_y < -margin_y
                or corner_x + step_x > WIDTH + margin_x
                or corner_y + step_y > HEIGHT + margin_y
            ):
                continue
            source = math.floor(corner_y + step_y / 2), math.floor(corner_x + step_x / 2)
            for task, array in labels.items():
                value = array[..., source[0], source[1]].copy()
                if task == "depth":
                    value = value * np.float32(math.sqrt(step_x * step_y))
                if task == "normals" and view.flip:
                    value[0] = -value[0]
                out[task][..., y, x] = value
    return out


@pytest.mark.parametrize("index", range(8))
def test_labels_are_those_of_the_slow_twin(index: int) -> None:
    view = draw_view(
        ViewPolicy(policy="multitask_train", size=SIZE, seed=2), f"image{index}", WIDTH, HEIGHT, 0
    )
    labels = some_labels()
    expected, rendered = slow_twin(labels, view), render_labels(labels, view)
    assert rendered.keys() == labels.keys()
    for task, tensor in rendered.items():
        assert tensor.dtype == torch.from_numpy(labels[task]).dtype
        if task == "depth":
            torch.testing.assert_close(tensor, torch.from_numpy(expected[task]), rtol=1e-5, atol=0)
        else:
            assert np.array_equal(tensor.numpy(), expected[task]), task


def test_the_views_of_the_twin_test_flip_pad_and_magnify() -> None:
    policy = ViewPolicy(policy="multitask_train", size=SIZE, seed=2)
    views = [draw_view(policy, f"image{index}", WIDTH, HEIGHT, 0) for index in range(8)]
    assert len({view.flip for view in views}) == 2
    assert min(view.magnification for view in views) < 0.8
    assert max(view.magnification for view in views) > 1.5
    assert {view.box[0] < 0 for view in views} == {True, False}


def test_image_and_labels_show_the_same_places() -> None:
    """In a smooth picture whose colours are its coordinates, bicubic and nearest agree to a pixel."""
    y, x = np.indices((HEIGHT, WIDTH))
    picture = np.stack([3 * x, 3 * y, np.full_like(x, 9)], axis=-1).astype(np.uint8)
    labels = {"semseg": x.astype(np.uint8), "boundary": y.astype(np.uint8)}
    policy = ViewPolicy(policy="multitask_train", size=SIZE, jitter_probability=0)
    for index in range(40):
        view = draw_view(policy, f"image{index}", WIDTH, HEIGHT, 0)
        pixels = render_view(Image.fromarray(picture), view).float()
        rendered = render_labels(labels, view)
        known = rendered["semseg"] != 255
        assert torch.equal(known, pixels[2] < 30)  # elsewhere is padding
        for channel, task in enumerate(labels):
            difference = (pixels[channel] - 3 * rendered[task].float())[known].abs()
            assert difference.max() <= 3 * (0.5 + 1 / min(1, view.magnification))


def test_a_flip_of_the_view_flips_the_labels() -> None:
    labels = some_labels()
    box = (-7.0, -9.0, 77.0, 54.0)
    plain = render_labels(labels, View(box, False, SIZE))
    flipped = render_labels(labels, View(box, True, SIZE))
    for task, tensor in plain.items():
        mirrored = tensor.flip(-1)
        if task == "normals":
            mirrored = mirrored * torch.tensor([-1.0, 1, 1])[:, None, None]
        assert torch.equal(mirrored, flipped[task])
    lengths = flipped["normals"].norm(dim=0)
    assert ((lengths - 1).abs() < 1e-5).logical_or(lengths == 0).all()


def test_depth_does_not_depend_on_the_size_that_is_rendered() -> None:
    labels = {"depth": np.full((HEIGHT, WIDTH), 6.0, np.float32)}
    view = View((0, 0, 35, 25), False, (50, 70))
    assert torch.equal(render_labels(labels, view)["depth"], torch.full((50, 70), 3.0))
    assert torch.equal(render_labels(labels, view, (5, 7))["depth"], torch.full((5, 7), 3.0))


def test_parts_are_ignored_where_none_is_seen() -> None:
    parts = np.zeros((HEIGHT, WIDTH), np.uint8)
    parts[:, :20] = 2
    with_person = render_labels({"parts": parts}, View((0, 0, 40, 50), False, SIZE))["parts"]
    assert set(with_person.unique().tolist()) == {0, 2}
    without = render_labels({"parts": parts}, View((30, 0, 70, 50), False, SIZE))["parts"]
    assert without.unique().tolist() == [255]
    assert parts.max() == 2  # what was read is not written to


def test_ignored_values_are_those_that_the_losses_leave_out() -> None:
    assert IGNORE.keys() == TASK_LOSSES.keys() | {"instances"}  # which the losses of sets read
    nowhere = View((100, 100, 200, 200), False, SIZE)
    rendered = render_labels(some_labels(), nowhere)
    for task, loss in TASK_LOSSES.items():
        channels = loss.channels or 21
        prediction = torch.randn(1, channels, *SIZE)
        assert loss.function(prediction, rendered[task][None]) == 0


def test_labels_of_another_size_are_refused() -> None:
    labels = some_labels() | {"depth": np.ones((HEIGHT, WIDTH + 1), np.float32)}
    with pytest.raises(ValueError, match="one size"):
        render_labels(labels, View((0, 0, 10, 10), False, SIZE))
    with pytest.raises(ValueError, match="tasks among"):
        render_labels({"edges": np.ones((3, 3), np.uint8)}, View((0, 0, 3, 3), False, SIZE))
