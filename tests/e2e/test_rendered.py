"""`images: rendered`: the student's pixels of every row, bit for bit what rendering gives."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from teachercache import FeatureCache, render_view
from teachercache.cache_builder.builder import build, prepare
from teachercache.cache_builder.repair import repair
from teachercache.pipeline.crops import StudentJitter
from teachercache.pipeline.errors import CacheMismatchError, IncompleteCacheError
from teachercache.pipeline.loading.cached_teachers import CachedTeachers
from teachercache.pipeline.loading.loader import FeatureLoader
from teachercache.pipeline.loading.sampler import ShardShuffleSampler
from teachercache.pipeline.rearranging.convert import convert
from teachercache.pipeline.rearranging.merge import merge
from teachercache.pipeline.rearranging.subset import subset
from teachercache.pipeline.records.spec import IMAGES
from teachercache.pipeline.verify import strays, verify
from teachercache.student.training.preflight import preflight
from tests.make_cache import build_recipe, make_images
from tests.train_recipes import train_recipe

QUIET = Console(quiet=True)
VIEWS = {"num_views": 2, "size": [32, 32], "margin": 16}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five images, the second of which cannot be decoded, in shards of three samples of two wide views."""
    folder = tmp_path_factory.mktemp("rendered")
    make_images(folder / "images", 5)
    (folder / "images" / "image_001.jpg").write_bytes(b"no image")
    build(build_recipe(folder / "cache", folder / "images", views=VIEWS, images="rendered"), QUIET)
    return folder


@pytest.fixture
def without_images(built: Path, tmp_path: Path) -> FeatureCache:
    """A copy of the cache, whose images are not where it says."""
    shutil.copytree(built, tmp_path / "both")
    shutil.rmtree(tmp_path / "both" / "images")
    cache = FeatureCache.open(tmp_path / "both" / "cache", images=str(tmp_path))
    return cache


def batches(cache: FeatureCache, count: int, **settings: object) -> list[torch.Tensor]:
    sampler = ShardShuffleSampler(cache, batch_size_per_process=3)
    with FeatureLoader(cache, sampler, **settings) as loader:  # type: ignore[arg-type]
        return [batch.images.clone() for _, batch in zip(range(count), loader, strict=False)]


def test_the_pixels_of_every_row_are_those_of_rendering(built: Path) -> None:
    cache = FeatureCache.open(built / "cache")
    rows = cache.index.rows(cache.valid_samples()[:, None], [0, 1]).ravel()
    for row, pixels in zip(rows.tolist(), cache.pixels(rows), strict=True):
        sample = int(cache.index.locate(row)[0])
        assert torch.equal(pixels, render_view(cache.image(sample), cache.view(row)))
    assert (verify(cache, full=True), strays(cache)) == ([], [])


def test_training_reads_windows_without_the_images(built: Path, without_images: FeatureCache) -> None:
    cache = without_images
    sampler = ShardShuffleSampler(cache, batch_size_per_process=3)
    with FeatureLoader(cache, sampler) as loader:
        for _, batch in zip(range(4), loader, strict=False):
            whole = cache.pixels(batch.rows)
            for image, view, (top, left) in zip(batch.images, whole, batch.windows.tolist(), strict=True):
                assert torch.equal(image, view[:, top : top + 32, left : left + 32])
    assert torch.equal(CachedTeachers(cache)[[0, 3]]["pixels"], cache.pixels([0, 5]))


def test_a_slice_of_a_view_is_the_window_that_would_be_rendered(built: Path, tmp_path: Path) -> None:
    recipes = {
        kind: build_recipe(tmp_path / kind, built / "images", views=VIEWS, images=kind)
        for kind in ("rendered", "reference")
    }
    read, rendered = (batches(build(recipe, QUIET).cache, 4) for recipe in recipes.values())
    difference = torch.stack(read).int() - torch.stack(rendered).int()
    assert difference.abs().max() <= 1  # a window's box is rounded otherwise


def test_jitter_renders_from_the_images(built: Path, without_images: FeatureCache) -> None:
    jitter = StudentJitter(brightness=0.5)
    with_images = FeatureCache.open(built / "cache")
    assert not torch.equal(batches(with_images, 1)[0], batches(with_images, 1, jitter=jitter)[0])
    with pytest.raises(Exception, match="image_"):
        batches(without_images, 1, jitter=jitter)


def test_the_plan_counts_what_the_build_writes(built: Path, tmp_path: Path) -> None:
    recipe = build_recipe(tmp_path / "new", built / "images", views=VIEWS, images="rendered")
    plan = prepare(recipe, QUIET)[2]
    assert plan.image_bytes == plan.missing_image_bytes == 10 * plan.pixel_bytes
    [tiny] = plan.teachers
    records = FeatureCache.open(built / "cache").commits(IMAGES)
    overhead = 4 + 16  # the checksum of an index, and of all rows
    written = sum(record.nbytes - overhead for record in records.values())
    padding, empty = 2 * 16, 2 * (3 * 48 * 48 + 4)
    assert written == plan.image_bytes + padding - empty
    assert plan.num_files == 2 * (tiny.num_files + 2) + 2 * 2


def test_a_damaged_shard_of_pixels_is_made_again(built: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(built / "cache", tmp_path / "cache"))
    shard = path / "teachers/images/pixels/c/0/0/0/0"
    before = shard.read_bytes()
    shard.write_bytes(before[:1000] + b"\x00\xff" + before[1002:])
    (path / "teachers/images/pixels/zarr.json").unlink()
    done = repair(FeatureCache.open(path))
    assert {problem.teacher for problem in done.mended} == {IMAGES}
    assert done.left == []
    assert shard.read_bytes() == before


def test_they_survive_subset_merge_and_conversion(built: Path, tmp_path: Path) -> None:
    cache = FeatureCache.open(built / "cache")
    key = cache.key(4)
    parts = [
        subset(str(built / "cache"), str(tmp_path / name), keys=keys).run()
        for name, keys in (("last", [key]), ("first", [cache.key(0)]))
    ]
    assert torch.equal(parts[0].pixels([0, 1]), cache.pixels(cache.index.rows(4, [0, 1])))
    merged = merge([part.storage.url for part in parts], str(tmp_path / "merged")).run()
    tars = convert(merged.storage.url, str(tmp_path / "tars"), "webdataset").run()
    back = convert(tars.storage.url, str(tmp_path / "back"), "zarr").run()
    for other in (merged, tars, back):
        rows = other.index.rows([[0], [1]], [0, 1]).ravel()
        assert torch.equal(other.pixels(rows), torch.cat([part.pixels([0, 1]) for part in parts]))
        assert verify(other, full=True) == []


def test_a_shard_without_pixels_is_missing(built: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(built / "cache", tmp_path / "cache"))
    (path / "commits/images/00001.json").unlink()
    cache = FeatureCache.open(path)
    with pytest.raises(IncompleteCacheError, match="images: 1 of 2"):
        ShardShuffleSampler(cache, batch_size_per_process=2)
    with pytest.raises(IncompleteCacheError, match="not committed"):
        cache.pixels([6])
    recipe = build_recipe(path, built / "images", views=VIEWS, images="rendered")
    assert build(recipe, QUIET).shards == 1
    assert torch.equal(FeatureCache.open(path).pixels([6]), FeatureCache.open(built / "cache").pixels([6]))


def test_a_cache_grows_by_views_with_their_pixels(built: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(built / "cache", tmp_path / "cache"))
    recipe = build_recipe(path, built / "images", views=VIEWS | {"num_views": 3}, images="rendered")
    grown = build(recipe, QUIET).cache
    row = int(grown.index.rows(4, 2))
    assert torch.equal(grown.pixels(row)[0], render_view(grown.image(4), grown.view(row)))
    assert verify(grown, full=True) == []
    with pytest.raises(CacheMismatchError, match="images: the cache has 'rendered'"):
        build(build_recipe(path, built / "images", views=VIEWS), QUIET)


@pytest.mark.usefixtures("fresh_accelerate")
def test_pixels_of_another_pillow_than_the_teachers_are_told(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = FeatureCache.open(built / "cache")
    online = train_recipe(built / "cache", tmp_path / "run", features="online")
    assert "Pillow" not in str(preflight(online, cache.spec, cache).notices)
    monkeypatch.setattr("PIL.__version__", "0.9")
    assert "the teachers' are by 0.9 here" in str(preflight(online, cache.spec, cache).notices)
    cached = train_recipe(built / "cache", tmp_path / "run")
    assert "Pillow" not in str(preflight(cached, cache.spec, cache).notices)
    fresh = train_recipe(built / "cache", tmp_path / "run", features="fresh")
    assert "are not read" in str(preflight(fresh, cache.spec, cache).notices)
    path = shutil.copytree(built / "cache", tmp_path / "cache")
    record = cache.manifest.read_commit("tiny", 1)
    cache = FeatureCache.open(path)
    cache.manifest.commit(record.model_copy(update={"versions": {"pillow": "0.9"}}))  # it was added later
    assert "may differ from tiny's: another Pillow" in str(preflight(cached, cache.spec, cache).notices)
