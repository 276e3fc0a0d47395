"""A mount that stumbles is met wherever files are read: it is read again, or the error names the file."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from teachercache import build
from teachercache.cache_builder.draft import Draft
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import StorageError
from teachercache.pipeline.loading.loader import FeatureLoader
from teachercache.pipeline.loading.sampler import ShardShuffleSampler
from teachercache.pipeline.places import retries
from teachercache.pipeline.places.local_storage import LocalStorage
from teachercache.pipeline.sources import open_source
from teachercache.pipeline.verify import verify
from tests.make_cache import build_recipe, make_cache, make_images

QUIET = Console(quiet=True)
INT4 = {"tiny": {"model": "vit_tiny_patch16_224", "pretrained": False, "codec": "int4-hadamard"}}


class Mount:
    """Fails the next `failures` reads of files below `folder`, whatever reads them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.failures, self.failed = Path("/nowhere"), 0, 0
        self._names: dict[int, str] = {}
        self._lock = threading.Lock()
        open_file, open_handle, preadv = LocalStorage._open, os.open, os.preadv

        def storage_open(storage: LocalStorage, name: str) -> IO[bytes]:
            self._may_fail(f"{storage.url}/{name}")
            return open_file(storage, name)

        def os_open(path: Any, flags: int, *rest: Any, **options: Any) -> int:
            if flags & os.O_ACCMODE == os.O_RDONLY:
                self._may_fail(os.fspath(path))
            handle = open_handle(path, flags, *rest, **options)
            self._names[handle] = os.fspath(path)
            return handle

        def os_preadv(handle: int, *rest: Any) -> int:
            self._may_fail(self._names.get(handle, ""))
            return preadv(handle, *rest)

        patch.setattr(LocalStorage, "_open", storage_open)
        patch.setattr(os, "open", os_open)
        patch.setattr(os, "preadv", os_preadv)
        patch.setattr(retries, "_PAUSES_S", (0.0,) * 4)

    def fail(self, folder: Path, failures: int) -> None:
        self.folder, self.failures, self.failed = folder, failures, 0

    def _may_fail(self, path: str) -> None:
        if not Path(path).is_relative_to(self.folder) or Path(path).is_dir():
            return
        with self._lock:  # several threads read
            if not self.failures:
                return
            self.failures -= 1
            self.failed += 1
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))  # as the kernel says it of a read: no name


@pytest.fixture
def mount() -> Iterator[Mount]:
    with pytest.MonkeyPatch.context() as patch:
        yield Mount(patch)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), 6)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, images: Path) -> FeatureCache:
    return make_cache(tmp_path_factory.mktemp("cache") / "cache", images)


def next_batches(cache: FeatureCache) -> list[Any]:
    sampler = ShardShuffleSampler(cache, batch_size_per_process=4)
    with FeatureLoader(cache, sampler) as loader:
        return [batch.features["alpha"].decode().clone() for batch in islice(loader, 3)]


LOOKS: dict[str, Callable[[str], Any]] = {
    "open": lambda url: FeatureCache.open(url).samples.num_rows,
    "read": lambda url: FeatureCache.open(url).read([0, 7])["alpha"].decode().sum().item(),
    "through zarr": lambda url: (
        FeatureCache.open(url, direct=False).read([0, 7])["alpha"].decode().sum().item()
    ),
    "train": lambda url: [float(values.sum()) for values in next_batches(FeatureCache.open(url))],
    "verify": lambda url: verify(FeatureCache.open(url), full=True),
}


@pytest.mark.parametrize("name", LOOKS)
def test_a_cache_on_a_mount_that_stumbles_is_read(mount: Mount, cache: FeatureCache, name: str) -> None:
    url = cache.storage.url
    expected = LOOKS[name](url)
    mount.fail(Path(url), failures=3)
    assert LOOKS[name](url) == expected
    assert mount.failures == 0


@pytest.mark.parametrize("name", LOOKS)
def test_a_mount_that_is_gone_is_said_with_the_file(mount: Mount, cache: FeatureCache, name: str) -> None:
    folder = Path(cache.storage.url) / ("" if name == "open" else "teachers")
    mount.fail(folder, failures=1_000_000)
    with pytest.raises(StorageError, match=rf"{folder}/\S+ cannot be read at the moment(.|\n)*Stale"):
        LOOKS[name](cache.storage.url)


def test_a_bad_place_on_a_disk_is_a_problem_of_its_shard(mount: Mount, cache: FeatureCache) -> None:
    """And ends no verification: what else is wrong is found in the same run."""
    mount.fail(Path(cache.storage.url) / "teachers/alpha/codes/c/1", failures=1_000_000)
    (problem,) = verify(cache, full=True)
    assert (problem.teacher, problem.shard) == ("alpha", 1)
    assert "codes/c/1/0/0/0/0 cannot be read" in problem.reason


def test_images_that_training_reads_by_reference_are_named(
    mount: Mount, cache: FeatureCache, images: Path
) -> None:
    mount.fail(images, failures=2)
    assert len(next_batches(cache)) == 3
    mount.fail(images, failures=1_000_000)
    with pytest.raises(StorageError, match=rf"{images}/image_00\d.jpg cannot be read(.|\n)*Stale"):
        next_batches(cache)


def test_a_calibration_reads_again_and_else_names_the_image(
    mount: Mount, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = build_recipe(tmp_path / "cache", images, teachers=INT4)

    def fails(count: int) -> None:
        draw = Draft.calibration_sample

        def drawn(*arguments: Any) -> Any:
            mount.fail(images, failures=count)
            return draw(*arguments)

        monkeypatch.setattr(Draft, "calibration_sample", drawn)

    fails(1_000_000)
    with pytest.raises(StorageError, match=rf"{images}/image_00\d.jpg cannot be read"):
        build(recipe, QUIET)
    monkeypatch.undo()
    mount.fail(images, failures=0)
    fails(3)
    result = build(recipe, QUIET)
    assert (mount.failures, result.shards) == (0, 2)
    assert verify(result.cache, full=True) == []


def test_sources_are_scanned_and_read_again(mount: Mount, images: Path, tmp_path: Path) -> None:
    data = [{"bytes": path.read_bytes(), "path": path.name} for path in sorted(images.iterdir())]
    pq.write_table(pa.table({"image": data}), tmp_path / "images.parquet", row_group_size=2)
    for place in (images, tmp_path / "images.parquet"):
        for failures in (0, 3):
            source = open_source(place)
            mount.fail(place, failures)
            samples = source.scan()
            assert (samples["status"].to_pylist(), mount.failed) == (["ok"] * 6, failures)
            mount.fail(place, failures)
            row = samples.slice(np.argmax(samples["nbytes"]), 1).to_pylist()[0]
            assert len(source.read(row["path"], row["offset"], row["nbytes"])) == row["nbytes"]
        mount.fail(place, failures=1_000_000)
        with pytest.raises(StorageError, match=rf"{place}\S* cannot be read"):
            open_source(place).scan()
