"""`teachercache inspect`: what it says of whole, half-built and broken caches, and what it costs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import zarr
from typer.testing import CliRunner
from zarr.codecs import ZstdCodec

from teachercache.jobs.cli import app
from teachercache.jobs.inspection.details import row_details, sample_details, shard_details
from teachercache.jobs.inspection.report import timeline
from teachercache.jobs.inspection.summary import covered, summarize
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import CacheError, RecipeError, in_a_line
from teachercache.pipeline.places.local_storage import LocalStorage
from teachercache.pipeline.places.open_storage import open_storage
from teachercache.pipeline.records.manifest import CommitRecord, Manifest
from teachercache.pipeline.records.spec import StoreKind
from teachercache.pipeline.verify import verify
from tests.make_cache import make_cache, make_images, teacher_spec
from tests.s3_server import Server, running, server  # noqa: F401  (fixtures)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), 6)


@pytest.fixture
def cache(tmp_path: Path, images: Path) -> FeatureCache:
    """Two shards of 3 samples × 2 views; sample 4 could not be decoded."""
    return make_cache(tmp_path / "cache", images, invalid_samples=[4])


def inspect(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    return result.output


def inspect_json(*arguments: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(inspect(*arguments, "--json"))
    return found


def test_a_whole_cache(cache: FeatureCache, tmp_path: Path) -> None:
    found = inspect_json(tmp_path / "cache")
    alpha = found["teachers"]["alpha"]
    assert (found["problems"], found["committed"]) == ([], {"alpha": 2, "beta": 2})
    assert (alpha["rows_committed"], alpha["rows_invalid"]) == (12, 2)
    files = [path for path in (tmp_path / "cache/teachers/alpha/codes/c").rglob("*") if path.is_file()]
    assert alpha["nbytes"] == sum(path.stat().st_size for path in files)
    full_shard = cache.manifest.read_commit("alpha", 0)
    assert alpha["bytes_per_row"] * 6 == full_shard.nbytes - 4 - 16  # checksums of the index and of all rows
    text = inspect(tmp_path / "cache")
    for words in ("alpha", "random (seed 0)", "12 (2 invalid)", "2 of 2", cache.spec.dataset.fingerprint):
        assert words in text
    assert "broken" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("bytes ")][:1]
    assert "so far" not in line
    assert "when complete" not in line


def test_only_one_thing_is_looked_at(cache: FeatureCache, tmp_path: Path) -> None:
    for options in (
        ["--shard", "1", "--row", "2"],
        ["--row", "2", "--key", "a"],
        ["--shard", "0", "--key", ""],
    ):
        result = CliRunner().invoke(app, ["inspect", str(tmp_path / "cache"), *options])
        assert isinstance(result.exception, RecipeError)
        for words in (f"{options[0]} {options[2]}", "expected", "do"):
            assert words in str(result.exception)


def test_a_half_built_cache(tmp_path: Path, images: Path) -> None:
    make_cache(tmp_path / "cache", images, skip_shards=[1])
    text = inspect(tmp_path / "cache")
    assert "1 of 2" in text
    assert "Not complete" in text
    assert "so far" in text
    assert "when complete" in text
    assert "broken" not in text
    assert "not committed" in inspect(tmp_path / "cache", "--shard", 1)


FAULTS: dict[str, Callable[[Path], object]] = {
    "gone": lambda folder: (folder / SHARD).unlink(),
    "cut": lambda folder: (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-1]),
    "of another spec": lambda folder: damage_record(folder, content_id="0" * 32),
    "of other rows": lambda folder: damage_record(folder, first_row=0, invalid_rows=[]),
    "a record that was edited": lambda folder: (folder / "commits/alpha/00001.json").write_text("{}"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_whoever_meets_a_fault_says_the_same(cache: FeatureCache, tmp_path: Path, fault: str) -> None:
    FAULTS[fault](tmp_path / "cache")
    (shown,) = summarize(cache.storage)["problems"]
    (found,) = (problem for problem in verify(cache) if problem.teacher == "alpha")
    assert found.reason == shown
    assert shard_details(cache.manifest, 1)["teachers"]["alpha"]["state"] == f"broken: {shown}"
    with pytest.raises(CacheError) as refused:
        FeatureCache.open(tmp_path / "cache").read([6], ["alpha"])
    assert in_a_line(refused.value).rstrip(".") == shown.rstrip(".")


def test_a_row_that_others_compressed_is_read_as_readers_do(cache: FeatureCache, tmp_path: Path) -> None:
    folder = tmp_path / "cache/teachers/alpha/codes"
    plain: Any = zarr.open_array(folder, mode="r")
    values, settings = plain[:], {"shape": plain.shape, "shards": plain.shards, "chunks": plain.chunks}
    zarr.create_array(folder, **settings, dtype="float32", compressors=[ZstdCodec()], overwrite=True)[:] = (
        values
    )
    before = shard_details(cache.manifest, 1)["teachers"]["alpha"]["state"]
    assert "broken" in before  # it is not what was committed
    assert row_details(cache.manifest, 7)["teachers"]["alpha"]["state"] == "sound"


def damage_record(folder: Path, **changes: object) -> None:
    path = folder / "commits/alpha/00001.json"
    record = json.loads(path.read_text())
    record.pop("checksum", None)
    Manifest(open_storage(folder)).commit(CommitRecord.model_validate(record | changes))


SHARD = "teachers/alpha/codes/c/1/0/0/0/0"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard is gone": (lambda folder: (folder / SHARD).unlink(), f"{SHARD} is missing"),
    "a shard is cut": (lambda folder: (folder / SHARD).write_bytes(b"x"), f"{SHARD} has 1 bytes"),
    "a record is cut": (lambda folder: (folder / "commits/alpha/00001.json").write_text("{"), "00001.json"),
    "a record of another spec": (
        lambda folder: damage_record(folder, content_id="0" * 32),
        "commits/alpha/00001.json was computed for another spec",
    ),
    "a record of another shard": (
        lambda folder: shutil.copy(folder / "commits/alpha/00000.json", folder / "commits/alpha/00001.json"),
        "record of another shard",
    ),
    "a record too many": (
        lambda folder: damage_record(folder, shard=9, first_row=54, invalid_rows=[]),
        "commits/alpha/00009.json shard 9 does not exist",
    ),
    "metadata is gone": (
        lambda folder: (folder / "teachers/alpha/codes/zarr.json").unlink(),
        "Features of teacher alpha cannot be read",
    ),
    "metadata is a list": (
        lambda folder: (folder / "teachers/alpha/codes/zarr.json").write_text("[" * 100_000),
        "Features of teacher alpha cannot be read",
    ),
    "no samples": (lambda folder: (folder / "samples.parquet").unlink(), "samples.parquet is missing"),
    "views are noise": (lambda folder: (folder / "views.parquet").write_bytes(b"?" * 99), "views.parquet"),
    "quarantine is noise": (
        lambda folder: LocalStorage(folder).write("quarantine/00001.jsonl", b"?\n"),
        "quarantine/00001.jsonl",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_broken_cache_is_told_not_failed_on(cache: FeatureCache, tmp_path: Path, name: str) -> None:
    damage, words = DAMAGE[name]
    damage(tmp_path / "cache")
    (problem,) = inspect_json(tmp_path / "cache")["problems"]
    assert words in problem
    assert "1 thing is broken" in inspect(tmp_path / "cache")
    assert "beta" in inspect(tmp_path / "cache", "--shard", 1)


def test_records_that_lead_out_of_the_cache(cache: FeatureCache, tmp_path: Path) -> None:
    outside = {"../../secret": {"nbytes": 1, "checksum": ""}}
    damage_record(tmp_path / "cache", files=outside)
    (problem,) = inspect_json(tmp_path / "cache")["problems"]
    assert "../../secret" in problem


def test_one_shard(cache: FeatureCache, tmp_path: Path) -> None:
    found = inspect_json(tmp_path / "cache", "--shard", 1)
    assert (found["rows"], found["samples"], found["views"]) == ([6, 11], [3, 5], 2)
    assert found["teachers"]["alpha"]["invalid_rows"] == [8, 9]
    assert found["teachers"]["alpha"]["state"] == "committed"
    assert SHARD in inspect(tmp_path / "cache", "--shard", 1)
    with pytest.raises(CacheError, match="no shard 2"):
        shard_details(cache.manifest, 2)


def test_one_row_is_read_without_torch_as_with_it(cache: FeatureCache, tmp_path: Path) -> None:
    found = inspect_json(tmp_path / "cache", "--row", 7)
    assert (found["sample"]["key"], found["view_index"], found["shard"]) == (cache.key(3), 1, 1)
    assert found["view"]["left"] == cache.view(7).box[0]
    for name, encoded in cache.read([7]).items():
        norms = torch.linalg.vector_norm(encoded.decode()[0], dim=-1).flatten(1)
        shown = found["teachers"][name]["token_norms"]
        assert [level["mean"] for level in shown] == pytest.approx(norms.mean(1).tolist(), rel=1e-6)
        assert [level["max"] for level in shown] == pytest.approx(norms.amax(1).tolist(), rel=1e-6)
    text = inspect(tmp_path / "cache", "--row", 7)
    assert f"flip {json.dumps(cache.view(7).flip)}" in text
    (states,) = [line.split() for line in text.splitlines() if line.lstrip().startswith("state ")]
    assert states == ["state", "sound", "sound"]
    with pytest.raises(CacheError, match="no row 12"):
        row_details(cache.manifest, 12)


@pytest.mark.parametrize("codec", ["bf16", "f16"])
def test_values_that_are_not_finite_are_counted(tmp_path: Path, images: Path, codec: str) -> None:
    teachers = {"alpha": teacher_spec(codec=codec)}
    cache = make_cache(tmp_path / "cache", images, teachers=teachers, hashes=False)
    first_token = cache.read([7])["alpha"].arrays["codes"][0, 0, 0, 0].numpy()
    infinity = {"bf16": b"\x80\x7f", "f16": b"\x00\x7c"}[codec]
    shard = tmp_path / "cache" / SHARD
    data = shard.read_bytes()
    place = data.index(first_token.tobytes())
    row_nbytes = cache.read([7])["alpha"].nbytes
    from teachercache.pipeline.stores.shard_format import checksum

    row = infinity + data[place + 2 : place + row_nbytes]
    shard.write_bytes(data[:place] + row + checksum(row) + data[place + row_nbytes + 4 :])
    levels = row_details(cache.manifest, 7)["teachers"]["alpha"]["token_norms"]
    assert [level["not_finite"] for level in levels] == [1, 0, 0, 0]


def test_a_flipped_bit_of_a_row_is_found(images: Path, tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", images, invalid_samples=[4], hashes=False)
    shard = tmp_path / "cache" / SHARD
    data = bytearray(shard.read_bytes())
    data[20] ^= 1
    shard.write_bytes(data)
    states = [row_details(cache.manifest, row)["teachers"]["alpha"]["state"] for row in (6, 7, 8)]
    assert "the checksum of row 0 is wrong" in states[0]
    assert states[1] == "sound"
    assert "could not be decoded" in states[2]


def test_a_shard_in_the_place_of_another_is_found(cache: FeatureCache, tmp_path: Path) -> None:
    shard = tmp_path / "cache" / SHARD
    other = tmp_path / "cache" / SHARD.replace("c/1/", "c/0/")
    shard.write_bytes(other.read_bytes()[: shard.stat().st_size])
    assert "is not the file" in row_details(cache.manifest, 6)["teachers"]["alpha"]["state"]
    assert "broken" in shard_details(cache.manifest, 1)["teachers"]["alpha"]["state"]
    assert row_details(cache.manifest, 6)["teachers"]["beta"]["state"] == "sound"


def test_one_sample_by_its_key(tmp_path: Path) -> None:
    for folder in ("n01", "n02"):
        make_images(tmp_path / "images" / folder, 2)
    cache = make_cache(tmp_path / "cache", tmp_path / "images")
    found = inspect_json(tmp_path / "cache", "--key", "n02/image_001")
    assert [(row["row"], row["shard"]) for row in found["rows"]] == [(6, 1), (7, 1)]
    assert found["rows"][0]["teachers"] == {"alpha": "sound", "beta": "sound"}
    rows = [line.split() for line in inspect(tmp_path / "cache", "--key", "n02/image_001").splitlines()]
    assert ["row", "view_index", "shard", "alpha", "beta"] in rows
    assert ["7", "1", "1", "sound", "sound"] in rows
    with pytest.raises(
        CacheError, match=r"2 samples have keys that end so.*\n.*\n.*n01/image_001, n02/image_001"
    ):
        sample_details(cache.manifest, "image_001")
    with pytest.raises(CacheError, match=r"No sample has.*\n.*\n.*n01/image_000"):
        sample_details(cache.manifest, "age_0")
    with pytest.raises(CacheError, match="2 samples have keys that end so"):
        sample_details(cache.manifest, "age_001")
    (tmp_path / "images/n02/image_001.jpg").rename(tmp_path / "images/n02/only_one.jpg")
    other = make_cache(tmp_path / "other", tmp_path / "images")
    for end in ("only_one", "y_one"):
        assert sample_details(other.manifest, end)["sample"]["key"] == "n02/only_one"
    (tmp_path / "images/n01/image_000.jpg").rename(tmp_path / "images/n01/not_only_one.jpg")
    both = make_cache(tmp_path / "both", tmp_path / "images")
    assert sample_details(both.manifest, "only_one")["sample"]["key"] == "n02/only_one"  # behind the slash


def test_the_page_says_how_far_it_looked(cache: FeatureCache, tmp_path: Path) -> None:
    """A flipped byte changes no size and no record."""
    words = "compared by `teachercache verify CACHE --full`"
    shard = tmp_path / "cache/teachers/alpha/codes/c/0/0/0/0/0"
    data = bytearray(shard.read_bytes())
    data[0] ^= 1
    shard.write_bytes(data)
    for said in (
        "Records and file sizes agree; every byte is",
        "Records and file sizes were compared; every",
    ):
        result = CliRunner().invoke(app, ["inspect", str(tmp_path / "cache")], env={"COLUMNS": "200"})
        assert said in result.output
        assert words in result.output
        shard.write_bytes(b"x")


def test_an_object_store(cache: FeatureCache, tmp_path: Path) -> None:
    fsspec.filesystem("memory").put(str(tmp_path / "cache"), "/inspected", recursive=True)
    remote = Manifest(open_storage("memory://inspected"))
    local = summarize(cache.storage)
    assert summarize(remote.storage) == local | {"url": "memory://inspected"}
    assert row_details(remote, 7) == row_details(cache.manifest, 7)
    fsspec.filesystem("memory").rm("/inspected", recursive=True)


def test_s3(images: Path, server: Server) -> None:  # noqa: F811
    cache = make_cache("s3://bucket/inspected", images, invalid_samples=[4], skip_shards=[1])
    cache.storage.remove("teachers/alpha/codes/c/0/0/0/0/0")
    found = inspect_json("s3://bucket/inspected")
    assert found["committed"] == {"alpha": 1, "beta": 1}
    assert found["problems"] == ["teachers/alpha/codes/c/0/0/0/0/0 is missing"]
    server.answered.clear()
    states = inspect_json("s3://bucket/inspected", "--row", 1)["teachers"]
    assert (states["alpha"]["state"][:6], states["beta"]["state"]) == ("broken", "sound")
    assert all(request.range for request in server.requests("GET") if "/c/" in request.path)


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
def test_it_imports_little(tmp_path: Path, images: Path, store: StoreKind) -> None:
    """The second that it may take is not enough to import torch."""
    cache = make_cache(tmp_path / "cache", images, store=store)
    code = (
        "import sys; from teachercache.jobs.cli import app; app(sys.argv[1:], standalone_mode=False);"
        "heavy = {'torch', 'torchvision', 'timm', 'ray', 'matplotlib', 'gradio', 'zarr'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    for options in ([], ["--shard", "1"], ["--row", "7"], ["--key", cache.key(0)]):
        command = [sys.executable, "-c", code, "inspect", str(tmp_path / "cache"), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_build_speed_leaves_out_the_pauses() -> None:
    assert covered([(0, 10), (5, 12), (100, 108), (101, 102)]) == 20
    assert covered([]) == 0


def test_the_timeline_gives_each_shard_in_flight_a_lane(cache: FeatureCache) -> None:
    def record(host: str, shard: int, second: int, teacher: str = "alpha", worker: str = "") -> CommitRecord:
        seconds = {"wall": 10.0, "forward": 5.0}
        finished = f"2026-01-01T00:00:{second:02d}+00:00"
        changes = {"host": host, "worker": worker, "shard": shard, "teacher": teacher, "seconds": seconds}
        changes["finished"] = finished
        return cache.manifest.read_commit("alpha", 0).model_copy(update=changes)

    found = timeline([record("a", 0, 10), record("a", 1, 15), record("a", 2, 25), record("b", 3, 30)])
    assert found is not None
    assert [worker for worker, _ in found.lanes] == ["a", "a", "b"]
    assert found.end - found.start == 30
    assert found.lanes[0][1][100] == 0.5
    again = timeline([record("a", 0, 10), record("a", 0, 10, teacher="beta")])
    assert again is not None
    assert len(again.lanes) == 1
    assert timeline([]) is None
    actors = timeline([record("a", 0, 10, worker="a:7"), record("a", 1, 20, worker="a:8")])
    assert actors is not None
    assert [worker for worker, _ in actors.lanes] == ["a:7", "a:8"]
