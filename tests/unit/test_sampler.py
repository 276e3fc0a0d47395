"""Epochs are exact, ranks are disjoint, and the number of the step is the only state."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import CacheError
from teachercache.pipeline.loading.sampler import ShardShuffleSampler, held_out_samples
from teachercache.pipeline.rearranging.subset import subset
from tests.make_cache import make_cache, make_images, teacher_spec


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    folder = tmp_path_factory.mktemp("sampler")
    images = make_images(folder / "images", 23, size=(16, 16))
    return make_cache(
        folder / "cache",
        images,
        teachers={"t": teacher_spec()},
        num_views=3,
        samples_per_shard=2,
        invalid_samples=[4],
    )


def sampler(
    cache: FeatureCache, batch: int = 4, *, rank: int = 0, world_size: int = 1, seed: int = 0
) -> ShardShuffleSampler:
    return ShardShuffleSampler(
        cache, batch_size_per_process=batch, rank=rank, world_size=world_size, seed=seed, window_shards=3
    )


def stream(cache: FeatureCache, samples: int, seed: int = 0) -> np.ndarray:
    batch, made = 4, sampler(cache, seed=seed)
    return np.concatenate([made.batch(step) for step in range(-(-samples // batch))])[:samples]


def test_every_epoch_holds_every_valid_sample_once(cache: FeatureCache) -> None:
    valid = [sample for sample in range(23) if sample != 4]
    samples = cache.index.locate(stream(cache, 5 * 22))[0].reshape(5, 22)
    for epoch in samples:
        assert sorted(epoch.tolist()) == valid
    assert len({tuple(epoch) for epoch in samples.tolist()}) == 5, "epochs differ in their order"


def test_num_views_epochs_see_every_row_once(cache: FeatureCache) -> None:
    rows = stream(cache, 3 * 22)
    assert sorted(rows.tolist()) == [row for row in range(69) if row not in (12, 13, 14)]
    first_views = cache.index.locate(rows[:22])[1]
    assert len(set(first_views.tolist())) == 3, "an epoch mixes views"


def test_ranks_are_disjoint_and_make_up_the_global_batch(cache: FeatureCache) -> None:
    whole = sampler(cache, 6)
    ranks = [sampler(cache, 2, rank=rank, world_size=3) for rank in range(3)]
    for step in range(20):
        parts = [rank.batch(step) for rank in ranks]
        np.testing.assert_array_equal(np.concatenate(parts), whole.batch(step))


def test_any_step_can_be_had_without_those_before(cache: FeatureCache) -> None:
    one, resumed = sampler(cache), sampler(cache)
    straight = [one.batch(step) for step in range(12)]
    for step in range(7, 12):
        np.testing.assert_array_equal(straight[step], resumed.batch(step))


def test_a_run_can_go_on_with_another_number_of_processes(cache: FeatureCache) -> None:
    before = [sampler(cache, 4).batch(step) for step in range(3)]
    after = [sampler(cache, 2, rank=rank, world_size=2).batch(3) for rank in range(2)]
    np.testing.assert_array_equal(np.concatenate([*before, *after]), stream(cache, 16))


def test_the_seed_decides(cache: FeatureCache) -> None:
    np.testing.assert_array_equal(stream(cache, 44, seed=1), stream(cache, 44, seed=1))
    assert (stream(cache, 44, seed=1) != stream(cache, 44, seed=2)).any()


def test_shuffling_stays_within_windows_of_shards(cache: FeatureCache) -> None:
    rows = stream(cache, 22)
    shards = rows // cache.spec.rows_per_shard
    changes = [len(set(shards[start : start + 6].tolist())) for start in range(0, 18, 6)]
    assert max(changes) <= 4, "six samples of a window of three two-sample shards (one is short)"


def test_a_batch_may_be_larger_than_an_epoch(cache: FeatureCache) -> None:
    samples = cache.index.locate(sampler(cache, 50).batch(0))[0]
    assert len(set(samples[:22].tolist())) == len(set(samples[22:44].tolist())) == 22


def test_a_fraction_is_that_of_a_subset(cache: FeatureCache, tmp_path: Path) -> None:
    part = ShardShuffleSampler(cache, batch_size_per_process=4, fraction=0.5)
    half = subset(cache.storage.url, str(tmp_path / "half"), fraction=0.5).run()
    keys = half.samples["key"].to_pylist()
    assert len(keys) == 12
    seen = cache.index.locate(np.concatenate([part.batch(step) for step in range(part.num_samples)]))[0]
    assert {cache.key(sample) for sample in seen} == set(keys) - {cache.key(4)}
    assert part.num_samples == len(set(seen.tolist()))
    assert sampler(cache).num_samples == 22
    quarter = ShardShuffleSampler(cache, batch_size_per_process=4, fraction=0.25)
    rows = np.concatenate([quarter.batch(step) for step in range(9)])
    assert set(cache.index.locate(rows)[0].tolist()) < set(seen.tolist())
    with pytest.raises(CacheError, match=r"a fraction of 0\.01 of 23 samples"):
        ShardShuffleSampler(cache, batch_size_per_process=4, fraction=0.01)


def test_what_is_held_out_follows_from_keys_and_seed() -> None:
    """So that a cache that grows moves nobody."""
    keys = [f"image_{i:04d}" for i in range(2000)]
    held_out = held_out_samples(keys, 0.1, seed=0)
    assert held_out.size == pytest.approx(200, rel=0.2)
    grown = held_out_samples(["first", *keys, "last"], 0.1, seed=0)
    assert set(held_out + 1) == set(grown) - {0, 2001}
    assert set(held_out) < set(held_out_samples(keys, 0.2, seed=0))
    assert set(held_out) != set(held_out_samples(keys, 0.1, seed=1))


def test_nothing_valid_is_an_error(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", 2)
    broken = make_cache(tmp_path / "cache", images, invalid_samples=[0, 1])
    with pytest.raises(CacheError, match="quarantined"):
        ShardShuffleSampler(broken, batch_size_per_process=1)
