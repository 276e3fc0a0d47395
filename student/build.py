"""A student by its kind: built anew, or loaded from where it was saved."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

from teachercache.pipeline.records.spec import Size
from teachercache.student.kpu.model import KPU
from teachercache.student.models.amalgam import Amalgam
from teachercache.student.models.student import Student, find_saved, read_config, require_known
from teachercache.student.sak.model import SAK

_KINDS: dict[str, Any] = {SAK.kind: SAK, KPU.kind: KPU, Amalgam.kind: Amalgam}


def build_student(
    kind: str,
    *,
    stem: str | None,
    teacher_dims: Mapping[str, int],
    image_size: Size,
    tasks: Mapping[str, int] | None = None,
    pretrained: bool = False,
    reduction: int = 4,
    fusion: str = "mor",
    decoder: str = "simple",
    adapter_paths: bool = True,
    sak_compat: bool = False,
    teacher_grids: Mapping[str, Size] | None = None,
    class_tokens: Collection[str] = (),
    preservation: bool = True,
    unification: bool = True,
    reconstruction: bool = True,
) -> Student:
    """A new student of `kind`: "sak", "kpu", or "amalgam" for tasks on the features of teachers alone.

    `stem`: name of a timm ViT, `pretrained` its weights; None for an amalgam without one.
    `teacher_dims`: name → channels of each teacher.
    `image_size`: (height, width) in pixels. `reduction`: width of the stem / width inside an adapter.
    `adapter_paths`: False for the baseline with linear aligners only. `sak_compat`: feed the stem as SAK's
    authors do, see `Stem`.
    `tasks`: name → output channels; none for stage 1. `fusion`: how a task makes one of the stem's and the
    paths' representations, "mor", "sum" or "concat". `decoder`: the heads, "simple" or "upernet".
    Of a KPU alone: `teacher_grids`, (rows, columns) of each teacher's map, `class_tokens`, the teachers that
    have one, and the switches of its Table 2. Arguments of other kinds are ignored.
    Raises `RecipeError` for arguments that cannot work, `WeightsNotFoundError` when the stem's weights
    cannot be had.
    """
    require_known("student", kind, _KINDS)
    arguments: dict[str, Any] = {"pretrained": pretrained}
    if kind == KPU.kind:
        arguments |= {"teacher_grids": teacher_grids or {}, "class_tokens": class_tokens}
        arguments |= {"preservation": preservation, "unification": unification}
        arguments |= {"reconstruction": reconstruction}
    else:
        arguments |= {"fusion": fusion, "decoder": decoder, "sak_compat": sak_compat}
    if kind == SAK.kind:
        arguments |= {"reduction": reduction, "adapter_paths": adapter_paths}
    student: Student = _KINDS[kind](stem, teacher_dims, image_size, tasks=tasks or {}, **arguments)
    return student


def load_student(source: str | os.PathLike[str], revision: str | None = None) -> Student:
    """A student of any kind, from a folder or from the Hugging Face Hub; see `Student.from_pretrained`."""
    folder = find_saved(source, revision)
    kind = str(read_config(folder).get("kind"))
    require_known("student", kind, _KINDS)
    student: Student = _KINDS[kind].from_pretrained(folder)
    return student
