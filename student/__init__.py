"""The consumer of a cache: students, losses and the trainer.

from student import build_student, load_student
student = load_student("runs/sak/student")
predictions = student(student.normalize(images))     uint8 (B, 3, H, W) → {task: (B, channels, H, W)}
                                                     or, of stage 1, {teacher: [4 × (B, C, h, w)]}
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from pipeline.spec import Size
from student.base import Student, StudentOutput, find_saved, read_config, require_known
from student.sak.model import SAK
from student.sak.transfer import load_stage_1

_KINDS: dict[str, type[SAK]] = {SAK.kind: SAK}


def build_student(
    kind: str,
    *,
    stem: str,
    teacher_dims: Mapping[str, int],
    image_size: Size,
    tasks: Mapping[str, int] | None = None,
    pretrained: bool = False,
    reduction: int = 4,
    fusion: str = "mor",
    decoder: str = "simple",
    adapter_paths: bool = True,
) -> Student:
    """A new student of `kind` ("sak").

    `stem`: name of a timm ViT, `pretrained` its weights. `teacher_dims`: name → channels of each teacher.
    `image_size`: (height, width) in pixels. `reduction`: width of the stem / width inside an adapter.
    `adapter_paths`: False for the baseline with linear aligners only.
    `tasks`: name → output channels; none for stage 1. `fusion`: how a task makes one of the stem's and the
    paths' representations, "mor", "sum" or "concat". `decoder`: the heads, "simple" or "upernet".
    Raises `RecipeError` for arguments that cannot work, `WeightsNotFoundError` when the stem's weights
    cannot be had.
    """
    return _class(kind)(
        stem,
        teacher_dims,
        image_size,
        reduction=reduction,
        pretrained=pretrained,
        tasks=tasks,
        fusion=fusion,
        decoder=decoder,
        adapter_paths=adapter_paths,
    )


def load_student(source: str | os.PathLike[str], revision: str | None = None) -> Student:
    """A student of any kind, from a folder or from the Hugging Face Hub; see `Student.from_pretrained`."""
    folder = find_saved(source, revision)
    return _class(str(read_config(folder).get("kind"))).from_pretrained(folder)


def _class(kind: str) -> type[SAK]:
    require_known("student", kind, _KINDS)
    return _KINDS[kind]


__all__ = ["SAK", "Student", "StudentOutput", "build_student", "load_stage_1", "load_student"]
