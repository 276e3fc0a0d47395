"""Clusters and GPUs that are too small for a recipe: a message that says what to do, before any work."""

from __future__ import annotations

from typing import Any

import pytest
import ray
import torch

from teachercache.cache_builder import ray_runner, worker
from teachercache.cache_builder.build_recipe import RunnerRecipe
from teachercache.cache_builder.ray_cluster import Need
from teachercache.cache_builder.ray_runner import RayRunner
from teachercache.cache_builder.runner import require_place
from teachercache.cache_builder.worker import Worker
from teachercache.pipeline.errors import BuildError, MissingExtraError
from tests.make_cache import teacher_spec


def cluster(monkeypatch: pytest.MonkeyPatch, *nodes: dict[str, float]) -> None:
    """What Ray says of the nodes that are alive; one that has died had everything."""
    alive = [{"Alive": True, "Resources": resources} for resources in nodes]
    dead = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [*alive, dead])


class Noted(dict[str, float]):
    """In the place of Ray's gauges."""

    def __init__(self, name: str, *_: object) -> None:
        self.name = name

    def set(self, value: float, *_: object) -> None:
        self[self.name] = value


@pytest.mark.parametrize(
    ("model", "size", "num_rows", "gpus"),
    [
        ("vit_tiny_patch16_224", 224, 192, 0),
        ("vit_tiny_patch16_224", 224, 10_000_000, 1),
        ("vit_large_patch16_384", 1024, 8, 1),
    ],
)
def test_a_long_build_asks_for_gpus_where_there_are_none_and_a_short_one_says_that_it_does_not(
    model: str,
    size: int,
    num_rows: int,
    gpus: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cluster(monkeypatch, {"CPU": 2.0})
    for name, answer in (("is_initialized", True), ("cluster_resources", {"CPU": 2.0})):
        monkeypatch.setattr(ray, name, lambda answer=answer: answer)
    for name, stand_in in (("Gauge", Noted), ("Head", lambda: None)):
        monkeypatch.setattr(ray_runner, name, stand_in)
    actor = ray_runner._Actor(None, gpus, loaded=1, opening=1)
    monkeypatch.setattr(RayRunner, "_start_actor", lambda self, need: actor)
    changes = {"model": model, "render_size": (size, size), "image_size": (size, size)}
    teacher = teacher_spec().model_copy(update=changes)
    runner = RayRunner(RunnerRecipe(kind="ray"), {"a": teacher}, 4, num_rows)
    assert runner._need().gpus == gpus
    assert ("computes on CPUs until GPUs come" in caplog.text) == (not gpus)
    assert ("waiting for a node with 1 CPUs and 1 GPUs" in caplog.text) == bool(gpus)
    assert runner._waiting == {"teachercache_build_actors_waiting": len(runner._actors)}
    assert runner._actors


def test_a_cluster_whose_only_gpus_are_too_small_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, {"CPU": 4.0}, {"CPU": 8.0, "GPU": 1.0})
    with pytest.raises(BuildError) as raised:
        Need(cpus=1, gpus=2).room(nodes_may_join=True, has_begun=False)
    lines = str(raised.value).splitlines()
    assert lines[1] == "  got:      nodes with 4 CPUs and 0 GPUs, 8 CPUs and 1 GPUs"
    assert lines[2] == "  expected: one with 1 CPUs and 2 GPUs"
    assert "start larger nodes, or lower runner.cpus_per_actor or runner.gpus_per_actor" in lines[3]


@pytest.mark.parametrize(
    ("nodes", "room"),
    [
        ([{"CPU": 4.0}], 0),  # GPUs may come
        ([{"GPU": 2.0}, {"CPU": 4.0}], 0),  # a node that gives no CPU to anybody
        ([{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 5.0}], 2),
        ([{"CPU": 1.0, "GPU": 4.0}], 1),
    ],
)
def test_a_build_waits_for_gpus_where_there_are_none_yet(
    monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, float]], room: int
) -> None:
    cluster(monkeypatch, *nodes)
    assert Need(cpus=1, gpus=2).room(nodes_may_join=True, has_begun=False) == room


def test_an_extra_that_is_missing_ends_a_build_at_once() -> None:
    with pytest.raises(MissingExtraError):
        require_place(MissingExtraError("pcodec"), "/cache")


def test_a_build_that_has_begun_waits_and_a_cluster_of_its_own_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster(monkeypatch, {"CPU": 8.0, "GPU": 1.0})
    assert Need(cpus=1, gpus=2).room(nodes_may_join=True, has_begun=True) == 0
    cluster(monkeypatch, {"CPU": 4.0})
    with pytest.raises(BuildError, match="No node of this Ray cluster has room"):
        Need(cpus=1, gpus=2).room(nodes_may_join=False, has_begun=False)


def test_teachers_that_do_not_fit_a_gpu_end_a_build_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def build_teachers(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmany lines")

    monkeypatch.setattr(worker, "build_teachers", build_teachers)
    with pytest.raises(BuildError) as raised:
        Worker({"alpha": teacher_spec()}, RunnerRecipe(device="cpu"))
    lines = str(raised.value).splitlines()
    assert lines[1] == "  got:      CUDA out of memory. Tried to allocate 2.00 GiB."
    assert "runner.batch_size=1" in lines[3]


class Large(torch.nn.Module):
    """Room for five views."""

    spec, compiled_for, weights_hash = teacher_spec(), 0, ""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, pixels_B3HW: torch.Tensor) -> None:
        if len(pixels_B3HW) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")


def test_a_gpu_that_is_too_small_for_a_batch_says_which_batch_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    def calibrate(teachers: dict[str, Large], _: object, batch_size: int) -> None:
        teachers["alpha"](torch.empty(batch_size, 3, 8, 8))

    monkeypatch.setattr(worker, "build_teachers", lambda *_: {"alpha": Large()})
    monkeypatch.setattr(worker, "calibrate", calibrate)
    small = Worker({"alpha": teacher_spec()}, RunnerRecipe(device="cpu", batch_size=16))
    sample: Any = None
    with pytest.raises(BuildError, match=r"set runner\.batch_size=4, which fits"):
        small.calibrate(sample, ["alpha"])
