"""A line for each view, in Parquet and in Lance: what is in it, and who reads it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from teachercache import FeatureCache
from teachercache.pipeline.errors import CacheError, MissingExtraError
from teachercache.pipeline.rearranging.exports import export_lines
from tests.make_cache import make_cache, make_images, teacher_spec

HAS_LANCE = importlib.util.find_spec("lance") is not None


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    """5 samples in two classes × 2 views; sample 2 could not be decoded."""
    folder = tmp_path_factory.mktemp("lines")
    for name, count in (("cats", 3), ("dogs", 2)):
        make_images(folder / "images" / name, count, seed=count)
    teachers = {"alpha": teacher_spec(cls_token=True), "beta": teacher_spec(width=4, grid=3, codec="bf16")}
    return make_cache(folder / "cache", folder / "images", teachers=teachers, invalid_samples=[2])


def check(cache: FeatureCache, table: pa.Table) -> None:
    assert table.schema == pa.schema(
        [
            ("key", pa.string()),
            ("view", pa.int32()),
            ("row", pa.int64()),
            ("label", pa.string()),
            ("mean_alpha", pa.list_(pa.float32(), 8)),
            ("cls_alpha", pa.list_(pa.float32(), 8)),
            ("mean_beta", pa.list_(pa.float32(), 4)),
        ]
    )
    rows = [0, 1, 2, 3, 6, 7, 8, 9]
    assert table["row"].to_pylist() == rows
    assert table["view"].to_pylist() == [0, 1] * 4
    assert table["label"].to_pylist() == ["cats"] * 4 + ["dogs"] * 4
    assert table["key"].to_pylist() == [cache.key(row // 2) for row in rows]
    for name, encoded in cache.read(rows).items():
        expected = encoded.decode()[:, 1].mean((1, 2))
        np.testing.assert_allclose(np.stack(table[f"mean_{name}"].to_numpy()), expected, rtol=1e-5)
    tokens = cache.read_tokens(rows, "alpha", "cls")[:, 1].numpy()
    np.testing.assert_array_equal(np.stack(table["cls_alpha"].to_numpy()), tokens)


def test_a_parquet_file_holds_every_readable_view(cache: FeatureCache, tmp_path: Path) -> None:
    assert export_lines(cache, str(tmp_path / "new" / "lines.parquet"), "parquet", level=1) == 8
    check(cache, pq.read_table(tmp_path / "new" / "lines.parquet"))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["lines.parquet"]


def test_the_datasets_library_loads_it(cache: FeatureCache, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    export_lines(cache, str(tmp_path / "lines.parquet"), "parquet")
    loaded = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "lines.parquet"), split="train", cache_dir=str(tmp_path / "hf")
    )
    assert {name: loaded[3][name] for name in ("key", "view", "row", "label")} == {
        "key": cache.key(1),
        "view": 1,
        "row": 3,
        "label": "cats",
    }


@pytest.mark.skipif(not HAS_LANCE, reason="the package pylance is not installed")
def test_a_lance_data_set_holds_the_same(cache: FeatureCache, tmp_path: Path) -> None:
    """In a process of its own: a process that has imported lance may not fork any more."""
    code = """
import sys
import lance
import pyarrow.parquet as pq
from teachercache import FeatureCache
from teachercache.pipeline.rearranging.exports import export_lines
cache, out, copy = sys.argv[1:]
assert export_lines(FeatureCache.open(cache), out, "lance", level=1) == 8
pq.write_table(lance.dataset(out).to_table(), copy)
"""
    copy = tmp_path / "copy.parquet"
    command = [sys.executable, "-c", code, cache.storage.url, str(tmp_path / "lines.lance"), str(copy)]
    subprocess.run(command, check=True)
    check(cache, pq.read_table(copy))


def test_without_the_package_the_error_says_how_to_get_it(
    cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lance", None)  # as if it were not installed
    with pytest.raises(MissingExtraError, match=r"pip install 'teachercache\[lance\]'"):
        export_lines(cache, str(tmp_path / "lines.lance"), "lance")
    assert list(tmp_path.iterdir()) == []


def test_a_level_that_is_not_stored_is_refused(cache: FeatureCache, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="level 4 of 4"):
        export_lines(cache, str(tmp_path / "lines.parquet"), "parquet", level=4)
    assert list(tmp_path.iterdir()) == []
