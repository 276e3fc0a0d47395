"""Reading shard files directly gives what zarr gives, and never anything else."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec

from teachercache import FeatureCache
from teachercache.pipeline.errors import CorruptShardError
from teachercache.pipeline.places.local_storage import LocalStorage
from teachercache.pipeline.stores import zarr_store
from teachercache.pipeline.stores.shard_format import ABSENT, checksum, empty_index, index_nbytes, parse_index
from teachercache.pipeline.stores.zarr_store import DirectStore, ZarrStore, shard_file
from tests.make_cache import features, make_cache, make_images, teacher_spec

ROOT = Path(__file__).parents[2]
CODECS = ("f32", "f16", "bf16", "int4-hadamard", "int3-hadamard")
NUM_SAMPLES, NUM_VIEWS, INVALID = 10, 2, 4
PLACES = 24  # of four shards; the last four hold no row
VALID_ROWS = [row for row in range(NUM_SAMPLES * NUM_VIEWS) if row // NUM_VIEWS != INVALID]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), NUM_SAMPLES)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, images: Path) -> FeatureCache:
    """Every dtype, several arrays a teacher, a short last shard, a sample that holds nothing."""
    teachers = {codec: teacher_spec(codec=codec, cls_token=True, width=5) for codec in CODECS}
    folder = tmp_path_factory.mktemp("cache")
    return make_cache(folder, images, teachers=teachers, invalid_samples=[INVALID])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, images: Path) -> FeatureCache:
    return make_cache(tmp_path_factory.mktemp("plain"), images)


def read_all(store: ZarrStore, cache: FeatureCache, teacher: str, rows: list[int]) -> dict[str, NDArray]:
    out = {name: layout.empty(len(rows)) for name, layout in cache.layouts(teacher).items()}
    store.read(teacher, np.array(rows, np.int64), out)
    return out


@pytest.fixture(scope="module")
def stores(cache: FeatureCache) -> list[ZarrStore]:
    assert isinstance(cache.storage, LocalStorage)
    return [
        DirectStore(cache.storage, cache.spec),
        DirectStore(cache.storage, cache.spec, checksums=True),
        ZarrStore(cache.storage, cache.spec),
    ]


@settings(deadline=None)
@given(teacher=st.sampled_from(CODECS), rows=st.lists(st.sampled_from(VALID_ROWS), max_size=12))
def test_rows_are_those_that_zarr_reads(
    cache: FeatureCache, stores: list[ZarrStore], teacher: str, rows: list[int]
) -> None:
    written = features(cache.spec, teacher)
    for store in stores:
        for name, values in read_all(store, cache, teacher, rows).items():
            assert values.tobytes() == written[name][rows].numpy().tobytes(), (store, name)


@settings(deadline=None)
@given(
    row=st.sampled_from(sorted(set(range(24)) - set(VALID_ROWS))), more=st.lists(st.sampled_from(VALID_ROWS))
)
def test_rows_that_hold_nothing_are_never_zeros(
    cache: FeatureCache, stores: list[ZarrStore], row: int, more: list[int]
) -> None:
    for store in stores:
        with pytest.raises(CorruptShardError, match="holds no row"):
            read_all(store, cache, "f16", [*more, row])


def _cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _change(entry: tuple[int, int]) -> Callable[[bytes], bytes]:
    """The shard with another first entry in its index, and the checksum of the index right."""

    def damage(data: bytes) -> bytes:
        index = parse_index(data[-index_nbytes(6) :], 6, len(data)).copy()
        index[0] = entry
        return data[: -index_nbytes(6)] + index.tobytes() + checksum(index.tobytes())

    return damage


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "a few bytes": lambda data: data[:7],
    "cut in the chunks": _cut,
    "cut in the index": lambda data: data[:-1],
    "index flipped": lambda data: data[:-20] + bytes([data[-20] ^ 1]) + data[-19:],
    "grown": lambda data: data + b"\0",
    "behind the end": _change((10**9, 132)),
    "in the index": _change((700, 132)),
    "wraps around": _change((2**64 - 100, 132)),
    "too large": _change((0, 2**64 - 10)),
    "half absent": _change((ABSENT, 132)),
    "too short": _change((0, 131)),
    "too long": _change((0, 136)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_an_error_for_the_whole_shard(tmp_path: Path, images: Path, damage: str) -> None:
    make_cache(tmp_path, images, hashes=False)
    shard = tmp_path / shard_file("alpha", "codes", 0, 4)
    shard.write_bytes(DAMAGES[damage](shard.read_bytes()))
    cache = FeatureCache.open(tmp_path)
    with pytest.raises(CorruptShardError, match=rf"teachers/alpha/codes/c/0(.|\n)*verify {tmp_path}"):
        cache.read([1], ["alpha"])
    assert torch.equal(
        cache.read([6])["alpha"].decode(), FeatureCache.open(tmp_path).read([6])["alpha"].decode()
    )


def test_a_shard_that_is_cut_while_it_is_open_is_an_error(tmp_path: Path, images: Path) -> None:
    cache = make_cache(tmp_path, images)
    cache.read([0], ["alpha"])
    shard = tmp_path / shard_file("alpha", "codes", 0, 4)
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(CorruptShardError, match="ends inside row 5"):
        cache.read([5], ["alpha"])


@settings(deadline=None)
@given(st.binary(max_size=200), st.integers(0, 8))
def test_no_bytes_are_taken_for_an_index(data: bytes, rows: int) -> None:
    end = data[-index_nbytes(rows) :]
    try:
        index = parse_index(end, rows, len(data))
    except ValueError:
        return
    assert end[-4:] == checksum(end[:-4])
    assert len(index) == rows


def test_an_index_of_absent_rows_is_one() -> None:
    end = empty_index(3).tobytes()
    assert (parse_index(end + checksum(end), 3, 500) == ABSENT).all()


def test_arrays_that_others_compressed_are_read_through_zarr(tmp_path: Path, images: Path) -> None:
    cache = make_cache(tmp_path, images, teachers={"t": teacher_spec(codec="f16")})
    folder = tmp_path / "teachers" / "t" / "codes"
    plain: Any = zarr.open_array(folder, mode="r")
    values, settings = plain[:], {"shape": plain.shape, "shards": plain.shards, "chunks": plain.chunks}
    zarr.create_array(folder, **settings, dtype="float16", compressors=[ZstdCodec()], overwrite=True)[:] = (
        values
    )
    rows = [19, 0, 7]
    read = FeatureCache.open(tmp_path).read(rows)["t"].tensors()["codes"]
    assert torch.equal(read, features(cache.spec, "t")["codes"][rows])


def test_threads_share_few_open_files(cache: FeatureCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zarr_store, "OPEN_SHARDS", 2)
    assert isinstance(cache.storage, LocalStorage)
    store = DirectStore(cache.storage, cache.spec)
    written = features(cache.spec, "f16")
    before = _open_files()
    generator = np.random.default_rng(0)
    tasks = [generator.choice(VALID_ROWS, 5).tolist() for _ in range(200)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(partial(read_all, store, cache, "f16"), tasks))
    for rows, values in zip(tasks, results, strict=True):
        assert np.array_equal(values["codes"], written["codes"][rows].numpy())
    assert _open_files() <= before + 2
    del store
    assert _open_files() <= before


def _open_files() -> int:
    return sum(1 for _ in Path("/dev/fd").iterdir())


FORK = """
import sys
from multiprocessing import get_context
from teachercache import FeatureCache

def codes(rows):
    return cache.read(rows, ["beta"])["beta"].tensors()["codes"].tolist()

cache, rows = FeatureCache.open(sys.argv[1]), [0, 7, 19]
expected = codes(rows)
with get_context("fork").Pool(2) as pool:
    assert pool.map(codes, [rows] * 8, chunksize=1) == [expected] * 8
assert codes(rows) == expected
"""


def test_a_forked_process_reads_on_with_the_files_of_its_parent(plain: FeatureCache) -> None:
    """In a process of its own: one that runs many tests has threads, whose locks a fork copies."""
    command = [sys.executable, "-c", FORK, plain.storage.url]
    subprocess.run(command, check=True, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize(("direct", "checksums"), [(True, False), (True, True), (False, False)])
def test_another_process_reads_by_the_same_road(plain: FeatureCache, direct: bool, checksums: bool) -> None:
    opened = FeatureCache.open(plain.storage.url, direct=direct, checksums=checksums)
    expected = opened.read([3], ["beta"])["beta"].decode()
    other = pickle.loads(pickle.dumps(opened))  # noqa: S301  our own bytes
    assert torch.equal(other.read([3], ["beta"])["beta"].decode(), expected)
    assert type(other.store) is type(opened.store)
    assert getattr(other.store, "checksums", None) == getattr(opened.store, "checksums", None)
