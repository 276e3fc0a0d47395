"""Checkpoints: exact, complete or not there, and never mistaken for those of another run."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import AdamW

from teachercache import build_student
from teachercache.pipeline.errors import CheckpointError, DiskSpaceError
from teachercache.pipeline.places import retries
from teachercache.pipeline.places.local_storage import LocalStorage
from teachercache.student.training.checkpoint import (
    load_newest,
    misnamed,
    newest_checkpoint,
    save_checkpoint,
    set_aside,
)
from tests.train_recipes import room_for

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
    assert load_newest(path.parent, other, other_optimizer, RUN) == (3, {})
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
        case "a pipe":
            file.unlink()
            os.mkfifo(file)
        case "a folder":
            file.unlink()
            file.mkdir()
        case "a link to itself":
            file.unlink()
            file.symlink_to(file)


@pytest.mark.parametrize("how", ["gone", "cut", "flipped"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, how: str) -> None:
    path = saved(tmp_path)
    damage(path / name, how)
    with pytest.raises(CheckpointError, match=re.escape(str(path / name))):
        load_newest(path.parent, *make(0), RUN)


SUMS = '{"model.safetensors": "", "optimizer.safetensors": ""}'


@pytest.mark.parametrize(
    "content",
    [
        *("", "\xff", "[]", "{}", '{"step": 3}', '{"step": 3, "run": {}, "checksums": {}}'),
        *(f'{{"step": {step}, "run": {{}}, "checksums": {SUMS}}}' for step in ("true", '"3"', "3.0")),
        f'{{"step": 3, "run": [], "checksums": {SUMS}}}',
        '{"step": 3, "run": {}, "checksums": [1, 2]}',
        '{"step": 3, "run": {}, "checksums": ["model.safetensors", "optimizer.safetensors"]}',
        "[" * 200_000,
    ],
)
def test_a_damaged_state_is_named(tmp_path: Path, content: str) -> None:
    path = saved(tmp_path)
    (path / "state.json").write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match=re.escape(str(path / "state.json"))):
        load_newest(path.parent, *make(0), RUN)


def test_another_run_is_refused_with_all_that_differs(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with pytest.raises(CheckpointError) as error:
        load_newest(path.parent, *make(0), RUN | {"optimizer.lr": 2e-3, "clip_norm": 1.0})
    assert "optimizer.lr: 0.002" in str(error.value)
    assert "optimizer.lr: 0.001" in str(error.value)
    assert "clip_norm: 1.0" in str(error.value)
    assert "seed" not in str(error.value)


def test_another_model_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with pytest.raises(CheckpointError, match="not those of this student"):
        load_newest(path.parent, nn.Linear(2, 2), AdamW([torch.zeros(1)]), RUN)


def test_holds_no_pickle(tmp_path: Path) -> None:
    path = saved(tmp_path)
    assert sorted(file.name for file in path.iterdir()) == [
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    assert json.loads((path / "state.json").read_text())["run"] == RUN


def two_saved(tmp_path: Path) -> tuple[Path, Path]:
    """Checkpoints of 3 and of 5 steps."""
    model, optimizer = make(0)
    steps(model, optimizer, range(3))
    older = save_checkpoint(tmp_path / "checkpoints", 3, model, optimizer, RUN, keep=2)
    steps(model, optimizer, range(3, 5))
    return older, save_checkpoint(tmp_path / "checkpoints", 5, model, optimizer, RUN, keep=2)


@pytest.mark.parametrize("how", ["gone", "cut", "flipped", "a pipe", "a folder", "a link to itself"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_one_gives_way_to_the_one_before(tmp_path: Path, name: str, how: str) -> None:
    older, newest = two_saved(tmp_path)
    damage(newest / name, how)
    model, optimizer = make(1)
    taken, damaged = load_newest(newest.parent, model, optimizer, RUN)
    assert (taken, list(damaged)) == (3, [newest])
    assert str(newest / name) in str(damaged[newest])
    expected, expected_optimizer = make(0)
    assert steps(model, optimizer, range(3, 8)) == steps(expected, expected_optimizer, range(8))[3:]
    damage(older / name, how)
    with pytest.raises(CheckpointError, match="does not begin again") as error:
        load_newest(newest.parent, *make(0), RUN)
    assert str(newest / name) in str(error.value)


def test_a_damaged_one_is_kept_beside_the_run(tmp_path: Path) -> None:
    _, newest = two_saved(tmp_path)
    assert set_aside(newest).name == "step_00000005.damaged"
    model, optimizer = make(0)
    steps(model, optimizer, range(5))
    again = save_checkpoint(newest.parent, 5, model, optimizer, RUN, keep=1)
    assert set_aside(again).name == "step_00000005.damaged_2"
    assert newest_checkpoint(newest.parent) is None
    with pytest.raises(CheckpointError, match=r"step_00000005\.damaged, step_00000005\.damaged_2"):
        load_newest(newest.parent, *make(0), RUN)


@pytest.mark.parametrize("name", ["step_00000009", "step_00000004"])
def test_a_checkpoint_under_another_step_is_not_that_step(tmp_path: Path, name: str) -> None:
    older, newest = two_saved(tmp_path)
    renamed = newest.rename(newest.with_name(name))
    taken, damaged = load_newest(older.parent, *make(0), RUN)
    assert (taken, list(damaged)) == (3, [renamed])
    assert f"step 5, in a folder or with an optimizer of step {name[-1]}" in str(damaged[renamed])


def test_a_step_that_was_edited_is_not_believed(tmp_path: Path) -> None:
    _, newest = two_saved(tmp_path)
    state = newest / "state.json"
    state.write_text(state.read_text().replace('"step": 5', '"step": 9'))
    taken, damaged = load_newest(newest.parent, *make(0), RUN)
    assert (taken, list(damaged)) == (3, [newest])
    renamed = newest.rename(newest.with_name("step_00000009"))  # its optimizer has taken 5
    assert list(load_newest(newest.parent, *make(0), RUN)[1]) == [renamed]


def test_a_run_with_renamed_checkpoints_does_not_begin_again(tmp_path: Path) -> None:
    path = saved(tmp_path)
    path.rename(path.with_name("best"))
    (path.parent / ".ipynb_checkpoints").mkdir()
    assert misnamed(path.parent) == ["best"]
    with pytest.raises(CheckpointError, match=r"got: +best\n(.|\n)*choose another output"):
        load_newest(path.parent, *make(0), RUN)


@pytest.mark.parametrize("shape", [(2,), (3, 3, 3)])
def test_an_optimizer_of_another_shape_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = saved(tmp_path)
    tensors = load_file(path / "optimizer.safetensors")
    tensors["first.bias/exp_avg"] = torch.zeros(shape)
    save_file(tensors, path / "optimizer.safetensors")
    state = json.loads((path / "state.json").read_text())
    state["checksums"]["optimizer.safetensors"] = LocalStorage(path).checksum("optimizer.safetensors")
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"got: +first\.bias/exp_avg of shape(.|\n)*shape \(3,\)"):
        load_newest(path.parent, *make(0), RUN)


def test_what_cannot_be_read_now_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, newest = two_saved(tmp_path)

    def away(storage: LocalStorage, name: str) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), name)

    monkeypatch.setattr(LocalStorage, "_read", away)
    monkeypatch.setattr(retries, "_PAUSES_S", ())
    with pytest.raises(CheckpointError, match=r"cannot be read(.|\n)*run the same command again"):
        load_newest(newest.parent, *make(0), RUN)


@pytest.mark.parametrize("full_in", ["weights", "optimizer"])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, full_in: str) -> None:
    path = saved(tmp_path)
    before = sorted(path.parent.iterdir())
    model, optimizer = make(0)
    steps(model, optimizer, range(4))
    room = 100 if full_in == "weights" else (path / "model.safetensors").stat().st_size
    message = r"step 4 cannot be written(.|\n)*run the same command again"
    with room_for(room), pytest.raises(DiskSpaceError, match=message):
        save_checkpoint(path.parent, 4, model, optimizer, RUN, keep=1)
    assert sorted(path.parent.iterdir()) == before
    assert load_newest(path.parent, *make(0), RUN) == (3, {})


def test_a_power_cut_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is synced, and every folder in which something got its name."""
    synced, fsync = set(), os.fsync

    def noting(handle: int) -> None:
        synced.add(Path(f"/proc/self/fd/{handle}").readlink())
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noting)
    path = saved(tmp_path / "new" / "run")
    inside = path.with_name(path.name + ".partial")
    files = {inside / name for name in ("model.safetensors", "optimizer.safetensors", "state.json")}
    assert synced == {tmp_path, tmp_path / "new", tmp_path / "new/run", path.parent, inside, *files}
    synced.clear()
    student = build_student("sak", stem="test_vit", teacher_dims={"a": 4}, image_size=(32, 32))
    student.save_pretrained(tmp_path / "other/student")
    names = {file.name.split(".")[0] for file in synced if file.suffix == ".partial"}
    assert names == {"model", "config"}
    assert {tmp_path, tmp_path / "other", tmp_path / "other/student"} <= synced
    assert {file.name for file in (tmp_path / "other/student").iterdir()} == {
        "config.json",
        "model.safetensors",
    }


@pytest.mark.parametrize("what", ["a link", "a file"])
def test_what_is_no_folder_among_the_checkpoints_keeps_none_from_being_written(
    tmp_path: Path, what: str
) -> None:
    """A checkpoint that was moved to a larger disk and linked back, say."""
    older = saved(tmp_path)
    elsewhere = older.rename(tmp_path / "elsewhere")
    if what == "a link":
        older.symlink_to(elsewhere)
    else:
        older.write_bytes(b"")
    for step in (4, 5):
        save_checkpoint(older.parent, step, *make(0), RUN, keep=1)
        assert [path.name for path in older.parent.iterdir()] == [f"step_{step:08d}"]
    assert (elsewhere / "state.json").exists()
