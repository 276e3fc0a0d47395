"""What killed processes, full disks and other programs leave in a cache: swept or named, and no error."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from teachercache import FeatureCache
from teachercache.cache_builder.repair import repair
from teachercache.jobs.inspection.details import sample_details
from teachercache.jobs.inspection.summary import summarize
from teachercache.pipeline.errors import CacheNotFoundError, DiskSpaceError
from teachercache.pipeline.places.local_storage import LocalStorage
from teachercache.pipeline.rearranging.convert import convert
from teachercache.pipeline.rearranging.exports import export_theia
from teachercache.pipeline.rearranging.merge import merge
from teachercache.pipeline.rearranging.rearrangement import Rearrangement
from teachercache.pipeline.rearranging.subset import subset
from teachercache.pipeline.records.spec import StoreKind
from teachercache.pipeline.verify import strays, verify
from tests.make_cache import make_cache, make_images, teacher_spec

TEACHERS = {"t": teacher_spec(codec="f16"), "u": teacher_spec(width=4, grid=3, codec="bf16")}


@pytest.fixture
def source(tmp_path: Path) -> FeatureCache:
    """4 samples, 2 views, 2 shards."""
    return make_cache(tmp_path / "cache", make_images(tmp_path / "images", 4), teachers=TEACHERS)


def killed_while_writing(folder: Path, name: str) -> Path:
    """The temporary file of a process that was killed."""
    child = os.fork()
    if not child:
        with LocalStorage(folder).open_write(name) as file:
            file.write(b"half of it")
            os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    (left,) = (folder / name).parent.glob(f"{Path(name).name}*.partial")
    return left


def merge_with_another(source: FeatureCache, out: str) -> Rearrangement:
    root = Path(source.storage.url).parent
    if not (root / "other").exists():
        images = make_images(root / "plain", 3, seed=5)
        (root / "more").mkdir()
        for path in images.iterdir():
            path.rename(root / "more" / f"more_{path.name}")
        make_cache(root / "other", root / "more", teachers=TEACHERS)
    return merge([source.storage.url, str(root / "other")], out)


VERBS: dict[str, Callable[[FeatureCache, str], Rearrangement]] = {
    "merge": merge_with_another,
    "subset": lambda source, out: subset(source.storage.url, out, keys=["image_001", "image_003"]),
    "subset of teachers": lambda source, out: subset(source.storage.url, out, teachers=["t"]),
    "convert": lambda source, out: convert(source.storage.url, out, "webdataset"),
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=list(VERBS))
def test_what_a_killed_process_left_is_named_and_swept(
    tmp_path: Path, source: FeatureCache, verb: Callable[[FeatureCache, str], Rearrangement]
) -> None:
    cache = verb(source, str(tmp_path / "new")).run()
    left = killed_while_writing(tmp_path / "new", "teachers/t/half")
    alive = tmp_path / "new" / "teachers" / "t" / "alive"
    with cache.storage.open_write("teachers/t/alive"):
        assert strays(cache) == [f"teachers/t/{left.name}"]
    alive.unlink()
    verb(source, str(tmp_path / "new")).run()
    assert not left.exists()
    assert strays(cache) == []


def test_repair_sweeps_what_a_killed_one_left(source: FeatureCache) -> None:
    left = killed_while_writing(Path(source.storage.url), "commits/t/00000.json")
    assert verify(source, full=True) == []
    assert strays(source) == [f"commits/t/{left.name}"]
    assert repair(source).left == []
    assert not left.exists()


def test_an_export_sweeps_its_own_folder_alone(tmp_path: Path, source: FeatureCache) -> None:
    left = killed_while_writing(tmp_path / "out" / "imagenet", "t/half.tar")
    others = killed_while_writing(tmp_path / "out" / "mine", "half.tar")
    export_theia(source, str(tmp_path / "out"))
    assert (left.exists(), others.exists()) == (False, True)


def test_a_lock_of_the_dead_is_named(source: FeatureCache) -> None:
    child = os.fork()
    if not child:
        with source.storage.exclusive("commits/00001"):
            os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    with source.storage.exclusive("commits/00000"):
        assert strays(source) == ["commits/00001.lock"]
    source.storage.sweep()
    assert strays(source) == []


def foreign(folder: Path) -> set[str]:
    """Beside every file and folder what macOS, Windows, NFS and editors put there."""
    added = []
    for path in [folder, *folder.rglob("*")]:
        added += [path.with_name(f"._{path.name}"), path.with_name(f"{path.name}~")] if path != folder else []
        if path.is_dir():
            names = (".DS_Store", "Thumbs.db", "desktop.ini", ".nfs000000000001", "#codes#", "codes copy")
            added += [path / name for name in names]
    for path in added:
        path.write_bytes(b"\0\5\26\7")
    (folder / ".Spotlight-V100").mkdir()
    (folder / ".Spotlight-V100" / "store.db").write_bytes(b"x")
    return {str(path.relative_to(folder)) for path in added} | {".Spotlight-V100/store.db"}


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
def test_files_of_other_programs_are_strays_and_no_error(tmp_path: Path, store: StoreKind) -> None:
    images = make_images(tmp_path / "images", 4)
    before = make_cache(tmp_path / "cache", images, teachers=TEACHERS, store=store)
    rows = list(range(8))
    expected, facts = before.read(rows), summarize(before.storage)
    added = foreign(tmp_path / "cache")
    cache = FeatureCache.open(tmp_path / "cache")
    assert summarize(cache.storage) == facts | {"problems": []}
    assert sample_details(cache.manifest, "image_001")["rows"][0]["teachers"]["t"] == "sound"
    assert verify(cache, full=True) == []
    assert set(strays(cache)) == added
    for reader in (cache, FeatureCache.open(tmp_path / "cache", direct=False)):
        read = reader.read(rows)
        assert all(torch.equal(read[name].decode(), expected[name].decode()) for name in TEACHERS)
    copy = subset(cache.storage.url, str(tmp_path / "copy"), teachers=["t"]).run()
    assert (verify(copy, full=True), strays(copy)) == ([], [])
    assert repair(cache).mended == []


# --- full disks ----------------------------------------------------------------------------------------


@contextmanager
def disk_is_full_at(part: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No byte more of files with this in their name."""
    whole = LocalStorage.open_write

    @contextmanager
    def full(self: LocalStorage, name: str) -> Iterator[Any]:
        with whole(self, name) as file:
            if part in name:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield file

    with monkeypatch.context() as patched:
        patched.setattr(LocalStorage, "open_write", full)
        yield


@pytest.mark.parametrize("verb", VERBS.values(), ids=list(VERBS))
@pytest.mark.parametrize("part", ["samples.parquet", "views.parquet", "cache.json", ".json"])
def test_a_full_disk_leaves_no_half_of_a_new_cache(
    tmp_path: Path,
    source: FeatureCache,
    monkeypatch: pytest.MonkeyPatch,
    verb: Callable[[FeatureCache, str], Rearrangement],
    part: str,
) -> None:
    out = tmp_path / "new"
    verb(source, str(tmp_path / "warm_up"))
    message = rf"No space left on device: {out}(.|\n)*expected: (.|\n)*free some space(.|\n)*same command"
    with disk_is_full_at(part, monkeypatch), pytest.raises(DiskSpaceError, match=message):
        verb(source, str(out))
    assert not [path for path in out.rglob("*") if path.is_file()]
    with pytest.raises(CacheNotFoundError):
        FeatureCache.open(out)
    with disk_is_full_at("commits/", monkeypatch), pytest.raises(DiskSpaceError, match=message):
        verb(source, str(out)).run()
    assert not list(out.rglob("*.partial"))
    cache = verb(source, str(out)).run()
    assert (verify(cache, full=True), strays(cache)) == ([], [])


@pytest.mark.parametrize("part", ["imagenet_train.json", "-train.tar", "splits.json"])
def test_a_full_disk_ends_an_export_with_words(
    tmp_path: Path, source: FeatureCache, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    with disk_is_full_at(part, monkeypatch), pytest.raises(DiskSpaceError, match="free some space"):
        export_theia(source, str(tmp_path / "out"))
    assert not list((tmp_path / "out").rglob("*.partial"))
    assert export_theia(source, str(tmp_path / "out")) == 8


def test_a_full_disk_is_a_reason_of_repair(source: FeatureCache, monkeypatch: pytest.MonkeyPatch) -> None:
    source.storage.remove("views.parquet")
    with disk_is_full_at("views.parquet", monkeypatch):
        (left,) = repair(source).left
    assert "No space left on device" in left.reason
    assert "free some space" in left.reason
    assert repair(source).left == []


def test_a_shard_that_another_has_committed_is_left_as_it_is(tmp_path: Path, source: FeatureCache) -> None:
    """A build, or the same command, at work in the same place: files and record of one stay together."""
    out = tmp_path / "new"
    slow, quick = (subset(source.storage.url, str(out), teachers=["t"]) for _ in range(2))
    cache = quick.run()
    before = {path: path.stat().st_ino for path in out.rglob("*") if path.is_file()}
    assert slow.run().spec == cache.spec
    assert before == {path: path.stat().st_ino for path in out.rglob("*") if path.is_file()}
