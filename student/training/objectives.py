"""What a step of training minimises: distillation (SAK, Eq. 5), tasks, or both (Eq. 6)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from teachercache.pipeline.loading.loader import Batch
from teachercache.student.kpu.latent_space import Features
from teachercache.student.losses.alignment import AlignmentLoss
from teachercache.student.losses.distillation import DistillationLoss, LossOutput, Target
from teachercache.student.losses.tasks import MultiTaskLoss
from teachercache.student.models.student import Student, StudentOutput
from teachercache.student.timing import StageTimer
from teachercache.student.training.targets import TargetSource


@dataclass
class Objective:
    """L = γ · L_distillation + Σ_tasks w_t · L_t (SAK, Eq. 6); stage 1 has no tasks and γ = 1.

    `model` is `student` as accelerate wrapped it. Without `distillation` the features are not asked for
    and the aligners do not run: a baseline that learns from labels alone.
    """

    model: nn.Module
    student: Student
    targets: TargetSource
    distillation: DistillationLoss | None
    weight: float = 1.0
    tasks: MultiTaskLoss | None = None

    def __post_init__(self) -> None:
        assert self.distillation or self.tasks, "nothing to minimise"

    def __call__(self, batch: Batch, timer: StageTimer) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and its terms for the log."""
        device = self.student.mean.device
        with timer.stage("targets"):
            reads = self.distillation is not None or self.student.reads_features
            targets = self.targets(batch) if reads else {}
            labels = {task: values.to(device, non_blocking=True) for task, values in batch.labels.items()}
        with timer.stage("forward"):
            images_B3HW = batch.images.to(device, non_blocking=True)
            output = self._run(self.student.normalize(images_B3HW), targets)
            losses: list[Tensor] = []
            terms: dict[str, Tensor] = {}
            if self.distillation:
                maps = {
                    name: output.feature_maps[name][-target.num_levels :] for name, target in targets.items()
                }
                distilled = self.distillation(maps, targets)
                losses.append(self.weight * distilled.total)
                terms |= _terms(distilled, self.distillation.distance)
            if self.tasks:
                tasks = self.tasks(output.predictions, labels)
                losses.append(tasks.total)
                terms |= {f"loss/{task}": loss for task, loss in tasks.tasks.items()}
                terms |= _mean_gates(output, self.student)
        return sum(losses[1:], start=losses[0]), terms

    def _run(self, pixels_B3HW: Tensor, targets: Mapping[str, Target]) -> StudentOutput:
        inputs: dict[str, Any] = {"full": True, "maps": self.distillation is not None}
        if self.student.reads_features:
            inputs["features"] = {name: target.feature_maps_BSHWC for name, target in targets.items()}
        return self.model(pixels_B3HW, **inputs)


def _terms(loss: LossOutput, distance: str) -> dict[str, Tensor]:
    terms = {"loss": loss.levels, "cosine": loss.cosine, distance: loss.distance}
    return {
        f"{term}/{teacher}/level{level}": value
        for term, by_teacher in terms.items()
        for teacher, values in by_teacher.items()
        for level, value in enumerate(values)
    }


def _mean_gates(output: StudentOutput, student: Student) -> dict[str, Tensor]:
    """The weight of each expert, by task and level: what Figures 7 and 8 of the paper show."""
    return {
        f"gate/{task}/level{level}/{expert}": weight
        for task, gates_BSE in output.gates.items()
        for level, gates_E in enumerate(gates_BSE.detach().mean(0))
        for expert, weight in zip(student.experts, gates_E, strict=True)
    }


@dataclass
class KPUObjective:
    """The loss of a batch, called as `teachercache.student.training.objectives.Objective`; `weight`
    multiplies all of it.

    `model` is `student` as accelerate wrapped it.
    """

    model: nn.Module
    student: Student
    targets: TargetSource
    loss: AlignmentLoss
    weight: float = 1.0
    tasks: None = None

    def __call__(self, batch: Batch, timer: StageTimer) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and its terms for the log."""
        with timer.stage("targets"):
            teachers = {name: last_level(target) for name, target in self.targets(batch).items()}
        with timer.stage("forward"):
            images_B3HW = batch.images
            images_B3HW = images_B3HW.to(self.student.mean.device, non_blocking=True)
            alignments = self.model(self.student.normalize(images_B3HW), teachers=teachers)
            loss, terms = self.loss(alignments)
        return self.weight * loss, terms


def last_level(target: Target) -> Features:
    """X^t of a teacher in at least float32: its class token, where there is one, and its last map."""
    map_BCHW, image_BC = target.feature_maps_BSHWC[:, -1].permute(0, 3, 1, 2), target.cls_token_BC
    dtype = torch.promote_types(map_BCHW.dtype, torch.float32)
    return Features(None if image_BC is None else image_BC.to(dtype), map_BCHW.to(dtype))
