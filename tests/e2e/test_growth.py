"""Caches that grow: what is there keeps its bytes and its numbers, and what is new is read like the rest."""

from __future__ import annotations

import io
import json
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from teachercache import FeatureCache, render_view
from teachercache.cache_builder import builder
from teachercache.cache_builder.build_recipe import BuildRecipe
from teachercache.cache_builder.builder import build
from teachercache.cache_builder.extract import ShardExtractor
from teachercache.cache_builder.runner import LocalRunner, Runner
from teachercache.cache_builder.teachers import build_teacher
from teachercache.jobs.inspection import details
from teachercache.jobs.inspection.summary import summarize
from teachercache.jobs.inspection.tables import warnings
from teachercache.pipeline.errors import (
    AlreadyCommittedError,
    BuildError,
    BuildInterruptedError,
    CacheError,
    CacheMismatchError,
    CacheNotFoundError,
)
from teachercache.pipeline.loading.loader import FeatureLoader
from teachercache.pipeline.loading.sampler import ShardShuffleSampler
from teachercache.pipeline.places.open_storage import open_storage
from teachercache.pipeline.records.manifest import CommitRecord, Manifest
from teachercache.pipeline.sources.decode import HEAD_BYTES
from teachercache.pipeline.verify import strays, verify
from tests.contract.test_hostile_files import sealed
from tests.make_cache import build_recipe, make_images

QUIET = Console(quiet=True)
TINY = {"model": "vit_tiny_patch16_224", "pretrained": False, "image_size": 32, "codec": "f32"}
GROWING = {"cache.json", "samples.parquet", "views.parquet", "zarr.json"}  # written anew, whole

State = dict[str, tuple[bytes, int]]


def state(cache: Path) -> State:
    """Bytes and time of every file but those that say how large the cache is."""
    files = [path for path in cache.rglob("*") if path.is_file() and path.name not in GROWING]
    return {str(path.relative_to(cache)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def recipe(cache: Path, source: Path, num_views: int = 2, **changes: object) -> BuildRecipe:
    views = {"num_views": num_views, "size": [32, 32]}
    return build_recipe(cache, source, **{"teachers": {"tiny": TINY}, "views": views} | changes)


def by_key(cache: FeatureCache, views: int) -> dict[tuple[str, int], torch.Tensor]:
    """Features by what they are of, whatever their rows are."""
    found = {}
    for sample in range(cache.num_samples):
        for view in range(views):
            row = int(cache.index.rows(sample, view))
            found[cache.key(sample), view] = cache.read([row])["tiny"].decode()[0]
    return found


def assert_same_features(grown: FeatureCache, whole: FeatureCache) -> None:
    """As if it had been built at once, up to the noise of the arithmetic: batches are others."""
    views = whole.num_views
    found, expected = by_key(grown, views), by_key(whole, views)
    assert found.keys() == expected.keys()
    for key, features in expected.items():
        torch.testing.assert_close(found[key], features, rtol=1e-4, atol=1e-4)


def assert_usable(cache: FeatureCache) -> None:
    """Verified, inspected and sampled: every sample once an epoch, every view once in as many epochs."""
    assert verify(cache, full=True) == []
    assert strays(cache) == []
    summary = summarize(cache.storage)
    assert summary["problems"] == []
    assert summary["committed"]["tiny"] == cache.spec.num_shards
    sample = details.sample_details(cache.manifest, cache.key(cache.num_samples - 1))
    assert [row["teachers"]["tiny"] for row in sample["rows"]] == ["sound"] * cache.num_views
    sampler = ShardShuffleSampler(cache, batch_size_per_process=cache.num_samples)
    seen: list[tuple[int, int]] = []
    for epoch in range(cache.num_views):
        samples, views, _ = cache.index.locate(sampler.batch(epoch))
        assert sorted(samples.tolist()) == list(range(cache.num_samples))
        seen += zip(samples.tolist(), views.tolist(), strict=True)
    assert len(set(seen)) == cache.num_samples * cache.num_views
    with FeatureLoader(cache, sampler, threads=2) as loader:
        batch = next(iter(loader))
    found = batch.features["tiny"].decode()
    assert torch.equal(found, cache.read(batch.rows, ["tiny"])["tiny"].decode())
    for place, row in enumerate(batch.rows.tolist()):
        index = int(cache.index.locate(row)[0])
        assert batch.sample_keys[place] == cache.key(index)
        assert torch.equal(batch.renders[32, 32][place], render_view(cache.image(index), cache.view(row)))


def test_views_are_added(tmp_path: Path) -> None:
    images, path = make_images(tmp_path / "images", 5), tmp_path / "cache"
    small = build(recipe(path, images, 2), QUIET).cache
    before, rows = state(path), by_key(small, 2)
    result = build(recipe(path, images, 5), QUIET)
    grown = result.cache
    assert before.items() <= state(path).items()
    assert [(s.first_row, s.views) for s in grown.spec.segments] == [(0, (0, 2)), (12, (2, 5))]
    assert (result.shards, result.views, grown.num_views, grown.num_rows) == (3, 15, 5, 25)
    for (key, view), features in rows.items():
        row = int(grown.index.rows(grown.find(key), view))
        assert row == 2 * grown.find(key) + view
        assert torch.equal(grown.read([row])["tiny"].decode()[0], features)
    assert_usable(grown)
    assert_same_features(grown, build(recipe(tmp_path / "whole", images, 5), QUIET).cache)
    assert build(recipe(path, images, 5), QUIET).shards == 0


def test_samples_are_appended(tmp_path: Path) -> None:
    images, path = make_images(tmp_path / "images", 4), tmp_path / "cache"
    first = build(recipe(path, images, images="copy"), QUIET).cache
    before = state(path)
    for old, new in (("image_000", "a_new"), ("image_001", "zebra"), ("image_002", "image_0005")):
        data = (images / f"{old}.jpg").read_bytes()
        (images / f"{new}.jpg").write_bytes(data + b"\0")
    grown = build(recipe(path, images, images="copy"), QUIET).cache
    assert before.items() <= state(path).items()
    assert grown.samples["key"].to_pylist() == [
        *first.samples["key"].to_pylist(), "a_new", "image_0005", "zebra",
    ]  # fmt: skip
    assert [segment.samples for segment in grown.spec.segments] == [(0, 4), (4, 7)]
    assert_usable(grown)
    assert_same_features(grown, build(recipe(tmp_path / "whole", images), QUIET).cache)
    assert grown.image_bytes(4) == (images / "a_new.jpg").read_bytes()


def test_views_samples_and_teachers_grow_one_after_the_other(tmp_path: Path) -> None:
    """rows_per_shard is 6, so five views of a new sample make blocks of three and two."""
    images, path = make_images(tmp_path / "images", 3), tmp_path / "cache"
    build(recipe(path, images, 2, images="copy"), QUIET)
    build(recipe(path, images, 5, images="copy"), QUIET)
    before = state(path)
    (images / "more.jpg").write_bytes((images / "image_001.jpg").read_bytes() + b"\0")
    teachers = {"tiny": TINY, "late": TINY | {"random_seed": 7}}
    final = recipe(path, images, 5, images="copy", teachers=teachers)
    grown = build(final, QUIET).cache
    assert before.items() <= state(path).items()
    blocks = [(segment.samples, segment.views) for segment in grown.spec.segments]
    assert blocks == [((0, 3), (0, 2)), ((0, 3), (2, 5)), ((3, 4), (0, 3)), ((3, 4), (3, 5))]
    assert_usable(grown)
    assert grown.manifest.committed_shards("images") == {0, 3}, "images are copied once, with the first view"
    assert grown.image_bytes(3) == (images / "more.jpg").read_bytes()
    whole = build(recipe(tmp_path / "whole", images, 5, teachers=teachers), QUIET).cache
    assert_same_features(grown, whole)
    late = grown.read(grown.index.rows(3, [4]), ["late"])["late"].decode()
    expected = whole.read(whole.index.rows(whole.find("more"), [4]), ["late"])["late"].decode()
    torch.testing.assert_close(late, expected, rtol=1e-4, atol=1e-4)


def remove_an_image(images: Path) -> None:
    (images / "image_002.jpg").unlink()


def change_an_image(images: Path) -> None:
    (images / "image_002.jpg").write_bytes((images / "image_001.jpg").read_bytes() + b"\0")


@pytest.mark.parametrize(
    ("change", "num_views", "message"),
    [
        (remove_an_image, 2, "1 of 4 samples are gone from the source: image_002"),
        (change_an_image, 2, "1 of 4 samples are other images now: image_002"),
        (lambda _: None, 1, "views.num_views: the cache has 2, the recipe asks for 1"),
    ],
)
def test_what_is_no_growth_is_refused(
    tmp_path: Path, change: Callable[[Path], None], num_views: int, message: str
) -> None:
    images, path = make_images(tmp_path / "images", 4), tmp_path / "cache"
    build(recipe(path, images), QUIET)
    before = state(path) | {"cache.json": ((path / "cache.json").read_bytes(), 0)}
    change(images)
    with pytest.raises(CacheMismatchError, match=message):
        build(recipe(path, images, num_views), QUIET)
    assert state(path) | {"cache.json": ((path / "cache.json").read_bytes(), 0)} == before


def test_an_interrupted_growth_leaves_the_cache_as_it_was_and_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, path = make_images(tmp_path / "images", 4), tmp_path / "cache"
    build(recipe(path, images), QUIET)

    def fail(*_: object) -> None:
        raise OSError("the power goes")

    with monkeypatch.context() as patched:
        patched.setattr(Manifest, "write_spec", fail)
        with pytest.raises(OSError, match="the power goes"):
            build(recipe(path, images, 4), QUIET)
    cache = FeatureCache.open(path)
    assert cache.num_views == 2
    assert_usable(cache)
    assert_usable(build(recipe(path, images, 4), QUIET).cache)


def start_build(content: BuildRecipe) -> subprocess.Popen[str]:
    script = (
        "import sys; from teachercache import build; "
        "from teachercache.cache_builder.build_recipe import BuildRecipe;"
        "result = build(BuildRecipe.model_validate_json(sys.argv[1])); print(result.shards)"
    )
    command = [sys.executable, "-c", script, content.model_dump_json()]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_jobs_build_one_cache(tmp_path: Path) -> None:
    images, path = make_images(tmp_path / "images", 16), tmp_path / "cache"
    jobs = [start_build(recipe(path, images, rows_per_shard=2)) for _ in range(2)]
    printed = [job.communicate(timeout=200) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], printed
    counts = [int(out) for out, _ in printed]
    assert sum(counts) == 16, "each shard is committed by one of them"
    cache = FeatureCache.open(path)
    assert_usable(cache)
    assert_same_features(cache, build(recipe(tmp_path / "whole", images, rows_per_shard=2), QUIET).cache)


IN_TURN = """
import sys, time
from pathlib import Path
from teachercache.cache_builder import builder
from teachercache.cache_builder.builder import build
from teachercache.cache_builder.build_recipe import BuildRecipe
from teachercache.jobs.launch import run
establish, folder, turn = builder._establish, Path(sys.argv[2]), int(sys.argv[3])
def in_turn(*arguments):
    (folder / f"drafted{turn}").touch()
    while len(list(folder.glob("drafted*"))) < 2 or (turn and not (folder / "established").exists()):
        time.sleep(0.02)
    try:
        return establish(*arguments)
    finally:
        (folder / "established").touch()
builder._establish = in_turn
run(lambda: print(build(BuildRecipe.model_validate_json(sys.argv[1])).shards))
"""


def build_in_turn(folder: Path, contents: Sequence[BuildRecipe]) -> list[tuple[int, str]]:
    """Two builds, each in a process: both draft, the first establishes, then the second, and both compute.

    Returns their exit statuses and all they print.
    """
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", IN_TURN, content.model_dump_json(), str(folder), str(turn)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for turn, content in enumerate(contents)
    ]
    printed = [job.communicate(timeout=200)[0] for job in jobs]
    return [(job.returncode, text) for job, text in zip(jobs, printed, strict=True)]


@pytest.mark.parametrize("rows_per_shard", [4, 6])
def test_two_jobs_from_nothing_that_differ_in_views(tmp_path: Path, rows_per_shard: int) -> None:
    """The second draft has 5 shards of 4 rows; what it establishes behind the first has 6, or 4 of 6 rows."""
    images, path = make_images(tmp_path / "images", 5), tmp_path / "cache"
    few, more = (recipe(path, images, views, rows_per_shard=rows_per_shard) for views in (2, 4))
    (first, told), (second, grown) = build_in_turn(tmp_path, [few, more])
    assert (first, second) == (0, 0), told + grown
    cache = FeatureCache.open(path)
    assert [segment.views for segment in cache.spec.segments] == [(0, 2), (2, 4)]
    cache.require_complete()
    assert_usable(cache)
    assert cache.spec.num_shards == {4: 6, 6: 4}[rows_per_shard]
    whole = build(recipe(tmp_path / "whole", images, 4), QUIET).cache
    assert_same_features(cache, whole)


def test_the_job_with_fewer_views_comes_second(tmp_path: Path) -> None:
    """Shards of the two drafts have other rows: 6 of 2 views, 4 of 4."""
    images, path = make_images(tmp_path / "images", 6), tmp_path / "cache"
    more, few = (recipe(path, images, views) for views in (4, 2))
    (first, told), (second, refused) = build_in_turn(tmp_path, [more, few])
    assert (first, second) == (0, 1), told + refused
    assert "views.num_views: the cache has 4, the recipe asks for 2" in refused
    assert_usable(FeatureCache.open(path))


def test_two_jobs_add_a_teacher_each(tmp_path: Path) -> None:
    images, path = make_images(tmp_path / "images", 6), tmp_path / "cache"
    build(recipe(path, images), QUIET)
    before = state(path)
    late = [{f"late{seed}": TINY | {"random_seed": seed}} for seed in (1, 2)]
    jobs = [start_build(recipe(path, images, teachers=teachers)) for teachers in late]
    printed = [job.communicate(timeout=200) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], printed
    assert before.items() <= state(path).items()
    cache = FeatureCache.open(path)
    assert set(cache.teachers) == {"tiny", "late1", "late2"}
    cache.require_complete()
    assert verify(cache, full=True) == []


def test_one_of_two_publishes_a_shard(tmp_path: Path) -> None:
    images, path = make_images(tmp_path / "images", 3), tmp_path / "cache"
    cache = build(recipe(path, images), QUIET).cache
    record = cache.manifest.read_commit("tiny", 0)
    cache.storage.remove("commits/tiny/00000.json")
    published: list[int] = []
    ready = threading.Barrier(4)

    def publish(number: int) -> None:
        ready.wait()
        try:
            with Manifest(open_storage(path)).publishing(0, ["tiny"]):
                Manifest(open_storage(path)).commit(record)
                published.append(number)
        except AlreadyCommittedError:
            return

    threads = [threading.Thread(target=publish, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(published) == 1
    assert not list(path.rglob("*.lock"))


def test_jobs_seldom_compute_the_same_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two that begin at once, and whose scripts have seeded `random` alike."""
    monkeypatch.setattr(random, "randrange", lambda _: 0)
    images, path = make_images(tmp_path / "images", 24), tmp_path / "cache"
    computed: list[int] = []
    extract, runner, loading = ShardExtractor._extract, builder._runner, threading.Lock()
    takes = random.Random(0)

    def counted(self: ShardExtractor, shard: int, *rest: Any) -> dict[str, CommitRecord]:
        computed.append(shard)
        time.sleep(takes.uniform(0.1, 0.15))
        return extract(self, shard, *rest)

    def one_after_the_other(*arguments: Any) -> Runner:
        with loading:
            return runner(*arguments)

    monkeypatch.setattr(ShardExtractor, "_extract", counted)
    monkeypatch.setattr(builder, "_runner", one_after_the_other)
    settings = {"batch_size": 4, "decode_threads": 1, "shards_in_flight": 1}
    content = recipe(path, images, rows_per_shard=2, runner=settings)
    with ThreadPoolExecutor(2) as pool:
        committed = list(pool.map(lambda _: build(content, QUIET).shards, range(2)))
    assert sum(committed) == 24
    assert min(committed) > 4, "both have worked"
    assert set(computed) == set(range(24))
    assert len(computed) <= 24 + 10  # 3 are expected: a draw among n that are left hits the other's in 1/n


def build_overtaken(
    content: BuildRecipe, monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], object]
) -> builder.BuildResult:
    """A build, while whose teachers load something else happens."""
    load = builder._runner

    def load_meanwhile(*arguments: Any) -> Runner:
        loaded = load(*arguments)
        monkeypatch.setattr(builder, "_runner", load)
        meanwhile()
        return loaded

    monkeypatch.setattr(builder, "_runner", load_meanwhile)
    return build(content, QUIET)


def test_a_slower_job_keeps_what_another_has_grown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, path = make_images(tmp_path / "images", 6), tmp_path / "cache"
    build(recipe(path, images), QUIET)
    (path / "commits" / "tiny" / "00000.json").unlink()
    grown = recipe(path, images, 4)
    cache = build_overtaken(recipe(path, images), monkeypatch, lambda: build(grown, QUIET)).cache
    assert cache.num_views == 4
    assert_usable(cache)


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        pytest.param({"teachers": {"late": TINY | {"random_seed": 1}}}, None, id="teachers"),
        pytest.param({"one_more": True}, None, id="one more image"),
        pytest.param({"views": {"num_views": 2, "size": [32, 32], "seed": 1}}, "views.seed", id="seed"),
        pytest.param({"teachers": {"tiny": TINY | {"codec": "f16"}}}, "teachers.tiny.codec", id="codec"),
        pytest.param({"rows_per_shard": 4}, "rows_per_shard: the cache has 6", id="rows_per_shard"),
        pytest.param({"images": "copy"}, "images: the cache has 'reference'", id="images"),
    ],
)
def test_a_job_that_is_overtaken_from_nothing_is_complete_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], refusal: str | None
) -> None:
    """Two recipes whose drafts were made before there was a cache; the other one is then established."""
    images, path = make_images(tmp_path / "images", 4), tmp_path / "cache"
    other = recipe(path, images)
    source = make_images(tmp_path / "more", 5) if "one_more" in changes else images
    changes.pop("one_more", None)
    content = build_recipe(path, source, **{"teachers": {"tiny": TINY}} | changes)
    if refusal:
        with pytest.raises(CacheMismatchError, match=refusal):
            build_overtaken(content, monkeypatch, lambda: build(other, QUIET))
        assert_usable(FeatureCache.open(path))
    else:
        cache = build_overtaken(content, monkeypatch, lambda: build(other, QUIET)).cache
        assert set(cache.teachers) == {"tiny", *content.teachers}
        assert_usable(cache)
        cache.require_complete()


def test_a_job_that_is_overtaken_with_newer_images_takes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own list of images is older than the cache; none of them is gone."""
    images, path = make_images(tmp_path / "images", 4), tmp_path / "cache"

    def add_an_image_and_build() -> None:
        (images / "more.jpg").write_bytes((images / "image_001.jpg").read_bytes() + b"\0")
        build(recipe(path, images), QUIET)

    cache = build_overtaken(recipe(path, images), monkeypatch, add_an_image_and_build).cache
    assert cache.num_samples == 5
    assert_usable(cache)


def test_a_cache_that_another_replaces_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, path = make_images(tmp_path / "images", 4), tmp_path / "cache"
    build(recipe(path, images), QUIET).cache.storage.remove("commits/tiny/00000.json")

    def replace() -> None:
        shutil.rmtree(path)
        build(recipe(path, images, rows_per_shard=2), QUIET)

    with pytest.raises(CacheMismatchError, match="Another cache has replaced this one"):
        build_overtaken(recipe(path, images), monkeypatch, replace)
    assert_usable(FeatureCache.open(path))
    grown = recipe(path, images, 4, rows_per_shard=2)
    with pytest.raises(CacheNotFoundError):
        build_overtaken(grown, monkeypatch, lambda: shutil.rmtree(path))


def test_a_build_ends_well_only_with_all_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status 0 means complete: a record that somebody removed while the job ran is not passed over."""
    images, path = make_images(tmp_path / "images", 4), tmp_path / "cache"
    commit = Manifest.commit

    def commit_and_lose(self: Manifest, record: CommitRecord) -> None:
        commit(self, record)
        if record.shard == 1:
            self.storage.remove("commits/tiny/00001.json")

    monkeypatch.setattr(Manifest, "commit", commit_and_lose)
    with pytest.raises(BuildError, match=r"1 of 2 shards failed(.|\n)*shard 1: its commit record is gone"):
        build(recipe(path, images), QUIET)
    monkeypatch.undo()
    assert build(recipe(path, images), QUIET).shards == 1


def test_a_job_says_what_another_has_added_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is done with what its own recipe asks for, whatever is missing of the rest."""
    images, path = make_images(tmp_path / "images", 4), tmp_path / "cache"
    extract, told = ShardExtractor.extract, io.StringIO()

    def die(*_: object) -> None:
        raise BuildInterruptedError("killed")

    def grow_and_die(self: ShardExtractor, *arguments: Any) -> Any:
        monkeypatch.setattr(ShardExtractor, "extract", extract)
        with monkeypatch.context() as patched:
            patched.setattr(LocalRunner, "run", die)
            with pytest.raises(BuildInterruptedError):
                build(recipe(path, images, 4), QUIET)
        return extract(self, *arguments)

    monkeypatch.setattr(ShardExtractor, "extract", grow_and_die)
    settings = {"batch_size": 4, "shards_in_flight": 1}
    result = build(recipe(path, images, runner=settings), Console(file=told, width=200))
    assert result.shards == 2
    assert "extended the cache by 2 views of each sample; 2 shards are not committed yet" in told.getvalue()
    assert_usable(build(recipe(path, images, 4), QUIET).cache)


def test_waiting_for_a_lock_is_no_hanging_and_can_be_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    images, path = make_images(tmp_path / "images", 3), tmp_path / "cache"
    cache = build(recipe(path, images), QUIET).cache
    cache.storage.remove("commits/tiny/00000.json")
    monkeypatch.setattr("teachercache.pipeline.places.locks._SAY_SO_AFTER_S", 0.0)
    teachers = {"tiny": build_teacher(cache.spec.teachers["tiny"])}
    with (
        ShardExtractor(cache, teachers) as extractor,
        ThreadPoolExecutor(1) as pool,
        cache.storage.exclusive("commits/00000"),
    ):
        shard = pool.submit(extractor.extract, 0, ["tiny"])
        while "commits/00000.lock, held by process" not in caplog.text:
            assert not shard.done()
            time.sleep(0.05)
        time.sleep(1.5)
        assert extractor.idle_s()[0] < 1
        extractor.abandon()
        with pytest.raises(BuildInterruptedError, match="abandoned"):
            shard.result(timeout=10)
    assert not cache.manifest.committed_shards("tiny")


def test_teachers_of_one_row_see_one_image(tmp_path: Path) -> None:
    """An image that was changed far from its head, and has the same size: all bytes that were read tell."""
    images = make_images(tmp_path / "images", 5)
    one = images / "image_001.jpg"
    one.write_bytes(before := one.read_bytes().ljust(HEAD_BYTES + 10, b"\0"))
    build(recipe(tmp_path / "cache", images), QUIET)
    one.write_bytes(before[:-1] + b"x")
    runner = {"batch_size": 4, "decode_threads": 2, "max_attempts": 1}
    grown = recipe(tmp_path / "cache", images, teachers={"tiny": TINY, "late": TINY}, runner=runner)
    with pytest.raises(BuildError, match=r"1 of 2 shards(.|\n)*are not those that tiny was computed from"):
        build(grown, QUIET)
    cache = FeatureCache.open(tmp_path / "cache")
    assert set(cache.commits("late")) == {1}
    one.write_bytes(before)
    cache = build(grown, QUIET).cache
    assert verify(cache) == []
    record = cache.manifest.read_commit("late", 1)
    cache.manifest.commit(record.model_copy(update={"source_checksum": "0" * 32}))
    found = verify(FeatureCache.open(tmp_path / "cache"))
    assert {(problem.teacher, problem.shard) for problem in found} == {("tiny", 1), ("late", 1)}
    assert all("different images" in problem.reason for problem in found)


def test_segments_that_do_not_cover_the_cache_once_are_refused(tmp_path: Path) -> None:
    images, path = make_images(tmp_path / "images", 3), tmp_path / "cache"
    build(recipe(path, images), QUIET)
    content = json.loads((path / "cache.json").read_text())
    for segments in (
        [*content["segments"], content["segments"][0] | {"first_row": 6}],
        [content["segments"][0] | {"samples": [0, 2]}],
    ):
        (path / "cache.json").write_bytes(sealed(content | {"segments": segments}))
        with pytest.raises(CacheError, match="every view of every sample exactly once"):
            FeatureCache.open(path)


def test_a_cache_grown_by_views_is_complete_and_counts_a_bad_image_once(tmp_path: Path) -> None:
    """Images are copied with the first views alone; each block of views lists its own bad images."""
    images, path = make_images(tmp_path / "images", 5), tmp_path / "cache"
    (images / "image_002.jpg").write_bytes(b"no image")
    build(recipe(path, images, images="copy"), QUIET)
    result = build(recipe(path, images, num_views=4, images="copy"), QUIET)
    assert result.quarantined == 1
    summary = summarize(result.cache.storage)
    assert summary["planned"]["tiny"] > summary["planned"]["images"] == summary["committed"]["images"]
    assert [entry["key"] for entry in summary["quarantined"]] == ["image_002"]
    assert warnings(summary) == [
        "Random weights, for tests and timing only: tiny.",
        "1 sample is quarantined.",
    ]
