"""Builds that are told to go, that hang, and whose disk fills, turns read-only or vanishes."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from teachercache import FeatureCache, build
from teachercache.cache_builder.build_recipe import BuildRecipe
from teachercache.cache_builder.builder import BuildResult
from teachercache.cache_builder.calibrate import Calibration, CalibrationSample
from teachercache.cache_builder.extract import ShardExtractor
from teachercache.cache_builder.ray_runner import RayRunner, RayWorker
from teachercache.pipeline.errors import BuildError, CacheError, CacheNotFoundError
from teachercache.pipeline.records.manifest import CommitRecord
from teachercache.pipeline.verify import strays, verify
from tests.make_cache import build_recipe, make_images
from tests.ray_actors import await_actor

ROOT = Path(__file__).parents[2]
QUIET = Console(quiet=True)
PREEMPTED_WITHIN_S = 20
STALL_S = 20  # more than a busy machine takes for a shard of these tests


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), 24, size=(320, 240))


def shards_committed(cache: Path) -> int:
    return len(list((cache / "commits" / "tiny").glob("*.json")))


def await_shards(cache: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while shards_committed(cache) < count:
        assert time.monotonic() < deadline, f"no {count} shards within two minutes"
        time.sleep(0.01)


def partial_files(cache: Path) -> list[Path]:
    return list(cache.rglob("*.partial"))


# --- SIGTERM -------------------------------------------------------------------------------------------


def start(recipe: BuildRecipe, tmp_path: Path, prelude: str = "") -> subprocess.Popen[str]:
    """`teachercache build` in a process of its own, after `prelude`."""
    file = tmp_path / "recipe.json"
    file.write_text(recipe.model_dump_json())
    script = f"{prelude}\nfrom teachercache.jobs.cli import main\nmain()"
    return subprocess.Popen(
        [sys.executable, "-c", script, "build", str(file)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )


ON_RAY = {"kind": "ray", "num_actors": 1, "gpus_per_actor": 0, "batch_size": 4, "decode_threads": 1}


@pytest.mark.parametrize(
    ("number", "runner"),
    [
        pytest.param(signal.SIGTERM, {"kind": "local"}, id="SIGTERM"),
        pytest.param(signal.SIGINT, {"kind": "local"}, id="SIGINT"),
        pytest.param(signal.SIGTERM, ON_RAY, id="SIGTERM of a driver"),
    ],
)
def test_a_signal_ends_a_build_cleanly_and_the_same_command_goes_on(
    tmp_path: Path, images: Path, number: signal.Signals, runner: dict[str, object]
) -> None:
    recipe = build_recipe(tmp_path / "cache", images, rows_per_shard=2, runner=runner)
    process = start(recipe, tmp_path)
    await_shards(tmp_path / "cache", 2)
    process.send_signal(number)
    sent = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - sent < PREEMPTED_WITHIN_S
    assert process.returncode == 128 + number
    assert f"{number.name} ended the build; everything committed stays" in output
    assert "run the same command again" in output
    done = shards_committed(tmp_path / "cache")
    assert 2 <= done < 24
    assert partial_files(tmp_path / "cache") == []
    assert strays(FeatureCache.open(tmp_path / "cache")) == []
    result = build(build_recipe(tmp_path / "cache", images, rows_per_shard=2), QUIET)
    assert result.shards == 24 - done
    assert verify(result.cache, full=True) == []


HANG = """
import time
from teachercache.cache_builder.compute import Computing
from teachercache.cache_builder.extract import ShardExtractor
extract, encode, begun = ShardExtractor._extract, Computing.encode, set()
def begin(self, shard, *arguments):
    begun.add(shard)
    return extract(self, shard, *arguments)
def hang(self, *arguments):
    if len(begun) > 3:  # two at a time: so one has ended
        time.sleep(1000)
    return encode(self, *arguments)
ShardExtractor._extract, Computing.encode = begin, hang
"""


def test_a_shard_that_does_not_fit_the_gpu_ends_the_build_at_once_with_a_batch_that_may(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def extract(_: ShardExtractor, shard: int, names: Collection[str]) -> None:
        tried.append(shard)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmany lines")

    monkeypatch.setattr(ShardExtractor, "extract", extract)
    options = {"batch_size": 4, "decode_threads": 1, "shards_in_flight": 1}
    with pytest.raises(BuildError, match=r"allocate 2.00 GiB.\n(.|\n)*set runner\.batch_size=2, or"):
        build(build_recipe(tmp_path / "cache", images, runner=options), QUIET)
    assert len(tried) == 1


def test_a_teacher_that_hangs_ends_the_local_build_with_a_message(tmp_path: Path, images: Path) -> None:
    options = {"batch_size": 4, "decode_threads": 1, "stall_timeout_s": STALL_S}
    recipe = build_recipe(tmp_path / "cache", images, rows_per_shard=4, runner=options)
    output, _ = (process := start(recipe, tmp_path, HANG)).communicate(timeout=240)
    assert process.returncode == 1
    assert "no progress in shard" in output
    assert "runner.kind=ray" in output
    assert 0 < shards_committed(tmp_path / "cache") < 12
    assert build(recipe, QUIET).cache.valid_samples().size == 24
    assert partial_files(tmp_path / "cache") == []


def test_sigterm_ends_a_build_whose_teacher_hangs(tmp_path: Path, images: Path) -> None:
    recipe = build_recipe(tmp_path / "cache", images, rows_per_shard=48)
    process = start(recipe, tmp_path, HANG.replace("> 3", "> 0"))
    deadline = time.monotonic() + 60
    shards = re.compile("/c/[0-9]")  # the groups above are written before anything runs
    while not any(map(shards.search, map(str, partial_files(tmp_path / "cache")))):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    process.communicate(timeout=60)
    assert time.monotonic() - sent < PREEMPTED_WITHIN_S
    assert process.returncode == 143
    assert build(recipe, QUIET).shards == 1
    assert partial_files(tmp_path / "cache") == []


# --- the place of the cache ----------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", place], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mounting needs root: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], capture_output=True, check=False)


@pytest.fixture
def no_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let builds begin that `plan` would refuse: somebody else fills the disk while they run."""
    monkeypatch.setattr("teachercache.cache_builder.plan.Plan.require", lambda *_: None)


def test_a_full_disk_ends_the_build_and_it_goes_on_when_there_is_room(
    small_disk: Path, images: Path, no_estimate: None
) -> None:
    recipe = build_recipe(small_disk / "cache", images, rows_per_shard=2)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(2_700_000))
    with pytest.raises(BuildError, match=r"No space left on device(.|\n)*free some space(.|\n)*same command"):
        build(recipe, QUIET)
    done = shards_committed(small_disk / "cache")
    assert done < 24
    assert partial_files(small_disk / "cache") == []
    assert verify(FeatureCache.open(small_disk / "cache"), full=True) == []
    filler.unlink()
    result = build(recipe, QUIET)
    assert result.shards == 24 - done
    assert verify(result.cache, full=True) == []


def test_a_disk_that_is_full_from_the_beginning_is_told(
    small_disk: Path, images: Path, no_estimate: None
) -> None:
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "filler").write_bytes(bytes(4_000_000))
    with pytest.raises(CacheError, match=r"No space left on device(.|\n)*with room(.|\n)*free some space"):
        build(build_recipe(small_disk / "cache", images), QUIET)
    assert not [path for path in (small_disk / "cache").rglob("*") if path.is_file()]


def test_a_disk_that_fills_before_the_first_shard_leaves_nothing_half_made(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the tables, `cache.json`, the codec's tables, the layouts, and the lock."""
    teacher = {"model": "test_vit.r160_in1k", "pretrained": False, "image_size": 32, "codec": "int8-hadamard"}
    recipe = build_recipe(tmp_path / "cache", images, teachers={"tiny": teacher})
    open_file, full = Path.open, list[str]()

    def fail_when_full(self: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if "r" not in mode and any(part in self.name for part in full):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return open_file(self, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", fail_when_full)
    for part in (
        "samples.parquet",
        "views.parquet",
        "cache.json.",
        "tiny.safe",
        "zarr.json",
        "cache.json.lock",
    ):
        full[:] = [part]
        with pytest.raises(
            BuildError, match=r"No space left(.|\n)*expected: (.|\n)*free some(.|\n)*same command"
        ):
            build(recipe, QUIET)
        assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()], part
    full.clear()
    first = build(recipe, QUIET).cache
    grown = recipe.model_copy(update={"teachers": recipe.teachers | {"late": recipe.teachers["tiny"]}})
    for part in ("late.safe", "cache.json."):
        full[:] = [part]
        with pytest.raises(BuildError, match=r"No space left"):
            build(grown, QUIET)
        assert FeatureCache.open(tmp_path / "cache").spec == first.spec
        assert (verify(first, full=True), strays(first)) == ([], [])
    full.clear()
    assert verify(build(grown, QUIET).cache, full=True) == []


def test_a_read_only_folder_is_refused_before_the_teachers_are_loaded(
    small_disk: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = build_recipe(small_disk / "cache", images, rows_per_shard=2)
    first = build(recipe, QUIET).cache
    first.storage.remove("commits/tiny/00003.json")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    monkeypatch.setattr("teachercache.cache_builder.builder._runner", None)
    with pytest.raises(CacheError, match=r"cannot be written here(.|\n)*Read-only file system"):
        build(recipe, QUIET)


def test_a_disk_that_turns_read_only_ends_the_build(
    small_disk: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract = ShardExtractor.extract

    def remount_then_extract(self: ShardExtractor, shard: int, names: Collection[str]) -> object:
        if shards_committed(small_disk / "cache") >= 2:
            subprocess.run(["mount", "-o", "remount,ro", small_disk], check=False, capture_output=True)
        return extract(self, shard, names)

    monkeypatch.setattr(ShardExtractor, "extract", remount_then_extract)
    options = {"batch_size": 4, "decode_threads": 1, "shards_in_flight": 1}
    with pytest.raises(BuildError, match=r"Read-only file system(.|\n)*mount the place writable"):
        build(build_recipe(small_disk / "cache", images, rows_per_shard=2, runner=options), QUIET)


def test_a_cache_that_vanishes_ends_the_build_and_is_not_made_anew(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract = ShardExtractor.extract

    def vanish_then_extract(self: ShardExtractor, shard: int, names: Collection[str]) -> object:
        if (tmp_path / "cache").exists() and shards_committed(tmp_path / "cache") >= 2:
            (tmp_path / "cache").rename(tmp_path / "elsewhere")
        return extract(self, shard, names)

    monkeypatch.setattr(ShardExtractor, "extract", vanish_then_extract)
    options = {"batch_size": 4, "decode_threads": 1, "shards_in_flight": 1}
    recipe = build_recipe(tmp_path / "cache", images, rows_per_shard=2, runner=options)
    with pytest.raises(CacheNotFoundError, match=r"has vanished(.|\n)*mount it again"):
        build(recipe, QUIET)
    assert not (tmp_path / "cache").exists()
    monkeypatch.undo()
    shutil.move(tmp_path / "elsewhere", tmp_path / "cache")
    assert build(recipe, QUIET).shards == 22


# --- processes of a Ray cluster ------------------------------------------------------------------------


def ray_recipe(cache: Path, images: Path, **options: object) -> BuildRecipe:
    return build_recipe(cache, images, rows_per_shard=2, runner=ON_RAY | options)


def signal_an_actor(cache: Path, number: signal.Signals) -> threading.Thread:
    """Once two shards are committed, from another thread."""

    def send() -> None:
        await_shards(cache, 2)
        await_actor().send_signal(number)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def require_whole(result: BuildResult) -> None:
    """An actor that dies may have committed shards and told nobody; they count all the same."""
    assert result.cache.committed("tiny").sum() == 24
    assert (result.shards, result.views) == (24, 48)


def test_sigterm_of_an_actor_costs_no_attempt(tmp_path: Path, images: Path, cluster: None) -> None:
    sender = signal_an_actor(tmp_path / "cache", signal.SIGTERM)
    result = build(ray_recipe(tmp_path / "cache", images, num_actors=1, max_attempts=1), QUIET)
    sender.join()
    require_whole(result)
    assert verify(result.cache, full=True) == []


def test_an_actor_that_does_not_answer_is_replaced(
    tmp_path: Path, images: Path, cluster: None, caplog: pytest.LogCaptureFixture
) -> None:
    sender = signal_an_actor(tmp_path / "cache", signal.SIGSTOP)
    result = build(ray_recipe(tmp_path / "cache", images, num_actors=1, stall_timeout_s=STALL_S), QUIET)
    sender.join()
    assert re.search(r"replacing an actor with \d shards?: its process did not answer", caplog.text)
    require_whole(result)
    assert verify(result.cache, full=True) == []


def test_a_shard_whose_actor_dies_after_its_commit_is_counted(
    tmp_path: Path, images: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is no failure, though it is not tried again."""

    class DiesBeforeItTells(RayWorker):
        def extract(self, shard: int, names: Collection[str]) -> dict[str, CommitRecord]:
            records = super().extract(shard, names)
            if shard == 9:
                os._exit(1)
            return records

    monkeypatch.setattr(RayRunner, "worker", DiesBeforeItTells)
    recipe = ray_recipe(tmp_path / "cache", images, num_actors=1, max_attempts=1, shards_in_flight=1)
    require_whole(build(recipe, QUIET))


@pytest.mark.parametrize("call", ["load", "calibrate"])
def test_an_actor_that_dies_before_the_first_shard_is_replaced(
    tmp_path: Path,
    images: Path,
    cluster: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    call: str,
) -> None:
    died = tmp_path / "died"

    class DiesOnce(RayWorker):
        def load(self) -> dict[str, str]:
            self._die_in("load")
            return super().load()

        def calibrate(self, sample: CalibrationSample, names: Collection[str]) -> dict[str, Calibration]:
            self._die_in("calibrate")
            return super().calibrate(sample, names)

        def _die_in(self, this: str) -> None:
            if this == call and not died.exists():
                died.touch()
                os._exit(1)

    monkeypatch.setattr(RayRunner, "worker", DiesOnce)
    require_whole(build(ray_recipe(tmp_path / "cache", images, num_actors=1), QUIET))
    assert died.exists()
    assert "replacing an actor" in caplog.text


def test_actors_that_keep_dying_before_the_first_shard_end_the_build(
    tmp_path: Path, images: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dies(RayWorker):
        def load(self) -> dict[str, str]:
            os._exit(1)

    monkeypatch.setattr(RayRunner, "worker", Dies)
    recipe = ray_recipe(tmp_path / "cache", images, num_actors=1, max_attempts=1)
    with pytest.raises(BuildError, match=r"could not load the teachers(.|\n)*exit"):
        build(recipe, QUIET)
    assert not (tmp_path / "cache" / "cache.json").exists()


def test_a_teacher_that_hangs_once_is_replaced(
    tmp_path: Path,
    images: Path,
    cluster: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    hung = tmp_path / "hung"

    class Hangs(RayWorker):
        def extract(self, shard: int, names: Collection[str]) -> dict[str, CommitRecord]:
            if shard == 9 and not hung.exists():
                hung.touch()
                assert self._extractor is not None
                self._extractor._progressed_at[shard] = time.monotonic()
                time.sleep(1000)
            return super().extract(shard, names)

    monkeypatch.setattr(RayRunner, "worker", Hangs)
    recipe = ray_recipe(tmp_path / "cache", images, num_actors=1, max_attempts=2, stall_timeout_s=STALL_S)
    require_whole(build(recipe, QUIET))
    assert "no progress for" in caplog.text


def test_a_poison_shard_is_reported_and_the_others_are_built(
    tmp_path: Path, images: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Poisoned(RayWorker):
        def extract(self, shard: int, names: Collection[str]) -> dict[str, CommitRecord]:
            if shard == 5:
                os._exit(1)  # as an image that crashes the decoder would
            return super().extract(shard, names)

    monkeypatch.setattr(RayRunner, "worker", Poisoned)
    recipe = ray_recipe(tmp_path / "cache", images, num_actors=1, max_attempts=2)
    with pytest.raises(BuildError, match=r"1 of 24 shards failed(.|\n)*shard 5: the process that"):
        build(recipe, QUIET)
    assert shards_committed(tmp_path / "cache") == 23
    monkeypatch.undo()
    assert build(recipe, QUIET).shards == 1
