"""Views that leave the image: what is drawn, and that image and padding lie where the box says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.v2 import functional as F

from teachercache.pipeline.records.spec import CacheSpec
from teachercache.pipeline.records.view_policy import ViewPolicy
from teachercache.pipeline.views import (
    PADDING,
    View,
    ViewTable,
    draw_view,
    draw_views,
    render_view,
    source_pixels,
)
from tests.images import photo

SIZE = (96, 128)


def drawn(policy: ViewPolicy, count: int, width: int, height: int) -> list[View]:
    keys = [f"image_{i}" for i in range(count)]
    views = draw_views(policy, keys, np.full(count, width), np.full(count, height), (0, 1))
    table = ViewTable(views, policy.photometric)
    return [table.view(i) for i in range(count)]


def is_padding(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels == torch.tensor(PADDING)[:, None, None]).all(0)


def test_specs_of_other_policies_did_not_change() -> None:
    """Caches are known by a hash of this: a new field in it would orphan every cache there is."""
    assert sorted(ViewPolicy().model_dump(mode="json")) == [
        "crop_fraction",
        "flip_probability",
        "num_views",
        "policy",
        "ratio",
        "scale",
        "seed",
        "size",
    ]
    train = ViewPolicy(policy="multitask_train")
    assert train.scale == (0.5, 2.0)
    assert ViewPolicy.model_validate(train.model_dump(mode="json")) == train


OLDER_CACHE: dict[str, Any] = {  # of version 2, from before there was views.photometric
    "dataset": {"kind": "folder", "location": "/x", "num_samples": 4, "fingerprint": "f" * 32},
    "views": {"policy": "multitask_train", "num_views": 2, "size": [24, 32], "seed": 3},
    "rows_per_shard": 8,
    "segments": [{"first_row": 0, "samples": [0, 4], "views": [0, 2]}],
    "teachers": {},
    "created": "then",
    "versions": {},
    "cache_id": "fcded588495593b5c0eda95c2f91c681",
}


def test_an_older_cache_is_what_it_was() -> None:
    """Its features were made of torchvision's jitter, and its identity does not say so."""
    spec = CacheSpec.model_validate(OLDER_CACHE)
    assert spec.views.photometric == "color_jitter"
    assert "photometric" not in spec.model_dump(mode="json")["views"]
    assert spec.changed(created="now").views == spec.views
    assert spec.changed(views=ViewPolicy(**OLDER_CACHE["views"])).cache_id != spec.cache_id
    view = View((0, 0, 60, 40), False, (40, 60), 1.2, 0.7, 1.3, 0.05)
    image = F.adjust_contrast(F.adjust_brightness(photo(60, 40), 1.2), 0.7)
    image = F.adjust_hue(F.adjust_saturation(image, 1.3), 0.05)
    assert torch.equal(render_view(photo(60, 40), view), torch.from_numpy(np.array(image)).permute(2, 0, 1))


def convert(pixels: NDArray, factor: float = 1, offset: float = 0) -> NDArray[np.uint8]:
    """PhotoMetricDistortion's own arithmetic."""
    return np.clip(pixels * np.float64(factor) + offset, 0, 255).astype(np.uint8)


def test_distortion_adds_to_brightness_and_multiplies_pixels() -> None:
    pixels = np.array(photo(60, 40))
    plain = View((0, 0, 60, 40), False, (40, 60), photometric="distortion")

    def rendered(**factors: Any) -> NDArray[np.uint8]:
        return render_view(photo(60, 40), replace(plain, **factors)).permute(1, 2, 0).numpy()

    assert np.array_equal(rendered(), pixels)
    assert np.array_equal(rendered(brightness=0.75), convert(pixels, offset=-32))
    assert np.array_equal(rendered(contrast=1.5), convert(pixels, 1.5))
    both = convert(convert(pixels, offset=16), 0.625)
    assert np.array_equal(rendered(brightness=1.125, contrast=0.625), both)
    hsv, less = (np.array(Image.fromarray(p).convert("HSV")) for p in (pixels, rendered(saturation=0.5)))
    assert np.abs(less[..., 1] - hsv[..., 1] / 2).max() <= 3
    assert np.abs(less[..., 2].astype(int) - hsv[..., 2]).max() <= 1


def test_the_mean_of_a_picture_varies_as_with_the_authors_distortion() -> None:
    """Contrast around the mean left half of it."""
    rng, pixels = np.random.default_rng(0), np.array(photo(16, 12, seed=4)).astype(float)
    expected = []
    for _ in range(1000):
        image = convert(pixels, offset=rng.uniform(-32, 32)) if rng.random() < 0.5 else pixels
        expected.append((convert(image, rng.uniform(0.5, 1.5)) if rng.random() < 0.5 else image).mean())
    found = {}
    for photometric in ("distortion", "color_jitter"):
        policy = ViewPolicy(policy="multitask_train", size=SIZE, photometric=photometric)
        views = [replace(view, box=(0, 0, 16, 12), size=(12, 16)) for view in drawn(policy, 1000, 16, 12)]
        found[photometric] = np.std([render_view(photo(16, 12, 4), view).double().mean() for view in views])
    assert found["distortion"] == pytest.approx(np.std(expected), rel=0.06)
    assert found["color_jitter"] < 0.55 * found["distortion"]


def test_scales_are_uniform_and_keep_the_ratio_of_the_sides() -> None:
    policy = ViewPolicy(policy="multitask_train", size=SIZE)
    views = drawn(policy, 2000, 130, 90)
    scales = np.array([view.magnification for view in views])
    assert scales.min() >= 0.5
    assert scales.max() <= 2
    assert np.mean(scales) == pytest.approx(1.25, abs=0.03)
    assert np.std(scales) == pytest.approx(1.5 / np.sqrt(12), abs=0.02)
    for view in views[:50]:
        left, top, right, bottom = view.box
        assert (right - left) / (bottom - top) == pytest.approx(SIZE[1] / SIZE[0], rel=1e-5)
    assert np.mean([view.flip for view in views]) == pytest.approx(0.5, abs=0.04)


def test_the_window_lies_in_the_image_or_the_image_in_the_window() -> None:
    width, height = 130, 90
    for view in drawn(ViewPolicy(policy="multitask_train", size=SIZE), 300, width, height):
        left, top, right, bottom = view.box
        for low, high, side in ((left, right, width), (top, bottom, height)):
            pixel = 1 / view.magnification
            inside = low >= -1e-3 and high <= side + 1e-3
            around = low <= 1e-3 and high >= side - 1.001 * pixel
            assert inside or around
            if around and not inside:  # centred to a pixel
                assert abs(-low - (high - side)) <= 2.001 * pixel


def test_jitter_comes_with_its_probability_and_range() -> None:
    views = drawn(ViewPolicy(policy="multitask_train", size=SIZE), 2000, 130, 90)
    for name, low, high, neutral in (
        ("brightness", 0.75, 1.25, 1.0),
        ("contrast", 0.5, 1.5, 1.0),
        ("saturation", 0.5, 1.5, 1.0),
        ("hue", -0.1, 0.1, 0.0),
    ):
        values = np.array([getattr(view, name) for view in views])
        changed = values[values != neutral]
        assert len(changed) / len(values) == pytest.approx(0.5, abs=0.04)
        assert changed.min() == pytest.approx(low, abs=0.03 * (high - low))
        assert changed.max() == pytest.approx(high, abs=0.03 * (high - low))
    plain = drawn(ViewPolicy(policy="multitask_train", size=SIZE, jitter_probability=0), 20, 130, 90)
    assert {(view.brightness, view.contrast, view.saturation, view.hue) for view in plain} == {(1, 1, 1, 0)}


@pytest.mark.parametrize(
    ("image_size", "box"),
    [
        ((120, 80), (-4, -8, 124, 88)),  # smaller: amid padding, as it is
        ((121, 81), (-3, -7, 125, 89)),  # the odd pixel of padding is on the right and below
        ((128, 96), (0, 0, 128, 96)),
        ((256, 96), (0, -48, 256, 144)),  # larger: shrunk until it fits
        ((500, 375), (0, 0, 500, 375)),
    ],
)
def test_multitask_eval_shows_the_whole_image(image_size: tuple[int, int], box: tuple[float, ...]) -> None:
    view = draw_view(ViewPolicy(policy="multitask_eval", size=SIZE), "a", *image_size, 0)
    assert view.box == pytest.approx(box, abs=1e-4)
    assert view == View(view.box, flip=False, size=SIZE)
    pixels = render_view(Image.new("RGB", image_size, "red"), view)
    padding = is_padding(pixels)
    assert (pixels[:, ~padding] == torch.tensor([255, 0, 0])[:, None]).all()
    shown = view.magnification**2 * image_size[0] * image_size[1]
    assert (~padding).sum() == pytest.approx(shown, rel=0.02)


def test_an_image_that_fits_is_rendered_to_the_bit() -> None:
    image = photo(121, 81)
    pixels = render_view(image, draw_view(ViewPolicy(policy="multitask_eval", size=SIZE), "a", 121, 81, 0))
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(pixels[:, 7:88, 3:124], expected)
    assert is_padding(pixels).sum() == SIZE[0] * SIZE[1] - 121 * 81


@pytest.mark.parametrize("flip", [False, True])
def test_padding_lies_around_what_the_box_has_of_the_image(flip: bool) -> None:
    image = photo(60, 40)
    view = View((-20, -10, 100, 50), flip, (120, 240), brightness=1.2, contrast=0.7, saturation=1.3, hue=0.05)
    pixels = render_view(image, view)
    inner = render_view(image, View((0, 0, 60, 40), flip, (80, 120), 1.2, 0.7, 1.3, 0.05))
    columns = slice(80, 200) if flip else slice(40, 160)
    assert torch.equal(pixels[:, 20:100, columns], inner)
    outside = torch.ones(120, 240, dtype=torch.bool)
    outside[20:100, columns] = False
    assert is_padding(pixels)[outside].all()


def test_the_boxes_of_other_policies_are_rendered_as_before() -> None:
    image = photo(130, 90)
    for view in (
        *drawn(ViewPolicy(size=(48, 64)), 20, 130, 90),
        *drawn(ViewPolicy(policy="imagenet_eval", size=(48, 64)), 1, 130, 90),
    ):
        plain = image.resize((64, 48), Image.Resampling.BICUBIC, box=view.box)
        expected = torch.from_numpy(np.array(plain)).permute(2, 0, 1)
        assert torch.equal(render_view(image, view), expected.flip(-1) if view.flip else expected)


def test_a_box_beside_the_image_is_all_padding() -> None:
    view = View((200, 0, 300, 100), False, (10, 12))
    assert is_padding(render_view(photo(), view)).all()
    rows, columns = source_pixels(view, (30, 40))
    assert set(columns) == {-1}
    assert (rows >= 0).sum() == 3


def test_source_pixels_are_those_that_a_picture_of_coordinates_shows() -> None:
    """Blocks of 4×4 equal pixels survive any resampling at their middle: the image says where it is from."""
    block, grid = 12, (10, 15)
    coordinates = np.zeros((*grid, 3), np.uint8)
    coordinates[..., 0], coordinates[..., 1] = np.indices(grid) * 16
    image = Image.fromarray(coordinates.repeat(block, 0).repeat(block, 1))
    policy = ViewPolicy(policy="multitask_train", size=SIZE, jitter_probability=0)
    for view in drawn(policy, 60, image.width, image.height):
        for size in (SIZE, (150, 200)):
            pixels = render_view(image, view, size).numpy()
            rows, columns = source_pixels(view, (image.height, image.width), size)
            padded = (rows < 0)[:, None] | (columns < 0)
            assert np.array_equal(padded, is_padding(torch.from_numpy(pixels)).numpy())
            middle = np.isin(rows % block, range(4, 8))[:, None] & np.isin(columns % block, range(4, 8))
            middle &= ~padded
            expected = np.stack(np.broadcast_arrays((rows // block)[:, None], columns // block)) * 16
            assert np.abs(pixels[:2, middle].astype(int) - expected[:, middle]).max() <= 3


def test_unknown_sizes_give_an_empty_box() -> None:
    for policy in ("multitask_train", "multitask_eval"):
        view = draw_view(ViewPolicy(policy=policy), "unreadable", 0, 0, 0)
        assert view.box == (0.0, 0.0, 0.0, 0.0)
