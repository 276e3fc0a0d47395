from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ImageDecodeError, SourceError
from pipeline.sources import open_source
from tests.images import encode, photo, write_folder, write_parquet

JPEGS = [encode(photo(40 + i, 30, seed=i)) for i in range(7)]


def scan(root: Path) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in open_source(root, "parquet").scan().to_pylist()}


def test_rows_without_a_name_of_their_own_are_named_by_file_and_row(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data/a.parquet", JPEGS, ["x.jpg", None, "dir/y.jpg", "x.jpg", "", ".jpg", "z"])
    write_parquet(tmp_path / "data/b.parquet", JPEGS[:2], ["y.png", "w.jpg"])
    found = scan(tmp_path)
    assert sorted(found) == sorted(
        [*(f"data/a/{row:08d}" for row in (0, 1, 2, 3, 4)), ".jpg", "z", "data/b/00000000", "w"]
    )
    assert {row["status"] for row in found.values()} == {"ok"}
    assert found["data/a/00000003"]["offset"] == 3


def test_every_row_of_every_row_group_is_found_again(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", JPEGS, [f"{i}.jpg" for i in range(7)], rows_per_group=3)
    source = open_source(tmp_path)
    for i, row in enumerate(source.scan().to_pylist()):
        assert (row["key"], row["offset"], row["width"]) == (str(i), i, 40 + i)
        assert source.read(row["path"], row["offset"], row["nbytes"]) == JPEGS[i]


def test_null_bytes_and_bad_images(tmp_path: Path) -> None:
    write_parquet(
        tmp_path / "a.parquet", [JPEGS[0], None, b"", b"<html>"], ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    )
    assert {key: row["status"] for key, row in scan(tmp_path).items()} == {
        "0": "ok",
        "a/00000001": "the row has null bytes",
        "2": "the file has zero bytes",
        "3": "not an image: it starts with b'<html>'",
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


def test_unsafe_names_are_kept_out(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", JPEGS[:4], ["ok.jpg", "new\nline.jpg", "..", "a\0b.jpg"])
    found = scan(tmp_path)
    assert found["ok"]["status"] == "ok"
    bad = [row for key, row in found.items() if key != "ok"]
    assert len(bad) == 3
    assert all(str(row["status"]).startswith("unsafe name") for row in bad)
    assert all(str(row["key"]).isprintable() for row in bad)


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
    write_parquet(tmp_path / "good.parquet", JPEGS, [f"{i}.jpg" for i in range(7)])
    data = (tmp_path / "good.parquet").read_bytes()
    write_folder(
        tmp_path, {"cut.parquet": data[: len(data) // 2], "page.parquet": b"<html>", "none.parquet": b""}
    )
    found = scan(tmp_path)
    assert [key for key, row in found.items() if row["status"] == "ok"] == [str(i) for i in range(7)]
    bad = {row["path"]: row["status"] for row in found.values() if row["status"] != "ok"}
    assert sorted(bad) == ["cut.parquet", "none.parquet", "page.parquet"]
    assert all(str(status).startswith("the Parquet file cannot be read: ") for status in bad.values())


def test_a_damaged_row_group_is_reported_and_the_others_read(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", JPEGS, [f"{i}.jpg" for i in range(7)], rows_per_group=3)
    chunk = pq.read_metadata(path).row_group(1).column(0)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(data)
    found = scan(tmp_path)
    assert [key for key, row in found.items() if row["status"] == "ok"] == ["0", "1", "2", "6"]
    (bad,) = (row for row in found.values() if row["status"] != "ok")
    assert bad["offset"] == 3
    with pytest.raises(ImageDecodeError, match=r"row 4 of a\.parquet cannot be read"):
        open_source(tmp_path).read("a.parquet", 4, len(JPEGS[4]))
    assert str(bad["status"]).startswith("rows 3 to 5 cannot be read: ")
