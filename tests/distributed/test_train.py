"""The trainer under torchrun: two real processes (gloo) against one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from teachercache import build
from teachercache.student.training.checkpoint import newest_checkpoint
from teachercache.student.training.train import train
from tests.make_cache import build_recipe, make_images
from tests.train_recipes import CONTENT, logged, train_recipe

STEPS = 20


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real features of a small ViT, float32 on its own grid."""
    root = tmp_path_factory.mktemp("cache")
    build(build_recipe(root / "cache", make_images(root / "images", 9)))
    return root / "cache"


def start(
    cache: Path,
    output: Path,
    *,
    processes: int = 1,
    batch_size: int,
    steps: int = STEPS,
    stdout: int | None = None,
    **changes: Any,
) -> subprocess.Popen[bytes]:
    output.mkdir(parents=True, exist_ok=True)
    recipe = CONTENT | {
        "cache": str(cache),
        "output": str(output),
        "batch_size_per_process": batch_size,
        "schedule": {"max_steps": steps},
        "checkpoint_every_steps": 1000,
        **changes,
    }
    OmegaConf.save(recipe, output / "recipe.yaml")
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    script = Path(__file__).parents[2] / "jobs" / "train_student.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*launch, script, output / "recipe.yaml"], env=environment, stdout=stdout)


def run(cache: Path, output: Path, **arguments: Any) -> list[float]:
    with start(cache, output, **arguments) as process:
        assert process.wait(timeout=300) == 0
    return logged(output)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Five other images, on which nobody trains: two batches, of which the last is not full."""
    root = tmp_path_factory.mktemp("held_out")
    build(build_recipe(root / "cache", make_images(root / "images", 5, seed=1)))
    return {"cache": str(root / "cache"), "every_steps": 10}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def one_process(cache: Path, runs: Path, held_out: dict[str, Any]) -> list[float]:
    return run(cache, runs / "one", batch_size=4, validation=held_out)


@pytest.fixture(scope="module")
def two_processes(cache: Path, runs: Path, held_out: dict[str, Any]) -> list[float]:
    return run(cache, runs / "two", processes=2, batch_size=2, validation=held_out)


def test_two_processes_are_one_with_twice_the_batch(
    one_process: list[float], two_processes: list[float], runs: Path
) -> None:
    assert len(one_process) == STEPS
    assert two_processes[:10] == pytest.approx(one_process[:10], rel=1e-4)
    one, two = (
        json.loads((runs / name / "metrics.jsonl").read_text().splitlines()[9]) for name in ("one", "two")
    )
    measured = {key: value for key, value in one.items() if key.startswith("similarity/tiny")}
    assert len(measured) == 5, "on average, and four levels"
    assert {key: two[key] for key in measured} == pytest.approx(measured, rel=1e-4)


def test_online_teachers_give_the_losses_of_the_cache(
    cache: Path, one_process: list[float], tmp_path: Path
) -> None:
    assert run(cache, tmp_path, batch_size=4, features="online") == pytest.approx(one_process, rel=1e-5)


def test_online_teachers_give_the_losses_of_the_cache_on_two_processes(
    cache: Path, two_processes: list[float], tmp_path: Path
) -> None:
    online = run(cache, tmp_path, processes=2, batch_size=2, features="online")
    assert online == pytest.approx(two_processes, rel=1e-5)


@pytest.mark.usefixtures("fresh_accelerate")
def test_two_processes_train_a_kpu_as_one_does(cache: Path, tmp_path: Path) -> None:
    student = {"kind": "kpu", "stem": "test_vit", "pretrained": False}
    two = run(cache, tmp_path / "two", processes=2, batch_size=2, steps=10, student=student)
    whole = {"batch_size_per_process": 4, "schedule": {"max_steps": 10}}
    train(train_recipe(cache, tmp_path / "one", student=student, **whole))
    assert two == pytest.approx(logged(tmp_path / "one"), rel=1e-4)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two teachers on oblongs."""
    root = tmp_path_factory.mktemp("large")
    oblong = {"model": "test_vit", "pretrained": False, "image_size": [96, 64], "codec": "f32"}
    teachers = {"oblong": oblong, "other": oblong | {"random_seed": 1}}
    views = {"num_views": 1, "size": [96, 64]}
    build(build_recipe(root / "cache", make_images(root / "images", 9), teachers=teachers, views=views))
    return root / "cache"


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("weighting", ["famo", "teacher_drop"])
def test_two_processes_train_on_two_inputs_weighed_as_one_does(
    cache: Path, large: Path, tmp_path: Path, weighting: str
) -> None:
    def changes(*sizes: int) -> dict[str, Any]:
        inputs = zip((cache, large), sizes, strict=True)
        return {
            "student": {"kind": "kpu", "stem": "test_vit", "pretrained": False},
            "distillation": {"weighting": weighting},
            "inputs": [{"cache": str(one), "batch_size_per_process": size} for one, size in inputs],
            "batch_size_per_process": 16,  # the default, as if it was left out
        }

    two = run(cache, tmp_path / "two", processes=2, batch_size=2, steps=10, **changes(2, 1))
    train(train_recipe(cache, tmp_path / "one", schedule={"max_steps": 10}, **changes(4, 2)))
    assert two == pytest.approx(logged(tmp_path / "one"), rel=1e-4)
    if weighting == "famo":
        weights = [logged(tmp_path / name, "weight/oblong") for name in ("one", "two")]
        assert weights[1] == pytest.approx(weights[0], rel=1e-6)
        assert weights[0][-1] != weights[0][0]


def test_two_processes_see_the_windows_and_the_jitter_of_one(tmp_path: Path) -> None:
    views = {"num_views": 2, "size": [32, 32], "margin": 32}
    cache = build(build_recipe(tmp_path / "cache", make_images(tmp_path / "images", 9), views=views)).cache
    path, jitter = Path(cache.storage.url), {"brightness": 0.4, "hue": 0.1}
    two = run(path, tmp_path / "two", processes=2, batch_size=2, steps=10, student_jitter=jitter)
    whole = {"batch_size_per_process": 4, "schedule": {"max_steps": 10}}
    train(train_recipe(path, tmp_path / "one", student_jitter=jitter, **whole))
    assert two == pytest.approx(logged(tmp_path / "one"), rel=1e-4)


@pytest.mark.usefixtures("fresh_accelerate")
def test_two_processes_stream_what_one_streams_and_go_on_exactly(tmp_path: Path) -> None:
    """Of tars with two rows and a buffer of one row, two processes take at a time what one takes."""
    recipe = build_recipe(
        tmp_path / "cache", make_images(tmp_path / "images", 9), rows_per_shard=2, store="webdataset"
    )
    path = Path(build(recipe).cache.storage.url)
    loader = {"kind": "stream", "shuffle_buffer": 1, "threads": 2}

    def stream_on_two() -> list[float]:
        options = {"steps": 10, "checkpoint_every_steps": 6, "loader": loader}
        return run(path, tmp_path / "two", processes=2, batch_size=2, **options)

    losses = stream_on_two()
    whole = {"batch_size_per_process": 4, "schedule": {"max_steps": 10}}
    train(train_recipe(path, tmp_path / "one", loader=loader, **whole))
    assert losses == pytest.approx(logged(tmp_path / "one"), rel=1e-4)

    last = newest_checkpoint(tmp_path / "two" / "checkpoints")
    assert last is not None
    shutil.rmtree(last)
    assert stream_on_two() == losses


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_saves_and_the_same_command_goes_on(cache: Path, tmp_path: Path, processes: int) -> None:
    size = {"processes": processes, "batch_size": 4 // processes}
    with start(cache, tmp_path, steps=100_000, **size) as process:
        await_steps(tmp_path, 3)
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=120)
    assert code == 143 if processes == 1 else code != 0
    before = logged(tmp_path)
    checkpoint = newest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.name == f"step_{len(before):08d}"

    with start(cache, tmp_path, steps=100_000, **size) as process:
        await_steps(tmp_path, len(before) + 3)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)
    assert logged(tmp_path)[: len(before)] == before


def test_a_run_that_is_queued_again_follows_the_one_that_still_ends(cache: Path, tmp_path: Path) -> None:
    """With another number of processes, of which the main one waits for the folder."""
    with start(cache, tmp_path, batch_size=4, steps=100_000) as first:
        await_steps(tmp_path, 3)
        with start(
            cache, tmp_path, batch_size=2, processes=2, steps=100_000, stdout=subprocess.PIPE
        ) as second:
            assert second.stdout is not None
            told = next(line for line in second.stdout if b"waiting for that run to end" in line)
            assert f"process {first.pid} on ".encode() in told
            first.send_signal(signal.SIGTERM)
            assert first.wait(timeout=120) == 143
            before = logged(tmp_path)
            await_steps(tmp_path, len(before) + 3)
            second.send_signal(signal.SIGTERM)
            second.communicate(timeout=120)
    assert logged(tmp_path)[: len(before)] == before
    assert not (tmp_path / "run.lock").exists()


def await_steps(output: Path, count: int) -> None:
    file = output / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not file.exists() or len(file.read_text().splitlines()) < count:
        assert time.monotonic() < deadline, f"no {count} steps within two minutes"
        time.sleep(0.05)
