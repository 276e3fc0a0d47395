"""A student by its kind: built anew, or loaded from where it was saved."""

import os
from collections.abc import Mapping
from inspect import signature
from typing import Any

from teachercache.pipeline.errors import RecipeError, require_known
from teachercache.pipeline.records.strict import Size
from teachercache.student.kpu.model import KPU
from teachercache.student.models.amalgam import Amalgam
from teachercache.student.models.student import Student, find_saved, read_config
from teachercache.student.sak.model import SAK

_KINDS: dict[str, Any] = {one.kind: one for one in (SAK, KPU, Amalgam)}


def build_student(
    kind: str,
    *,
    stem: str | None,
    teacher_dims: Mapping[str, int],
    image_size: Size,
    tasks: Mapping[str, int] | None = None,
    pretrained: bool = False,
    **options: Any,
) -> Student:
    """A new student of `kind`: "sak", "kpu", or "amalgam" for tasks on the features of teachers alone.

    `stem`: name of a timm ViT, `pretrained` its weights; None for an amalgam without one.
    `teacher_dims`: name → channels of each teacher.
    `image_size`: (height, width) in pixels. `tasks`: name → output channels; none for stage 1.
    Of a SAK: `reduction`, width of the stem / width inside an adapter; `adapter_paths`, False for the
    baseline with linear aligners only. Of a SAK and an amalgam: `sak_compat`, feed the stem as SAK's authors
    do, see `Stem`; `fusion`, how a task makes one of the stem's and the paths' representations, "mor", "sum"
    or "concat"; `decoder`, the heads, "simple" or "upernet".
    Of a KPU: `teacher_grids`, (rows, columns) of each teacher's map, `class_tokens`, the teachers that have
    one, `preservation`, `unification` and `reconstruction`, the switches of its Table 2, and `norm`.
    Raises `RecipeError` for arguments that cannot work or are of another kind, `WeightsNotFoundError` when
    the stem's weights cannot be had.
    """
    require_known("student", kind, _KINDS)
    own = list(signature(_KINDS[kind]).parameters)
    if foreign := [name for name in options if name not in own]:
        raise RecipeError(
            f"A student of kind {kind} does not have these options.",
            got=", ".join(foreign),
            expected=f"some of {', '.join(own)}",
            do="leave them out, or choose another kind",
        )
    return _KINDS[kind](stem, teacher_dims, image_size, tasks=tasks or {}, pretrained=pretrained, **options)


def load_student(source: str | os.PathLike[str], revision: str | None = None) -> Student:
    """A student of any kind, from a folder or from the Hugging Face Hub; see `Student.from_pretrained`."""
    folder = find_saved(source, revision)
    kind = str(read_config(folder).get("kind"))
    require_known("student", kind, _KINDS)
    return _KINDS[kind].from_pretrained(folder)
