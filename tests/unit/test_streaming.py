"""Training from tars in order: the same rows and pixels, other ways to them."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
from rich.console import Console

from teachercache import FeatureCache, build
from teachercache.pipeline.errors import CheckpointError, CorruptShardError, MissingExtraError, RecipeError
from teachercache.pipeline.loading.loader import Batch, FeatureLoader
from teachercache.pipeline.loading.sampler import ShardShuffleSampler
from teachercache.pipeline.loading.streaming import StreamSampler
from teachercache.pipeline.records.rows import Ints
from teachercache.student.training.train import train
from tests.make_cache import build_recipe, make_cache, make_images, teacher_spec
from tests.train_recipes import logged, train_recipe

TEACHERS = {"a": teacher_spec(cls_token=True), "b": teacher_spec(codec="f16", width=4)}
SAMPLES, VIEWS = 11, 2
STREAM = {"kind": "stream", "shuffle_buffer": 4, "threads": 2}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), SAMPLES)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, images: Path) -> FeatureCache:
    path = tmp_path_factory.mktemp("stream") / "cache"
    return make_cache(path, images, teachers=TEACHERS, store="webdataset", invalid_samples=[4])


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory, images: Path) -> FeatureCache:
    """A real build whose images are in tars as well."""
    path = tmp_path_factory.mktemp("copied") / "cache"
    return build(build_recipe(path, images, store="webdataset", images="copy"), Console(quiet=True)).cache


class SameRows:
    """What another sampler draws, for a loader that asks for rows one by one."""

    def __init__(self, sampler: StreamSampler) -> None:
        self._sampler, self.batch_size_per_process = sampler, sampler.batch_size_per_process

    def batch(self, step: int) -> Ints:
        return self._sampler.batch(step)

    def epochs(self, step: int) -> Ints:
        return self._sampler.epochs(step)


def stream(cache: FeatureCache, **options: Any) -> StreamSampler:
    return StreamSampler(cache, **{"batch_size_per_process": 3, "shuffle_buffer": 5, "seed": 7} | options)


def batches(cache: FeatureCache, sampler: Any, count: int, first: int = 0) -> list[Batch]:
    with FeatureLoader(cache, sampler, start_step=first, threads=2) as loader:
        return list(islice(loader, count))


@pytest.mark.parametrize("kind", ["cache", "copied"])
@pytest.mark.parametrize(("batch_size", "shuffle_buffer"), [(3, 5), (8, 256), (16, 5)])
def test_batches_are_those_of_the_random_access_loader(
    kind: str,
    batch_size: int,
    shuffle_buffer: int,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A pass has some 20 rows: a batch that crosses passes may hold one twice."""
    cache: FeatureCache = request.getfixturevalue(kind)
    sampler = stream(cache, batch_size_per_process=batch_size, shuffle_buffer=shuffle_buffer)
    expected = batches(cache, SameRows(sampler), 20)
    unread: Any = None
    monkeypatch.setattr(cache.store, "read", unread)
    if kind == "copied":
        monkeypatch.setattr(cache.images, "read", unread)
    streamed = batches(cache, sampler, 20)
    for one, other in zip(streamed, expected, strict=True):
        assert (one.step, one.sample_keys) == (other.step, other.sample_keys)
        assert one.rows.tolist() == other.rows.tolist()
        assert torch.equal(one.images, other.images)
        assert one.features.keys() == other.features.keys()
        for teacher, encoded in one.features.items():
            for name, tensor in encoded.arrays.items():
                assert torch.equal(tensor, other.features[teacher].arrays[name])
        assert all(torch.equal(one.cls_tokens[name], other.cls_tokens[name]) for name in other.cls_tokens)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_passes_of_all_processes_show_every_view_once(cache: FeatureCache, world_size: int) -> None:
    samplers = [stream(cache, rank=rank, world_size=world_size) for rank in range(world_size)]
    for number in range(3):
        drawn = [
            row for sampler in samplers for rows in sampler.shards(number).values() for row in rows.tolist()
        ]
        samples, views, _ = cache.index.locate(np.sort(drawn))
        assert samples.tolist() == [s for s in range(SAMPLES) if s != 4 for _ in range(VIEWS)]
        assert views.tolist() == [0, 1] * (SAMPLES - 1)


def test_every_process_takes_as_many_steps_of_whole_batches(cache: FeatureCache) -> None:
    drawn = [
        [sampler.batch(step) for step in range(40)]
        for sampler in (stream(cache, rank=rank, world_size=3) for rank in range(3))
    ]
    assert {rows.size for of_rank in drawn for rows in of_rank} == {3}
    seen = Counter(row for of_rank in drawn for rows in of_rank for row in rows.tolist())
    assert len(seen) == (SAMPLES - 1) * VIEWS
    first_pass = [of_rank[0].tolist() for of_rank in drawn]
    assert len({row for rows in first_pass for row in rows}) == 9


def test_a_view_has_another_epoch_in_every_pass(cache: FeatureCache) -> None:
    sampler = stream(cache)
    pairs = [
        pair for step in range(30) for pair in zip(sampler.batch(step), sampler.epochs(step), strict=True)
    ]
    samples = cache.index.locate([row for row, _ in pairs])[0]
    named = [(sample, int(epoch)) for sample, (_, epoch) in zip(samples.tolist(), pairs, strict=True)]
    assert len(set(named)) == len(named) == 90


def test_rows_are_shuffled_by_the_seed(cache: FeatureCache) -> None:
    def rows(**options: Any) -> list[int]:
        sampler = stream(cache, **options)
        return [row for step in range(6) for row in sampler.batch(step).tolist()]

    assert rows() == rows()
    assert rows() != rows(seed=8)
    unshuffled = np.concatenate(list(stream(cache).shards(0).values())).tolist()
    assert rows(shuffle_buffer=1) == unshuffled[:18]


@pytest.mark.parametrize("first", [1, 5, 7, 13])
def test_a_resumed_stream_goes_on_exactly_and_skips_tars_that_are_done(
    cache: FeatureCache, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = batches(cache, stream(cache), first + 3)[first:]
    opened: list[str] = []
    open_read = cache.storage.open_read

    def noting(name: str) -> IO[bytes]:
        opened.append(name)
        return open_read(name)

    monkeypatch.setattr(cache.storage, "open_read", noting)
    resumed = batches(cache, stream(cache), 3, first)
    assert [batch.rows.tolist() for batch in resumed] == [batch.rows.tolist() for batch in expected]
    for one, other in zip(resumed, expected, strict=True):
        assert torch.equal(one.features["a"].arrays["codes"], other.features["a"].arrays["codes"])
    number, taken = stream(cache).taken(first)
    shards = stream(cache).shards(number)
    left = [shard for shard, rows in shards.items() if not np.isin(rows, taken).all()]
    tars = [int(Path(name).stem) for name in opened if name.startswith("teachers/a")]
    assert tars[: len(left)] == left[: len(tars)]


def test_the_buffer_holds_no_more_rows_than_it_was_given(cache: FeatureCache) -> None:
    from teachercache.pipeline.loading.streaming import TarStream

    sampler = stream(cache, shuffle_buffer=4)
    tars = TarStream(cache, sampler, ["a"], images=False, step=0)
    for step in range(20):
        tars.take(sampler.batch(step))
        assert len(tars._held) <= 4
    tars.close()


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("teachers/tiny/00000.tar", "cut in a member"),
        ("teachers/tiny/00000.tar", "cut between members"),
        ("teachers/tiny/00000.tar", "another byte"),
        ("images/00000.tar", "cut in a member"),
        ("images/00000.tar", "cut between members"),
    ],
)
def test_a_tar_that_ends_early_or_is_damaged_is_named(
    tmp_path: Path, images: Path, name: str, what: str
) -> None:
    recipe = build_recipe(tmp_path / "cache", images, store="webdataset", images="copy", rows_per_shard=30)
    cache = build(recipe, Console(quiet=True)).cache
    path = tmp_path / "cache" / name
    data = path.read_bytes()
    third = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"][3]
    inside = third + 700
    changed = {
        "cut in a member": data[:inside],
        "cut between members": data[:third],
        "another byte": data[:inside] + bytes([data[inside] ^ 1]) + data[inside + 1 :],
    }[what]
    path.write_bytes(changed)
    with pytest.raises(CorruptShardError, match=f"{name}(.|\n)*verify"):
        batches(cache, stream(cache), 20)


def test_a_zarr_cache_is_refused_with_what_to_do(tmp_path: Path, images: Path) -> None:
    with pytest.raises(RecipeError, match=r"store: zarr(.|\n)*convert CACHE -o NEW --to webdataset"):
        stream(make_cache(tmp_path / "cache", images))


def test_a_stream_without_webdataset_says_what_to_install(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "webdataset.filters", None)
    with pytest.raises(MissingExtraError, match=r"teachercache\[train\]"):
        stream(cache)


def test_samples_that_are_held_out_are_passed_over(cache: FeatureCache) -> None:
    sampler = stream(cache, among=np.array([0, 2, 9]))
    assert {key for batch in batches(cache, sampler, 6) for key in batch.sample_keys} == {
        cache.key(sample) for sample in (0, 2, 9)
    }
    assert isinstance(sampler, ShardShuffleSampler)
    assert sampler.num_samples == 3


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_resumed_run_on_a_stream_is_the_same_run(copied: FeatureCache, tmp_path: Path) -> None:
    recipe = partial(train_recipe, copied.storage.url, loader=STREAM, student_jitter={})
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(recipe(whole))
    checkpoint = "checkpoints/step_00000003"
    shutil.copytree(whole / checkpoint, resumed / checkpoint)
    shutil.copy(whole / "metrics.jsonl", resumed)
    train(recipe(resumed))
    assert logged(resumed) == logged(whole)

    with pytest.raises(CheckpointError, match=r"loader\.kind: None(.|\n)*loader\.kind: stream"):
        train(recipe(resumed, loader={"threads": 2}))


def test_what_a_stream_cannot_do_is_refused_before_a_step(cache: FeatureCache, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"loader\.kind=stream reads features=cached, got fresh"):
        train_recipe(cache.storage.url, tmp_path, loader=STREAM, features="fresh")
    images, zarr = make_images(tmp_path / "images", 2), tmp_path / "zarr"
    recipe = train_recipe(make_cache(zarr, images).storage.url, tmp_path / "run", loader=STREAM)
    with pytest.raises(RecipeError, match="convert CACHE"):
        train(recipe)
