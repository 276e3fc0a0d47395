"""What CutMix exchanges of pixels it exchanges of features, whatever the processes."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from teachercache import FeatureCache, build
from teachercache.pipeline.loading.loader import Batch, FeatureLoader
from teachercache.pipeline.loading.sampler import ShardShuffleSampler
from teachercache.pipeline.records.spec import GridSpec
from teachercache.student.losses.distillation import Target
from teachercache.student.training.cutmix import CutMix
from teachercache.student.training.preflight import preflight
from teachercache.student.training.train import train
from tests.make_cache import build_recipe, make_images
from tests.train_recipes import logged, train_recipe

SIDE, PATCHES, TOKENS = 96, 6, 7


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    folder = tmp_path_factory.mktemp("cutmix")
    recipe = build_recipe(folder / "cache", make_images(folder / "images", 8), views={"size": [32, 32]})
    return build(recipe, Console(quiet=True)).cache


def numbered(keys: list[str], step: int = 0) -> tuple[Any, Tensor, Tensor]:
    """A batch whose pixels and features of image i are all i."""
    count = len(keys)
    numbers = torch.arange(count, dtype=torch.uint8)
    images = numbers.view(-1, 1, 1, 1).expand(count, 3, SIDE, SIDE)
    maps = numbers.float().view(-1, 1, 1, 1, 1).expand(count, 2, TOKENS, TOKENS, 4)
    batch = Batch(step, np.arange(count), keys, np.zeros((count, 2), int), images, {}, {}, {}, {}, {})
    return batch, images, maps


def mixed(keys: list[str], step: int = 0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Of whom each pixel, (B, H, W), and each token, (B, 7, 7), is."""
    batch, images, maps = numbered(keys, step)
    cutmix = CutMix((PATCHES, PATCHES), seed)
    images, targets = cutmix(batch, images, {"t": Target(maps)})
    return images[:, 0], targets["t"].feature_maps_BSHWC[:, 1, :, :, 0]


def test_pairs_exchange_a_rectangle_of_whole_patches_and_the_tokens_in_it() -> None:
    shares = []
    for step in range(50):
        pixels, tokens = mixed(["a", "b", "c", "d"], step)
        centres = ((np.arange(TOKENS) + 0.5) * SIDE / TOKENS).astype(int)
        assert torch.equal(tokens, pixels[:, centres][:, :, centres].float())
        patches = pixels.unflatten(1, (PATCHES, -1)).unflatten(3, (PATCHES, -1))
        assert (patches == patches[:, :, :1, :, :1]).all(), "whole patches"
        for own, other in ((0, 1), (1, 0), (2, 3), (3, 2)):
            theirs = patches[own, :, 0, :, 0] == other
            assert (theirs | (patches[own, :, 0, :, 0] == own)).all()
            rows, columns = theirs.any(1), theirs.any(0)
            assert torch.equal(theirs, rows[:, None] & columns), "a rectangle"
            shares.append(theirs.float().mean().item())
    assert 0.4 < np.mean(shares) < 0.6
    assert min(shares) < 0.1 < 0.9 < max(shares)


def test_rectangles_are_drawn_by_seed_step_and_the_first_key_of_a_pair() -> None:
    first = mixed(["a", "b"])[0]
    assert torch.equal(first, mixed(["a", "other"])[0])
    for other in (mixed(["b", "a"]), mixed(["a", "b"], step=1), mixed(["a", "b"], seed=1)):
        assert not torch.equal(first, other[0])


def test_two_processes_mix_as_one(cache: FeatureCache) -> None:
    cutmix = CutMix((2, 2), seed=3)

    def images(processes: int) -> list[Tensor]:
        parts = []
        for rank in range(processes):
            sampler = ShardShuffleSampler(
                cache, batch_size_per_process=4 // processes, rank=rank, world_size=processes
            )
            with FeatureLoader(cache, sampler) as loader:
                parts.append([cutmix(one, one.images, {})[0].clone() for one in islice(loader, 4)])
        return [torch.cat(ranks) for ranks in zip(*parts, strict=True)]

    for one, two in zip(images(1), images(2), strict=True):
        assert torch.equal(one, two)


@pytest.mark.usefixtures("fresh_accelerate")
def test_whole_patches_are_those_of_the_stem(
    cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever `views.patch` says: without a margin it is of no window."""
    mix, grids = CutMix._patches, []

    def noted(cutmix: CutMix, batch: Batch) -> Tensor:
        patches_Bhw = mix(cutmix, batch)
        grids.append(patches_Bhw.shape[1:])
        return patches_Bhw

    monkeypatch.setattr(CutMix, "_patches", noted)
    student = {"stem": "vit_small_patch8_224", "pretrained": False}
    changes = {"student": student, "schedule": {"max_steps": 1}, "cutmix": True}
    train(train_recipe(cache.storage.url, tmp_path, **changes))
    assert grids == [(4, 4)]


@pytest.mark.usefixtures("fresh_accelerate")
def test_online_teachers_give_the_losses_of_the_cache(cache: FeatureCache, tmp_path: Path) -> None:
    losses = {}
    for name, changes in (
        ("plain", {}),
        ("cached", {"cutmix": True}),
        ("online", {"cutmix": True, "features": "online"}),
    ):
        recipe = train_recipe(
            cache.storage.url, tmp_path / name, schedule={"max_steps": 10}, optimizer={"lr": 2e-5}, **changes
        )
        train(recipe)
        losses[name] = logged(tmp_path / name)
    assert losses["online"] == pytest.approx(losses["cached"], rel=1e-5)
    assert losses["plain"] != pytest.approx(losses["cached"], rel=1e-3)


@pytest.mark.parametrize(
    ("batch_size", "views", "teacher", "said"),
    [
        (3, {}, {}, "pairs the images"),
        (2, {"margin": 32}, {}, "views.margin 32"),
        (2, {}, {"grid": GridSpec(kind="adjoint", size=(2, 2))}, "grid: adjoint of "),
        (2, {}, {"render_size": (32, 48)}, "padding in the maps of "),
    ],
)
def test_what_cannot_be_mixed_is_refused(
    cache: FeatureCache, batch_size: int, views: dict[str, Any], teacher: dict[str, Any], said: str
) -> None:
    spec = cache.spec.changed(
        views=cache.spec.views.model_copy(update=views),
        teachers={name: one.model_copy(update=teacher) for name, one in cache.spec.teachers.items()},
    )
    recipe = train_recipe("cache", "run", cutmix=True, batch_size_per_process=batch_size)
    assert [one for one in preflight(recipe, spec).problems if said in str(one)]


@pytest.mark.parametrize(
    "other",
    [
        {"student": {"kind": "kpu", "stem": "test_vit"}},
        {"multitask": {"dataset": {"kind": "scenes", "root": "scenes"}}},
    ],
)
def test_a_kpu_and_labels_are_not_mixed(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="cutmix mixes maps"):
        train_recipe("cache", "run", cutmix=True, **other)
