"""GPU nodes that join while a build waits for them, or works on CPUs; Ray takes our word for the GPUs."""

from __future__ import annotations

import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.autoscaler.v2.sdk import get_cluster_status
from rich.console import Console

from benchmarks.chaos import ChaosCluster, make_images, recipe_for
from teachercache import build
from teachercache.cache_builder.build_recipe import BuildRecipe
from teachercache.cache_builder.builder import BuildResult
from teachercache.cache_builder.ray_runner import RayRunner, RayWorker
from teachercache.cache_builder.runner import Task
from teachercache.pipeline.records.manifest import CommitRecord

TIMEOUT_S = 240
ASKED_WITHIN_S = 10  # the runner looks around every other second
USED_WITHIN_S = 60  # seven on a machine with something else to do: an actor imports torch
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Ray keeps sockets below it, whose paths may have 107 characters."""
    with tempfile.TemporaryDirectory(prefix="late") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def nodes(folder: Path) -> Iterator[ChaosCluster]:
    """A head, and a node with one CPU."""
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    cluster = ChaosCluster(folder, raylets=1)
    ray.init(address=cluster.address, logging_level="error", log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.stop()


@pytest.fixture
def gpus(nodes: ChaosCluster) -> Iterator[Callable[[int], None]]:
    """To add a node of one CPU and some GPUs; it goes with the test."""
    added = []

    def add(count: int) -> None:
        nodes.add_node(num_gpus=count)
        added.append(count)

    yield add
    for _ in added:
        nodes.remove_node()
    until(lambda: not ray.cluster_resources().get("GPU"))


@pytest.fixture(scope="module")
def recipe(folder: Path) -> BuildRecipe:
    return recipe_for(folder / "cache", make_images(folder / "images", 96, seed=0))


def until(happens: Callable[[], object], of: Future[Any] | None = None) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not happens():
        assert time.monotonic() < deadline
        if of is not None and of.done():
            of.result()
        time.sleep(0.05)


def demand(nodes: ChaosCluster) -> list[dict[str, float]]:
    """What `ray status` shows, and an autoscaler acts upon."""
    demands = get_cluster_status(nodes.address).resource_demands.ray_task_actor_demand
    return [bundle.bundle for one in demands for bundle in one.bundles_by_count]


def with_runner(recipe: BuildRecipe, **options: object) -> BuildRecipe:
    return recipe.model_copy(update={"runner": recipe.runner.model_copy(update=options)})


@pytest.fixture
def require_in_time(capsys: pytest.CaptureFixture[str]) -> Callable[[float], None]:
    """To check after how many seconds GPUs that joined are used, and to show it."""

    def require(seconds: float) -> None:
        with capsys.disabled():
            print(f"[used after {seconds:.1f} s]", end=" ")
        assert seconds < USED_WITHIN_S

    return require


def test_a_build_waits_for_gpus_says_so_and_asks_the_autoscaler(
    nodes: ChaosCluster,
    gpus: Callable[[int], None],
    recipe: BuildRecipe,
    caplog: pytest.LogCaptureFixture,
    require_in_time: Callable[[float], None],
) -> None:
    with ThreadPoolExecutor(1) as pool:
        running: Future[BuildResult] = pool.submit(build, with_runner(recipe, gpus_per_actor=1.0), QUIET)
        until(lambda: {"CPU": 1.0, "GPU": 1.0} in demand(nodes), running)
        until(lambda: "waiting for a node with 1 CPUs and 1 GPUs" in caplog.text, running)
        assert "runner.gpus_per_actor=0 computes on CPUs" in caplog.text
        gpus(1)
        joined = time.time()
        until((Path(recipe.cache) / "cache.json").exists, running)
        require_in_time(time.time() - joined)
        assert running.result(TIMEOUT_S).shards == 12
    until(lambda: not demand(nodes))


def test_cpus_work_until_gpus_come_and_then_retire(
    nodes: ChaosCluster,
    gpus: Callable[[int], None],
    recipe: BuildRecipe,
    folder: Path,
    require_in_time: Callable[[float], None],
) -> None:
    """And while nobody asks for GPUs, no autoscaler is asked for nodes."""
    cache = build(with_runner(recipe, kind="local"), QUIET).cache
    for shard in range(cache.spec.num_shards):
        cache.storage.remove(f"commits/tiny/{shard:05d}.json")
    arrived = folder / "gpu"

    class Patient(RayWorker):
        """Shards other than the first four wait for a GPU."""

        def fill(self, url: str, images: str, loaded: object) -> str:
            if ray.get_gpu_ids():
                arrived.touch()
            return super().fill(url, images, loaded)

        def extract(self, shard: int, names: Any) -> dict[str, CommitRecord]:
            while shard >= 4 and not arrived.exists():
                time.sleep(0.05)
            return super().extract(shard, names)

    class PatientRunner(RayRunner):
        worker = Patient

    tasks = [Task(shard, ("tiny",)) for shard in range(12)]
    options = with_runner(recipe, gpus_per_actor=None).runner
    with PatientRunner(options, cache.spec.teachers, 12) as runner, ThreadPoolExecutor(1) as pool:
        running = pool.submit(runner.run, recipe.cache, str(folder / "images"), tasks, lambda _: None)
        until(lambda: len(cache.manifest.committed_shards("tiny")) >= 4, running)
        assert [actor.gpus for actor in runner._actors] == [0]
        assert demand(nodes) == []
        gpus(1)
        joined, clock = time.time(), time.monotonic()
        until(lambda: any(actor.gpus for actor in runner._actors), running)
        assert time.monotonic() - clock < ASKED_WITHIN_S
        assert running.result(TIMEOUT_S) == {}
        require_in_time(arrived.stat().st_mtime - joined)
        assert {actor.gpus for actor in runner._actors} == {1}
    assert len(cache.manifest.committed_shards("tiny")) == 12
