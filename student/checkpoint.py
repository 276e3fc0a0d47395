"""Checkpoints: `<output>/checkpoints/step_00000100/{model.safetensors, optimizer.safetensors, state.json}`.

A checkpoint is written under a temporary name and renamed, so a folder with the final name is complete.
`state.json` holds the step, the checksums of the other two files and what the run was; nothing else is
needed, because batches, seeds and the learning rate are functions of the step.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from pipeline.errors import CheckpointError
from pipeline.processes import TEMPORARY_SUFFIX
from pipeline.storage import LocalStorage

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: Optimizer, run: Mapping[str, Any], keep: int
) -> Path:
    """Write the state after `step` optimizer steps, then delete all but the newest `keep` checkpoints."""
    target = folder / f"step_{step:08d}"
    temporary = target.with_name(target.name + TEMPORARY_SUFFIX)
    for leftover in folder.glob(f"*{TEMPORARY_SUFFIX}"):
        shutil.rmtree(leftover)
    temporary.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, temporary / MODEL)
    save_file(_optimizer_tensors(model, optimizer), temporary / OPTIMIZER)
    files = LocalStorage(temporary)
    checksums = {name: files.checksum(name) for name in (MODEL, OPTIMIZER)}
    state = {"step": step, "checksums": checksums, "run": dict(run)}
    (temporary / STATE).write_text(json.dumps(state, indent=2) + "\n")
    for path in (*temporary.iterdir(), temporary):
        _fsync(path)
    temporary.rename(target)
    _fsync(folder)
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the most steps."""
    return next(reversed(_checkpoints(folder)), None)


def load_checkpoint(path: Path, model: nn.Module, optimizer: Optimizer, run: Mapping[str, Any]) -> int:
    """Restore model and optimizer; returns the number of steps that were taken.

    Raises `CheckpointError` naming the damaged file, or what differs between the two runs.
    """
    state = _read_state(path)
    _require_same_run(path, state["run"], run)
    tensors = {name: _read_tensors(path, name, state["checksums"][name]) for name in (MODEL, OPTIMIZER)}
    try:
        model.load_state_dict(tensors[MODEL])
    except RuntimeError as error:
        raise CheckpointError(
            f"The weights in {path / MODEL} are not those of this student.",
            got=error,
            expected="weights written by the same version of the student",
            do="continue with that version, or start in another output folder",
        ) from error
    _load_optimizer(model, optimizer, tensors[OPTIMIZER])
    return int(state["step"])


def _checkpoints(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def _trained(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"{name}/{key}": value.contiguous()
        for index, name in enumerate(_trained(model))
        for key, value in state.get(index, {}).items()
    }


def _load_optimizer(model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    indices = {name: index for index, name in enumerate(_trained(model))}
    state: dict[int, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        name, key = path.rsplit("/", 1)
        state.setdefault(indices[name], {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((path / STATE).read_text())
        complete = state.keys() >= {"step", "run"} and state["checksums"].keys() == {MODEL, OPTIMIZER}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path / STATE, error) from error
    if not complete:
        raise _damaged(path / STATE, "keys are missing")
    return state


def _read_tensors(path: Path, name: str, checksum: str) -> dict[str, Tensor]:
    files = LocalStorage(path)
    if not files.exists(name):
        raise _damaged(path / name, "no such file")
    if files.checksum(name) != checksum:
        raise _damaged(path / name, "other bytes than were written")
    try:
        tensors: dict[str, Tensor] = load_file(path / name)
    except (OSError, SafetensorError) as error:
        raise _damaged(path / name, error) from error
    return tensors


def _damaged(file: Path, what: object) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint file {file} is damaged.",
        got=what,
        expected="the file as it was written",
        do=f"delete {file.parent} to continue from the checkpoint before it",
    )


def _require_same_run(path: Path, saved: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    keys = sorted(key for key in saved.keys() | run.keys() if saved.get(key) != run.get(key))
    if keys:
        raise CheckpointError(
            f"The checkpoint {path} is of another run than this recipe states.",
            got="; ".join(f"{key}: {run.get(key)}" for key in keys),
            expected="; ".join(f"{key}: {saved.get(key)}" for key in keys) + " (as in the checkpoint)",
            do="undo the change, or choose another output folder for the new run",
        )


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
