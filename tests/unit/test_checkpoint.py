"""Checkpoints: exact, complete or not there, and never mistaken for those of another run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from pipeline.errors import CheckpointError
from student.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint

RUN: dict[str, Any] = {"optimizer.lr": 1e-3, "seed": 0}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(self.first(self.frozen(x)).relu())
        return result


def make(seed: int) -> tuple[Model, AdamW]:
    torch.manual_seed(seed)
    model = Model()
    return model, AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)


def steps(model: Model, optimizer: AdamW, count: range) -> list[float]:
    losses = []
    for step in count:
        torch.manual_seed(step)
        loss = model(torch.randn(8, 3)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def saved(tmp_path: Path) -> Path:
    model, optimizer = make(0)
    steps(model, optimizer, range(3))
    return save_checkpoint(tmp_path / "checkpoints", 3, model, optimizer, RUN, keep=2)


def test_a_restored_run_takes_the_same_steps(tmp_path: Path) -> None:
    path = saved(tmp_path)
    model, optimizer = make(0)
    expected = steps(model, optimizer, range(8))[3:]
    other, other_optimizer = make(1)
    assert load_checkpoint(path, other, other_optimizer, RUN) == 3
    assert steps(other, other_optimizer, range(3, 8)) == expected


def test_the_newest_is_found_and_the_old_are_deleted(tmp_path: Path) -> None:
    model, optimizer = make(0)
    steps(model, optimizer, range(1))
    assert newest_checkpoint(tmp_path) is None
    for step in (1, 2, 100_000_000, 99_999_999):
        save_checkpoint(tmp_path, step, model, optimizer, RUN, keep=3)
    assert newest_checkpoint(tmp_path) == tmp_path / "step_100000000"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_00000002",
        "step_100000000",
        "step_99999999",
    ]


def test_what_was_not_finished_does_not_exist(tmp_path: Path) -> None:
    path = saved(tmp_path)
    leftover = path.with_name("step_00000009.partial")
    path.rename(leftover)
    assert newest_checkpoint(path.parent) is None
    saved(tmp_path)
    assert not leftover.exists()


def damage(file: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    match how:
        case "gone":
            file.unlink()
        case "cut":
            file.write_bytes(data[: len(data) // 2])
        case "flipped":
            data[-1] ^= 1
            file.write_bytes(data)


@pytest.mark.parametrize("how", ["gone", "cut", "flipped"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, how: str) -> None:
    path = saved(tmp_path)
    damage(path / name, how)
    with pytest.raises(CheckpointError, match=re.escape(str(path / name))):
        load_checkpoint(path, *make(0), RUN)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"step": 3}', '{"step": 3, "run": {}, "checksums": {}}']
)
def test_a_damaged_state_is_named(tmp_path: Path, content: str) -> None:
    path = saved(tmp_path)
    (path / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match=re.escape(str(path / "state.json"))):
        load_checkpoint(path, *make(0), RUN)


def test_another_run_is_refused_with_all_that_differs(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path, *make(0), RUN | {"optimizer.lr": 2e-3, "clip_norm": 1.0})
    assert "optimizer.lr: 0.002" in str(error.value)
    assert "optimizer.lr: 0.001" in str(error.value)
    assert "clip_norm: 1.0" in str(error.value)
    assert "seed" not in str(error.value)


def test_another_model_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with pytest.raises(CheckpointError, match="not those of this student"):
        load_checkpoint(path, nn.Linear(2, 2), AdamW([torch.zeros(1)]), RUN)


def test_holds_no_pickle(tmp_path: Path) -> None:
    path = saved(tmp_path)
    assert sorted(file.name for file in path.iterdir()) == [
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    assert json.loads((path / "state.json").read_text())["run"] == RUN
