"""What changes with the epoch: fresh views for teachers and student, and jitter for the student alone."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from rich.console import Console

from teachercache import FeatureCache, build, render_view
from teachercache.pipeline.crops import StudentJitter, draw_jitter
from teachercache.pipeline.loading.loader import Batch, FeatureLoader
from teachercache.pipeline.loading.sampler import ShardShuffleSampler
from teachercache.pipeline.views import draw_view
from teachercache.student.training.train import train
from tests.make_cache import build_recipe, make_cache, make_images
from tests.train_recipes import logged, train_recipe

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

STRONG = StudentJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), 6)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, images: Path) -> FeatureCache:
    return make_cache(tmp_path_factory.mktemp("made"), images)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, images: Path) -> FeatureCache:
    """One view of each of six images, with real features."""
    views = {"num_views": 1, "size": [32, 32]}
    return build(
        build_recipe(tmp_path_factory.mktemp("b") / "cache", images, views=views), Console(quiet=True)
    ).cache


def batches(cache: FeatureCache, count: int = 6, seed: int = 5, **changes: Any) -> list[Batch]:
    sampler = ShardShuffleSampler(cache, batch_size_per_process=2, seed=seed)
    with FeatureLoader(cache, sampler, seed=seed, **changes) as loader:
        return list(islice(loader, count))


def run(cache: FeatureCache, output: Path, **changes: Any) -> list[float]:
    changes = {"schedule": {"max_steps": 20}, "optimizer": {"lr": 2e-5}} | changes
    train(train_recipe(cache.storage.url, output, **changes))
    AcceleratorState._reset_state(reset_partial_state=True)
    return logged(output)


def test_fresh_views_are_drawn_by_seed_sample_and_epoch(made: FeatureCache) -> None:
    policy = made.spec.views.model_copy(update={"seed": 5})
    for step, batch in enumerate(batches(made, fresh=True, features=False, extra_sizes={(48, 40)})):
        for i, key in enumerate(batch.sample_keys):
            view = draw_view(policy, key, 64, 48, step // 3)
            for size in ((32, 32), (48, 40)):
                assert torch.equal(
                    batch.renders[size][i], render_view(made.image(made.find(key)), view, size)
                )


def test_fresh_crops_are_new_in_each_epoch_of_a_cache_of_pairs_too(
    made: FeatureCache, images: Path, tmp_path: Path
) -> None:
    pairs, views = make_cache(tmp_path, images, flip="pairs"), {"fresh": True, "features": False}
    for one, other in zip(batches(made, **views), batches(pairs, **views), strict=True):
        assert torch.equal(one.images, other.images)


def test_fresh_training_sees_what_a_cache_holds_in_the_first_epoch_and_new_crops_then(
    built: FeatureCache, tmp_path: Path
) -> None:
    """An epoch is three steps."""
    cached = run(built, tmp_path / "cached")
    fresh = run(built, tmp_path / "fresh", features="fresh")
    assert fresh[:3] == pytest.approx(cached[:3], rel=1e-5)
    assert abs(fresh[3] - cached[3]) > 1e-4 * cached[3]
    online = run(built, tmp_path / "online", features="online")
    assert online == pytest.approx(cached, rel=1e-5)


def test_jitter_is_the_student_s_alone(made: FeatureCache) -> None:
    clean = batches(made, extra_sizes={(32, 32)})
    for one, other in zip(clean, batches(made, jitter=STRONG, extra_sizes={(32, 32)}), strict=True):
        assert torch.equal(one.renders[32, 32], other.renders[32, 32])
        assert (one.images != other.images).float().mean() > 0.5
        assert torch.equal(one.features["alpha"].decode(), other.features["alpha"].decode())
    none = batches(made, jitter=StudentJitter())
    assert all(torch.equal(one.images, other.images) for one, other in zip(clean, none, strict=True))


def test_jitter_is_drawn_evenly_by_seed_sample_and_epoch() -> None:
    drawn = np.array([draw_jitter(STRONG, 0, f"s{i}", epoch) for i in range(200) for epoch in range(5)])
    assert drawn.min(0) == pytest.approx([0.6, 0.6, 0.6, -0.1], abs=0.01)
    assert drawn.max(0) == pytest.approx([1.4, 1.4, 1.4, 0.1], abs=0.01)
    assert np.abs(np.corrcoef(drawn.T) - np.eye(4)).max() < 0.1
    assert len({tuple(row) for row in drawn.tolist()}) == 1000
    assert draw_jitter(STRONG, 1, "s0", 0) != draw_jitter(STRONG, 0, "s0", 0)


def test_jitter_is_added_to_that_of_the_view(made: FeatureCache) -> None:
    view = made.view(0).jittered(1.1, 0.9, 1.2, 0.4).jittered(0.5, 1.0, 1.0, 0.3)
    changes = view.brightness, view.contrast, view.saturation, view.hue
    assert changes == pytest.approx((0.55, 0.9, 1.2, -0.3))


def test_with_jitter_too_online_teachers_give_the_losses_of_the_cache(
    built: FeatureCache, tmp_path: Path
) -> None:
    jitter = {"student_jitter": STRONG.model_dump()}
    cached = run(built, tmp_path / "cached", **jitter)
    assert run(built, tmp_path / "online", features="online", **jitter) == pytest.approx(cached, rel=1e-5)
    assert run(built, tmp_path / "clean", schedule={"max_steps": 1})[0] != pytest.approx(cached[0], rel=1e-4)
