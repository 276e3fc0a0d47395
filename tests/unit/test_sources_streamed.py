"""Images of a remote tar that stream by through webdataset: same bytes, same errors, fewer requests."""

from __future__ import annotations

import io
import json
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import fsspec
import pytest

from teachercache.cache_builder.decode import Decoding
from teachercache.cache_builder.progress import StageSeconds
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import CacheMismatchError, StorageError
from teachercache.pipeline.places.remote_storage import RemoteStorage
from teachercache.pipeline.sources import tar
from tests.images import encode, photo, tar_bytes
from tests.make_cache import make_cache, teacher_spec

COUNT = 20
JPEGS = [encode(photo(400, 300, seed)) for seed in range(COUNT)]
NAMES = [f"a/{number:03d}.jpg" for number in range(COUNT)]
PLAIN = list(zip(NAMES, JPEGS, strict=True))
URL = "memory://streamed/set.tar"

Members = Sequence[tuple[str, bytes]]


@pytest.fixture(autouse=True)
def requests(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes of each range that is asked for; none of them by the thread that computes."""
    asked, read_range = list[int](), RemoteStorage.read_range

    def noted(self: RemoteStorage, name: str, offset: int, nbytes: int) -> bytes:
        assert threading.current_thread().name.startswith(("stream", "decode"))
        asked.append(nbytes)
        return read_range(self, name, offset, nbytes)

    monkeypatch.setattr(RemoteStorage, "read_range", noted)
    yield asked
    fsspec.filesystem("memory").store.clear()


def put(data: bytes, url: str = URL) -> None:
    fsspec.filesystem("memory").pipe_file(url, data)


def cache_of(folder: Path, source: str = URL, kind: str = "auto") -> FeatureCache:
    """One shard of all images at `source`, or of several sources."""
    teachers = {"t": teacher_spec()}
    return make_cache(
        folder / "cache", source, kind=kind, teachers=teachers, num_views=1, samples_per_shard=3 * COUNT
    )


def decoded(cache: FeatureCache) -> list[bytes | str | None]:
    """What the decoding threads have for each sample of the shard: the image, or why there is none."""
    decoding = Decoding(cache, threads=2, batch_size=4, pinned=False)
    try:
        return [one.data or one.reason for one in decoding.samples(0, ["t"], StageSeconds())]
    finally:
        decoding.close()


def gnu(members: Members) -> bytes:
    return tar_bytes(members, tarfile.GNU_FORMAT)


@pytest.mark.parametrize("container", [tar_bytes, gnu])
@pytest.mark.parametrize("suffix", [".jpg", f".{'long' * 30}.jpg"])
def test_images_in_order_are_one_request(
    tmp_path: Path, requests: list[int], container: Callable[[Members], bytes], suffix: str
) -> None:
    fields = [[(f"{i:03d}.cls", b"3"), (f"{i:03d}{suffix}", jpeg)] for i, jpeg in enumerate(JPEGS)]
    put(container([member for pair in fields for member in pair]))
    assert decoded(cache_of(tmp_path)) == JPEGS
    assert len(requests) == 1


def test_a_span_is_read_piece_by_piece(
    tmp_path: Path, requests: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar, "_STREAMED_AT_ONCE", 4096)
    put(tar_bytes(PLAIN))
    assert decoded(cache_of(tmp_path)) == JPEGS
    assert set(requests[:-1]) == {4096}


def test_each_tar_is_a_stream_and_each_source(tmp_path: Path, requests: list[int]) -> None:
    for name in ("one/0.tar", "one/1.tar", "two/0.tar"):
        members = [(f"{name[:-4]}-{path}", data) for path, data in PLAIN]
        put(tar_bytes(members), f"memory://streamed/{name}")
    place = json.dumps({name: f"memory://streamed/{name}" for name in ("one", "two")})
    cache = cache_of(tmp_path, place, "several")
    assert decoded(cache) == 3 * JPEGS
    assert len(requests) == 3


def test_a_tar_of_tars_streams_as_far_as_its_class(tmp_path: Path, requests: list[int]) -> None:
    classes = [tar_bytes((f"{wnid}_{path[2:]}", data) for path, data in PLAIN) for wnid in ("n1", "n2")]
    put(tar_bytes([("n1.tar", classes[0]), ("n2.tar", classes[1])]))
    assert decoded(cache_of(tmp_path)) == 2 * JPEGS
    assert len(requests) == 1 + COUNT


def test_other_members_with_the_same_beginning_are_not_taken(tmp_path: Path, requests: list[int]) -> None:
    """Bytes and head do not tell these images apart, nor do their names."""
    bmps = [encode(photo(200, 40), "BMP")[:-3] + bytes((number, 0, 0)) for number in range(2 * COUNT)]
    members = [(f"{number // 2:03d}.{'abcd' * 30}{number % 2}.bmp", bmp) for number, bmp in enumerate(bmps)]
    put(tar_bytes(members))
    cache = cache_of(tmp_path)
    wanted = [index for index in range(2 * COUNT) if index % 3 != 1]
    with_stream = run_named("stream", lambda: list(cache.images.stream_source(wanted)))
    assert with_stream == [bmps[index] for index in wanted]
    assert len(requests) == 1


def run_named(name: str, run: Callable[[], list[bytes | None]]) -> list[bytes | None]:
    found: list[bytes | None] = []
    thread = threading.Thread(target=lambda: found.extend(run()), name=name)
    thread.start()
    thread.join()
    return found


def shuffled() -> bytes:
    return tar_bytes(PLAIN[1::2] + PLAIN[::2])


def few() -> bytes:
    return tar_bytes(PLAIN[:5])


def sparse() -> bytes:
    return tar_bytes([member for one in PLAIN for member in (one, (f"{one[0]}.raw", bytes(8000)))])


def linked() -> bytes:
    """The last one has the bytes of the first."""
    file = io.BytesIO(tar_bytes(PLAIN[:-1]))
    with tarfile.open(fileobj=file, mode="a") as archive:
        link = tarfile.TarInfo("z.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, NAMES[0]
        archive.addfile(link)
    return file.getvalue()


@pytest.mark.parametrize("data", [shuffled, few, sparse, linked])
def test_where_a_stream_does_not_serve_each_image_is_a_range(
    tmp_path: Path, requests: list[int], data: Callable[[], bytes]
) -> None:
    put(data())
    cache = cache_of(tmp_path)
    found = decoded(cache)
    nbytes = cache.samples["nbytes"].to_pylist()
    assert [len(one or "") for one in found] == nbytes
    assert sorted(requests) == sorted(nbytes)


def test_a_build_does_not_need_webdataset(
    tmp_path: Path, requests: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tar_bytes(PLAIN))
    monkeypatch.setitem(sys.modules, "webdataset.tariterators", None)
    assert decoded(cache_of(tmp_path)) == JPEGS
    assert len(requests) == COUNT


def test_a_member_that_webdataset_skips_is_read_by_its_range(tmp_path: Path, requests: list[int]) -> None:
    put(tar_bytes([*PLAIN[:9], ("__b__/x.jpg", JPEGS[9]), *PLAIN[10:]]))
    cache = cache_of(tmp_path)
    assert sorted(map(repr, decoded(cache))) == sorted(map(repr, JPEGS))


def test_a_stream_that_breaks_loses_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar, "_STREAMED_AT_ONCE", 4096)
    read_range = RemoteStorage.read_range

    def failing(self: RemoteStorage, name: str, offset: int, nbytes: int) -> bytes:
        if nbytes == 4096 and offset > 8192:
            raise StorageError("The store stumbles.")
        return read_range(self, name, offset, nbytes)

    monkeypatch.setattr(RemoteStorage, "read_range", failing)
    put(tar_bytes(PLAIN))
    assert decoded(cache_of(tmp_path)) == JPEGS


def test_an_unreadable_image_divides_a_stream(tmp_path: Path, requests: list[int]) -> None:
    put(tar_bytes([*PLAIN, ("a/019b.jpg", b"no image"), *((f"b/{name}", data) for name, data in PLAIN)]))
    assert decoded(cache_of(tmp_path)) == [*JPEGS, "not an image: it starts with b'no image'", *JPEGS]
    assert len(requests) == 2


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def another_image(data: bytes) -> bytes:
    start = data.index(JPEGS[7])
    return data[:start] + bytes(len(JPEGS[7])) + data[start + len(JPEGS[7]) :]


def another_size(_: bytes) -> bytes:
    return tar_bytes([*PLAIN[:7], (NAMES[7], JPEGS[7] + bytes(1000)), *PLAIN[8:]])


def a_little_longer(_: bytes) -> bytes:
    """Its recorded bytes are there, and no other image moves."""
    return tar_bytes([*PLAIN[:7], (NAMES[7], JPEGS[7] + b"1"), *PLAIN[8:]])


def header_lost(data: bytes) -> bytes:
    start = data.index(JPEGS[7])
    return data[: start - 512] + bytes(512) + data[start:]


def gone(_: bytes) -> None:
    return None


@pytest.mark.parametrize("change", [cut, another_image, another_size, a_little_longer, header_lost, gone])
def test_a_tar_that_changed_ends_as_by_ranges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[bytes], bytes | None]
) -> None:
    put(data := tar_bytes(PLAIN))
    cache = cache_of(tmp_path)
    changed = change(data)
    if changed is None:
        fsspec.filesystem("memory").rm(URL)
    else:
        put(changed)

    def outcome() -> object:
        try:
            return decoded(FeatureCache.open(cache.storage.url))
        except Exception as error:
            return type(error), str(error)

    streamed = outcome()
    monkeypatch.setattr(tar, "_LEAST_STREAMED", 2 * COUNT)
    assert streamed == outcome()
    assert (streamed == JPEGS) == (change in (a_little_longer, header_lost))


def test_a_changed_image_is_an_error(tmp_path: Path) -> None:
    put(data := tar_bytes(PLAIN))
    cache = cache_of(tmp_path)
    put(another_image(data))
    with pytest.raises(CacheMismatchError, match=r"The image of sample a/007 has changed"):
        decoded(cache)


def test_a_local_source_is_not_asked_for_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.tar").write_bytes(tar_bytes(PLAIN))
    cache = cache_of(tmp_path, str(tmp_path / "train.tar"))
    monkeypatch.setattr(type(cache.images), "stream_source", None)
    assert all(isinstance(one, bytes) for one in decoded(cache))
