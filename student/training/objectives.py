"""What a step of training minimises: distillation (SAK, Eq. 5), tasks, or both (Eq. 6)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from teachercache.pipeline.codecs.normalisation import Normalisation
from teachercache.pipeline.loading.loader import Batch
from teachercache.student.kpu.latent_space import Alignment, Features
from teachercache.student.losses.alignment import AlignmentLoss
from teachercache.student.losses.distillation import DistillationLoss, LossOutput, Target
from teachercache.student.losses.tasks import MultiTaskLoss
from teachercache.student.losses.weighting import Losses, Weighting
from teachercache.student.models.student import Student, StudentOutput
from teachercache.student.timing import StageTimer
from teachercache.student.training.cutmix import CutMix
from teachercache.student.training.targets import TargetSource, balanced


@dataclass
class _OfStudent:
    """`model` is `student` as accelerate wrapped it, `targets` those of its inputs. `weight` multiplies what
    `loss` says of the teachers, as `weighting` counts them. `balance`: in whose terms maps are compared, by
    teacher. `cutmix`: what changes images and targets before."""

    model: nn.Module
    student: Student
    targets: Sequence[TargetSource]
    loss: Any
    weight: float = 1.0
    tasks: MultiTaskLoss | None = None
    weighting: Weighting = field(default_factory=Weighting)
    balance: Mapping[str, Normalisation] = field(default_factory=dict)
    cutmix: CutMix | None = None


class SakObjective(_OfStudent):
    """L = γ · L_distillation + Σ_tasks w_t · L_t (SAK, Eq. 6) of one input; stage 1 has no tasks and γ = 1.

    Without a `loss` the aligners do not run: a baseline that learns from labels alone.
    """

    loss: DistillationLoss | None

    def __call__(self, batches: Sequence[Batch], timer: StageTimer) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a step's batch, and its terms for the log."""
        (batch,), device = batches, self.student.mean.device
        labels = {task: values.to(device, non_blocking=True) for task, values in batch.labels.items()}
        output, targets = self._run(batch, timer)
        with timer.stage("forward"):
            losses, terms = list[Tensor](), dict[str, Tensor]()
            if self.loss:
                distilled = self._distilled(output, targets)
                mean = self.weighting([distilled.samples], [batch])
                losses.append(self.weight * len(targets) * mean)
                terms |= _terms(distilled, self.loss.distance)
                terms |= {f"weight/{name}": weight for name, weight in self.weighting.weights().items()}
            if self.tasks:
                tasks = self.tasks(output.predictions, labels)
                losses.append(tasks.total)
                terms |= {f"loss/{task}": loss for task, loss in tasks.tasks.items()}
                terms |= _mean_gates(output, self.student)
        return sum(losses[1:], start=losses[0]), terms

    @torch.no_grad()
    def losses(self, batches: Sequence[Batch], timer: StageTimer) -> list[Losses]:
        """Those of the teachers, before any weight."""
        return [self._distilled(*self._run(batches[0], timer)).samples]

    def _distilled(self, output: StudentOutput, targets: Mapping[str, Target]) -> LossOutput:
        assert self.loss is not None
        maps = {name: output.feature_maps[name][-target.num_levels :] for name, target in targets.items()}
        for name, normalisation in self.balance.items():
            maps[name] = balanced(normalisation, maps[name])
            whole = normalisation.forward(targets[name].feature_maps_BSHWC)
            targets = {**targets, name: replace(targets[name], feature_maps_BSHWC=whole)}
        return self.loss(maps, targets)

    def _run(self, batch: Batch, timer: StageTimer) -> tuple[StudentOutput, Mapping[str, Target]]:
        """What the student says of a batch, and its targets."""
        with timer.stage("targets"):
            targets: Mapping[str, Target] = self.targets[0](batch)
        with timer.stage("forward"):
            images_B3HW = batch.images.to(self.student.mean.device, non_blocking=True)
            if self.cutmix:
                images_B3HW, targets = self.cutmix(batch, images_B3HW, targets)
            inputs: dict[str, Any] = {"full": True, "maps": self.loss is not None}
            if self.student.reads_features:
                maps = {name: target.feature_maps_BSHWC.float() for name, target in targets.items()}
                inputs["features"] = maps
            return self.model(self.student.normalize(images_B3HW), **inputs), targets


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


class KPUObjective(_OfStudent):
    """Eq. 4 over the teachers of all inputs, each of which is a forward pass of its own; `balance` is of what
    L_s2t and L_rec compare."""

    loss: AlignmentLoss

    def __call__(self, batches: Sequence[Batch], timer: StageTimer) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a step's batches, one of each input, and its terms for the log."""
        inputs, terms = self._inputs(batches, timer)
        total = self.weight * self.weighting(inputs, batches)
        return total, terms | {f"weight/{name}": one for name, one in self.weighting.weights().items()}

    @torch.no_grad()
    def losses(self, batches: Sequence[Batch], timer: StageTimer) -> list[Losses]:
        """Those of the teachers of each input, before any weight."""
        return self._inputs(batches, timer)[0]

    def _inputs(self, batches: Sequence[Batch], timer: StageTimer) -> tuple[list[Losses], dict[str, Tensor]]:
        inputs, terms = list[Losses](), dict[str, Tensor]()
        for batch, targets_of in zip(batches, self.targets, strict=True):
            with timer.stage("targets"):
                teachers = {name: last_level(target) for name, target in targets_of(batch).items()}
            with timer.stage("forward"):
                images_B3HW = batch.images.to(self.student.mean.device, non_blocking=True)
                found = self.model(self.student.normalize(images_B3HW), teachers=teachers)
                alignments = {name: self._balanced(name, alignment) for name, alignment in found.items()}
                samples, of_input = self.loss.samples(alignments)
            inputs.append(samples)
            terms |= of_input
        return inputs, terms

    def _balanced(self, name: str, alignment: Alignment) -> Alignment:
        if name not in self.balance:
            return alignment
        changed = {
            space: one._replace(map=balanced(self.balance[name], [one.map])[0])
            for space, one in alignment._asdict().items()
            if space in ("teacher", "s2t", "rec") and one is not None
        }
        return alignment._replace(**changed)


def last_level(target: Target) -> Features:
    """X^t of a teacher in at least float32: its class token, where there is one, and its last map."""
    map_BCHW, image_BC = target.feature_maps_BSHWC[:, -1].permute(0, 3, 1, 2), target.cls_token_BC
    dtype = torch.promote_types(map_BCHW.dtype, torch.float32)
    return Features(None if image_BC is None else image_BC.to(dtype), map_BCHW.to(dtype))
