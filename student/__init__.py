"""The consumer of a cache: students, losses and the trainer.

from student import build_student, load_student
student = load_student("runs/sak/student")
maps = student(student.normalize(images))       uint8 (B, 3, H, W) → {teacher: [4 × (B, C, h, w)]}
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping

from pipeline.errors import RecipeError
from pipeline.spec import Size
from student.base import Student, find_saved, read_config
from student.sak.model import SAK

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
) -> Student:
    """A new student of `kind` ("sak").

    `stem`: name of a timm ViT, `pretrained` its weights. `teacher_dims`: name → channels of each teacher.
    `image_size`: (height, width) in pixels. `reduction`: width of the stem / width inside an adapter.
    Raises `RecipeError` for arguments that cannot work, `WeightsNotFoundError` when the stem's weights
    cannot be had.
    """
    if tasks:
        raise RecipeError(
            "Students with tasks (stage 2: routers and heads) are not there yet.",
            got=", ".join(tasks),
            expected="no tasks",
            do="leave `tasks` empty and distil the representations (stage 1)",
        )
    return _class(kind)(stem, teacher_dims, image_size, reduction=reduction, pretrained=pretrained)


def load_student(source: str | os.PathLike[str], revision: str | None = None) -> Student:
    """A student of any kind, from a folder or from the Hugging Face Hub; see `Student.from_pretrained`."""
    folder = find_saved(source, revision)
    return _class(str(read_config(folder).get("kind"))).from_pretrained(folder)


def _class(kind: str) -> type[SAK]:
    if kind not in _KINDS:
        near = difflib.get_close_matches(kind, _KINDS, 1)
        raise RecipeError(
            "There is no student of this kind.",
            got=kind,
            expected=f"one of {', '.join(_KINDS)}",
            do=f"did you mean {near[0]}?" if near else None,
        )
    return _KINDS[kind]


__all__ = ["SAK", "Student", "build_student", "load_student"]
