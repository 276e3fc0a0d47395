"""The checkpoints of SAK's authors (github.com/innovator-zero/SAK), by the names that their code gives."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from student.sak.model import SAK
from student.sak.transfer import load_tensors

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


def load_reference(student: SAK, tensors: Mapping[str, Tensor]) -> None:
    """Load a checkpoint of the authors', of stage 1 or 2, into a student of the same teachers and tasks.

    `tensors`: `torch.load("checkpoint.pth", weights_only=True)["model"]`. The student is to have the
    image size of the checkpoint and its teachers in the same order, which is that of the gates. It takes
    over the normalisation of pixels of their code, which is ImageNet's for every stem.
    Raises `CheckpointError`, naming every tensor that is missing, unknown or of another shape.
    """
    normalisation = {
        "mean": torch.tensor(IMAGENET_DEFAULT_MEAN).view(3, 1, 1),
        "std": torch.tensor(IMAGENET_DEFAULT_STD).view(3, 1, 1),
    }
    levels = {str(block - 1): level for level, block in enumerate(student.stem.level_blocks)}
    renamed = {_rename(name, levels): tensor for name, tensor in tensors.items()}
    load_tensors(student, normalisation | renamed, "The authors' checkpoint")


def _rename(name: str, levels: Mapping[str, int]) -> str:
    """Their name → ours; a name that is none of theirs stays as it is, and is unknown to a student."""
    for theirs, ours in _NAMES.items():
        if found := re.fullmatch(rf"(?:backbone\.)?{theirs}", name):
            fields = found.groupdict()
            block, task = fields.get("block", ""), fields.get("task", "")
            level = levels.get(block, f"block_{block}")
            return ours.format_map(fields | {"level": level, "task": _TASKS.get(task, task)})
    return name
