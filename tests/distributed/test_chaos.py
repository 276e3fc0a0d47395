"""A node that joins late, the metrics of every actor, and the short form of `benchmarks/chaos.py`."""

from __future__ import annotations

import os
import re
import secrets
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
from rich.console import Console

from benchmarks.chaos import TIMEOUT_S, ChaosCluster, chaos, make_images, recipe_for
from teachercache import build
from teachercache.cache_builder.build_recipe import RunnerRecipe
from teachercache.cache_builder.progress import STAGES
from teachercache.cache_builder.ray_runner import RayRunner, RayWorker
from teachercache.cache_builder.runner import Task
from teachercache.pipeline.errors import BuildError
from teachercache.pipeline.records.manifest import CommitRecord
from teachercache.pipeline.records.spec import TeacherSpec

METRICS_TIMEOUT_S = 90
REPORT_INTERVAL_S = 10  # Ray's own


@pytest.fixture
def folder() -> Iterator[Path]:
    """Ray keeps sockets below it, whose paths may have 107 characters."""
    with tempfile.TemporaryDirectory(prefix="chaos") as name:
        yield Path(name)


def test_one_kill_of_each_kind_changes_no_byte(folder: Path) -> None:
    found = chaos(folder, kills=4, seed=3, samples=48, raylets=2)
    assert set(found.kills.values()) == {1}
    assert len(found.kills) == 4
    assert (found.rows_lost, found.duplicated, found.problems, found.differing_files) == (0, 0, [], [])
    assert found.repeated <= found.at_risk


def test_whole_nodes_of_several_are_killed_and_no_byte_changes(folder: Path) -> None:
    """A raylet goes with its actor and what that has in flight; the build itself goes on, and ends once."""
    found = chaos(folder, kills=2, seed=0, samples=48, raylets=3, kinds=["raylet"])
    assert found.kills == {"raylet": 2}
    assert (found.rows_lost, found.duplicated, found.problems, found.differing_files) == (0, 0, [], [])
    assert found.repeated <= found.at_risk


def test_a_late_node_is_used_and_every_actor_is_measured(folder: Path) -> None:
    images = make_images(folder / "images", 96, seed=0)
    recipe = recipe_for(folder / "cache", images)
    local = recipe.model_copy(update={"runner": RunnerRecipe(batch_size=4)})
    cache = build(local, Console(quiet=True)).cache
    for shard in range(cache.spec.num_shards):
        cache.storage.remove(f"commits/tiny/{shard:05d}.json")

    class Patient(RayWorker):
        """The later shards wait for the actor of the late node."""

        def __init__(self, teachers: Mapping[str, TeacherSpec], runner: RunnerRecipe) -> None:
            super().__init__(teachers, runner)
            (folder / f"actor{os.getpid()}").touch()

        def extract(self, shard: int, names: Collection[str]) -> dict[str, CommitRecord]:
            deadline = time.monotonic() + 100
            while shard >= 4 and len(list(folder.glob("actor*"))) < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
            return super().extract(shard, names)

    class PatientRunner(RayRunner):
        worker = Patient

    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    cluster = ChaosCluster(folder, raylets=1)
    seconds = Counter[str]()

    def collect(records: Mapping[str, CommitRecord]) -> None:
        seconds.update(records["tiny"].seconds)

    try:
        ray.init(address=cluster.address, logging_level="error", log_to_driver=False)
        with PatientRunner(recipe.runner, cache.spec.teachers) as runner, ThreadPoolExecutor(1) as pool:
            tasks = [Task(shard, ("tiny",)) for shard in range(12)]
            running = pool.submit(runner.run, recipe.cache, str(images), tasks, collect)
            while not cache.manifest.committed_shards("tiny"):
                time.sleep(0.05)
            cluster.add_node()  # Ray wants the main thread for it
            assert running.result(TIMEOUT_S) == {}
            measured = scrape({"shards": 2, "views": 2, "stage_seconds": 2 * len(STAGES)})
            assert sum(measured["shards"].values()) == 12
            assert sum(measured["views"].values()) == 192
            del seconds["wall"]
            assert sum(measured["stage_seconds"].values()) == pytest.approx(seconds.total(), rel=0.01)
    finally:
        ray.shutdown()
        cluster.stop()


def test_an_actor_needs_one_node_with_all_it_takes(folder: Path) -> None:
    recipe = recipe_for(folder / "cache", folder / "images")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    cluster = ChaosCluster(folder, raylets=2)
    try:
        ray.init(address=cluster.address, logging_level="error", log_to_driver=False)
        with pytest.raises(BuildError, match=r"has room for one actor(.|\n)*1 CPUs(.|\n)*one with 2 CPUs"):
            RayRunner(recipe.runner.model_copy(update={"cpus_per_actor": 2.0}), {})
    finally:
        ray.shutdown()
        cluster.stop()


def scrape(counts: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """Our metrics by name and labels, from the Prometheus endpoints of all nodes, when they rest."""
    last: dict[str, dict[str, float]] = {}
    deadline = time.monotonic() + METRICS_TIMEOUT_S
    while time.monotonic() < deadline:
        found: dict[str, dict[str, float]] = {name: {} for name in counts}
        for node in ray.nodes():
            url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            with urllib.request.urlopen(url, timeout=10) as response:
                text = response.read().decode()
            pattern = r"^ray_teachercache_(\w+?)(?:_total)?\{(.*)\} (\S+)$"
            for name, labels, value in re.findall(pattern, text, re.MULTILINE):
                if name in counts:  # gauges vanish when an actor rests
                    found[name][labels] = float(value)
        if found == last and {name: len(values) for name, values in found.items()} == counts:
            return found
        last = found
        time.sleep(REPORT_INTERVAL_S + 1)
    raise AssertionError(f"not {counts} metrics at rest within {METRICS_TIMEOUT_S} s: {last}")
