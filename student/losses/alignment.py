"""The loss of a KPU: L = L_t2s + L_s2t + λ L_rec (KPU, Eq. 4)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from teachercache.student.kpu.latent_space import Alignment, Features
from teachercache.student.losses.distillation import CosineKind, DistanceKind, Target, cosine_similarity


@dataclass(frozen=True)
class AlignmentLoss:
    """L_align = λ1 (1 - cos(x1, x2)) + λ2 (1 - cos(V1, V2)) + λ3 smooth-L1(V1, V2) (KPU, Eq. 1) in each of
    the spaces, with the paper's weights by default; `reconstruction_weight` is the λ of Eq. 4.

    The first term is left out for a teacher without a class token. `cosine` and `distance` are those of
    `DistillationLoss`, averaged as there; `teacher_weights` are 1 by default.
    Computed in float32 (float64 stays float64), autocast or not.
    """

    cosine: CosineKind = "token"
    image_weight: float = 1.0
    cosine_weight: float = 0.9
    distance: DistanceKind = "smooth_l1"
    distance_weight: float = 0.1
    reconstruction_weight: float = 1.0
    teacher_weights: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, alignments: Mapping[str, Alignment]) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 4, whose three sums are means over teachers, and the terms of `samples`."""
        samples, terms = self.samples(alignments)
        return torch.stack([loss_B.mean() for loss_B in samples.values()]).mean(), terms

    def samples(self, alignments: Mapping[str, Alignment]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(L_s2t + L_t2s + λ L_rec of each teacher, (B,), and the detached terms for the log: L_align and its
        parts, for each teacher and space, "s2t", "t2s" and "rec")."""
        samples: dict[str, Tensor] = {}
        terms: dict[str, Tensor] = {}
        for name, alignment in alignments.items():
            losses_B = []
            for space, weight, one, other in self._pairs(alignment):
                with torch.autocast(one.map.device.type, enabled=False):
                    loss_B, parts = self.align(one, other)
                losses_B.append(self.teacher_weights.get(name, 1.0) * weight * loss_B)
                for term, value_B in {"loss": loss_B, **parts}.items():
                    terms[f"{term}/{name}/{space}"] = value_B.detach().mean()
            samples[name] = torch.stack(losses_B).sum(0)
        return samples, terms

    def align(self, one: Features, other: Features) -> tuple[Tensor, dict[str, Tensor]]:
        """(L_align (B,), its terms before their weights): `one` on the grid of `other`."""
        target = Target(other.map.permute(0, 2, 3, 1)[:, None])
        cosine, distance = target.compare(0, one.map, self.cosine, self.distance)
        loss = self.cosine_weight * cosine + self.distance_weight * distance
        parts = {"cosine": cosine, self.distance: distance}
        if one.image is not None and other.image is not None:
            dtype = torch.promote_types(one.image.dtype, torch.float32)
            cosines_B = cosine_similarity(one.image.to(dtype), other.image.to(dtype), dim=-1)
            parts["image_cosine"] = 1 - cosines_B
            loss = loss + self.image_weight * parts["image_cosine"]
        return loss, parts

    def _pairs(self, alignment: Alignment) -> Iterator[tuple[str, float, Features, Features]]:
        yield "s2t", 1.0, alignment.s2t, alignment.teacher
        if alignment.t2s is not None:
            yield "t2s", 1.0, alignment.student, alignment.t2s
        if alignment.rec is not None:
            yield "rec", self.reconstruction_weight, alignment.rec, alignment.teacher
