"""What distillation minimises.

B  images     S     levels      C  channels of the teacher
h, w          grid of the student          H, W  grid of the teacher
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import explain
from pipeline.grids import upsample

CosineKind = Literal["flattened", "token"]


@dataclass
class Target:
    """What one teacher says of a batch, on its own grid.

    The loss asks a target only for `num_levels` and `compare`, so what is known of the teacher, and in
    which form, is the target's own business.
    """

    feature_maps_BSHWC: Tensor

    @property
    def num_levels(self) -> int:
        return self.feature_maps_BSHWC.shape[1]

    def compare(self, level: int, student_BChw: Tensor, cosine: CosineKind) -> tuple[Tensor, Tensor]:
        """(1 - cosine, smooth-L1) at one level, two scalars; computed in at least float32.

        The student's map is resampled bilinearly to the teacher's grid, whichever is the finer. (The
        authors' code resamples the coarser of the two; with the teachers of the paper that is always
        the student's.)
        """
        teacher_BHWC = self.feature_maps_BSHWC[:, level]
        dtype = torch.promote_types(student_BChw.dtype, torch.float32)
        height, width, channels = teacher_BHWC.shape[1:]
        if student_BChw.shape[1] != channels:
            raise ValueError(
                explain(
                    f"Student and teacher have different widths at level {level}.",
                    got=f"{student_BChw.shape[1]} channels from the student",
                    expected=f"{channels} channels, as the teacher has",
                    do="build the student with this width in teacher_dims",
                )
            )
        student_BHWC = upsample(student_BChw.to(dtype), (height, width)).permute(0, 2, 3, 1)
        teacher_BHWC = teacher_BHWC.to(dtype)
        smooth_l1 = F.smooth_l1_loss(student_BHWC, teacher_BHWC)
        if cosine == "flattened":
            student_BHWC, teacher_BHWC = student_BHWC.flatten(1), teacher_BHWC.flatten(1)
        return (1 - F.cosine_similarity(student_BHWC, teacher_BHWC, dim=-1)).mean(), smooth_l1


@dataclass
class LossOutput:
    """`total` has the gradient. The others are detached, (S,) for each teacher: `levels` the terms of
    the sum before the teacher's weight, `cosine` (as 1 - cosine) and `smooth_l1` what they are made of."""

    total: Tensor
    levels: dict[str, Tensor]
    cosine: dict[str, Tensor]
    smooth_l1: dict[str, Tensor]


class DistillationLoss(nn.Module):
    """Σ_teachers w · Σ_levels (0.9 · (1 - cosine) + 0.1 · smooth-L1) (SAK, Eq. 5).

    `cosine="flattened"` takes one cosine for each image over its whole map, as the authors' code does;
    `"token"` takes one for each token of the teacher's grid. Both are then averaged over what they were
    taken for; smooth-L1 (beta = 1) is averaged over all elements. `teacher_weights` are 1 by default.
    Computed in float32 (float64 stays float64), autocast or not.
    """

    def __init__(
        self,
        cosine: CosineKind = "flattened",
        cosine_weight: float = 0.9,
        smooth_l1_weight: float = 0.1,
        teacher_weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.cosine = cosine
        self.cosine_weight = cosine_weight
        self.smooth_l1_weight = smooth_l1_weight
        self.teacher_weights = dict(teacher_weights or {})

    def forward(self, student: Mapping[str, Sequence[Tensor]], targets: Mapping[str, Target]) -> LossOutput:
        """`student`: for each teacher its levels, each (B, C, h, w).

        Raises `ValueError` where student and targets differ in teachers, levels or widths.
        """
        _require_pairs(student, targets)
        losses, levels, cosine, smooth_l1 = [], {}, {}, {}
        for teacher, maps_BChw in student.items():
            target = targets[teacher]
            with torch.autocast(maps_BChw[0].device.type, enabled=False):
                terms = [target.compare(i, map_BChw, self.cosine) for i, map_BChw in enumerate(maps_BChw)]
            cosine_S, smooth_l1_S = (torch.stack(values) for values in zip(*terms, strict=True))
            loss_S = self.cosine_weight * cosine_S + self.smooth_l1_weight * smooth_l1_S
            losses.append(self.teacher_weights.get(teacher, 1.0) * loss_S.sum())
            levels[teacher] = loss_S.detach()
            cosine[teacher], smooth_l1[teacher] = cosine_S.detach(), smooth_l1_S.detach()
        return LossOutput(torch.stack(losses).sum(), levels, cosine, smooth_l1)


def _require_pairs(student: Mapping[str, Sequence[Tensor]], targets: Mapping[str, Target]) -> None:
    if student.keys() != targets.keys():
        raise ValueError(
            explain(
                "Student and targets are not of the same teachers.",
                got=f"a student of {', '.join(student) or 'none'}",
                expected=f"{', '.join(targets) or 'none'}, as there are targets",
                do="build the student for the teachers that it is distilled from",
            )
        )
    for teacher, levels in student.items():
        if len(levels) != targets[teacher].num_levels:
            raise ValueError(
                explain(
                    f"Student and teacher {teacher} have different numbers of levels.",
                    got=f"{len(levels)} levels from the student",
                    expected=f"{targets[teacher].num_levels} levels, as the teacher has",
                    do="choose as many block_indices for the teacher as the student has levels",
                )
            )
