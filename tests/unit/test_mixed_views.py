"""What is mixed of pixels is mixed of features."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from benchmarks.mixed_views import LEAST_SIDE, Mix, _cutmix, _tolerant, _zoom, mixed
from teachercache.pipeline.grids import upsample
from teachercache.student.losses.distillation import Target
from teachercache.student.training.targets import TARGET_SOURCES, CachedTargets

PATCH, TOKENS, SIDE = 16, 6, 96


def batch(images: Tensor) -> Any:
    return SimpleNamespace(images=images)


@pytest.mark.parametrize("seed", range(5))
def test_cutmix_takes_pixels_and_tokens_of_the_same_patches(seed: int) -> None:
    torch.manual_seed(seed)
    numbers = torch.arange(1, 4, dtype=torch.uint8)
    one = batch(numbers.view(3, 1, 1, 1).expand(3, 3, SIDE, SIDE))
    features = numbers.float().view(3, 1, 1, 1, 1).expand(3, 2, TOKENS, TOKENS, 4)
    target = _cutmix(one, {"t": Target(features)}, PATCH)["t"]
    of_pixels = one.images[:, 0, PATCH // 2 :: PATCH, PATCH // 2 :: PATCH].float()
    assert torch.equal(target.feature_maps_BSHWC[:, 1, :, :, 0], of_pixels)
    assert all(
        set(image.unique().tolist()) <= {a, b}
        for image, a, b in zip(one.images, (1, 2, 3), (3, 1, 2), strict=True)
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_student_of_a_zoomed_view_is_asked_where_the_kept_tokens_lie(seed: int) -> None:
    torch.manual_seed(seed)
    ramp = torch.linspace(0, 255, SIDE).byte().expand(2, 3, SIDE, SIDE)
    centres = (torch.arange(7) + 0.5) * 255 / 7  # of the same ramp, as a teacher of 7 × 7 tokens sees it
    features = centres.view(1, 1, 1, 7, 1).expand(2, 1, 7, 7, 1)
    one = batch(ramp)
    target = _zoom(one, {"t": Target(features)}, PATCH)["t"]
    student = one.images[:, :1].float()  # a student that says its pixels
    assert target.grid is not None
    seen = upsample(student, target.grid)
    kept = target.feature_maps_BSHWC
    assert int(LEAST_SIDE * 7) <= kept.shape[3] <= 7
    assert (seen[:, 0] - kept[:, 0, ..., 0]).abs().max() < 4, "within a pixel or so of the ramp"


def test_a_student_that_is_right_but_for_a_token_is_right_where_shifts_are_tolerated() -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 1, TOKENS, TOKENS, 8)
    shifted = features[:, 0].roll(1, 2).permute(0, 3, 1, 2)
    plain = Target(features).compare(0, shifted, "flattened", "smooth_l1")
    tolerant = _tolerant(batch(torch.empty(0)), {"t": Target(features)}, PATCH)["t"]
    cosine, distance = tolerant.compare(0, shifted, "flattened", "smooth_l1")
    assert cosine.max() < 0.25 < 0.8 < plain[0].min()
    assert (distance < plain[1] / 3).all()
    exact = features[:, 0].permute(0, 3, 1, 2)
    for ours, theirs in zip(
        tolerant.compare(0, exact, "flattened", "smooth_l1"),
        Target(features).compare(0, exact, "flattened", "smooth_l1"),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("mix", [None, *get_args(Mix)])
def test_training_is_plain_again_afterwards(mix: Mix | None) -> None:
    with mixed(mix, PATCH):
        assert (TARGET_SOURCES["cached"] is CachedTargets) == (mix is None)
    assert TARGET_SOURCES["cached"] is CachedTargets
