"""Checkpoints: `<output>/checkpoints/step_00000100/{model.safetensors, optimizer.safetensors, state.json}`.

A checkpoint is written under a temporary name and renamed, so a folder with the final name is complete.
`state.json` holds the step, the checksums of the other two files, what the run was, and FAMO's ξ where it
weighs the teachers; nothing else is needed, because batches, seeds and the learning rate are functions of the
step. One that was damaged since is passed over and set aside as `step_00000100.damaged`.
"""

import errno
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from teachercache.pipeline.errors import CheckpointError
from teachercache.pipeline.places.durable import fsync, make_folder, rename
from teachercache.pipeline.places.local_storage import LocalStorage
from teachercache.pipeline.places.processes import TEMPORARY_SUFFIX
from teachercache.student.losses.weighting import Famo
from teachercache.student.saving import saving

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
DAMAGED_SUFFIX = ".damaged"


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    run: Mapping[str, Any],
    keep: int,
    famo: Famo | None = None,
) -> Path:
    """Write the state after `step` optimizer steps, then delete all but the newest `keep` checkpoints.

    Raises `DiskSpaceError` or `CheckpointError` where that fails; those before it are then untouched.
    """
    target = folder / f"step_{step:08d}"
    temporary = target.with_name(target.name + TEMPORARY_SUFFIX)
    with saving(f"The checkpoint of step {step}", target):
        make_folder(folder)
        for leftover in folder.glob(f"*{TEMPORARY_SUFFIX}"):
            _delete(leftover)
        try:
            temporary.mkdir()
            weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
            save_file(weights, temporary / MODEL)
            save_file(_optimizer_tensors(model, optimizer), temporary / OPTIMIZER)
            files = LocalStorage(temporary)
            checksums = {name: files.checksum(name) for name in (MODEL, OPTIMIZER)}
            state = {"step": step, "checksums": checksums, "run": dict(run)}
            if famo is not None:
                state["famo"] = famo.state()
            (temporary / STATE).write_text(json.dumps(state, indent=2) + "\n")
            for path in (*temporary.iterdir(), temporary):
                fsync(path)
            rename(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    for old in _checkpoints(folder)[:-keep]:  # by another name first: half of it would look whole
        _delete(old.rename(old.with_name(old.name + TEMPORARY_SUFFIX)))
    return target


def _delete(path: Path) -> None:
    """A checkpoint, or the link or file that somebody put in its place."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path)


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the most steps."""
    return next(reversed(_checkpoints(folder)), None)


def require_output(folder: Path, resume: bool) -> None:
    """Raises `CheckpointError` where `folder` can hold no checkpoints, or holds some not to `resume` from."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(
            "There can be no checkpoints in this output folder.",
            got=f"{folder}, which is not a folder",
            expected="a folder, or nothing",
            do="move it away, or choose another output",
        )
    if not resume and (newest := newest_checkpoint(folder)):
        raise CheckpointError(
            "The output folder holds a run already, and resume is false.",
            got=newest,
            expected="a folder without checkpoints",
            do="choose another output, delete that run, or set resume=true to continue it",
        )


def load_newest(
    folder: Path, model: nn.Module, optimizer: Optimizer, run: Mapping[str, Any], famo: Famo | None = None
) -> tuple[int, dict[Path, CheckpointError]]:
    """Restore from the newest checkpoint that is sound: (the steps that were taken, the damaged newer ones).

    (0, {}) where there is none. Raises `CheckpointError` where all are damaged or have other names, which is
    no reason to begin again, where one cannot be read now, and for one of another run.
    """
    damaged: dict[Path, CheckpointError] = {}
    for path in reversed(_checkpoints(folder)):
        try:
            state, tensors = _read(path)
        except CheckpointError as error:
            damaged[path] = error
            continue
        except OSError as error:  # of the moment, perhaps: no reason to pass a checkpoint over
            raise CheckpointError(
                f"The checkpoint {path} cannot be read.",
                got=error,
                expected="a file system that answers, and files that this user may read",
                do="run the same command again when it does",
            ) from error
        _require_same_run(path, state["run"], run)
        _load_weights(path, model, tensors[MODEL])
        _load_optimizer(path, model, optimizer, tensors[OPTIMIZER])
        if famo is not None:
            famo.load(state["famo"])
        return int(state["step"]), damaged
    others = misnamed(folder)
    if damaged or others:
        first = next(iter(damaged.values()), None)
        raise CheckpointError(
            f"No checkpoint in {folder} can be continued from, and a run that has some does not begin again.",
            got=str(first).replace("\n", "\n    ") if first else ", ".join(others),
            expected="a folder such as step_00000100 with the files that were written to it",
            do="put it back (its step is in state.json), or choose another output to begin again",
        )
    return 0, {}


def misnamed(folder: Path) -> list[str]:
    """Folders that hold what a checkpoint holds, and have another name: somebody's, or of `set_aside`."""
    held = {path.parent.name for name in (MODEL, OPTIMIZER, STATE) for path in folder.glob(f"*/{name}")}
    own = {path.name for path in _checkpoints(folder)}
    return sorted(name for name in held - own if not name.endswith(TEMPORARY_SUFFIX))


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint: nobody continues from it, and nothing of it is lost."""
    target, number = path.with_name(path.name + DAMAGED_SUFFIX), 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}{DAMAGED_SUFFIX}_{number}")
    return path.rename(target)


def _checkpoints(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _trained(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"{name}/{key}": value.contiguous()
        for index, name in enumerate(_trained(model))
        for key, value in state.get(index, {}).items()
    }


def _load_weights(path: Path, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(
            f"The weights in {path / MODEL} are not those of this student.",
            got=error,
            expected="weights written by the same version of the student",
            do="continue with that version, or start in another output folder",
        ) from error


def _load_optimizer(
    path: Path, model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    indices = {name: index for index, name in enumerate(_trained(model))}
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition("/")
        if name not in indices or (kind != "step" and tensor.shape != shapes[name]):
            raise CheckpointError(
                f"The optimizer's state in {path / OPTIMIZER} is not that of this student.",
                got=f"{key} of shape {tuple(tensor.shape)}",
                expected=f"shape {tuple(shapes[name])}" if name in indices else "parameters that are trained",
                do="continue with the version that wrote it, or start in another output folder",
            )
        state.setdefault(indices[name], {})[kind] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _read(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """The state, and the tensors of each file. Raises `CheckpointError` for what is not as it was written."""
    files, tensors = LocalStorage(path), dict[str, dict[str, Tensor]]()
    with _damage_told(path / STATE):
        state: dict[str, Any] = json.loads(files.read(STATE))
        sums = dict(state["checksums"])
        known = {MODEL, OPTIMIZER} == set(sums) and all(isinstance(value, str) for value in sums.values())
        if not (known and type(state["step"]) is int and isinstance(state["run"], dict)):
            raise ValueError("keys are missing, or hold something else")
    for name, checksum in sums.items():
        with _damage_told(path / name):
            if files.checksum(name) != checksum:
                raise ValueError("other bytes than were written")
            tensors[name] = load_file(path / name)
    taken = {int(tensor) for key, tensor in tensors[OPTIMIZER].items() if key.endswith("/step")}
    others = {_step(path), max(taken, default=state["step"])} - {state["step"]}
    with _damage_told(path / STATE):
        if others:
            raise ValueError(f"step {state['step']}, in a folder or with an optimizer of step {max(others)}")
    return state, tensors


@contextmanager
def _damage_told(file: Path) -> Iterator[None]:
    """Raises `CheckpointError` for what is wrong with a file; a file system that fails is another matter."""
    try:
        yield
    except (OSError, SafetensorError, RecursionError, ValueError, KeyError, TypeError) as error:
        gone = isinstance(error, FileNotFoundError | NotADirectoryError)
        if isinstance(error, OSError) and not gone and error.errno != errno.ELOOP:  # a link to itself
            raise
        raise CheckpointError(
            f"The checkpoint file {file} is damaged.",
            got=error if type(error) is ValueError else f"{type(error).__name__}: {error}",
            expected="the file as it was written, in a folder of its own step",
            do="put it back, or go on from the checkpoint before it",
        ) from error


def _require_same_run(path: Path, saved: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    keys = sorted(key for key in saved.keys() | run.keys() if saved.get(key) != run.get(key))
    if keys:
        raise CheckpointError(
            f"The checkpoint {path} is of another run than this recipe states.",
            got="; ".join(f"{key}: {run.get(key)}" for key in keys),
            expected="; ".join(f"{key}: {saved.get(key)}" for key in keys) + " (as in the checkpoint)",
            do="undo the change, or choose another output folder for the new run",
        )
