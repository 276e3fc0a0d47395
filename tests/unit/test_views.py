"""Views are drawn the same everywhere, stored, and replayed to the same bits."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from teachercache.pipeline.records.view_policy import ViewPolicy
from teachercache.pipeline.views import View, ViewTable, draw_view, draw_views, render_view

KEYS = [f"n0144/{i}" for i in range(500)]
WIDTHS = np.random.default_rng(0).integers(20, 900, len(KEYS))
HEIGHTS = np.random.default_rng(1).integers(20, 900, len(KEYS))


def photograph(width: int = 90, height: int = 70) -> Image.Image:
    pixels = np.random.default_rng(3).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def test_a_view_does_not_depend_on_the_others() -> None:
    policy = ViewPolicy(num_views=3, seed=5)
    table = ViewTable(draw_views(policy, KEYS, WIDTHS, HEIGHTS, (0, 3)))
    for sample, view in ((0, 0), (17, 2), (499, 1)):
        alone = draw_view(policy, KEYS[sample], int(WIDTHS[sample]), int(HEIGHTS[sample]), view)
        assert table.view(sample * 3 + view) == alone
    later = draw_views(policy, KEYS, WIDTHS, HEIGHTS, (1, 3))
    assert ViewTable(later).view(2 * 17 + 1) == table.view(3 * 17 + 2)


def test_views_are_the_same_in_another_process() -> None:
    script = (
        "from teachercache.pipeline.records.spec import ViewPolicy; "
        "from teachercache.pipeline.views import draw_view;"
        "print(draw_view(ViewPolicy(num_views=2, seed=5), 'n0144/1', 500, 375, 1))"
    )
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == str(draw_view(ViewPolicy(num_views=2, seed=5), "n0144/1", 500, 375, 1))


def test_drawn_parameters_are_these() -> None:
    """A change of the generator would make existing seeds mean other views."""
    view = draw_view(ViewPolicy(num_views=2, seed=0), "n01440764_10026", 500, 375, 1)
    assert (view.box, view.flip) == GOLDEN_VIEW


GOLDEN_VIEW = ((143.0, 93.0, 382.0, 360.0), True)


def test_random_resized_crop_follows_torchvision() -> None:
    table = draw_views(ViewPolicy(num_views=4), KEYS, WIDTHS, HEIGHTS, (0, 4))
    left, top, right, bottom = (table[side].to_numpy() for side in ("left", "top", "right", "bottom"))
    width, height = np.repeat(WIDTHS, 4), np.repeat(HEIGHTS, 4)
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (right <= width).all()
    assert (bottom <= height).all()
    assert (right - left >= 1).all()
    assert (bottom - top >= 1).all()
    assert 0.45 < table["flip"].to_numpy().mean() < 0.55

    torch.manual_seed(0)
    from torchvision.transforms.v2 import RandomResizedCrop

    reference = RandomResizedCrop(224)
    image = torch.zeros(3, 375, 500)
    areas = []
    for _ in range(2000):
        box = reference.make_params([image])
        areas.append(box["height"] * box["width"] / (375 * 500))
    many = draw_views(
        ViewPolicy(), [str(i) for i in range(2000)], np.full(2000, 500), np.full(2000, 375), (0, 1)
    )
    ours = (
        (many["right"].to_numpy() - many["left"].to_numpy())
        * (many["bottom"].to_numpy() - many["top"].to_numpy())
        / (375 * 500)
    )
    assert np.mean(ours) == pytest.approx(np.mean(areas), abs=0.02)
    assert np.std(ours) == pytest.approx(np.std(areas), abs=0.02)


def test_a_very_long_image_falls_back_to_the_centre() -> None:
    view = draw_view(ViewPolicy(scale=(1.0, 1.0)), "long", 1000, 10, 0)
    assert view.box == (493.0, 0.0, 506.0, 10.0)


def test_imagenet_eval_is_the_centre_crop() -> None:
    view = draw_view(ViewPolicy(policy="imagenet_eval", size=(224, 224)), "a", 500, 400, 0)
    assert view == View(box=(75.0, 25.0, 425.0, 375.0), flip=False, size=(224, 224))


def test_render_is_crop_resize_flip() -> None:
    image = photograph()
    plain = render_view(image, View((10, 5, 70, 65), False, (32, 24)))
    assert plain.dtype == torch.uint8
    assert plain.shape == (3, 32, 24)
    expected = image.resize((24, 32), Image.Resampling.BICUBIC, box=(10, 5, 70, 65))
    assert torch.equal(plain, torch.from_numpy(np.array(expected)).permute(2, 0, 1))
    flipped = render_view(image, View((10, 5, 70, 65), True, (32, 24)))
    assert torch.equal(flipped, plain.flip(-1))
    assert render_view(image, View((10, 5, 70, 65), False, (32, 24)), (64, 48)).shape == (3, 64, 48)


@pytest.mark.parametrize("box", [(10, 5, 70, 65), (-30, 5, 70, 65), (-200, 0, -100, 80)])
def test_a_view_is_rendered_into_memory_that_is_there(box: tuple[float, float, float, float]) -> None:
    """In the image, over its edge, and all padding."""
    view, batch = View(box, True, (32, 24)), torch.zeros(3, 3, 32, 24, dtype=torch.uint8)
    out = render_view(photograph(), view, out=batch[1])
    assert out.data_ptr() == batch[1].data_ptr()
    assert torch.equal(batch[1], render_view(photograph(), view))
    assert not batch[::2].any()


def test_jitter_is_torchvisions() -> None:
    image = photograph()
    view = View((0, 0, 90, 70), False, (70, 90), brightness=1.2, contrast=0.8, saturation=1.1, hue=0.05)
    expected = F.adjust_brightness(image, view.brightness)
    expected = F.adjust_contrast(expected, view.contrast)
    expected = F.adjust_saturation(expected, view.saturation)
    expected = F.adjust_hue(expected, view.hue)
    assert torch.equal(render_view(image, view), torch.from_numpy(np.array(expected)).permute(2, 0, 1))


def test_unknown_sizes_give_an_empty_box() -> None:
    table = ViewTable(draw_views(ViewPolicy(), ["unreadable"], np.array([0]), np.array([0]), (0, 1)))
    assert table.view(0).box == (0.0, 0.0, 0.0, 0.0)
