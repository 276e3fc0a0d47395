"""What holds for every kind of source."""

import os
import pickle
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest

from teachercache.pipeline.errors import (
    EmptySourceError,
    ImageDecodeError,
    RecipeError,
    SourceError,
    SourceNotFoundError,
)
from teachercache.pipeline.records.tables import SAMPLE_SCHEMA, dataset_fingerprint
from teachercache.pipeline.sources import decode_image, image_folder, open_source, parquet
from teachercache.pipeline.sources import source as source_module
from teachercache.pipeline.sources.source import left_out_line
from tests.images import encode, exif, photo, tar_bytes, write_folder, write_parquet

KINDS = ["image_folder", "webdataset", "parquet", "ilsvrc"]
IMAGES = {
    f"n{i % 2:08d}_{i}": encode(photo(40 + i, 30, seed=i), exif=exif(6) if i % 3 == 0 else b"")
    for i in range(24)
}
SIZES = {key: (30, 40 + i) if i % 3 == 0 else (40 + i, 30) for i, key in enumerate(IMAGES)}

PARQUET_KEYS = {f"data/train-{i // 12}/{i % 12:08d}": name for i, name in enumerate(IMAGES)}

Maker = Callable[[Path], Path]


def make_folder(root: Path) -> Path:
    return write_folder(root, {f"{key}.JPEG": data for key, data in IMAGES.items()})


def make_webdataset(root: Path) -> Path:
    shards: dict[str, bytes] = {}
    for i in range(0, 24, 2):  # enough tars that processes are started for them
        members = []
        for key in list(IMAGES)[i : i + 2]:
            members += [(f"{key}.jpg", IMAGES[key]), (f"{key}.cls", str(int(key[1:9])).encode())]
        shards[f"train-{i:04d}.tar"] = tar_bytes(members)
    return write_folder(root, shards)


def make_parquet(root: Path) -> Path:
    for name, part in (("train-0", slice(0, 12)), ("train-1", slice(12, 24))):
        keys = list(IMAGES)[part]
        images, labels = [IMAGES[key] for key in keys], [int(key[1:9]) for key in keys]
        write_parquet(root / "data" / f"{name}.parquet", images, labels)
    return root


def make_ilsvrc(root: Path) -> Path:
    classes = []
    for wnid in ("n00000000", "n00000001"):
        members = [(f"{key}.JPEG", data) for key, data in IMAGES.items() if key.startswith(wnid)]
        classes.append((f"{wnid}.tar", tar_bytes(members)))
    write_folder(root, {"ILSVRC2012_img_train.tar": tar_bytes(classes)})
    return root / "ILSVRC2012_img_train.tar"


MAKERS: dict[str, Maker] = {
    "image_folder": make_folder,
    "webdataset": make_webdataset,
    "parquet": make_parquet,
    "ilsvrc": make_ilsvrc,
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def location(kind: str, tmp_path: Path) -> Path:
    return MAKERS[kind](tmp_path / "source")


@pytest.fixture
def names(kind: str) -> dict[str, str]:
    """The name in IMAGES that each key stands for: in Parquet files, a key is file and row."""
    return PARQUET_KEYS if kind == "parquet" else {name: name for name in IMAGES}


def rows(table: pa.Table) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = table.to_pylist()
    return found


def test_kinds_are_told_by_looking(kind: str, location: Path) -> None:
    source = open_source(location)
    assert (source.kind, source.location) == (kind, str(location))


def test_the_table_lists_every_image(kind: str, location: Path, names: dict[str, str]) -> None:
    table = open_source(location).scan()
    assert table.schema == SAMPLE_SCHEMA
    assert table["key"].to_pylist() == sorted(names)
    assert set(table["status"].to_pylist()) == {"ok"}
    for row in rows(table):
        name = names[row["key"]]
        assert row["nbytes"] == len(IMAGES[name])
        assert (row["width"], row["height"]) == SIZES[name]
        label = {"image_folder": None, "ilsvrc": name[:9]}.get(kind, str(int(name[1:9])))
        assert row["label"] == label


def test_read_gives_the_bytes_back(location: Path, names: dict[str, str]) -> None:
    source = open_source(location)
    table = source.scan()
    source = pickle.loads(pickle.dumps(source))  # noqa: S301  # as Ray hands it to another process
    for row in rows(table):
        data = source.read(row["path"], row["offset"], row["nbytes"])
        assert data == IMAGES[names[row["key"]]]
        assert decode_image(data).size == (row["width"], row["height"])


def test_threads_may_share_a_source(location: Path, names: dict[str, str]) -> None:
    source = open_source(location)
    table = rows(source.scan()) * 8
    together = threading.Barrier(8)

    def read(part: int) -> bool:
        together.wait()
        return all(
            source.read(row["path"], row["offset"], row["nbytes"]) == IMAGES[names[row["key"]]]
            for row in table[part::8]
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))


def test_root_and_time_do_not_change_the_table(kind: str, location: Path, tmp_path: Path) -> None:
    here = open_source(location).scan()
    elsewhere = MAKERS[kind](tmp_path / "elsewhere" / "deeper")
    for path in elsewhere.rglob("*"):
        os.utime(path, (1, 1))
    there = open_source(elsewhere).scan()
    assert there.equals(here)
    assert dataset_fingerprint(there) == dataset_fingerprint(here)


def test_units_give_the_same_rows_in_another_process(location: Path) -> None:
    source = open_source(location)
    for unit in source.units():
        other_source, other_unit = pickle.loads(pickle.dumps((source, unit)))  # noqa: S301
        assert other_source.scan_unit(other_unit) == source.scan_unit(unit)


def test_processes_do_not_change_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(make_folder(tmp_path))
    alone = source.scan()
    monkeypatch.setattr(image_folder, "_FILES_PER_UNIT", 2)
    monkeypatch.setattr(source_module, "_SECONDS_ALONE", 0.0)
    counts: list[int] = []
    assert source.scan(workers=2, progress=counts.append).equals(alone)
    assert counts == [2] * 12


def test_the_fingerprint_is_that_of_the_images_not_of_their_container(tmp_path: Path) -> None:
    named = [make for kind, make in MAKERS.items() if kind != "parquet"]  # whose keys are file and row
    prints = {dataset_fingerprint(open_source(make(tmp_path / make.__name__)).scan()) for make in named}
    assert len(prints) == 1


def test_parquet_files_hold_the_images_that_a_folder_holds(tmp_path: Path) -> None:
    folder, files = (
        open_source(make(tmp_path / make.__name__)).scan() for make in (make_folder, make_parquet)
    )
    names = pa.array([PARQUET_KEYS[key] for key in files["key"].to_pylist()])
    files = files.set_column(0, SAMPLE_SCHEMA.field("key"), names).sort_by("key")
    assert dataset_fingerprint(files) == dataset_fingerprint(folder)


@pytest.mark.parametrize("column", ["key", "nbytes", "width", "height", "head_hash"])
def test_the_fingerprint_sees_every_change(tmp_path: Path, column: str) -> None:
    table = open_source(make_folder(tmp_path)).scan()
    index = table.schema.get_field_index(column)
    changed = table[column].to_pylist()
    changed[7] = changed[7] + "x" if column == "key" else changed[7] ^ 1
    other = table.set_column(
        index, SAMPLE_SCHEMA.field(index), pa.array(changed, SAMPLE_SCHEMA.field(index).type)
    )
    assert dataset_fingerprint(other) != dataset_fingerprint(table)
    parts = pa.concat_tables([table.slice(0, 5), table.slice(5)])
    assert dataset_fingerprint(parts) == dataset_fingerprint(table)


def test_keys_are_told_apart_in_the_fingerprint() -> None:
    def table(*keys: str) -> pa.Table:
        columns = {name: [0] * len(keys) for name in SAMPLE_SCHEMA.names}
        strings = {name: [""] * len(keys) for name in ("path", "label", "status")}
        return pa.table(columns | strings | {"key": list(keys)}, schema=SAMPLE_SCHEMA)

    assert dataset_fingerprint(table("ab", "c")) != dataset_fingerprint(table("a", "bc"))


def test_object_stores_give_the_same_table(kind: str, location: Path, names: dict[str, str]) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(location), f"/{kind}/{location.name}", recursive=True)
    url = f"memory://{kind}/{location.name}"
    try:
        source = open_source(url)
        table = source.scan(workers=2)
        assert (source.kind, source.location) == (kind, url)
        assert table.equals(open_source(location).scan())
        for row in rows(table):
            assert source.read(row["path"], row["offset"], row["nbytes"]) == IMAGES[names[row["key"]]]
    finally:
        memory.rm(f"/{kind}", recursive=True)


def test_a_file_that_is_gone_is_no_bad_image(location: Path) -> None:
    source = open_source(location)
    row = rows(source.scan())[0]
    location.rename(location.with_name("moved"))
    for cached in (parquet._row_group, parquet._footer, parquet._first_rows):
        cached.cache_clear()
    with pytest.raises(SourceNotFoundError, match="is gone"):
        source.read(row["path"], row["offset"], row["nbytes"])


def test_a_file_that_changed_is_a_bad_image(location: Path) -> None:
    source = open_source(location)
    row = rows(source.scan())[-1]
    with pytest.raises(ImageDecodeError, match="changed since it was scanned"):
        source.read(row["path"], row["offset"], 1 << 30)


def test_a_missing_place(kind: str, tmp_path: Path) -> None:
    for location in (tmp_path / "nowhere", tmp_path / "*.tar", "memory://nowhere/at/all"):
        with pytest.raises(SourceNotFoundError, match="check the path"):
            open_source(location, kind)


@pytest.mark.parametrize("asked", ["auto", *KINDS])
def test_a_place_without_images_says_what_it_holds(asked: str, tmp_path: Path) -> None:
    write_folder(tmp_path, {"a.txt": b"", "b.txt": b"", "c/README": b""})
    with pytest.raises(EmptySourceError) as caught:
        open_source(tmp_path, asked).scan()
    assert "2 × .txt, 1 × no suffix" in str(caught.value)
    assert ".jpg, .jpeg, .png, .webp" in str(caught.value)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(EmptySourceError, match="no file at all"):
        open_source(tmp_path)


@pytest.mark.parametrize("kind_of_tar", ["webdataset", "ilsvrc"])
def test_tars_without_images_name_their_members(kind_of_tar: str, tmp_path: Path) -> None:
    write_folder(tmp_path, {"a.tar": tar_bytes([("x.npy", b"1"), ("y.npy", b"2")])})
    with pytest.raises(EmptySourceError, match=r"2 × \.npy"):
        open_source(tmp_path, kind_of_tar).scan()


def test_only_unreadable_images(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a.jpg": b"<html>", "b.jpg": b""})
    with pytest.raises(EmptySourceError, match=r"None of the 2 images can be read.\n.*a.jpg: not an image"):
        open_source(tmp_path).scan()


def test_kinds_side_by_side_are_not_guessed(tmp_path: Path) -> None:
    write_folder(
        tmp_path, {"a.tar": tar_bytes([("x.jpg", IMAGES["n00000000_0"])]), "b.JPG": b"", "c.txt": b""}
    )
    with pytest.raises(SourceError, match=r"image_folder and webdataset, by \.jpg, \.tar files") as caught:
        open_source(tmp_path)
    assert "name the kind" in str(caught.value)
    assert open_source(tmp_path, "webdataset").scan()["key"].to_pylist() == ["x"]
    assert open_source(tmp_path / "*.tar").kind == "webdataset"


def test_an_unknown_kind(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="one of auto, image_folder, webdataset, parquet, ilsvrc"):
        open_source(tmp_path, "hdf5")


def test_patterns_choose_files(tmp_path: Path) -> None:
    for name in ("train-0", "train-1", "val-0"):
        write_parquet(tmp_path / "data" / f"{name}.parquet", [IMAGES["n00000000_0"]])
    paths = [
        open_source(tmp_path / pattern).scan()["path"].to_pylist()
        for pattern in ("data/train-*.parquet", "**/*-0.parquet", "data/val-0.parquet")
    ]
    assert paths == [
        ["train-0.parquet", "train-1.parquet"],
        ["data/train-0.parquet", "data/val-0.parquet"],
        ["val-0.parquet"],
    ]


def test_a_folder_may_be_named_like_a_pattern(tmp_path: Path) -> None:
    write_folder(tmp_path / "set [1]", {"a.jpg": IMAGES["n00000000_0"]})
    assert open_source(tmp_path / "set [1]").scan()["key"].to_pylist() == ["a"]


def test_relative_locations_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    assert open_source("source").location == str(tmp_path / "source")
    assert open_source(f"file://{tmp_path}/source").location == str(tmp_path / "source")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_place_that_may_not_be_read(tmp_path: Path) -> None:
    make_webdataset(tmp_path)
    (tmp_path / "train-0004.tar").chmod(0)
    with pytest.raises(SourceError, match="permissions"):
        open_source(tmp_path).scan()


def test_a_place_that_no_library_opens() -> None:
    with pytest.raises(SourceError, match="no-such-protocol"):
        open_source("no-such-protocol://bucket/images")


def test_a_process_that_dies_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(make_folder(tmp_path))
    monkeypatch.setattr(image_folder, "_FILES_PER_UNIT", 2)
    monkeypatch.setattr(source_module, "_SECONDS_ALONE", 0.0)
    source.location = _Deadly()  # type: ignore[assignment]
    with pytest.raises(SourceError, match="__main__"):
        source.scan(workers=2)


class _Deadly:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> tuple[object, ...]:
        return (os._exit, (1,))


@pytest.mark.parametrize("missing", ["the server", "the credentials"])
def test_an_object_store_out_of_reach_is_our_error(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    s3fs = pytest.importorskip("s3fs")
    credentials = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    for name, value in credentials.items():
        if missing == "the server":
            monkeypatch.setenv(name, value)
        else:
            monkeypatch.delenv(name, raising=False)
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
        "AWS_MAX_ATTEMPTS": "1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
        "AWS_CONFIG_FILE": "/nowhere",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(SourceError, match=r"got: +s3://bucket/train(.|\n)*do: .*AWS_ACCESS_KEY_ID"):
        open_source("s3://bucket/train")
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    ("where", "kind"),
    [
        ("in other processes", "image_folder"),
        *((w, k) for w in ("here", "in an object store") for k in KINDS),
    ],
)
def test_what_is_left_out_is_counted_wherever_it_is_scanned(
    where: str, kind: str, location: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = location if location.is_dir() else location.parent
    write_folder(folder, {"a/b.avif": b"", "c.avif": b"", ".DS_Store": b"", "README": b""})
    url = str(folder)
    if where == "in an object store":
        url = f"memory://left-out/{kind}"
        fsspec.filesystem("memory").put(str(folder), f"/left-out/{kind}", recursive=True)
    elif where == "in other processes":
        monkeypatch.setattr(source_module, "_SECONDS_ALONE", 0.0)
        monkeypatch.setattr(image_folder, "_FILES_PER_UNIT", 8)
    left_out = Counter[str]()
    samples = open_source(url).scan(workers=2, left_out=left_out)
    assert samples.schema.metadata is None
    assert left_out == {".avif": 2, "hidden": 1, "without suffix": 1}
    line = left_out_line(samples.num_rows, left_out)
    assert str(line).startswith("Images in the source: 24. Left out: 4 (2 × .avif, 1 × ")


def test_many_kinds_are_one_line() -> None:
    assert left_out_line(5, Counter()) is None
    line = left_out_line(1234, Counter({f".{i:02d}": 2000 - i for i in range(10)}))
    assert line is not None
    assert line.startswith("Images in the source: 1,234. Left out: 19,955 (2,000 × .00, 1,999 × .01, ")
    assert line.endswith(", 1,993 × .07, 3,983 of other kinds).")


def test_a_picture_of_a_page_does_not_hide_what_a_folder_holds(tmp_path: Path) -> None:
    gif = encode(photo(), "GIF")
    write_folder(tmp_path, {"assets/demo.gif": gif, "._a.jpg": b"left by macOS"})
    assert open_source(tmp_path).kind == "image_folder"
    write_parquet(tmp_path / "data" / "train.parquet", [IMAGES["n00000000_0"]])
    assert open_source(tmp_path).kind == "parquet"
