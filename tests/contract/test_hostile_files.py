"""Files that were damaged or made to do harm: only our own errors come out, soon, and little is allocated.

Checksums find accidents. Here every file is sealed again after it was changed, as somebody would who
means it.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st

from teachercache import FeatureCache, render_view
from teachercache.jobs.inspection.summary import summarize
from teachercache.pipeline.codecs import get_codec
from teachercache.pipeline.errors import CacheError, CorruptShardError, TeacherCacheError
from teachercache.pipeline.places.local_storage import LocalStorage
from teachercache.pipeline.places.open_storage import open_storage
from teachercache.pipeline.records.feature_stats import FeatureMoments
from teachercache.pipeline.records.manifest import Manifest, QuarantineEntry, moments_name, tables_name
from teachercache.pipeline.records.seal import UNSEALED, seal
from teachercache.pipeline.records.spec import StoreKind
from teachercache.pipeline.sources import open_source
from teachercache.pipeline.sources.keys import name_problem
from teachercache.pipeline.stores.shard_format import CHECKSUM_NBYTES, checksum
from teachercache.pipeline.stores.webdataset_store import index_bytes, read_tar_index
from teachercache.pipeline.verify import strays, verify
from tests.images import tar_bytes
from tests.make_cache import make_cache, make_images, teacher_spec

ROOT = Path(__file__).parents[2]
SHIPPED = [
    path
    for folder in ("pipeline", "cache_builder", "student", "jobs")
    for path in (ROOT / folder).rglob("*.py")
]
PICKLING = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
RECORDS = ("cache.json", "commits/alpha/00000.json", "commits/alpha/00001.json")
SHARDS = ("teachers/alpha/codes/c/0/0/0/0/0", "teachers/alpha/cls/c/0/0/0")
ROWS_PER_SHARD = 6


def offences(tree: ast.AST) -> Iterator[str]:
    """What could run code that a file holds."""
    for node in ast.walk(tree):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from (f"imports {module}" for module in modules if module.split(".")[0] in PICKLING)
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            allowed: dict[str, bool] = {
                "torch.load": keywords.get("weights_only") == "True",
                "np.load": keywords.get("allow_pickle", "False") == "False",
                "numpy.load": keywords.get("allow_pickle", "False") == "False",
                "torch.hub.load": False,
                "yaml.load": keywords.get("Loader") in ("yaml.SafeLoader", "yaml.CSafeLoader"),
                "yaml.unsafe_load": False,
                "yaml.full_load": False,
                "eval": False,
                "exec": False,
            }
            if not allowed.get(call, True):
                yield f"calls {ast.unparse(node)}"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled(path: Path) -> None:
    assert list(offences(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "eval(text)",
    ],
)
def test_unpickling_would_be_seen(code: str) -> None:
    assert list(offences(ast.parse(code)))


def make_victim(root: Path, store: StoreKind) -> Path:
    teachers = {"alpha": teacher_spec(codec="f16", cls_token=True)}
    images = make_images(root / "images", 6)
    cache = make_cache(
        root / "cache", images, teachers=teachers, invalid_samples=[2], store=store, hashes=False
    )
    entry = QuarantineEntry(sample_index=2, key="image_002", location="image_002.jpg", reason="cut")
    cache.manifest.write_quarantine(0, [entry])
    assert verify(cache, full=True) == []
    return root / "cache"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_victim(tmp_path_factory.mktemp("hostile"), "zarr")


@pytest.fixture(scope="module")
def folder(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(original, tmp_path_factory.mktemp("copy") / "cache"))


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_victim(tmp_path_factory.mktemp("hostile tars"), "webdataset")


def use(folder: Path) -> None:
    """All that is done with a cache."""
    cache = read_all(folder)
    verify(cache, full=True)
    strays(cache)


def read_all(folder: Path, roads: Sequence[bool] = (True, False)) -> FeatureCache:
    for direct in roads:
        cache = FeatureCache.open(folder, direct=direct, checksums=True)
        cache.valid_samples()
        for teacher in cache.teachers:
            cache.read([0, 1, 11], [teacher])
        cache.read_tokens([0, 11], "alpha", "cls")
        cache.key(0)
        cache.view(0)
        cache.image_bytes(0)
        cache.manifest.quarantine()
    return cache


def only_our_errors(folder: Path, name: str, data: bytes) -> None:
    before = (folder / name).read_bytes()
    (folder / name).write_bytes(data)
    try:
        with suppress(TeacherCacheError, IndexError):
            use(folder)
    finally:
        (folder / name).write_bytes(before)


def sealed(content: dict[str, Any]) -> bytes:
    """A record as its writer would write it, the spec's own hash included."""
    content = {key: value for key, value in content.items() if key not in ("checksum", "cache_id")}
    return seal(json.dumps(content | {"checksum": UNSEALED}).encode())


integers = st.sampled_from([0, 1, -1, 5, 6, 7, 12, 2**31, 2**63, 10**12, 10**18, 10**30]) | st.integers()
texts = st.sampled_from(["", "../../out", "/etc/passwd", "a\0b", "f32", "int4-dct", "images"]) | st.text()
documents = st.recursive(
    st.none() | st.booleans() | integers | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)


def of_the_same_kind(value: Any) -> st.SearchStrategy[Any]:
    """Mostly what a parser would let through."""
    kinds: list[tuple[type, st.SearchStrategy[Any]]] = [
        (bool, st.booleans()),
        (int, integers),
        (float, st.floats()),
        (str, texts),
        (list, st.lists(integers, max_size=5)),
    ]
    return next((strategy for kind, strategy in kinds if isinstance(value, kind)), documents) | documents


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON document."""
    for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield node, key
        yield from places(node[key])


@settings(max_examples=300, deadline=None)
@given(data=st.data(), name=st.sampled_from(RECORDS), changes=st.integers(1, 3))
def test_changed_records_give_our_errors(folder: Path, data: st.DataObject, name: str, changes: int) -> None:
    content = json.loads((folder / name).read_text())
    for _ in range(changes):
        change(content, data)
    only_our_errors(folder, name, sealed(content))


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(RECORDS), data=st.binary(max_size=200))
@example(name=RECORDS[0], data=b"[" * 10**6)
@example(name=RECORDS[1], data=b"1" * 10**6)
def test_records_of_any_bytes_give_our_errors(folder: Path, name: str, data: bytes) -> None:
    only_our_errors(folder, name, data)
    only_our_errors(folder, name, seal(data + UNSEALED.encode()))


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(SHARDS),
    places=st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 2**64 - 1)), min_size=1, max_size=4),
    cut=st.integers(0, 10**4) | st.none(),
    index_is_right=st.booleans(),
)
def test_changed_shards_give_our_errors(
    folder: Path, name: str, places: list[tuple[int, int]], cut: int | None, index_is_right: bool
) -> None:
    """Numbers anywhere, so also offsets and sizes in the index, which then gets its checksum again."""
    data = bytearray((folder / name).read_bytes())
    index_start = len(data) - 16 * ROWS_PER_SHARD - CHECKSUM_NBYTES
    for place, number in places:
        start = index_start + 8 * (place % (2 * ROWS_PER_SHARD)) if place % 2 else place % index_start
        data[start : start + 8] = number.to_bytes(8, "little")
    if index_is_right:
        data[-CHECKSUM_NBYTES:] = checksum(bytes(data[index_start:-CHECKSUM_NBYTES]))
    only_our_errors(folder, name, bytes(data[:cut]))


def change(content: Any, data: st.DataObject) -> None:
    """One value of a JSON document, or one less."""
    container, key = data.draw(st.sampled_from(list(places(content)) or [(content, "schema_version")]))
    if data.draw(st.integers(0, 9)):
        container[key] = data.draw(of_the_same_kind(container[key]))
    else:
        del container[key]


@settings(max_examples=100, deadline=None)
@given(data=st.data(), name=st.sampled_from(["codes/zarr.json", "cls/zarr.json", "zarr.json"]))
def test_changed_array_metadata_gives_our_errors(folder: Path, data: st.DataObject, name: str) -> None:
    content = json.loads((folder / "teachers" / "alpha" / name).read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        change(content, data)
    only_our_errors(folder, f"teachers/alpha/{name}", json.dumps(content).encode())


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [10**15, 4, 2, 2, 8]},
        {"shape": [12, 4, 2, 2, 10**12]},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [10**12, 4, 2, 2, 8]}}},
        {"data_type": "float64"},
    ],
)
def test_arrays_of_any_size_are_refused_before_they_are_allocated(
    original: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = Path(shutil.copytree(original, tmp_path / "cache"))
    path = folder / "teachers" / "alpha" / "codes" / "zarr.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    cache = FeatureCache.open(folder, direct=False)
    tracemalloc.start()
    with suppress(CacheError):  # more rows than there are hurt nobody
        cache.read([0], ["alpha"])
    assert tracemalloc.get_traced_memory()[1] < 300e6
    tracemalloc.stop()


@settings(max_examples=300, deadline=None)
@given(
    places=st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 2**64 - 1)), min_size=1, max_size=4),
    cut=st.integers(0, 10**4) | st.none(),
    index_is_right=st.booleans(),
)
def test_changed_tars_give_our_errors(
    tars: Path, places: list[tuple[int, int]], cut: int | None, index_is_right: bool
) -> None:
    """Numbers anywhere: in the headers of members and of safetensors, in rows, and in the index."""
    name = "teachers/alpha/00000.tar"
    data = bytearray((tars / name).read_bytes())
    index = read_tar_index(LocalStorage(tars), name, ROWS_PER_SHARD).copy()
    start = data.index(index_bytes(index))
    for place, number in places:
        if place % 2:
            index.reshape(-1)[place % index.size] = number
        else:
            data[place % start : place % start + 8] = number.to_bytes(8, "little")
    if index_is_right:
        for row in index:
            row[2] = google_crc32c.value(bytes(data[int(row[0]) : int(row[0]) + int(row[1])]))
        data[start : start + len(index_bytes(index))] = index_bytes(index)
    only_our_errors(tars, name, bytes(data[:cut]))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_tars_of_any_members_are_scanned_with_our_errors(tmp_path_factory: Any, data: st.DataObject) -> None:
    whole = bytearray(tar_bytes([("a.jpg", b"x" * 600), ("b/c.cls", b"7"), ("b/c.jpg", b"y" * 30)]))
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(whole) - 9))
        whole[place : place + 8] = data.draw(st.binary(min_size=8, max_size=8))
    for start in range(0, len(whole) - 511, 512):  # headers with the checksum that makes them count
        if data.draw(st.booleans()):
            header = whole[start : start + 512]
            total = sum(header) - sum(header[148:156]) + 8 * 32
            whole[start + 148 : start + 156] = b"%06o\0 " % total
    folder = tmp_path_factory.mktemp("tar")
    (folder / "a.tar").write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    with suppress(TeacherCacheError):
        samples = open_source(str(folder / "a.tar"), "webdataset").scan()
        assert all(name_problem(key) is None for key in samples["key"].to_pylist())


DTYPES = [torch.float64, torch.float32, torch.float16, torch.int64, torch.uint8, torch.bool]


def tensor_files(sound: dict[str, torch.Tensor]) -> st.SearchStrategy[bytes]:
    """Safetensors with some tensors of `sound`, of others under the same names, and any bytes."""
    shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)
    others = st.builds(lambda shape, dtype: torch.ones(shape, dtype=dtype), shapes, st.sampled_from(DTYPES))
    values = {name: st.just(tensor) | others for name, tensor in sound.items()}
    return st.binary(max_size=200) | st.fixed_dictionaries({}, optional=values).map(safetensors.torch.save)


MOMENTS = FeatureMoments.of(torch.ones(2, 4, 2, 2, 8), covariance=True).tensors()
TABLES = {
    codec: get_codec(codec)
    .calibrate(torch.randn(4, 4, 2, 2, 8, generator=torch.Generator().manual_seed(0)))
    .state()
    for codec in ("int8-hadamard", "int4-rings", "int4-dct")
}


@settings(max_examples=80, deadline=None)
@given(data=tensor_files(MOMENTS), shard=st.integers(0, 1))
@example(data=safetensors.torch.save({"a": torch.zeros(1)}), shard=1)
def test_statistics_of_any_tensors_give_our_errors(folder: Path, data: bytes, shard: int) -> None:
    """The record names the file with its checksum: it was meant."""
    before = {path: path.read_bytes() for path in sorted((folder / "commits" / "alpha").iterdir())}
    sound = safetensors.torch.save(MOMENTS)
    try:
        for number, path in enumerate(before):
            content, stats = json.loads(before[path]), data if number == shard else sound
            name = moments_name("alpha", number)
            file = {"nbytes": len(stats), "checksum": xxhash.xxh3_128_hexdigest(stats)}
            open_storage(folder).write(name, stats)
            path.write_bytes(sealed(content | {"files": content["files"] | {name: file}}))
        cache = FeatureCache.open(folder)
        assert verify(cache, full=True) == []
        with suppress(TeacherCacheError):
            cache.statistics("alpha").covariance_SCC()
    except ValueError as error:
        assert "no covariance" in str(error)  # noqa: PT017  (moments of both shards without products are sound)
    finally:
        shutil.rmtree(folder / "stats")
        for path, record in before.items():
            path.write_bytes(record)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), codec=st.sampled_from(sorted(TABLES)))
def test_codec_tables_of_any_tensors_give_our_errors(folder: Path, data: st.DataObject, codec: str) -> None:
    tables = data.draw(tensor_files(TABLES[codec]))
    content = json.loads((folder / "cache.json").read_text())
    content["teachers"]["alpha"] |= {"codec": codec, "tables_hash": xxhash.xxh3_128_hexdigest(tables)}
    open_storage(folder).write(tables_name("alpha"), tables)
    try:
        only_our_errors(folder, "cache.json", sealed(content))
    finally:
        shutil.rmtree(folder / "stats")


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_views_of_any_numbers_give_our_errors(folder: Path, data: st.DataObject) -> None:
    views = Manifest(open_storage(folder)).views(FeatureCache.open(folder).spec)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, views.num_columns - 1))
        field, values = views.schema.field(place), views.column(place).to_pylist()
        of_its_type = {
            pa.int64(): st.integers(-(2**63), 2**63 - 1),
            pa.int32(): st.integers(-(2**31), 2**31 - 1),
            pa.float32(): st.floats(width=32),
            pa.bool_(): st.booleans(),
        }[field.type]
        values[data.draw(st.integers(0, 1))] = data.draw(of_its_type)
        views = views.set_column(place, field, pa.array(values, field.type))
    views = views.slice(0, data.draw(st.sampled_from([len(views), 0, 1])))
    before = (folder / "views.parquet").read_bytes()
    try:
        Manifest(open_storage(folder)).write_table("views.parquet", views)
        cache = FeatureCache.open(folder)
        with suppress(TeacherCacheError):
            verify(cache, full=True)
        with suppress(TeacherCacheError, IndexError):
            render_view(cache.image(0), cache.view(0), (32, 32))
    finally:
        (folder / "views.parquet").write_bytes(before)


def change_spec(**changes: Any) -> Callable[[Path], None]:
    """Put numbers where `path__to__number` says."""

    def change(folder: Path) -> None:
        content = json.loads((folder / "cache.json").read_text())
        for path, value in changes.items():
            *parents, key = path.split("__")
            node = content
            for parent in parents:
                node = node[int(parent) if isinstance(node, list) else parent]
            node[key] = value
        (folder / "cache.json").write_bytes(sealed(content))

    return change


HUGE = {
    "samples": change_spec(dataset__num_samples=10**18, segments__0__samples=[0, 10**18]),
    "samples in a segment": change_spec(segments__0__samples=[0, 10**18]),
    "rows of a shard": change_spec(rows_per_shard=2 * 10**12),
    "the first row": change_spec(segments__0__first_row=6 * 10**17),
    "views": change_spec(views__num_views=6, segments__0__views=[0, 6 * 10**12]),
    "levels": change_spec(teachers__alpha__block_indices=list(range(10**5))),
    "channels": change_spec(teachers__alpha__width=10**9),
    "the grid": change_spec(teachers__alpha__native_grid=[10**9, 10**9]),
    "the image": change_spec(teachers__alpha__image_size=[10**9, 10**9]),
    "the global feature": change_spec(teachers__alpha__global_width=10**12),
    "the view": change_spec(views__size=[10**9, 10**9]),
    "negative rows": change_spec(segments__0__samples=[6, 0]),
}


@pytest.mark.parametrize("change", HUGE.values(), ids=HUGE)
def test_sizes_beyond_reason_are_refused_before_they_are_allocated(
    original: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    folder = Path(shutil.copytree(original, tmp_path / "cache"))
    change(folder)
    assert_refused(lambda: use(folder))


def assert_refused(action: Callable[[], object]) -> None:
    """Soon, by an error of ours, and with little memory."""
    tracemalloc.start()
    start = time.monotonic()
    try:
        with pytest.raises(CacheError):
            action()
        assert tracemalloc.get_traced_memory()[1] < 300e6
        assert time.monotonic() - start < 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_of_a_gigabyte_is_not_read(original: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(original, tmp_path / "cache"))
    with (folder / name).open("r+b") as file:
        file.truncate(1 << 30)  # takes no room on the disk
    assert_refused(lambda: Manifest(open_storage(folder)).commits("alpha") and FeatureCache.open(folder))


def test_a_table_of_more_rows_than_bytes_is_not_unpacked(original: Path, tmp_path: Path) -> None:
    """Run lengths: 20 million equal lines in 120 kB."""
    folder = Path(shutil.copytree(original, tmp_path / "cache"))
    path, cache = folder / "views.parquet", FeatureCache.open(folder)
    views = cache.manifest.views(cache.spec)
    block = views.take(np.zeros(1_000_000, np.int64))
    with pq.ParquetWriter(path, views.schema, compression="zstd", max_rows_per_page=10**6) as writer:
        for _ in range(20):
            writer.write_table(block)
        writer.add_key_value_metadata({"checksum": UNSEALED})
    data = seal(path.read_bytes())
    path.write_bytes(data)
    assert len(data) < 200_000
    assert_refused(lambda: FeatureCache.open(folder).views)


def test_a_table_of_one_long_text_in_every_line_is_not_unfolded(original: Path, tmp_path: Path) -> None:
    """A dictionary: 2,000 lines of one key of 1 MiB in 3 kB."""
    folder = Path(shutil.copytree(original, tmp_path / "cache"))
    samples = FeatureCache.open(folder).samples.take(np.zeros(2000, np.int64))
    path, keys = (
        folder / "samples.parquet",
        pa.DictionaryArray.from_arrays(np.zeros(2000, np.int32), ["k" * 2**20]),
    )
    table = samples.set_column(0, "key", keys)
    with pq.ParquetWriter(path, table.schema, compression="zstd", store_schema=False) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"checksum": UNSEALED})
    path.write_bytes(seal(path.read_bytes()))
    assert path.stat().st_size < 10_000
    pool = pa.default_memory_pool()
    before = pool.max_memory()
    with pytest.raises(CacheError, match=r"2,000 lines with [0-9,]+ bytes of key and more"):
        FeatureCache.open(folder).key(0)
    assert pool.max_memory() - before < 100e6


IRREGULAR = [
    "cache.json",
    "samples.parquet",
    "views.parquet",
    RECORDS[1],
    "quarantine/00000.jsonl",
    "teachers/alpha/codes/zarr.json",
    "teachers/alpha/codes/c/0/0/0/0/0",
]


@pytest.mark.parametrize("what", ["/dev/zero", "a pipe", "a folder"])
@pytest.mark.parametrize("name", IRREGULAR)
def test_what_is_no_file_is_neither_waited_for_nor_read(
    original: Path, tmp_path: Path, name: str, what: str
) -> None:
    folder = Path(shutil.copytree(original, tmp_path / "cache"))
    (folder / name).unlink()
    if what == "a pipe":
        os.mkfifo(folder / name)
    elif what == "a folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to(what)
    for road in (True, False):
        assert_refused(partial(read_all, folder, [road]))
    if name != "cache.json":
        cache = FeatureCache.open(folder)
        assert verify(cache, full=True)
        assert summarize(cache.storage)["problems"]
        with suppress(TeacherCacheError):
            strays(cache)


@pytest.mark.parametrize("value", [b"\xdf\xff", None])
def test_a_table_with_values_that_cannot_be_is_refused(
    original: Path, tmp_path: Path, value: bytes | None
) -> None:
    folder = Path(shutil.copytree(original, tmp_path / "cache"))
    samples = FeatureCache.open(folder).samples
    keys = pa.array([value] * samples.num_rows, pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(keys), keys.buffers(), keys.null_count)
    table = samples.set_column(0, "key", text)
    with pq.ParquetWriter(folder / "samples.parquet", table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"checksum": UNSEALED})
    (folder / "samples.parquet").write_bytes(seal((folder / "samples.parquet").read_bytes()))
    with pytest.raises(CacheError, match=r"samples.parquet(.|\n)*(UTF8|without a value)"):
        FeatureCache.open(folder).key(0)


@pytest.mark.parametrize("name", ["../../out", "/etc", "a/b", "..", ".", "images", "a\\b", "a\0b", ""])
def test_names_of_teachers_stay_in_the_cache(original: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(original, tmp_path / "cache"))
    content = json.loads((folder / "cache.json").read_text())
    content["teachers"][name] = content["teachers"]["alpha"]
    (folder / "cache.json").write_bytes(sealed(content))
    with pytest.raises(CacheError, match=r"teacher's name|leave its folder"):
        FeatureCache.open(folder)


def test_names_in_records_stay_in_the_cache(original: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(original, tmp_path / "cache"))
    (tmp_path / "secret").write_text("secret")
    path = folder / RECORDS[1]
    content = json.loads(path.read_text())
    (file,) = (file for name, file in content["files"].items() if "codes" in name)
    path.write_bytes(sealed(content | {"files": content["files"] | {"../secret": file}}))
    (problem,) = verify(FeatureCache.open(folder), full=True)
    assert "would leave its folder" in problem.reason


@pytest.mark.parametrize("member", [[-512, 10], [0, 10**18], [10**18, 1], [0, -1]])
def test_ranges_in_records_stay_in_the_file(original: Path, tmp_path: Path, member: list[int]) -> None:
    folder = Path(shutil.copytree(original, tmp_path / "cache"))
    path = folder / RECORDS[1]
    path.write_bytes(sealed(json.loads(path.read_text()) | {"members": [member]}))
    with pytest.raises(CacheError, match="members must be byte ranges"):
        FeatureCache.open(folder).commits("alpha")


def test_records_of_another_cache_are_not_read(original: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(original, tmp_path / "cache"))
    path = folder / RECORDS[1]
    path.write_bytes(sealed(json.loads(path.read_text()) | {"content_id": "0" * 32}))
    with pytest.raises(CorruptShardError, match=r"computed for another spec(.|\n)*teachercache repair"):
        FeatureCache.open(folder).read([1], ["alpha"])
