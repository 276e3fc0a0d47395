"""Views with a margin, of which students see windows, and pairs of flips."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from teachercache.cache_builder.teachers import TeacherRecipe, resolve_teachers
from teachercache.pipeline.errors import TeacherInputError
from teachercache.pipeline.records.view_policy import ViewPolicy
from teachercache.pipeline.views import ViewTable, draw_view, draw_views, render_view
from teachercache.student.datasets.labels import render_labels
from tests.unit.test_views import HEIGHTS, KEYS, WIDTHS, photograph

WIDE = ViewPolicy(size=(64, 96), margin=32)


def test_policies_without_a_margin_are_written_as_they_always_were() -> None:
    fields = ViewPolicy(margin=0, patch=16, flip="random").model_dump()
    assert not fields.keys() & {"margin", "patch", "flip"}
    assert WIDE.model_dump()["margin"] == 32
    assert ViewPolicy.model_validate(WIDE.model_dump()) == WIDE


def test_the_stored_view_is_larger_by_the_margin_and_drawn_as_any_of_its_size() -> None:
    wide = draw_views(WIDE, KEYS, WIDTHS, HEIGHTS, (0, 1))
    assert wide.equals(draw_views(ViewPolicy(size=(96, 128)), KEYS, WIDTHS, HEIGHTS, (0, 1)))


@pytest.mark.parametrize("policy", ["imagenet_train", "multitask_train"])
@pytest.mark.parametrize("flip", [0, 1])
def test_a_window_shows_the_very_pixels_and_labels_of_its_view(policy: str, flip: int) -> None:
    image, height, width = photograph(300, 200), 200, 300
    labels = {"semseg": np.random.default_rng(0).integers(0, 9, (height, width), np.uint8)}
    for view_index in range(8):
        drawn = ViewPolicy(policy=policy, num_views=8, size=(64, 96), margin=32, flip_probability=flip)
        view = draw_view(drawn, "a", width, height, view_index)
        pixels, semseg = render_view(image, view), render_labels(labels, view)["semseg"]
        for top, left in ((0, 0), (16, 32), (32, 16)):
            window, place = view.window((top, left), (64, 96)), np.s_[..., top : top + 64, left : left + 96]
            assert window.magnification == pytest.approx(view.magnification)
            assert torch.equal(render_labels(labels, window)["semseg"], semseg[place])
            apart = (render_view(image, window).int() - pixels[place].int()).abs()
            assert (apart > 0).float().mean() < 2e-3, "boxes are rounded to float32 on their way to Pillow"
            assert apart.max() <= (1 if policy == "imagenet_train" else 8), "and jitter enlarges that"


def test_the_only_window_of_a_view_without_a_margin_is_the_view() -> None:
    view = draw_view(ViewPolicy(size=(64, 96)), "a", 300, 200, 0)
    assert view.window((0, 0), (64, 96)) == view


@pytest.mark.parametrize("policy", ["imagenet_train", "multitask_train"])
def test_pairs_of_flips_are_one_crop_as_it_is_and_mirrored(policy: str) -> None:
    pairs = ViewPolicy(policy=policy, num_views=4, flip="pairs")
    table = ViewTable(draw_views(pairs, KEYS, WIDTHS, HEIGHTS, (0, 4)))
    crops = ViewTable(draw_views(ViewPolicy(policy=policy, num_views=2), KEYS, WIDTHS, HEIGHTS, (0, 2)))
    for sample in range(50):
        for number in range(2):
            one, other = (table.view(4 * sample + 2 * number + mirrored) for mirrored in (0, 1))
            assert one == crops.view(2 * sample + number)
            assert one.flip is not other.flip
            assert one.box == other.box
            assert one.brightness == other.brightness


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ({"margin": 24}, "multiples of views.patch, 16 pixels"),
        ({"margin": 32, "size": 100}, "multiples of views.patch, 16 pixels"),
        ({"margin": 28, "size": 98, "patch": 16}, "multiples of views.patch, 16 pixels"),
        ({"margin": 112, "size": 96}, "must not exceed size"),
        ({"margin": 16, "policy": "multitask_eval"}, "is one fixed view"),
        ({"flip": "pairs", "num_views": 3}, "an even num_views"),
    ],
)
def test_margins_and_pairs_that_cannot_be_are_refused(views: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ViewPolicy.model_validate(views)


def test_teachers_see_the_margin_and_a_student_s_grid_covers_it() -> None:
    recipes = {
        "clip": TeacherRecipe(model="vit_tiny_patch16_224", grid="adjoint"),
        "dino": TeacherRecipe(preset="dinov2_small", grid="bilinear"),
    }
    specs = resolve_teachers(recipes, ViewPolicy(size=(384, 384), margin=64))
    assert [spec.image_size for spec in specs.values()] == [(448, 448), (448, 448)]
    assert [spec.native_grid for spec in specs.values()] == [(28, 28), (32, 32)]
    assert [spec.stored_grid for spec in specs.values()] == [(28, 28), (28, 28)]
    fourteen = ViewPolicy(size=(392, 392), margin=56, patch=14)
    assert resolve_teachers(recipes, fourteen)["dino"].stored_grid == (32, 32)


def test_windows_of_a_padded_map_are_refused() -> None:
    """The reference pads SAM's view to a square: tokens of the padding are no part of any window."""
    recipes = {"sam": TeacherRecipe(preset="sam_base")}
    oblong = ViewPolicy(size=(448, 576), margin=64)
    with pytest.raises(TeacherInputError, match=r"(?s)sam is padded.*\(512, 640\).*\(1024, 1024\)"):
        resolve_teachers(recipes, oblong, sak_compat=True)
    assert not resolve_teachers(recipes, oblong)["sam"].is_padded
    for fits in (ViewPolicy(size=(448, 448), margin=64), ViewPolicy(size=(448, 576))):
        resolve_teachers(recipes, fits, sak_compat=True)


def test_an_adjoint_grid_of_another_margin_is_refused() -> None:
    recipes = {"clip": TeacherRecipe(model="vit_tiny_patch16_224", grid="adjoint", grid_size=(24, 24))}
    with pytest.raises(TeacherInputError, match=r"(?s)grid_size \(24, 24\).*\(28, 28\).*leave out"):
        resolve_teachers(recipes, ViewPolicy(size=(384, 384), margin=64))
