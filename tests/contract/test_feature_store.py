"""What every road to the rows keeps. A road is added to `ROADS`; the tests stay."""

from __future__ import annotations

import gc
import json
import pickle
import shutil
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import safetensors.torch
import torch
import webdataset
import xxhash
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec

from teachercache import FeatureCache
from teachercache.pipeline.codecs import codec_names, get_codec
from teachercache.pipeline.errors import (
    CacheError,
    CacheNotFoundError,
    CorruptShardError,
    IncompleteCacheError,
)
from teachercache.pipeline.records.manifest import FileRecord
from teachercache.pipeline.records.spec import Compressor, GridSpec, StoreKind
from teachercache.pipeline.stores import webdataset_store
from teachercache.pipeline.stores.shard_format import ABSENT, checksum, index_nbytes, parse_index
from teachercache.pipeline.verify import verify
from tests.make_cache import commit_shard, features, make_cache, make_images, teacher_spec

ROADS = ("direct", "zarr", "memory", "webdataset", "webdataset memory", "zstd", "blosc memory")
PLAIN_CODECS = ("f32", "f16", "bf16")

ADJOINT_AND_BITS = {
    "adjoint": teacher_spec(grid=4).model_copy(update={"grid": GridSpec(kind="adjoint", size=(2, 2))}),
    "bf16": teacher_spec(codec="bf16", cls_token=True),
}

Make = Callable[..., FeatureCache]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), 8)


@pytest.fixture(params=ROADS)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """`make_cache(…)` somewhere, opened by one road."""
    location = f"memory://{uuid.uuid4().hex}" if "memory" in request.param else str(tmp_path / "cache")
    store: StoreKind = "webdataset" if "webdataset" in request.param else "zarr"
    compressor = next((name for name in get_args(Compressor) if name in request.param), None)

    def make(images: Path, **arguments: Any) -> FeatureCache:
        make_cache(location, images, store=store, compressor=compressor, **arguments)
        return FeatureCache.open(location, direct=request.param in ("direct", "zstd"))

    return make


@pytest.mark.parametrize("codec", PLAIN_CODECS)
def test_rows_come_back_in_any_order(make: Make, images: Path, codec: str) -> None:
    teachers = {"t": teacher_spec(codec=codec, cls_token=True)}
    cache = make(images, teachers=teachers)
    rows = np.array([15, 0, 7, 7, 6])
    written = features(cache.spec, "t")
    read = cache.read(rows)["t"]
    assert torch.equal(read.tensors()["codes"], written["codes"][rows])
    decoded = get_codec(codec).decode_tensors({"codes": written["codes"][rows]}, "cpu", torch.float32)
    assert torch.equal(read.decode(), decoded)
    assert read.decode().shape == (5, 4, 2, 2, 8)
    assert torch.equal(cache.read_tokens(rows, "t", "cls"), written["cls"][rows])


def test_plain_codecs_are_there() -> None:
    assert set(PLAIN_CODECS) <= set(codec_names())


def test_a_cache_crosses_process_borders(make: Make, images: Path) -> None:
    cache = make(images)
    other = pickle.loads(pickle.dumps(cache))  # noqa: S301  our own bytes
    assert torch.equal(other.read([3])["alpha"].decode(), cache.read([3])["alpha"].decode())


def test_rows_without_a_commit_do_not_exist(make: Make, images: Path) -> None:
    cache = make(images, skip_shards=[1])
    assert cache.committed("alpha").tolist() == [True, False, True]
    assert cache.read([5], ["alpha"])
    with pytest.raises(IncompleteCacheError, match="shard 1"):
        cache.read([6], ["alpha"])
    with pytest.raises(IncompleteCacheError, match="alpha: 1 of 3 shards missing"):
        cache.valid_samples()
    commit_shard(cache, "alpha", 1)
    assert FeatureCache.open(cache.storage.url).valid_samples(["alpha"]).size == 8


def test_invalid_rows_hold_nothing_and_cannot_be_read(make: Make, images: Path) -> None:
    cache = make(images, invalid_samples=[2, 7])
    assert cache.valid_samples().tolist() == [0, 1, 3, 4, 5, 6]
    with pytest.raises(CacheError, match=r"could not be decoded(.|\n)*image_002"):
        cache.read([0, 4])


@pytest.mark.parametrize("row", [-1, 16, 17, 10**12])
def test_rows_that_are_not_there_are_an_index_error(make: Make, images: Path, row: int) -> None:
    with pytest.raises(IndexError, match=str(row)):
        make(images).read([row])


def test_an_unknown_teacher_names_the_nearest(make: Make, images: Path) -> None:
    with pytest.raises(CacheError, match=r"did you mean alpha\?"):
        make(images).read([0], ["alhpa"])


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_no_cache_is_a_file_not_found_error(scheme: str) -> None:
    with pytest.raises(CacheNotFoundError, match="build the cache first"):
        FeatureCache.open(f"{scheme}{uuid.uuid4().hex}")
    assert issubclass(CacheNotFoundError, FileNotFoundError)


def test_samples_are_found_by_key(make: Make, images: Path) -> None:
    cache = make(images)
    assert cache.find("image_003") == 3
    assert cache.key(3) == "image_003"
    assert cache.image(3).size == (64, 48)
    with pytest.raises(KeyError, match="image_007"):
        cache.find("image_07")


def test_images_that_moved_are_found_where_they_are(tmp_path: Path) -> None:
    first = make_images(tmp_path / "here", 3)
    make_cache(tmp_path / "cache", first)
    shutil.move(first, tmp_path / "there")
    cache = FeatureCache.open(tmp_path / "cache", images=str(tmp_path / "there"))
    assert cache.image(1).size == (64, 48)


@pytest.mark.parametrize("rows", [[1.9], [True, False], [[0, 1], [2, 3]], ["0"]])
def test_rows_are_whole_numbers(make: Make, images: Path, rows: Any) -> None:
    cache = make(images)
    with pytest.raises(ValueError, match="Rows must be a list of whole numbers"):
        cache.read(rows)
    assert len(cache.read([])[cache.teachers[0]].decode()) == 0


def test_rows_of_remote_tars_are_asked_for_at_once(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    location = f"memory://{uuid.uuid4().hex}"
    make_cache(location, images, store="webdataset")
    cache, asked = FeatureCache.open(location), []
    read_ranges = cache.storage.read_ranges

    def noting(names: list[str], *where: Any) -> list[bytes]:
        asked.append(len(names))
        return read_ranges(names, *where)

    monkeypatch.setattr(cache.storage, "read_ranges", noting)
    rows = [15, 0, 7, 7]
    assert len(cache.read(rows, cache.teachers[:1])[cache.teachers[0]].decode()) == 4
    assert asked == [6, 4]  # the two ends of three tars, then the rows


def test_a_cache_on_an_object_store_goes_to_other_processes_after_it_was_read(images: Path) -> None:
    location = f"memory://{uuid.uuid4().hex}"
    make_cache(location, images)
    cache = FeatureCache.open(location)
    read = cache.read([3, 1])["alpha"].decode()
    again = pickle.loads(pickle.dumps(cache))  # noqa: S301
    assert torch.equal(again.read([3, 1])["alpha"].decode(), read)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves closing tars to the collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_plain_webdataset_reads_the_store(tmp_path: Path, images: Path) -> None:
    teachers = {"t": teacher_spec(codec="f16", cls_token=True)}
    cache = make_cache(tmp_path / "cache", images, teachers=teachers, store="webdataset", invalid_samples=[4])
    tars = sorted(str(path) for path in (tmp_path / "cache" / "teachers" / "t").glob("*.tar"))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    gc.collect()
    assert [sample["__key__"] for sample in samples] == [cache.key(i) for i in (0, 1, 2, 3, 5, 6, 7)]
    written = features(cache.spec, "t")
    for index, sample in zip((0, 1, 2, 3, 5, 6, 7), samples, strict=True):
        for view in range(2):
            tensors = safetensors.torch.load(sample[f"{view}.safetensors"])
            assert tensors.keys() == written.keys()
            assert all(torch.equal(tensors[name], written[name][2 * index + view]) for name in written)
    described = json.loads((tmp_path / "cache" / "teachers" / "t" / "teacher.json").read_text())
    assert described["arrays"]["codes"]["axes"] == ["level", "height", "width", "channel"]
    assert described["teacher"] == cache.spec.teachers["t"].model_dump(mode="json")


def test_plain_zarr_reads_the_store(tmp_path: Path, images: Path) -> None:
    cache = make_cache(tmp_path / "cache", images, teachers={"t": teacher_spec(codec="f16", cls_token=True)})
    group: Any = zarr.open_group(tmp_path / "cache" / "teachers" / "t", mode="r")
    written = features(cache.spec, "t")
    np.testing.assert_array_equal(group["codes"][:16], written["codes"][:16].numpy())
    np.testing.assert_array_equal(group["cls"][3], written["cls"][3].numpy())
    assert group["codes"].metadata.dimension_names == ("row", "level", "height", "width", "channel")
    assert group.attrs["teacher"]["model"] == "none"
    assert not group["codes"][16:].any(), "the padding of the last shard is absent and reads as zero"


def test_the_metadata_is_that_of_zarr_python(tmp_path: Path, images: Path) -> None:
    spec = teacher_spec(codec="int4-hadamard", cls_token=True).model_copy(
        update={"checkpoint": "/Gewichte/größte"}
    )
    cache = make_cache(tmp_path / "cache", images, teachers={"t": spec, **ADJOINT_AND_BITS})
    for teacher in cache.teachers:
        memory = zarr.storage.MemoryStore()
        description = cache.spec.teachers[teacher].model_dump(mode="json")
        content_id = cache.spec.shard_content_id(teacher, 0)
        group = zarr.create_group(memory, attributes={"teacher": description, "content_id": content_id})
        for name, layout in cache.layouts(teacher).items():
            group.create_array(
                name,
                shape=(cache.spec.num_shards * cache.spec.rows_per_shard, *layout.shape),
                shards=(cache.spec.rows_per_shard, *layout.shape),
                chunks=(1, *layout.shape),
                dtype=layout.dtype,
                filters=None,
                serializer=BytesCodec(),
                compressors=[Crc32cCodec()],
                fill_value=0,
                dimension_names=("row", *layout.axes),
                attributes=layout.attributes,
            )
        expected = {f"teachers/{teacher}/{key}": data.to_bytes() for key, data in memory._store_dict.items()}
        assert cache.store.layout_files(teacher) == expected


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
def test_the_files_of_a_teacher_state_the_layouts_of_its_spec(
    tmp_path: Path, images: Path, store: StoreKind
) -> None:
    cache = make_cache(tmp_path / "cache", images, teachers=ADJOINT_AND_BITS, store=store)
    for teacher in cache.teachers:
        assert cache.store.stored_layouts(teacher) == cache.layouts(teacher)


HOSTILE_LAYOUTS = {
    "no object": [],
    "no shape": {"shape": None},
    "no number": {"shape": [16, "many"]},
    "a half": {"shape": [16, 2.5]},
    "nothing": {"shape": [16, 0]},
    "too much": {"shape": [16, 2**40]},
    "no dtype": {"data_type": "nonsense"},
    "objects": {"data_type": "object"},
}


@pytest.mark.parametrize("change", HOSTILE_LAYOUTS.values(), ids=list(HOSTILE_LAYOUTS))
def test_files_that_state_no_layout_are_refused(tmp_path: Path, images: Path, change: Any) -> None:
    cache = make_cache(tmp_path / "cache", images)
    file = tmp_path / "cache/teachers/alpha/codes/zarr.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change if change else change))
    with pytest.raises(CorruptShardError, match=r"alpha cannot be read(.|\n)*zarr\.json"):
        cache.store.stored_layouts("alpha")


def test_shard_files_are_those_of_zarr_python(tmp_path: Path, images: Path) -> None:
    cache = make_cache(tmp_path / "cache", images, teachers={"t": teacher_spec(codec="f16")})
    ours = tmp_path / "cache" / "teachers" / "t" / "codes"
    array: Any = zarr.open_array(ours, mode="r")
    reference = zarr.create_array(
        tmp_path / "reference",
        shape=array.shape,
        shards=array.shards,
        chunks=array.chunks,
        dtype="float16",
        filters=None,
        compressors=array.compressors,
    )
    reference[:12] = features(cache.spec, "t")["codes"][:12].numpy()
    for shard in (0, 1):
        name = f"c/{shard}/0/0/0/0"
        data, expected = (ours / name).read_bytes(), (tmp_path / "reference" / name).read_bytes()
        end = -index_nbytes(6)
        assert (data[: end - 16], data[end:]) == (expected[:end], expected[end:])
        assert data[end - 16 : end].hex() == xxhash.xxh3_128_hexdigest(expected[:end])


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
def test_a_shard_with_one_other_row_in_its_middle_has_other_ends(
    tmp_path: Path, images: Path, store: StoreKind
) -> None:
    teachers = {"t": teacher_spec(codec="f16", width=512, grid=4)}  # 64 KiB a row
    cache = make_cache(tmp_path / "cache", images, teachers=teachers, store=store)
    (name,) = cache.store.shard_files("t", 0)
    rows = features(cache.spec, "t")["codes"][:6].numpy()
    rows[3, 1, 1, 1, 1] += 1
    with cache.store.write_shard("t", 0) as writer:
        writer.write(range(6), {"codes": rows})
        files = writer.publish()
    assert files[name].ends != cache.commits("t")[0].files[name].ends
    with pytest.raises(CorruptShardError, match="is not the file that was committed"):
        FeatureCache.open(cache.storage.url).read([0])
    assert [problem.shard for problem in verify(FeatureCache.open(cache.storage.url))] == [0]


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
def test_a_shard_that_fails_leaves_nothing(tmp_path: Path, images: Path, store: StoreKind) -> None:
    cache = make_cache(tmp_path / "cache", images, skip_shards=[2], store=store)

    def fail() -> None:
        with cache.store.write_shard("alpha", 2) as writer:
            writer.write([0], {"codes": features(cache.spec, "alpha")["codes"][:1].numpy()})
            raise RuntimeError("the power goes")

    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RuntimeError):
        fail()
    assert [path for path in sorted(tmp_path.rglob("*")) if path.is_file()] == [
        p for p in before if p.is_file()
    ]


def test_rows_are_read_into_buffers_that_are_used_again(make: Make, images: Path) -> None:
    cache = make(images, teachers={"t": teacher_spec(codec="f16", cls_token=True)})
    written = features(cache.spec, "t")
    buffers = cache.buffers(4)
    for rows in ([15, 0, 7, 6], [3, 3], [11]):
        codes = cache.read(rows, out=buffers)["t"].tensors()["codes"]
        assert torch.equal(codes, written["codes"][rows])
        assert codes.data_ptr() == buffers["t"].tensors()["codes"].data_ptr()
    cls_token = torch.empty(2, 4, 8, dtype=torch.float16)
    assert torch.equal(cache.read_tokens([5, 1], "t", "cls", out=cls_token), written["cls"][[5, 1]])
    assert torch.equal(cls_token, written["cls"][[5, 1]])
    assert cache.read([], out=buffers)["t"].tensors()["codes"].shape == (0, 4, 2, 2, 8)


def test_buffers_that_do_not_fit_are_refused(make: Make, images: Path) -> None:
    cache = make(images, teachers={"t": teacher_spec(codec="f16"), "wide": teacher_spec(width=9)})
    with pytest.raises(ValueError, match=r"cache\.buffers\(\)"):
        cache.read([0, 1], ["t"], out=cache.buffers(1))
    with pytest.raises(ValueError, match=r"got:.*float32(.|\n)*expected:.*float16"):
        cache.read([0], ["t"], out={"t": cache.buffers(1)["wide"]})
    with pytest.raises(ValueError, match=r"got:.*none"):
        cache.read([0], ["t", "wide"], out=cache.buffers(1, ["t"]))


def without_row_0(cache: FeatureCache, name: str, data: bytes) -> bytes:
    if cache.spec.store == "webdataset":
        tar_rows = webdataset_store.read_tar_index(cache.storage, name, 6).copy()
        end = data.rindex(webdataset_store.index_bytes(tar_rows))
        tar_rows[0] = 0
        changed = webdataset_store.index_bytes(tar_rows)
        return data[:end] + changed + data[end + len(changed) :]
    index = parse_index(data[-index_nbytes(6) :], 6, len(data)).copy()
    index[0] = ABSENT
    return data[: -index_nbytes(6)] + index.tobytes() + checksum(index.tobytes())


@pytest.mark.parametrize("hashes", [False, True])
@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "absent row"])
def test_damaged_files_are_an_error_that_says_how_to_look(
    make: Make, images: Path, damage: str, hashes: bool
) -> None:
    cache = make(images, hashes=hashes)
    (name,) = cache.store.shard_files("alpha", 0)
    data = cache.storage.read(name)
    if damage == "gone":
        cache.storage.remove(name)
    elif damage == "absent row":
        cache.storage.write(name, without_row_0(cache, name, data))
    else:
        cache.storage.write(name, {"empty": b"", "cut": data[:-30]}[damage])
    with pytest.raises(CorruptShardError, match="teachercache verify"):
        cache.read([0], ["alpha"])
    if damage == "absent row" and not hashes:
        assert torch.equal(
            cache.read([1], ["alpha"])["alpha"].tensors()["codes"],
            features(cache.spec, "alpha")["codes"][[1]],
        )


def test_changed_bytes_are_noticed_where_checksums_are_asked_for(make: Make, images: Path) -> None:
    cache = make(images, hashes=False)
    (name,) = cache.store.shard_files("alpha", 0)
    data = bytearray(cache.storage.read(name))
    data[data.index(features(cache.spec, "alpha")["codes"][0].numpy().tobytes()) + 5] ^= 1
    cache.storage.write(name, data)
    with pytest.raises(CorruptShardError, match="teachercache verify"):
        FeatureCache.open(cache.storage.url, checksums=True).read([0], ["alpha"])


def test_two_writers_of_a_shard_leave_that_of_one_whole(make: Make, images: Path) -> None:
    """As two jobs do that computed the same shard; `Manifest.publishing` then lets one of them commit."""
    cache = make(images, skip_shards=[0])
    both_are_writing = threading.Barrier(2, timeout=60)
    values = features(cache.spec, "alpha")["codes"][:6].numpy()
    records: list[dict[str, FileRecord]] = []

    def write(sign: int) -> None:
        with cache.store.write_shard("alpha", 0) as writer:
            writer.write(range(3), {"codes": sign * values[:3]})
            both_are_writing.wait()
            writer.write(range(3, 6), {"codes": sign * values[3:]})
            records.append(writer.publish())

    threads = [threading.Thread(target=write, args=(sign,)) for sign in (1, -1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (name,) = cache.store.shard_files("alpha", 0)
    assert cache.storage.checksum(name) in {record[name].checksum for record in records}
    commit_shard(cache, "alpha", 0)
    found = FeatureCache.open(cache.storage.url, checksums=True).read(range(6), ["alpha"])
    assert torch.equal(found["alpha"].tensors()["codes"], torch.from_numpy(values))
