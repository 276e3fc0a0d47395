"""The losses of training: distillation (SAK), alignment (KPU), and tasks with labels."""

from teachercache.pipeline.lazy_names import lazy

_HOMES = {
    "AlignmentLoss": "alignment",
    "DistillationLoss": "distillation",
    "MultiTaskLoss": "tasks",
}
__getattr__ = lazy(__name__, _HOMES)
__all__ = [*_HOMES]
