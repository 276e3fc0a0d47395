"""Statistics of the features, which a build collects on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

from teachercache import FeatureCache, build
from teachercache.cache_builder.repair import repair
from teachercache.jobs.inspection.details import shard_details
from teachercache.jobs.inspection.summary import summarize
from teachercache.pipeline.errors import CacheError
from teachercache.pipeline.verify import verify
from tests.make_cache import build_recipe, make_cache, make_images

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_images(tmp_path_factory.mktemp("images"), 9)
    (folder / "image_004.jpg").write_bytes(b"no image")  # its rows have no features
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, images: Path) -> FeatureCache:
    """float32 on the teacher's own grid: what is stored is what the statistics are of."""
    path = tmp_path_factory.mktemp("cache") / "cache"
    return build(build_recipe(path, images, rows_per_shard=2, covariance=True), QUIET).cache


def test_statistics_equal_two_passes_in_float64(cache: FeatureCache) -> None:
    rows = cache.index.rows(cache.valid_samples()[:, None], [0, 1]).ravel()
    features = cache.read(rows)["tiny"].decode().double()
    tokens_SNC = features.transpose(0, 1).flatten(1, 3)
    mean_SC = tokens_SNC.mean(1)
    centred_SNC = tokens_SNC - mean_SC[:, None]
    variance_SC = centred_SNC.square().mean(1)
    covariance_SCC = centred_SNC.mT @ centred_SNC / centred_SNC.shape[1]
    found = cache.statistics("tiny")
    assert found.count == tokens_SNC.shape[1] == 16 * 2 * 2
    deviation = variance_SC.sqrt()
    assert ((found.mean_SC - mean_SC).abs() < 1e-6 * deviation).all()
    torch.testing.assert_close(found.std_SC(), deviation, rtol=1e-6, atol=0)
    scale_SCC = deviation[:, :, None] * deviation[:, None]
    assert ((found.covariance_SCC() - covariance_SCC).abs() < 1e-6 * scale_SCC).all()


def test_the_order_of_the_shards_and_a_restart_change_no_bit(
    tmp_path: Path, cache: FeatureCache, images: Path
) -> None:
    recipe = build_recipe(tmp_path / "cache", images, rows_per_shard=2, covariance=True)
    again = build(recipe, QUIET).cache
    for shard in (7, 0, 3):
        again.storage.remove(f"commits/tiny/{shard:05d}.json")
    assert build(recipe, QUIET).shards == 3
    found, expected = (
        one.statistics("tiny").tensors() for one in (FeatureCache.open(again.storage.url), cache)
    )
    assert found.keys() == expected.keys() == {"count", "mean", "squares", "products"}
    for name in found:
        assert torch.equal(found[name], expected[name])


def test_without_covariance_there_is_none(tmp_path: Path, images: Path) -> None:
    cache = build(build_recipe(tmp_path / "cache", images), QUIET).cache
    found = cache.statistics("tiny")
    assert found.products_SCC is None
    assert found.std_SC().shape == (4, 192)


def test_damaged_statistics_are_found_and_mended(tmp_path: Path, images: Path) -> None:
    cache = build(build_recipe(tmp_path / "cache", images), QUIET).cache
    expected = cache.statistics("tiny")
    file = tmp_path / "cache" / "stats" / "tiny" / "00001.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(CacheError, match=r"Shard 1 of tiny has no usable statistics(.|\n)*repair"):
        cache.statistics("tiny")
    assert [problem.file for problem in verify(cache, full=True)] == ["stats/tiny/00001.safetensors"]
    assert repair(cache, build_recipe("x", images).runner).left == []
    assert torch.equal(
        FeatureCache.open(tmp_path / "cache").statistics("tiny").squares_SC, expected.squares_SC
    )


def test_inspecting_a_shard_shows_its_statistics(tmp_path: Path, images: Path) -> None:
    cache = build(build_recipe(tmp_path / "cache", images, rows_per_shard=32), QUIET).cache
    std_SC = cache.statistics("tiny").std_SC()
    levels = shard_details(cache.manifest, 0)["teachers"]["tiny"]["channels"]
    assert [level["spread_max"] for level in levels] == pytest.approx(std_SC.amax(1).tolist())
    assert [level["spread_median"] for level in levels] == pytest.approx(std_SC.quantile(0.5, 1).tolist())
    assert [level["dead"] for level in levels] == [0] * 4
    file = tmp_path / "cache/stats/tiny/00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    found = shard_details(cache.manifest, 0)["teachers"]["tiny"]
    assert "stats/tiny/00000.safetensors is not the file that was committed" in found["state"]
    assert found["channels"] is None


def test_a_cache_computed_without_statistics_says_so(tmp_path: Path, images: Path) -> None:
    cache = make_cache(tmp_path / "cache", make_images(tmp_path / "images", 3))
    with pytest.raises(CacheError, match="a shard that was computed without"):
        cache.statistics("alpha")


def test_statistics_on_an_object_store_are_no_problem(tmp_path: Path, images: Path) -> None:
    cache = build(build_recipe(f"memory://{tmp_path.name}/cache", images), QUIET).cache
    assert summarize(cache.storage)["problems"] == []
    assert cache.statistics("tiny").count > 0
    cache.storage.remove("stats/tiny/00001.safetensors")
    (problem,) = summarize(cache.storage)["problems"]
    assert "stats/tiny/00001.safetensors is missing" in problem
    with pytest.raises(CacheError, match=r"Shard 1 of tiny has no usable statistics(.|\n)*repair"):
        cache.statistics("tiny")
