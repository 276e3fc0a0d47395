"""Damage is found, wherever it is, and repaired; and what is stored is what the teachers give."""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
from rich.console import Console
from typer.testing import CliRunner

from teachercache import FeatureCache, build
from teachercache.cache_builder.against_teacher import compare_with_teachers
from teachercache.cache_builder.build_recipe import RunnerRecipe
from teachercache.cache_builder.extract import ShardExtractor
from teachercache.cache_builder.repair import repair
from teachercache.cache_builder.worker import Worker
from teachercache.jobs import cli
from teachercache.pipeline.errors import BuildError, CacheError, CacheMismatchError
from teachercache.pipeline.places.local_storage import LocalStorage
from teachercache.pipeline.records.manifest import Manifest
from teachercache.pipeline.verify import strays, verify
from tests.make_cache import build_recipe, make_images

QUIET = Console(quiet=True)
RUNNER = RunnerRecipe(batch_size=4, decode_threads=2)  # as build_recipe's: other batches, other last bits


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(cache, images): two teachers, one with token features and a calibrated codec, copied images, and a
    sample in quarantine."""
    root = tmp_path_factory.mktemp("built")
    images = make_images(root / "images", 8)
    (images / "image_004.jpg").write_bytes(b"<html>not an image</html>")
    tiny = {"model": "vit_tiny_patch16_224", "pretrained": False, "image_size": 32}
    teachers = {
        "tiny": tiny | {"codec": "f32", "cls_token": True},
        "small": tiny | {"codec": "int4-hadamard"},
    }
    build(build_recipe(root / "cache", images, teachers=teachers, images="copy"), QUIET)
    return root / "cache", images


@pytest.fixture
def cache(built: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(built[0], tmp_path / "cache", copy_function=shutil.copy2))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


class OneFileChanged(LocalStorage):
    """The folder as it would be with other bytes in one file."""

    def __init__(self, root: Path, name: str, data: bytes) -> None:
        super().__init__(root)
        self._name, self._data = name, data

    def _open(self, name: str) -> IO[bytes]:
        if name != self._name:
            return super()._open(name)
        handle = os.memfd_create("changed")
        os.write(handle, self._data)
        os.lseek(handle, 0, os.SEEK_SET)
        return os.fdopen(handle, "rb")

    def _size(self, name: str) -> int | None:
        return len(self._data) if name == self._name else super()._size(name)


def changes_found(folder: Path, name: str, data: bytes) -> bool:
    storage = OneFileChanged(folder, name, data)
    try:
        return bool(verify(FeatureCache(storage, Manifest(storage).spec()), full=True))
    except CacheError:
        return True


def test_every_flipped_bit_is_found(built: tuple[Path, Path]) -> None:
    generator = random.Random(0)
    contents = {str(path.relative_to(built[0])): path.read_bytes() for path in files(built[0])}
    assert not changes_found(built[0], "samples.parquet", contents["samples.parquet"])
    for i in range(1000):  # every file has its share, however small it is
        name = sorted(contents)[i % len(contents)]
        data = bytearray(contents[name])
        bit = generator.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        assert changes_found(built[0], name, bytes(data)), f"bit {bit} of {name}"


def test_every_truncation_is_found(built: tuple[Path, Path]) -> None:
    generator = random.Random(0)
    for path in files(built[0]):
        data = path.read_bytes()
        for end in (0, 1, len(data) // 2, len(data) - 1, generator.randrange(len(data))):
            name = str(path.relative_to(built[0]))
            assert changes_found(built[0], name, data[:end]), f"{name} cut at {end}"


def flip(path: Path, bit: int = 1000) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)


def shard_of(cache: Path, teacher: str, shard: int, array: str = "codes") -> Path:
    return next(path for path in files(cache / "teachers" / teacher / array / "c" / str(shard)))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the commit records, which hold times."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in files(folder) if "commits" not in p.parts}


def test_a_quick_look_reads_no_more_than_the_ends_of_a_shard(cache: Path) -> None:
    shard = shard_of(cache, "tiny", 0)
    flip(shard, bit=8 * 6_000)
    assert verify(FeatureCache.open(cache)) == []
    (problem,) = verify(FeatureCache.open(cache), full=True)
    assert (problem.teacher, problem.shard) == ("tiny", 0)
    assert problem.file == str(shard.relative_to(cache))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "bytes, expected" in verify(FeatureCache.open(cache))[0].reason
    shard.unlink()
    assert verify(FeatureCache.open(cache))[0].reason.endswith("is missing")


def test_records_of_another_spec_or_place_are_found(cache: Path) -> None:
    manifest = FeatureCache.open(cache).manifest
    record = manifest.read_commit("tiny", 0)
    manifest.commit(record.model_copy(update={"content_id": "0" * 32}))
    assert "another spec" in verify(FeatureCache.open(cache))[0].reason
    manifest.commit(record.model_copy(update={"first_row": 6}))
    assert "expected range(0, 6)" in verify(FeatureCache.open(cache))[0].reason
    manifest.commit(record.model_copy(update={"shard": 40}))
    manifest.commit(record)
    assert "shard 40 does not exist" in verify(FeatureCache.open(cache))[0].reason


def test_tables_of_another_cache_are_found(cache: Path, tmp_path: Path) -> None:
    """Sound files in the wrong place: their own checksums are right."""
    other = build(build_recipe(tmp_path / "other", make_images(tmp_path / "images", 8, seed=5)), QUIET).cache
    for name in ("samples.parquet", "views.parquet"):
        shutil.copy(tmp_path / "other" / name, cache / name)
    reasons = [problem.reason for problem in verify(FeatureCache.open(cache), full=True)]
    assert [reason.partition(",")[0] for reason in reasons] == [
        "samples.parquet is sound",
        "views.parquet is sound",
    ]
    assert all("it is not the table of this cache" in reason for reason in reasons)
    assert verify(other, full=True) == []


def test_files_of_nobody_are_named(cache: Path) -> None:
    opened = FeatureCache.open(cache)
    assert strays(opened) == []
    (cache / "teachers" / "notes.txt").write_text("mine")
    (cache / "commits" / "tiny" / "00001.json").unlink()
    lost = {str(shard_of(cache, "tiny", 1, array).relative_to(cache)) for array in ("cls", "codes")}
    assert set(strays(opened)) == {*lost, "stats/tiny/00001.safetensors", "teachers/notes.txt"}


def test_repair_makes_the_same_bytes_and_touches_nothing_else(built: tuple[Path, Path], cache: Path) -> None:
    flip(shard_of(cache, "tiny", 0))
    flip(cache / "commits" / "small" / "00002.json")
    flip(cache / "commits" / "images" / "00001.json")
    flip(cache / "quarantine" / "00001.jsonl")
    flip(cache / "samples.parquet")
    (cache / "views.parquet").unlink()
    (cache / "teachers" / "small" / "codes" / "zarr.json").write_text("{}")
    broken = {("tiny", 0), ("small", 2), ("images", 1)}
    before = {path: path.stat().st_mtime_ns for path in files(cache)}
    done = repair(FeatureCache.open(cache), RUNNER)
    assert done.left == []
    assert len(done.mended) == 7
    assert {(p.teacher, p.shard) for p in done.mended if p.teacher and p.shard is not None} == broken
    assert contents(cache) == contents(built[0])
    assert verify(FeatureCache.open(cache), full=True) == []
    touched = {
        path.relative_to(cache) for path in files(cache) if before.get(path) != path.stat().st_mtime_ns
    }
    shards = {path.parts for path in touched if "c" in path.parts or "commits" in path.parts}
    assert {(parts[1], int(parts[parts.index("c") + 1])) for parts in shards if "c" in parts} == {
        ("tiny", 0),
        ("small", 2),
    }
    assert {(parts[1], int(parts[2][:5])) for parts in shards if "commits" in parts} == broken


def test_repair_of_a_sound_cache_loads_no_teacher(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teachercache.cache_builder.worker.build_teachers", None)
    before = {path: path.stat().st_mtime_ns for path in files(cache)}
    assert repair(FeatureCache.open(cache)).mended == []
    assert before == {path: path.stat().st_mtime_ns for path in files(cache)}


def grow(cache: Path, images: Path) -> dict[str, bytes]:
    """Add views; returns every file."""
    build(build_recipe(cache, images, views={"num_views": 4, "size": [32, 32]}), QUIET)
    return all_files(cache)


def all_files(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in files(cache)}


def test_a_cache_that_grew_since_it_was_opened_is_not_broken(tmp_path: Path) -> None:
    images, path = make_images(tmp_path / "images", 6), tmp_path / "cache"
    opened = build(build_recipe(path, images), QUIET).cache
    whole = grow(path, images)
    assert verify(opened, full=True) == []
    assert strays(opened) == []
    assert repair(opened, RUNNER).mended == []
    assert all_files(path) == whole


def test_a_cache_may_grow_while_it_is_repaired(tmp_path: Path) -> None:
    images, path = make_images(tmp_path / "images", 6), tmp_path / "cache"
    opened = build(build_recipe(path, images), QUIET).cache
    flip(path / "commits" / "tiny" / "00001.json")
    whole: dict[str, bytes] = {}

    def meanwhile() -> None:
        if not whole:
            whole.update(grow(path, images))

    done = repair(opened, RUNNER, progress=meanwhile)
    assert ([problem.file for problem in done.mended], done.left) == (["commits/tiny/00001.json"], [])
    assert verify(FeatureCache.open(path), full=True) == []
    changed = {name for name, data in all_files(path).items() if data != whole[name]}
    assert changed == {"commits/tiny/00001.json"}


def test_what_another_has_mended_is_not_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shard is computed again by a build while the repair loads its teachers."""
    images, path = make_images(tmp_path / "images", 6), tmp_path / "cache"
    opened = build(build_recipe(path, images), QUIET).cache
    record = path / "commits" / "tiny" / "00001.json"
    flip(record)
    load = Worker.open

    def open_late(self: Worker, url: str, images_at: str | None = None) -> ShardExtractor:
        extractor = load(self, url, images_at)
        monkeypatch.setattr(Worker, "open", load)
        record.unlink()
        build(build_recipe(path, images), QUIET)
        mended.append(record.read_bytes())
        return extractor

    mended: list[bytes] = []
    monkeypatch.setattr(Worker, "open", open_late)
    assert repair(opened, RUNNER).left == []
    assert [record.read_bytes()] == mended


def test_what_cannot_be_repaired_is_named_and_left(cache: Path, built: tuple[Path, Path]) -> None:
    """Codec tables follow from nothing; and nothing can be extracted from images that are gone."""
    flip(cache / "stats" / "small.safetensors")
    flip(shard_of(cache, "small", 2))
    before = contents(cache)
    done = repair(FeatureCache.open(cache), RUNNER)
    assert [problem.file for problem in done.left if problem.shard is None] == ["stats/small.safetensors"]
    assert "restore it from a copy" in done.left[0].reason
    assert contents(cache) == before
    flip(cache / "cache.json")
    with pytest.raises(CacheError, match=r"damaged or edited(.|\n)*restore cache\.json"):
        FeatureCache.open(cache)


def test_other_images_are_not_taken_for_the_ones_that_were_cached(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", 4)
    cache = build(build_recipe(tmp_path / "cache", images), QUIET).cache
    make_images(images, 4, seed=1)
    flip(tmp_path / "cache" / "samples.parquet")
    flip(tmp_path / "cache" / "commits" / "tiny" / "00000.json")
    done = repair(cache, RUNNER)
    assert len(done.left) == 2
    assert "are not those of the cache" in done.left[0].reason
    assert "samples.parquet" in done.left[1].reason
    assert (tmp_path / "cache" / "commits" / "tiny" / "00000.json").exists(), "no record is deleted in vain"


def damage_last_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


CHANGES: dict[str, Callable[[Path], object]] = {
    "replaced": lambda image: shutil.copy(image.with_name("image_002.jpg"), image),
    "cut": lambda image: image.write_bytes(image.read_bytes()[:-40]),
    "another byte, far from its head": damage_last_byte,
    "gone": Path.unlink,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("damaged", ["teachers/tiny/codes/c/0/0/0/0/0", "stats/tiny/00000.safetensors"])
def test_rows_of_other_images_do_not_replace_broken_ones(
    tmp_path: Path, change: Callable[[Path], object], damaged: str
) -> None:
    """In a cache of one teacher, no other record tells that the image is another one."""
    images = make_images(tmp_path / "images", 6)
    cache = build(build_recipe(tmp_path / "cache", images), QUIET).cache
    flip(tmp_path / "cache" / damaged)
    before = contents(tmp_path / "cache")
    change(images / "image_001.jpg")
    (left,) = repair(cache, RUNNER).left
    assert left.file == damaged
    assert re.search("has changed since|not those that tiny was computed from|is gone", left.reason)
    assert contents(tmp_path / "cache") == before, "what is sound in the shard can still be read"


def test_a_build_that_goes_on_refuses_images_that_changed(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", 6)
    recipe = build_recipe(tmp_path / "cache", images)
    build(recipe, QUIET)
    (tmp_path / "cache/commits/tiny/00001.json").unlink()
    damage_last_byte(images / "image_004.jpg")  # as many bytes, so the folder's listing is the same
    with pytest.raises(
        BuildError, match=r"image_004 has changed since(.|\n)*restore the images as they were"
    ):
        build(recipe, QUIET)
    assert FeatureCache.open(tmp_path / "cache").committed("tiny").tolist() == [True, False]


def test_stored_features_are_the_teachers(tmp_path: Path) -> None:
    tiny = {"model": "vit_tiny_patch16_224", "pretrained": False, "image_size": 32, "cls_token": True}
    codecs = ("f32", "bf16", "int4-hadamard", "int3-dct")
    pooled = {"grid": "adjoint", "grid_size": [1, 1], "codec": "f16", "global_feature": True}
    teachers = {codec: tiny | {"codec": codec} for codec in codecs} | {"adjoint": tiny | pooled}
    images = make_images(tmp_path / "images", 6)
    cache = build(build_recipe(tmp_path / "cache", images, teachers=teachers), QUIET).cache
    found = compare_with_teachers(cache, 9, seed=0)
    levels = ["level 1", "level 2", "level 3", "level 4"]
    assert [one.what for one in found if one.teacher == "f32"] == [*levels, "cls"]
    assert [one.what for one in found if one.teacher == "adjoint"] == [*levels, "norms", "cls", "global"]
    assert [one for one in found if not one.kept] == []
    assert all(one.max_error < 1e-4 and one.cosine > 0.999999 for one in found if one.teacher == "f32")


@pytest.mark.parametrize("codec", ["f32", "int4-hadamard"])
def test_features_of_another_view_are_not(tmp_path: Path, codec: str) -> None:
    """Sound files, wrong content: one row of 12 holds the features of another view."""
    tiny = {"model": "vit_tiny_patch16_224", "pretrained": False, "image_size": 32, "codec": codec}
    images = make_images(tmp_path / "images", 6)
    cache = build(build_recipe(tmp_path / "cache", images, teachers={"t": tiny}), QUIET).cache
    arrays = {name: tensor.numpy() for name, tensor in cache.read(range(12))["t"].tensors().items()}
    for array in arrays.values():
        array[7] = array[6]
    with cache.store.write_shard("t", 1) as writer:
        writer.write(range(6), {name: array[6:] for name, array in arrays.items()})
        files = writer.publish()
    record = cache.manifest.read_commit("t", 1)
    cache.manifest.commit(record.model_copy(update={"files": files}))
    opened = FeatureCache.open(tmp_path / "cache")
    assert verify(opened, full=True) == []
    assert not any(one.kept for one in compare_with_teachers(opened, 12, seed=0))


def test_a_teacher_with_other_weights_is_no_judge(cache: Path) -> None:
    opened = FeatureCache.open(cache)
    other = opened.spec.teachers["tiny"].model_copy(update={"random_seed": 7})
    spec = opened.spec.model_copy(update={"teachers": {"tiny": other}})
    with pytest.raises(CacheMismatchError, match="not the weights"):
        compare_with_teachers(FeatureCache(opened.storage, spec), 1)


def test_a_record_that_names_no_file_is_found(cache: Path) -> None:
    manifest = FeatureCache.open(cache).manifest
    record = manifest.read_commit("tiny", 1)
    manifest.commit(record.model_copy(update={"files": {}}))
    assert "does not name teachers/tiny/cls/c/1" in verify(FeatureCache.open(cache), full=True)[0].reason


def test_nothing_to_compare_is_no_agreement(tmp_path: Path) -> None:
    path, images = tmp_path / "cache", make_images(tmp_path / "images", 4)
    cache = build(build_recipe(path, images), QUIET).cache
    for shard in range(cache.spec.num_shards):
        cache.storage.remove(f"commits/tiny/{shard:05d}.json")
    result = CliRunner().invoke(cli.app, ["verify", str(path), "--against-teacher", "2"])
    assert result.exit_code == 1
    assert "tiny: no row is committed" in result.output


def test_the_command_finds_mends_and_compares(cache: Path) -> None:
    def teachercache(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(cli.app, [arguments[0], str(cache), *arguments[1:]])
        return result.exit_code, result.output

    (cache / "notes.txt").write_text("mine")
    flip(shard_of(cache, "tiny", 1))
    status, text = teachercache("verify", "--full")
    assert status == 1
    assert "teachers/tiny/codes/c/1/0/0/0/0 is not the file that was committed" in text
    assert "teachercache repair" in text
    status, text = teachercache("repair", "batch_size=4")
    assert status == 0, text
    assert "1 files were mended" in text
    status, text = teachercache("verify", "--full", "--against-teacher", "3")
    assert status == 0, text
    assert "9 shards of tiny, small, images are sound (every byte)" in text
    assert "1 files do not belong to this cache: notes.txt" in text
    assert text.count("as promised") == 9
    assert teachercache("repair", "batch_siez=4")[0] != 0
