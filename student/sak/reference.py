"""The checkpoints of SAK's authors (github.com/innovator-zero/SAK), with the names of their code."""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from teachercache.pipeline.errors import CheckpointError
from teachercache.pipeline.records.strict import Size
from teachercache.student.sak.model import SAK

_BLOCK, _TEACHER, _TASK, _REST = r"(?P<block>\d+)", r"(?P<teacher>[^.]+)", r"(?P<task>[^.]+)", r"(?P<rest>.+)"
_NAMES = {
    rf"vit\.{_REST}": "stem.vit.{rest}",
    rf"tsap\.{_TEACHER}\.{_REST}": "paths.{teacher}.adapters.{rest}",
    rf"out_norms\.{_BLOCK}_{_TEACHER}\.{_REST}": "paths.{teacher}.output_norms.{level}.{rest}",
    rf"ts_aligners\.{_BLOCK}_{_TEACHER}\.{_REST}": "paths.{teacher}.aligners.{level}.{rest}",
    rf"mor\.{_BLOCK}_{_TASK}\.router\.module\.{_REST}": "decoder.routers.{task}.{level}.mlp.{rest}",
    rf"heads\.{_TASK}\.linears\.{_REST}": "decoder.heads.{task}.linears.{rest}",
    rf"heads\.{_TASK}\.linear_fuse\.{_REST}": "decoder.heads.{task}.fuse.{rest}",
    rf"heads\.{_TASK}\.last_conv\.{_REST}": "decoder.heads.{task}.predict.{rest}",
}
_TASKS = {"human_parts": "parts", "sal": "saliency", "edge": "boundary"}
_STEMS = {384: "vit_small_patch16_384", 768: "vit_base_patch16_384", 1024: "vit_large_patch16_384"}
_PATCH = 16

Shape = tuple[int, ...]


class Unmatched(NamedTuple):
    """A tensor that only the student or only the checkpoint has, or whose shapes differ.

    `name` is the student's or, if it has none, the checkpoint's.
    """

    name: str
    shape: Shape | None
    reference_shape: Shape | None

    @property
    def kind(self) -> Literal["missing", "unexpected", "other shape"]:
        if self.reference_shape is None:
            return "missing"
        return "unexpected" if self.shape is None else "other shape"


def read_reference(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The student's tensors in a file from the authors, by their names, on the CPU.

    Reads only tensors and plain values. Raises `CheckpointError` for a file with anything else in it.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise errors of any kind
        raise CheckpointError(
            f"{os.fspath(path)} cannot be read.",
            got=_reason(path, error),
            expected="a file of tensors and plain values, as torch.save() writes it",
            do="copy or download it again",
        ) from error
    tensors = content.get("model", content) if isinstance(content, dict) else content
    named = isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)
    if not (named and tensors and all(isinstance(one, Tensor) for one in tensors.values())):
        raise CheckpointError(
            f"There is no student in {os.fspath(path)}.",
            got=f"{type(tensors).__name__} that holds something else",
            expected='names and tensors, alone or as the "model" among other things',
            do="pass a checkpoint.pth that the authors' code wrote",
        )
    return tensors


def _reason(path: str | os.PathLike[str], error: Exception) -> str:
    """What is wrong with the file, in place of torch's advice to trust it."""
    if isinstance(error, OSError):
        return str(error)
    if forbidden := re.search(r"GLOBAL (\S+)", str(error)):
        return f"{forbidden[1]} in it"
    with Path(path).open("rb") as file:
        start = file.read(16)
    return f"a file that starts with {start!r}" if start else "an empty file"


def reference_arguments(tensors: Mapping[str, Tensor], image_size: Size | None = None) -> dict[str, Any]:
    """`build_student`'s arguments for the student of a checkpoint, by its names and shapes.

    `image_size`: (height, width) in pixels; needed if the student's images are not square.
    Raises `CheckpointError` if names and shapes are not enough.
    """
    shapes = {_rename(name, {}): tuple(tensor.shape) for name, tensor in tensors.items()}
    positions = shapes.get("stem.vit.pos_embed", ())
    if len(positions) != 3 or positions[2] not in _STEMS:
        raise CheckpointError(
            "The checkpoint does not have a stem that the authors use.",
            got=f"vit.pos_embed {positions}" if positions else _listed(tensors),
            expected=f"vit.pos_embed (1, 1 + patches, {' or '.join(map(str, _STEMS))})",
            do="build the student in Python, and call load_reference() of teachercache.student.sak.reference",
        )
    _, num_tokens, width = positions
    side = math.isqrt(max(num_tokens - 1, 0))
    if image_size is None and side**2 != num_tokens - 1:
        raise CheckpointError(
            "The checkpoint does not state the size of its images, and they are not square.",
            got=f"{num_tokens - 1} patches of {_PATCH}×{_PATCH} pixels",
            expected="a height and a width",
            do="pass --size HEIGHT WIDTH; the authors' code takes 448 576 for NYUD-v2",
        )
    hidden = _lengths(shapes, r"paths\.([^.]+)\.adapters\.0\.down\.bias")
    aligned = _lengths(shapes, r"paths\.([^.]+)\.aligners\.[^.]+\.bias")
    tasks = _lengths(shapes, r"decoder\.heads\.([^.]+)\.predict\.bias")
    routers = _lengths(shapes, r"decoder\.routers\.([^.]+)\..+\.bias")
    return {
        "stem": _STEMS[width],
        "teacher_dims": dict.fromkeys(hidden, width) | aligned,
        "image_size": image_size or (side * _PATCH, side * _PATCH),
        "reduction": width // max(hidden.values()) if any(hidden.values()) else 4,
        "tasks": tasks,
        "fusion": "sum" if tasks and not routers else "mor",
    }


def load_reference(student: SAK, tensors: Mapping[str, Tensor]) -> list[Unmatched]:
    """Load what matches in name and shape from an authors' checkpoint of stage 1 or 2; return the rest.

    `tensors`: `read_reference("checkpoint.pth")`. Tensors that it lacks stay as they are in the student.
    The student must have the image size of the checkpoint and its teachers in the same order, which is that
    of the gates. It takes over their normalisation of pixels, which is ImageNet's for every stem.
    Raises `CheckpointError` if nothing matches, and leaves the student unchanged.
    """
    statistics = torch.tensor([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD]).view(2, 3, 1, 1)
    normalisation = dict(zip(("mean", "std"), statistics, strict=True))
    levels = {str(block - 1): level for level, block in enumerate(student.stem.level_depths)}
    state = student.state_dict()
    left = {name: tuple(tensor.shape) for name, tensor in state.items() if name not in normalisation}
    agreeing: dict[str, Tensor] = {}
    unmatched: list[Unmatched] = []
    for name, tensor in tensors.items():
        ours, shape = _rename(name, levels), tuple(tensor.shape)
        if ours not in left:
            unmatched.append(Unmatched(name, None, shape))
        elif (expected := left.pop(ours)) != shape:
            unmatched.append(Unmatched(ours, expected, shape))
        else:
            agreeing[ours] = tensor
    if not agreeing:
        raise CheckpointError(
            "No tensor of the checkpoint matches one of the student in name and shape.",
            got=_listed(tensors),
            expected=_listed(state),
            do="build the student with the checkpoint's stem, teachers, tasks and image size",
        )
    student.load_state_dict(normalisation | agreeing, strict=False)
    student.config["sak_compat"] = True
    return [Unmatched(name, shape, None) for name, shape in left.items()] + unmatched


def _rename(name: str, levels: Mapping[str, int]) -> str:
    """Their name → ours; other names stay unchanged, and no student has them."""
    for theirs, ours in _NAMES.items():
        if match := re.fullmatch(rf"(?:backbone\.)?{theirs}", name):
            fields = match.groupdict()
            block, task = fields.get("block", ""), fields.get("task", "")
            level = levels.get(block, f"block_{block}")
            return ours.format_map(fields | {"level": level, "task": _TASKS.get(task, task)})
    return name


def _lengths(shapes: Mapping[str, Shape], pattern: str) -> dict[str, int]:
    """{first group of `pattern`: length} for the vectors whose names match it."""
    matches = {name: re.fullmatch(pattern, name) for name, shape in shapes.items() if len(shape) == 1}
    return {match[1]: shapes[name][0] for name, match in matches.items() if match}


def _listed(tensors: Mapping[str, Tensor], most: int = 5) -> str:
    shown = [f"{name} {tuple(tensor.shape)}" for name, tensor in list(tensors.items())[:most]]
    more = f" and {len(tensors) - most} more" if len(tensors) > most else ""
    return (", ".join(shown) or "nothing") + more
