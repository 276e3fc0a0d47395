"""Batches hold the rows that the sampler names: the right pixels beside the right features."""

from __future__ import annotations

import threading
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image
from torch import Tensor

from teachercache import FeatureCache, render_view
from teachercache.pipeline.errors import (
    CacheError,
    CacheMismatchError,
    CorruptShardError,
    SourceError,
    TeacherCacheError,
)
from teachercache.pipeline.loading import loader as loader_module
from teachercache.pipeline.loading.batch_memory import TensorLayout
from teachercache.pipeline.loading.loader import Batch, FeatureLoader
from teachercache.pipeline.loading.sampler import ShardShuffleSampler
from teachercache.pipeline.records.strict import Size
from teachercache.pipeline.stores.zarr_store import shard_file
from teachercache.pipeline.views import View
from tests.make_cache import features, make_cache, make_images, teacher_spec


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    folder = tmp_path_factory.mktemp("loader")
    teachers = {"a": teacher_spec(cls_token=True), "b": teacher_spec(codec="f16", width=4)}
    return make_cache(folder / "cache", make_images(folder / "images", 9), teachers=teachers)


def test_batches_are_what_the_sampler_says(cache: FeatureCache) -> None:
    sampler = ShardShuffleSampler(cache, batch_size_per_process=4, seed=3)
    with FeatureLoader(cache, sampler, extra_sizes={(48, 40)}, threads=3) as loader:
        batches = list(islice(loader, 6))
    for step, batch in enumerate(batches):
        assert batch.step == step
        assert batch.rows.tolist() == sampler.batch(step).tolist()
        for name in ("a", "b"):
            assert torch.equal(
                batch.features[name].tensors()["codes"], features(cache.spec, name)["codes"][batch.rows]
            )
        assert torch.equal(batch.cls_tokens["a"], features(cache.spec, "a")["cls"][batch.rows])
        assert set(batch.renders) == {(32, 32), (48, 40)}
        for i, row in enumerate(batch.rows.tolist()):
            sample = int(cache.index.locate(row)[0])
            assert batch.sample_keys[i] == cache.key(sample)
            for size, pixels in batch.renders.items():
                assert torch.equal(pixels[i], render_view(cache.image(sample), cache.view(row), size))
        assert batch.seconds.keys() == {"read", "decode", "wait"}


def test_views_are_rendered_where_the_batch_lies(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = set[int]()

    def render(image: Image.Image, view: View, size: Size | None = None, *, out: Tensor) -> Tensor:
        places.add(out.data_ptr())
        return render_view(image, view, size, out=out)

    monkeypatch.setattr(loader_module, "render_view", render)
    sampler = ShardShuffleSampler(cache, batch_size_per_process=4)
    with FeatureLoader(cache, sampler, extra_sizes={(48, 40)}, prefetch=0) as loader:
        batch = next(iter(loader))
    assert {pixels.data_ptr() for render in batch.renders.values() for pixels in render} == places


def test_pixels_of_other_images_than_the_cached_ones_are_refused(tmp_path: Path) -> None:
    """Other pictures under the same names, padded to the same sizes: nothing else would tell."""
    images = make_images(tmp_path / "images", 4)
    cache = make_cache(tmp_path / "cache", images)
    others = make_images(tmp_path / "others", 4, seed=1)
    for path in images.iterdir():
        nbytes = path.stat().st_size
        data = (others / path.name).read_bytes()
        path.write_bytes(data.ljust(nbytes, b"\0")[:nbytes])
    sampler = ShardShuffleSampler(cache, batch_size_per_process=2)
    with (
        FeatureLoader(cache, sampler) as loader,
        pytest.raises(CacheMismatchError, match="has changed since"),
    ):
        next(iter(loader))


def test_without_features_only_images_are_read(cache: FeatureCache) -> None:
    sampler = ShardShuffleSampler(cache, batch_size_per_process=2)
    with FeatureLoader(cache, sampler, features=False, start_step=5) as loader:
        batch = next(iter(loader))
    assert (batch.step, batch.features, batch.cls_tokens) == (5, {}, {})


def test_without_images_only_features_are_read(tmp_path: Path, cache: FeatureCache) -> None:
    sampler = ShardShuffleSampler(cache, batch_size_per_process=3)
    with FeatureLoader(cache, sampler, ["b"], images=False, threads=5) as loader:
        batch = next(iter(loader))
    assert (batch.renders, batch.cls_tokens, batch.seconds["decode"]) == ({}, {}, 0)
    assert torch.equal(batch.features["b"].tensors()["codes"], features(cache.spec, "b")["codes"][batch.rows])


def test_a_batch_that_is_held_keeps_its_contents_while_others_are_made(cache: FeatureCache) -> None:
    sampler = ShardShuffleSampler(cache, batch_size_per_process=4)
    codes = features(cache.spec, "a")["codes"]
    with FeatureLoader(cache, sampler, threads=3, prefetch=3) as loader:
        batches = iter(loader)
        held = next(batches)
        pixels, target = held.renders[32, 32].clone(), held.features["a"].decode()
        for _ in range(12):
            passing = next(batches)
            assert torch.equal(passing.features["a"].tensors()["codes"], codes[passing.rows])
        assert torch.equal(held.renders[32, 32], pixels)
        assert torch.equal(held.features["a"].tensors()["codes"], codes[held.rows])
        rows = held.rows
        del held, passing
        for _ in range(12):
            next(batches)
        assert torch.equal(target, codes[rows]), "f32 decodes to the very memory of the batch"


def test_memory_goes_round(cache: FeatureCache) -> None:
    sampler = ShardShuffleSampler(cache, batch_size_per_process=4)
    places = set()
    with FeatureLoader(cache, sampler, prefetch=2) as loader:
        for batch in islice(loader, 30):
            places.add(batch.features["a"].tensors()["codes"].data_ptr())
    assert len(places) <= 4


@pytest.mark.parametrize("wrong", [{"threads": 0}, {"prefetch": -1}])
def test_a_loader_that_cannot_work_says_so(cache: FeatureCache, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="threads >= 1"):
        FeatureLoader(cache, ShardShuffleSampler(cache, batch_size_per_process=2), **wrong)


def test_an_interrupted_batch_comes_again(cache: FeatureCache, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = ShardShuffleSampler(cache, batch_size_per_process=2)
    collect, interrupts = FeatureLoader._collect, [True]

    def interrupted(loader: FeatureLoader, pending: Any) -> Batch:
        if pending.batch.step == 1 and interrupts:
            interrupts.pop()
            raise KeyboardInterrupt
        return collect(loader, pending)

    monkeypatch.setattr(FeatureLoader, "_collect", interrupted)
    with FeatureLoader(cache, sampler) as loader:
        batches = iter(loader)
        assert next(batches).step == 0
        with pytest.raises(KeyboardInterrupt):
            next(batches)
        assert [next(more).step for more in [iter(loader)] for _ in range(2)] == [1, 2]


def test_a_damaged_shard_reaches_the_consumer(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", make_images(tmp_path / "images", 3))
    sampler = ShardShuffleSampler(cache, batch_size_per_process=3)
    (tmp_path / "cache" / shard_file("beta", "codes", 0, 4)).unlink()
    with (
        FeatureLoader(cache, sampler) as loader,
        pytest.raises(CorruptShardError, match="teachercache verify"),
    ):
        next(iter(loader))


def test_threads_end_with_the_context_and_errors_reach_the_consumer(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", 3)
    cache = make_cache(tmp_path / "cache", images)
    for path in images.iterdir():
        path.unlink()
    sampler = ShardShuffleSampler(cache, batch_size_per_process=2)
    with FeatureLoader(cache, sampler) as loader, pytest.raises(FileNotFoundError, match="images=PATH"):
        next(iter(loader))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_an_image_that_no_longer_decodes_is_named(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", 3)
    cache = make_cache(tmp_path / "cache", images)
    path = sorted(images.iterdir())[1]
    path.write_bytes(path.read_bytes()[:4] * 500)
    sampler = ShardShuffleSampler(cache, batch_size_per_process=3)
    with FeatureLoader(cache, sampler) as loader, pytest.raises(TeacherCacheError, match=path.stem):
        next(iter(loader))


def test_labels_that_fail_are_named_with_their_sample(cache: FeatureCache) -> None:
    class Broken:
        layouts: ClassVar[dict[str, TensorLayout]] = {"depth": ((32, 32), torch.float32)}

        def read(self, sample_key: str, view: View) -> dict[str, torch.Tensor]:
            return {"depth": torch.zeros(31, 32)}

    sampler = ShardShuffleSampler(cache, batch_size_per_process=1)
    key = cache.key(int(cache.index.locate(sampler.batch(0))[0][0]))
    with (
        FeatureLoader(cache, sampler, labels=Broken()) as loader,
        pytest.raises(SourceError, match=rf"Sample {key} (.|\n)*size of the tensor(.|\n)*and its labels"),
    ):
        next(iter(loader))


def test_features_that_fail_are_named_with_teacher_and_shard(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any) -> None:
        raise MemoryError("Unable to allocate 3 GiB")

    monkeypatch.setattr(cache.store, "read", read)
    sampler = ShardShuffleSampler(cache, batch_size_per_process=2)
    with (
        FeatureLoader(cache, sampler, ["b"], images=False, threads=1) as loader,
        pytest.raises(CacheError, match=r"teacher b (.|\n)*MemoryError: Unable .*, in shard \d(.|\n)*--full"),
    ):
        next(iter(loader))
