import os
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from teachercache.pipeline.errors import ImageDecodeError, SourceError
from teachercache.pipeline.sources import open_source, parquet
from tests.images import encode, photo, write_folder, write_parquet

ROOT = Path(__file__).parents[2]
JPEGS = [encode(photo(40 + i, 30, seed=i)) for i in range(7)]


def scan(root: Path) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in open_source(root, "parquet").scan().to_pylist()}


def damage(path: Path, group: int, column: int) -> None:
    """Overwrites a column (image.bytes is 0, image.path 1) of a row group."""
    chunk = pq.read_metadata(path).row_group(group).column(column)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(data)


def test_samples_keep_the_order_of_the_rows(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data/a.parquet", JPEGS * 2, rows_per_group=3)
    write_parquet(tmp_path / "data/b.parquet", JPEGS)
    samples = open_source(tmp_path).scan()
    expected = [*((f"data/a/{i:08d}", i) for i in range(14)), *((f"data/b/{i:08d}", i) for i in range(7))]
    assert list(zip(samples["key"].to_pylist(), samples["offset"].to_pylist(), strict=True)) == expected
    assert samples["width"].to_pylist() == [40 + i for i in range(7)] * 3


def test_reading_in_table_order_decodes_each_row_group_once(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", JPEGS)
    write_parquet(tmp_path / "b.parquet", JPEGS, rows_per_group=3)
    source = open_source(tmp_path)
    samples = source.scan().to_pylist()
    parquet._row_group.cache_clear()
    read = [source.read(row["path"], row["offset"], row["nbytes"]) for row in samples]
    assert read == JPEGS * 2
    assert parquet._row_group.cache_info().misses == 4 + 3
    for row in samples[::2] + samples[1::2]:
        source.read(row["path"], row["offset"], row["nbytes"])
    assert parquet._row_group.cache_info().misses > 2 * (4 + 3)  # any other order costs more


def test_threads_that_need_the_same_row_group_decode_it_once(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", JPEGS, rows_per_group=7)
    source = open_source(tmp_path)
    together = threading.Barrier(7)

    def read(row: dict[str, Any]) -> bytes:
        together.wait()
        return source.read(row["path"], row["offset"], row["nbytes"])

    with ThreadPoolExecutor(7) as pool:
        samples = source.scan().to_pylist()
        parquet._row_group.cache_clear()
        assert list(pool.map(read, samples)) == JPEGS
    assert parquet._row_group.cache_info().misses == 1


FORK = """
import sys
from multiprocessing import get_context
from teachercache.pipeline.sources import open_source, parquet

source = open_source(sys.argv[1])
row = source.scan().to_pylist()[0]
with parquet._LOCKS[0]:
    child = get_context("fork").Process(target=source.read, args=(row["path"], 0, row["nbytes"]))
    child.start()
    child.join(timeout=60)
child.kill()
assert child.exitcode == 0, child.exitcode
"""


def test_a_forked_process_does_not_wait_for_threads_of_its_parent(tmp_path: Path) -> None:
    """In a process of its own: one that runs many tests has threads, whose locks a fork copies."""
    write_parquet(tmp_path / "a.parquet", JPEGS)
    command = [sys.executable, "-c", FORK, str(tmp_path)]
    subprocess.run(command, check=True, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_null_bytes_and_bad_images(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [JPEGS[0], None, b"", b"<html>"])
    assert {key: row["status"] for key, row in scan(tmp_path).items()} == {
        "a/00000000": "ok",
        "a/00000001": "the row has null bytes",
        "a/00000002": "the file has zero bytes",
        "a/00000003": "not an image: it starts with b'<html>'",
    }


def test_a_null_image_is_reported_too(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": JPEGS[0], "path": "a.jpg"}, None], kind)
    pq.write_table(pa.table({"image": images}), tmp_path / "a.parquet")
    assert [row["status"] for row in scan(tmp_path).values()] == ["ok", "the row has null bytes"]


def test_large_binary_and_no_path(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.large_binary())])
    pq.write_table(pa.table({"image": pa.array([{"bytes": JPEGS[0]}], kind)}), tmp_path / "a.parquet")
    assert list(scan(tmp_path)) == ["a/00000000"]


def test_the_names_of_the_images_are_not_even_read(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", JPEGS)
    expected = open_source(tmp_path).scan()
    damage(path, 0, column=1)
    assert open_source(tmp_path).scan().equals(expected)


def test_an_unsafe_file_name_is_explained(tmp_path: Path) -> None:
    write_parquet(tmp_path / "new\nline.parquet", JPEGS)
    with pytest.raises(SourceError, match="rename the file"):
        open_source(tmp_path).scan()


@pytest.mark.parametrize(
    "columns",
    [
        {"image": [b"1"]},
        {"img": [{"bytes": b"1", "path": "a"}]},
        {"image": [{"data": b"1"}]},
        {"image": [{"bytes": "text"}]},
    ],
)
def test_another_layout_is_explained(tmp_path: Path, columns: dict[str, list[object]]) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match="not in the Hub's image layout") as caught:
        open_source(tmp_path).scan()
    assert next(iter(columns)) in str(caught.value)


def test_a_cut_file_is_reported_and_the_others_read(tmp_path: Path) -> None:
    write_parquet(tmp_path / "good.parquet", JPEGS)
    data = (tmp_path / "good.parquet").read_bytes()
    write_folder(
        tmp_path, {"cut.parquet": data[: len(data) // 2], "page.parquet": b"<html>", "none.parquet": b""}
    )
    found = scan(tmp_path)
    assert [row["offset"] for row in found.values() if row["status"] == "ok"] == list(range(7))
    bad = {row["path"]: row["status"] for row in found.values() if row["status"] != "ok"}
    assert sorted(bad) == ["cut.parquet", "none.parquet", "page.parquet"]
    assert all(str(status).startswith("the Parquet file cannot be read: ") for status in bad.values())


def test_a_damaged_row_group_is_reported_and_the_others_read(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", JPEGS, rows_per_group=3)
    damage(path, 1, column=0)
    found = scan(tmp_path)
    assert [row["offset"] for row in found.values() if row["status"] == "ok"] == [0, 1, 2, 6]
    (bad,) = (row for row in found.values() if row["status"] != "ok")
    assert bad["offset"] == 3
    with pytest.raises(ImageDecodeError, match=r"row 4 of a\.parquet cannot be read"):
        open_source(tmp_path).read("a.parquet", 4, len(JPEGS[4]))
    assert str(bad["status"]).startswith("rows 3 to 5 cannot be read: ")


def test_other_columns_of_images_and_other_files_are_counted(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = pa.array([{"bytes": data, "path": None} for data in JPEGS[:3]], kind)
    pq.write_table(pa.table({"image": rows, "mask": rows, "text": ["a", "b", "c"]}), tmp_path / "a.parquet")
    write_folder(tmp_path, {"._a.parquet": b"left by macOS", "README.md": b"", "b.jsonl.gz": b""})
    left_out = Counter[str]()
    samples = open_source(tmp_path).scan(left_out=left_out)
    assert samples["status"].to_pylist() == ["ok"] * 3
    assert left_out == {"image in column mask": 3, "hidden": 1, ".md": 1, ".gz": 1}
