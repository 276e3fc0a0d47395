"""Sources and caches on an object store: a real S3 server on loopback, reached as people reach theirs."""

# ruff: noqa: F401, F811  (fixtures are imported)

from __future__ import annotations

import gc
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import s3fs
import xarray
import zarr
from rich.console import Console

from teachercache import FeatureCache, build
from teachercache.cache_builder.build_recipe import RunnerRecipe
from teachercache.cache_builder.repair import repair
from teachercache.pipeline.errors import BuildError, CacheError, CacheNotFoundError, CorruptShardError
from teachercache.pipeline.loading.loader import FeatureLoader
from teachercache.pipeline.loading.streaming import StreamSampler
from teachercache.pipeline.places.open_storage import open_storage
from teachercache.pipeline.verify import verify
from tests.images import tar_bytes
from tests.make_cache import build_recipe, make_cache, make_images, teacher_spec
from tests.s3_server import PART_BYTES, Request, Server, running, server

QUIET = Console(quiet=True)
TINY = {"tiny": {"model": "vit_tiny_patch16_224", "pretrained": False, "image_size": 32, "codec": "f16"}}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, running: Server) -> Path:
    """A folder of images, also at s3://bucket/images."""
    folder = make_images(tmp_path_factory.mktemp("images"), 8)
    for path in folder.iterdir():
        open_storage("s3://bucket/images").write(path.name, path.read_bytes())
    return folder


def file_checksums(cache: FeatureCache) -> dict[str, str]:
    records = cache.commits("tiny").values()
    return {name: file.checksum for record in records for name, file in record.files.items()}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, images: Path) -> FeatureCache:
    return build(build_recipe(tmp_path_factory.mktemp("local") / "cache", images, teachers=TINY), QUIET).cache


@pytest.fixture(scope="module")
def remote(running: Server, images: Path) -> tuple[FeatureCache, list[Request]]:
    """The same cache at s3://bucket/cache, and the requests that wrote it."""
    running.answered.clear()
    cache = build(build_recipe("s3://bucket/cache", "s3://bucket/images", teachers=TINY), QUIET).cache
    return cache, [request for request in running.requests("PUT", "POST") if "uploads" not in request.query]


def test_a_cache_on_s3_is_the_local_one(
    server: Server, remote: tuple[FeatureCache, list[Request]], local: FeatureCache
) -> None:
    cache, _ = remote
    assert cache.spec.cache_id == local.spec.cache_id
    assert file_checksums(cache) == file_checksums(local)
    assert verify(FeatureCache.open("s3://bucket/cache"), full=True) == []
    recipe = build_recipe("s3://bucket/cache", "s3://bucket/images", teachers=TINY)
    assert build(recipe, QUIET).shards == 0


def test_the_record_comes_last_and_in_one_request(remote: tuple[FeatureCache, list[Request]]) -> None:
    cache, written = remote
    assert len(cache.commits("tiny")) == 3
    for shard, record in cache.commits("tiny").items():
        (commit,) = (i for i, r in enumerate(written) if r.path.endswith(f"commits/tiny/{shard:05d}.json"))
        assert (written[commit].method, written[commit].query) == ("PUT", "")
        for name in record.files:
            assert max(i for i, r in enumerate(written) if r.path == f"/bucket/cache/{name}") < commit


def test_reading_asks_for_ranges(
    server: Server, remote: tuple[FeatureCache, list[Request]], local: FeatureCache
) -> None:
    rows = np.array([0, 15, 7, 6])
    expected = local.read(rows)["tiny"].decode()
    for direct in (True, False):
        cache = FeatureCache.open("s3://bucket/cache", direct=direct)
        server.answered.clear()
        assert cache.read(rows)["tiny"].decode().equal(expected)
        shards = [request for request in server.requests("GET") if "/codes/c/" in request.path]
        assert all(request.range is not None for request in shards)
        if direct:  # the two ends and the indexes of three shards, and four rows
            assert len(shards) == 3 * len({request.path for request in shards}) + len(rows) == 13


def test_zarr_and_xarray_open_it_at_its_root(
    server: Server, remote: tuple[FeatureCache, list[Request]], local: FeatureCache
) -> None:
    root: Any = zarr.open("s3://bucket/cache", mode="r")
    assert sorted(root["teachers/tiny"].array_keys()) == ["codes"]
    with xarray.open_datatree("s3://bucket/cache", engine="zarr") as tree:
        codes: Any = tree["teachers/tiny/codes"]
        found = codes.isel(row=[5]).values.astype(np.float32)
    np.testing.assert_array_equal(found, local.read([5])["tiny"].decode())


def test_a_flipped_bit_of_a_row_on_s3_is_never_read(
    server: Server, remote: tuple[FeatureCache, list[Request]]
) -> None:
    cache = FeatureCache.open("s3://bucket/cache")
    name = next(iter(cache.commits("tiny")[0].files))
    cache.read([1, 0])  # what is there before its first touch is seen by the ends of the shard
    whole = cache.storage.read(name)
    cache.storage.write(name, bytes([whole[0] ^ 1]) + whole[1:])
    try:
        with pytest.raises(CorruptShardError, match="checksum of row 0 is wrong"):
            cache.read([1, 0])
    finally:
        cache.storage.write(name, whole)


def test_damage_on_s3_is_found_and_repaired(
    server: Server, remote: tuple[FeatureCache, list[Request]], local: FeatureCache
) -> None:
    cache, _ = remote
    name = next(iter(cache.commits("tiny")[1].files))
    data = bytearray(cache.storage.read(name))
    data[100] ^= 1
    cache.storage.write(name, data)
    cache.storage.write("samples.parquet", cache.storage.read("samples.parquet")[:-10])
    opened = FeatureCache.open("s3://bucket/cache")
    assert [problem.file for problem in verify(opened, full=True)] == [name, "samples.parquet"]
    server.answered.clear()
    done = repair(opened, RunnerRecipe(batch_size=4))
    assert (len(done.mended), done.left) == (2, [])
    deleted = {r.path for r in server.requests("DELETE") if not r.path.endswith(".lock")}
    assert deleted == set(), "what is broken is replaced"
    mended = FeatureCache.open("s3://bucket/cache")
    assert verify(mended, full=True) == []
    assert file_checksums(mended) == file_checksums(local)


def test_a_build_survives_errors_throttling_and_hanging(
    server: Server, images: Path, local: FeatureCache
) -> None:
    """Every sixth request fails once, as S3 fails them; three of them hang."""
    seen: set[Request] = set()
    injected: list[int | str] = []

    def fault(request: Request) -> int | str | None:
        if request in seen or len(seen) % 6:
            seen.add(request)
            return None
        seen.add(request)
        injected.append("hang" if len(injected) in (3, 9, 14) else (500, 503)[len(injected) % 2])
        return injected[-1]

    server.fault = fault
    cache = build(build_recipe("s3://bucket/faults", "s3://bucket/images", teachers=TINY), QUIET).cache
    found = verify(FeatureCache.open("s3://bucket/faults"), full=True)
    server.fault = lambda _: None
    assert {500, 503, "hang"} <= set(injected)
    assert found == []
    assert file_checksums(cache) == file_checksums(local)


def test_a_lock_whose_answer_is_lost_is_held(server: Server) -> None:
    """The client asks again, and hears that the file is there already: by its own first request."""
    faults = ["late"]
    server.fault = lambda request: faults.pop() if faults and request.method == "PUT" else None

    def waiting() -> None:
        raise AssertionError("it waits for itself")

    storage = open_storage("s3://bucket/locked")
    with storage.exclusive("x", waiting):
        assert storage.exists("x.lock")
    assert not faults
    assert not storage.exists("x.lock")
    assert {status for request, status in server.answered if request.method == "PUT"} == {200, 412}


def open_uploads(prefix: str) -> list[str]:
    found = s3fs.S3FileSystem().call_s3("list_multipart_uploads", Bucket="bucket", Prefix=prefix)
    return [upload["Key"] for upload in found.get("Uploads", ())]


def test_an_upload_that_fails_leaves_no_record(server: Server, images: Path, local: FeatureCache) -> None:
    recipe = build_recipe("s3://bucket/denied", "s3://bucket/images", teachers=TINY)

    def fault(request: Request) -> int | None:
        return 403 if request.method == "PUT" and "denied/teachers/tiny/codes/c/1" in request.path else None

    server.fault = fault
    with pytest.raises(BuildError, match="1 of 3 shards failed"):
        build(recipe, QUIET)
    assert FeatureCache.open("s3://bucket/denied").committed("tiny").tolist() == [True, False, True]
    server.fault = lambda _: None
    assert open_uploads("denied") == []
    again = build(recipe, QUIET)
    assert again.shards == 1
    assert file_checksums(again.cache) == file_checksums(local)


@pytest.mark.parametrize("nbytes", [100, PART_BYTES + 100])
def test_a_file_that_fails_in_the_middle_does_not_appear(server: Server, nbytes: int) -> None:
    """Nor do its parts stay on the store, where they would be paid for."""
    storage = open_storage("s3://bucket/half")

    def fail_in_the_middle() -> None:
        with storage.open_write("shard") as file:
            file.write(b"x" * nbytes)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_in_the_middle()
    gc.collect()
    assert storage.size("shard") is None
    assert open_uploads("half") == []


def test_files_of_several_parts_are_whole(server: Server) -> None:
    storage, data = open_storage("s3://bucket/parts"), bytes(range(256)) * (PART_BYTES // 100)
    with storage.open_write("shard") as file:
        for start in range(0, len(data), 1 << 20):
            file.write(data[start : start + (1 << 20)])
    assert len([r for r in server.requests("PUT") if "partNumber" in r.query]) == 3
    assert storage.checksum("shard") == file.checksum
    assert storage.read_range("shard", PART_BYTES - 3, 6) == data[PART_BYTES - 3 : PART_BYTES + 3]
    assert storage.read_range("shard", len(data), 10) == b""
    assert storage.read_range("shard", len(data) - 2, 10) == data[-2:]


def test_other_writers_are_seen_at_once(server: Server) -> None:
    """A client that remembered listings would not see what another machine has written since."""
    here, there = open_storage("s3://bucket/shared"), s3fs.S3FileSystem(skip_instance_cache=True)
    there.pipe_file("bucket/shared/a/1", b"1")
    assert (here.names("a"), here.size("a/2")) == (["1"], None)
    there.pipe_file("bucket/shared/a/2", b"22")
    assert (here.names("a"), here.size("a/2"), list(here.walk("a"))) == (
        ["1", "2"],
        2,
        [("a/1", 1), ("a/2", 2)],
    )


def test_what_is_not_there_is_said(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("s3://bucket/nothing", "s3://no-such-bucket/cache"):
        with pytest.raises(CacheNotFoundError, match="build the cache first"):
            FeatureCache.open(url)
    server.fault = lambda _: 403
    with pytest.raises(CacheError, match=r"cannot be read(.|\n)*AWS_ACCESS_KEY_ID"):
        FeatureCache.open("s3://bucket/cache")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(CacheError, match=r"NoCredentialsError(.|\n)*AWS_ACCESS_KEY_ID"):
        FeatureCache.open("s3://bucket/cache")
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_stream_asks_for_the_index_of_a_tar_and_once_for_its_rows(server: Server, images: Path) -> None:
    teachers = {"t": teacher_spec(codec="f16")}
    make_cache("s3://bucket/tars", images, teachers=teachers, store="webdataset")
    cache = FeatureCache.open("s3://bucket/tars", images=str(images))
    sampler = StreamSampler(cache, batch_size_per_process=4, shuffle_buffer=3)
    server.answered.clear()
    with FeatureLoader(cache, sampler, threads=2) as loader:
        batches = list(islice(loader, 4))
    asked = [request.path for request in server.requests("GET") if request.path.endswith(".tar")]
    assert Counter(Counter(asked[:6]).values()) == {2: 3}, "the pass has three tars"
    for batch in batches:
        expected = cache.read(batch.rows)["t"].tensors()["codes"]
        np.testing.assert_array_equal(batch.features["t"].tensors()["codes"].numpy(), expected.numpy())


def test_a_tar_on_s3_streams_into_the_same_cache(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_images(tmp_path / "images", 20, size=(320, 240))
    members = [
        (f"{path.stem}.{name}", data)
        for path in sorted(folder.iterdir())
        for name, data in (("cls", b"3"), ("jpg", path.read_bytes()))
    ]
    tar = tar_bytes(members)
    (tmp_path / "set.tar").write_bytes(tar)
    open_storage("s3://bucket/sets").write("set.tar", tar)
    choices: dict[str, Any] = {"teachers": TINY, "rows_per_shard": 40}
    expected = build(build_recipe(tmp_path / "cache", tmp_path / "set.tar", **choices), QUIET).cache

    def asked(cache: str) -> int:
        server.answered.clear()
        built = build(build_recipe(cache, "s3://bucket/sets/set.tar", **choices), QUIET).cache
        assert file_checksums(built) == file_checksums(expected)
        return len([one for one in server.requests("GET") if one.path.endswith("set.tar")])

    streamed = asked("s3://bucket/streamed")
    monkeypatch.setattr("teachercache.pipeline.sources.tar._LEAST_STREAMED", 21)
    assert asked("s3://bucket/ranged") == streamed - 1 + 20
