"""Builds on a real local Ray cluster, and what happens when its processes die."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import ray
import torch
from rich.console import Console

from teachercache import build
from teachercache.cache_builder.build_recipe import RunnerRecipe
from teachercache.cache_builder.progress import STAGES
from teachercache.cache_builder.ray_cluster import connect
from teachercache.cache_builder.ray_runner import RayRunner
from teachercache.pipeline.errors import BuildError, TeacherCacheError, WeightsNotFoundError
from teachercache.pipeline.verify import verify
from tests.make_cache import build_recipe, make_cache, make_images
from tests.ray_actors import await_actor

QUIET = Console(quiet=True)
ERROR_LINES = 6


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), 16)


def runner(**options: object) -> dict[str, object]:
    return {"kind": "ray", "batch_size": 4, "decode_threads": 1, "gpus_per_actor": 0} | options


def test_ray_and_local_builds_of_two_sources_hold_the_same_features(tmp_path: Path, cluster: None) -> None:
    places = {name: make_images(tmp_path / name, 8, seed=seed) for seed, name in enumerate(("some", "more"))}
    sources = [{"name": name, "path": str(place)} for name, place in places.items()]
    sources[0]["kind"] = "image_folder"
    recipe = build_recipe(tmp_path / "ray", sources, rows_per_shard=4, runner=runner())
    result = build(recipe, QUIET)
    local = build(build_recipe(tmp_path / "local", sources, rows_per_shard=4), QUIET).cache
    assert {local.key(sample).partition("/")[0] for sample in range(16)} == set(places)
    assert (result.shards, result.views) == (8, 32)
    rows = list(range(32))
    torch.testing.assert_close(
        result.cache.read(rows)["tiny"].decode(), local.read(rows)["tiny"].decode(), rtol=1e-5, atol=1e-5
    )
    assert result.cache.spec.content_id("tiny") == local.spec.content_id("tiny")
    assert verify(result.cache, full=True) == []


def test_a_killed_actor_costs_its_shards_in_flight(tmp_path: Path, images: Path, cluster: None) -> None:
    recipe = build_recipe(tmp_path / "cache", images, rows_per_shard=2, runner=runner(num_actors=2))
    killed = threading.Event()

    def kill_one_actor_in_the_middle() -> None:
        commits = tmp_path / "cache" / "commits" / "tiny"
        deadline = time.monotonic() + 120
        while len(list(commits.glob("*.json"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.005)
        await_actor().kill()
        killed.set()

    killer = threading.Thread(target=kill_one_actor_in_the_middle)
    killer.start()
    result = build(recipe, QUIET)
    killer.join()
    assert killed.is_set()
    assert result.shards == 16  # with those that it committed, and told nobody
    assert result.cache.committed("tiny").sum() == 16
    assert verify(result.cache, full=True) == []
    assert result.cache.valid_samples().size == 16
    reference = build(
        build_recipe(tmp_path / "whole", images, rows_per_shard=2, runner=runner(num_actors=1)), QUIET
    )
    rows = list(range(32))
    assert torch.equal(result.cache.read(rows)["tiny"].decode(), reference.cache.read(rows)["tiny"].decode())


def test_a_teacher_that_cannot_load_is_one_message(tmp_path: Path, images: Path, cluster: None) -> None:
    """The same as without Ray."""
    teacher = {"model": "vit_tiny_patch16_224", "checkpoint": str(tmp_path / "no.safetensors")}
    messages = []
    for kind in ("ray", "local"):
        options = runner(kind=kind, num_actors=1)
        recipe = build_recipe(tmp_path / "cache", images, teachers={"t": teacher}, runner=options)
        with pytest.raises(WeightsNotFoundError, match=r"no\.safetensors") as caught:
            build(recipe, QUIET)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert len(messages[0].splitlines()) <= ERROR_LINES
    assert not (tmp_path / "cache" / "cache.json").exists()


def test_errors_cross_process_borders(cluster: None) -> None:
    def fail() -> None:
        raise BuildError("It failed.", got="this", expected="that", do="something")

    with pytest.raises(TeacherCacheError) as caught:
        ray.get(ray.remote(fail).remote())
    assert "expected: that" in str(caught.value)


def test_a_stage_may_take_no_time(tmp_path: Path, images: Path, cluster: None) -> None:
    cache = make_cache(tmp_path / "cache", images)
    record = cache.manifest.read_commit("alpha", 0)
    with RayRunner(RunnerRecipe.model_validate(runner()), {}, 0) as started:
        started._count({"alpha": record.model_copy(update={"seconds": dict.fromkeys(STAGES, 0.0)})})


@pytest.mark.parametrize(("num_shards", "actors"), [(None, 2), (5, 3), (2, 1), (0, 1)])
def test_no_more_actors_start_than_shards_can_occupy(
    cluster: None, num_shards: int | None, actors: int
) -> None:
    """Those that the nodes have no room for wait for nodes."""
    recipe = RunnerRecipe.model_validate(runner(shards_in_flight=2))
    with RayRunner(recipe, {}, num_shards) as started:
        assert len(started._actors) == actors


def test_the_address_of_the_jobs_api_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(BuildError, match=r"where `ray job submit` sends(.|\n)*host:port of the head"):
        connect()
