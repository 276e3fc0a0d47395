"""A step is read when the next one is under way, and that changes nothing of what a run leaves."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.loading.loader import FeatureLoader
from teachercache.pipeline.loading.sampler import ShardShuffleSampler
from teachercache.student.training.checkpoint import newest_checkpoint
from teachercache.student.training.loop import DeviceBatches
from teachercache.student.training.objectives import SakObjective
from teachercache.student.training.run_log import RunLog
from teachercache.student.training.run_pictures import RunPictures
from teachercache.student.training.train import train
from tests.make_cache import make_cache, make_images
from tests.train_recipes import CONTENT, logged, train_recipe

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache")
    make_cache(path, make_images(tmp_path_factory.mktemp("images"), 10))
    return path


def on_each_step(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None]) -> None:
    own = SakObjective.__call__

    def call(self: SakObjective, batches: Any, timer: Any) -> Any:
        act(batches[0].step)
        return own(self, batches, timer)

    monkeypatch.setattr(SakObjective, "__call__", call)


def test_a_step_is_read_one_late_but_for_what_needs_its_student(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    on_each_step(monkeypatch, lambda step: seen.append(f"step {step}"))
    own = RunLog.write

    def write(self: RunLog, step: int, values: Any) -> None:
        own(self, step, values)
        seen.append(f"read {step}")

    def draw(self: RunPictures) -> dict[str, Any]:
        seen.append("drawn")
        return {}

    monkeypatch.setattr(RunLog, "write", write)
    monkeypatch.setattr(RunPictures, "draw", draw)
    train(train_recipe(cache, tmp_path, picture_every_steps=4))
    assert seen == [
        *("step 0", "step 1", "read 0", "step 2", "read 1", "read 2"),  # a checkpoint
        *("step 3", "drawn", "read 3"),
        *("step 4", "step 5", "read 4", "read 5"),  # another
        *("step 6", "step 7", "read 6", "drawn", "read 7"),
    ]


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_stop_goes_on_as_if_it_had_not_been(
    told: signal.Signals, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(train_recipe(cache, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        on_each_step(patch, lambda step: os.kill(os.getpid(), told) if step == 3 else None)
        stopped = train(train_recipe(cache, tmp_path / "stopped"))
    assert stopped.interrupted
    assert stopped.steps == 5
    checkpoint = newest_checkpoint(tmp_path / "stopped" / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.name == "step_00000005"
    assert len(logged(tmp_path / "stopped")) == 5
    train(train_recipe(cache, tmp_path / "stopped"))
    assert logged(tmp_path / "stopped") == logged(tmp_path / "whole")
    weights, expected = (
        load_file(tmp_path / run / "student/model.safetensors") for run in ("stopped", "whole")
    )
    assert all(weights[name].equal(tensor) for name, tensor in expected.items())


def test_without_clip_norm_gradients_are_measured_and_left_alone(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short: dict[str, Any] = {"schedule": {"max_steps": 3}}
    train(train_recipe(cache, tmp_path / "far", clip_norm=1e9, **short))
    monkeypatch.delattr(Accelerator, "clip_grad_norm_")
    train(train_recipe(cache, tmp_path / "none", **short))
    for key in ("loss", "grad_norm"):
        assert logged(tmp_path / "none", key) == logged(tmp_path / "far", key)
    assert min(logged(tmp_path / "none", "grad_norm")) > 0


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which torch hides, but where it is an error
@pytest.mark.parametrize("kind", ["sak", "kpu"])
def test_a_compiled_run_is_the_plain_one_in_one_graph(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    student = {**CONTENT["student"], "kind": kind}
    changes: dict[str, Any] = {"schedule": {"max_steps": 3}, "mixed_precision": "bf16"}
    train(train_recipe(cache, tmp_path / "plain", student=student, **changes))
    graphs = []

    def note(graph: Any, _: Any, options: Any) -> Any:  # a code generator takes minutes on a CPU
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=note, fullgraph=True))
    train(train_recipe(cache, tmp_path / "compiled", student={**student, "compile": True}, **changes))
    assert logged(tmp_path / "compiled") == pytest.approx(logged(tmp_path / "plain"), rel=1e-5)
    # The codecs of two teachers, the student, and what SAK is compared by.
    assert len(graphs) == {"sak": 4, "kpu": 3}[kind]


def test_a_batch_is_changed_whole(cache: Path) -> None:
    opened = FeatureCache.open(str(cache))
    seen: list[torch.Tensor] = []
    with FeatureLoader(opened, ShardShuffleSampler(opened, batch_size_per_process=2)) as loader:
        batch = next(iter(loader))

    def change(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tensor)
        return tensor.to("meta")

    away = batch.map(change)
    features = [encoded.tensors() for encoded in away.features.values()]
    parts: list[dict[Any, torch.Tensor]] = [away.renders, away.cls_tokens, away.labels, *features]
    changed = [tensor for part in parts for tensor in part.values()]
    assert {one.device.type for one in changed} == {"meta"}
    assert len(changed) == len(seen) >= 1 + len(features)
    assert (away.step, away.sample_keys, away.seconds) == (batch.step, batch.sample_keys, batch.seconds)
    assert DeviceBatches(torch.device("cpu"))(batch) is batch
