"""Files that were damaged or made to do harm: only our own errors come out, soon, and little is allocated.

Checksums find accidents. Here every file is sealed again after it was changed, as somebody would who
means it.
"""

from __future__ import annotations

import ast
import json
import shutil
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cache_builder.verify import strays, verify
from pipeline import FeatureCache
from pipeline.errors import CacheError, TeacherCacheError
from pipeline.manifest import Manifest, QuarantineEntry
from pipeline.seal import UNSEALED, seal
from pipeline.storage import Storage
from pipeline.stores.shard_format import CHECKSUM_NBYTES, checksum
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


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hostile")
    teachers = {"alpha": teacher_spec(codec="f16", cls_token=True)}
    images = make_images(root / "images", 6)
    cache = make_cache(root / "cache", images, teachers=teachers, invalid_samples=[2])
    entry = QuarantineEntry(sample_index=2, key="image_002", location="image_002.jpg", reason="cut")
    cache.manifest.write_quarantine(0, [entry])
    assert verify(cache, full=True) == []
    return root / "cache"


@pytest.fixture(scope="module")
def folder(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(original, tmp_path_factory.mktemp("copy") / "cache"))


def use(folder: Path) -> None:
    """All that is done with a cache."""
    for direct in (True, False):
        cache = FeatureCache.open(folder, direct=direct, checksums=True)
        cache.valid_samples()
        for teacher in cache.teachers:
            cache.read([0, 1, 11], [teacher])
        cache.read_tokens([0, 11], "alpha", "cls")
        cache.key(0)
        cache.view(0)
        cache.image_bytes(0)
        cache.manifest.quarantine()
    verify(cache, full=True)
    strays(cache)


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
        container, key = data.draw(st.sampled_from(list(places(content)) or [(content, "schema_version")]))
        if data.draw(st.integers(0, 9)):
            container[key] = data.draw(of_the_same_kind(container[key]))
        else:
            del container[key]
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
    assert_refused(lambda: Manifest(Storage.at(folder)).commits("alpha") and FeatureCache.open(folder))


def test_a_table_of_more_rows_than_bytes_is_not_unpacked(original: Path, tmp_path: Path) -> None:
    """Run lengths: 20 million equal lines in 120 kB."""
    folder = Path(shutil.copytree(original, tmp_path / "cache"))
    path, views = folder / "views.parquet", Manifest(Storage.at(folder)).views()
    block = views.take(np.zeros(1_000_000, np.int64))
    with pq.ParquetWriter(path, views.schema, compression="zstd", max_rows_per_page=10**6) as writer:
        for _ in range(20):
            writer.write_table(block)
        writer.add_key_value_metadata({"checksum": UNSEALED})
    data = seal(path.read_bytes())
    path.write_bytes(data)
    assert len(data) < 200_000
    assert_refused(lambda: FeatureCache.open(folder).views)


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
    path.write_bytes(sealed(content | {"files": {"../secret": file}}))
    (problem,) = verify(FeatureCache.open(folder), full=True)
    assert "would leave its folder" in problem.reason


@pytest.mark.parametrize("member", [[-512, 10], [0, 10**18], [10**18, 1], [0, -1]])
def test_ranges_in_records_stay_in_the_file(original: Path, tmp_path: Path, member: list[int]) -> None:
    folder = Path(shutil.copytree(original, tmp_path / "cache"))
    path = folder / RECORDS[1]
    path.write_bytes(sealed(json.loads(path.read_text()) | {"members": [member]}))
    with pytest.raises(CacheError, match="members must be byte ranges"):
        FeatureCache.open(folder).commits("alpha")
