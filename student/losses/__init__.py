"""The losses of training: distillation (SAK), alignment (KPU), and tasks with labels."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from teachercache.student.losses.alignment import AlignmentLoss
    from teachercache.student.losses.distillation import DistillationLoss
    from teachercache.student.losses.tasks import MultiTaskLoss

_HOMES = {
    "AlignmentLoss": "teachercache.student.losses.alignment",
    "DistillationLoss": "teachercache.student.losses.distillation",
    "MultiTaskLoss": "teachercache.student.losses.tasks",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["AlignmentLoss", "DistillationLoss", "MultiTaskLoss"]
