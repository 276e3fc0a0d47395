"""One trainer at a time in an output folder, over processes and machines."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from teachercache.pipeline.errors import CheckpointError
from teachercache.pipeline.places import processes
from teachercache.student.training import run_lock
from teachercache.student.training.checkpoint import newest_checkpoint
from teachercache.student.training.train import train
from tests.make_cache import make_cache, make_images
from tests.train_recipes import logged, train_recipe

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

ELSEWHERE = "node7~0123456789abcdef~4242~17~0a1b2c3d~{:.0f}"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run lock")
    make_cache(folder / "cache", make_images(folder / "images", 10))
    return folder / "cache"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_ENDS_WITHIN_S", 0.4)
    monkeypatch.setattr(run_lock, "_LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(run_lock, "_TOUCH_EVERY_S", 0.05)


@contextmanager
def holder(output: Path, doing: str = "time.sleep(60)") -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder and does something."""
    code = (
        "import time\nfrom teachercache.pipeline.places.local_storage import LocalStorage\n"
        f"with LocalStorage({str(output)!r}).exclusive('run'):\n    print('held', flush=True)\n    {doing}"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_is_refused_and_the_first_goes_on(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with holder(tmp_path) as process:
        with pytest.raises(CheckpointError, match=r"run that lives(.|\n)*choose another output") as error:
            train(train_recipe(cache, tmp_path))
        who = rf"{tmp_path}/run\.lock.* process {process.pid} on \S+ since \d{{4}}-\d\d-\d\d \d\d:\d\d"
        assert re.search(who, str(error.value))
        assert re.search(who + ".*waiting", capsys.readouterr().out)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run.lock"]


def test_a_run_that_ends_is_waited_for(cache: Path, tmp_path: Path) -> None:
    with holder(tmp_path, "time.sleep(0.3)"):
        train(train_recipe(cache, tmp_path))
    assert len(logged(tmp_path)) == 8
    assert not (tmp_path / "run.lock").exists()


def test_a_run_that_was_killed_here_is_followed_at_once(cache: Path, tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.kill()
    assert (tmp_path / "run.lock").exists()
    train(train_recipe(cache, tmp_path, schedule={"max_steps": 1}))
    assert not (tmp_path / "run.lock").exists()


def test_of_another_machine_only_silence_counts(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its clock says: here it is a day behind."""
    monkeypatch.setattr(processes, "_LOCK_TIMEOUT_S", 1.5)
    lock = tmp_path / "run.lock"
    lock.write_text(ELSEWHERE.format(time.time() - 86400))
    ended = threading.Event()

    def live() -> None:
        while not ended.wait(0.1):
            os.utime(lock)

    thread = threading.Thread(target=live)
    thread.start()
    with pytest.raises(CheckpointError, match="process 4242 on node7 since"):
        train(train_recipe(cache, tmp_path))
    ended.set()
    thread.join()
    started = time.monotonic()
    train(train_recipe(cache, tmp_path, schedule={"max_steps": 1}))
    assert time.monotonic() - started > 1.5


def test_a_run_shows_that_it_lives(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touched = set()
    log = run_lock._read

    def noting(path: Path) -> bytes | None:
        touched.add(path.stat().st_mtime_ns)
        time.sleep(0.06)
        return log(path)

    monkeypatch.setattr(run_lock, "_read", noting)
    train(train_recipe(cache, tmp_path))
    assert len(touched) > 3


def test_a_run_that_lost_the_folder_writes_nothing_more(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a night in which its machine slept."""
    read, steps = run_lock._read, iter(range(100))

    def taken_over_at_step_5(path: Path) -> bytes | None:
        if next(steps) == 5:
            path.write_text(ELSEWHERE.format(time.time()))
        return read(path)

    monkeypatch.setattr(run_lock, "_read", taken_over_at_step_5)
    with pytest.raises(CheckpointError, match=r"no longer holds(.|\n)*process 4242 on node7"):
        train(train_recipe(cache, tmp_path))
    assert len(logged(tmp_path)) == 5
    assert newest_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints/step_00000003"
    assert "node7" in (tmp_path / "run.lock").read_text()


def test_an_output_that_cannot_be_written_is_one_message(cache: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lock of this run cannot be written(.|\n)*can write to"):
        train(train_recipe(cache, "/proc/self/fdinfo"))
