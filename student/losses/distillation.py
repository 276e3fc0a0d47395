"""The loss of distillation.

B  images     S     levels      C  channels of the teacher
h, w          grid of the student          H, W  grid of the teacher
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from teachercache.pipeline.errors import ArgumentError
from teachercache.pipeline.grids import Grid, Places, gram, upsample

CosineKind = Literal["flattened", "token"]
DistanceKind = Literal["smooth_l1", "squared_error"]
_OF_A_MAP = (1, 2, 3)


def cosine_similarity(a: Tensor, b: Tensor, dim: int, eps: float = 1e-8) -> Tensor:
    """<a, b> / (‖a‖ ‖b‖) along `dim`, as in PyTorch, whose own keeps normalised copies of both for the
    gradient. `eps` bounds each norm from below."""
    norm_a, norm_b = (torch.linalg.vector_norm(one, dim=dim).clamp_min(eps) for one in (a, b))
    return (a * b).sum(dim) / (norm_a * norm_b)


@dataclass
class Target:
    """What one teacher says of a batch: its features, on the grid that they are known on, and the class token
    of its last level where it is known. `grid`: that of the teacher, if it is not what the features fill."""

    feature_maps_BSHWC: Tensor
    cls_token_BC: Tensor | None = None
    grid: Grid | None = None

    def __post_init__(self) -> None:
        self.num_levels = self.feature_maps_BSHWC.shape[1]

    def compare(
        self, level: int, student_BChw: Tensor, cosine: CosineKind, distance: DistanceKind
    ) -> tuple[Tensor, Tensor]:
        """(1 - cosine, distance) at one level, (B,) each; computed in at least float32.

        The student's map is resampled bilinearly to the teacher's grid, whichever is the finer. (The
        authors' code resamples the coarser of the two; with the teachers of the paper that is always
        the student's.)
        """
        teacher_BHWC = self.feature_maps_BSHWC[:, level]
        dtype = torch.promote_types(student_BChw.dtype, torch.float32)
        height, width, channels = teacher_BHWC.shape[1:]
        _require_width(level, student_BChw, channels)
        student_BHWC = upsample(student_BChw.to(dtype), self.grid or (height, width)).permute(0, 2, 3, 1)
        teacher_BHWC = teacher_BHWC.to(dtype)
        measure = F.smooth_l1_loss if distance == "smooth_l1" else F.mse_loss
        difference_B = measure(student_BHWC, teacher_BHWC, reduction="none").mean((1, 2, 3))
        if cosine == "flattened":
            student_BHWC, teacher_BHWC = (one.flatten(1)[:, None] for one in (student_BHWC, teacher_BHWC))
        cosines_BN = cosine_similarity(student_BHWC, teacher_BHWC, dim=-1).flatten(1)
        return 1 - cosines_BN.mean(1), difference_B


class AdjointPair:
    """A student map s (B, C, h, w) with what is stored of the teacher map t that it is compared with: p
    (B, C, h, w), and ‖t‖² (B,); t itself is on `grid` (H, W).

    With U the bilinear upsampling to that grid, p is the map whose upsampling is nearest to t, so
    Uᵀt = UᵀU p: SAK's flattened cosine and the squared error follow exactly, in value and gradient. Other
    losses see t only through U p, and are exact where the teacher's grid is the coarser one (docs/codecs.md,
    Grids). All is computed in at least float32, autocast or not, and what two losses need of it once.
    """

    def __init__(self, s_BChw: Tensor, p_BChw: Tensor, squared_norm_t_B: Tensor, grid: Grid) -> None:
        self._s_BChw, self._p_BChw, self._squared_norm_t_B = (
            one.to(torch.promote_types(one.dtype, torch.float32))
            for one in (s_BChw, p_BChw, squared_norm_t_B)
        )
        self._grid = grid
        # Filled in when they are asked for; the lock of a `cached_property` would end a compiled graph.
        self._products: tuple[Tensor, Tensor] | None = None
        self._upsampled: tuple[Tensor, Tensor] | None = None

    def flattened_cosine(self, eps: float = 1e-8) -> Tensor:
        """cos(U s, t) (B,), exact, over each sample's whole map: <p, UᵀU s> / (‖U s‖ ‖t‖).

        `eps` bounds each norm from below, as in `F.cosine_similarity`.
        """
        product_B, squared_norm_s_B = self._exact_products()
        norm_s_B, norm_t_B = (
            one.clamp(min=eps**2).sqrt() for one in (squared_norm_s_B, self._squared_norm_t_B)
        )
        return product_B / (norm_s_B * norm_t_B)

    def squared_error(self) -> Tensor:
        """‖U s − t‖² (B,), exact, summed over the map: ‖U s‖² − 2 <p, UᵀU s> + ‖t‖².

        The three terms cancel as s nears t, so in float32 the value keeps an error of about 1e-7·‖t‖²; the
        gradient 2 UᵀU (s − p) has no such loss.
        """
        product_B, squared_norm_s_B = self._exact_products()
        return squared_norm_s_B - 2 * product_B + self._squared_norm_t_B

    def token_cosine(self) -> Tensor:
        """cos(U s, t) of each teacher token (B, H, W), approximate: <U s, U p> / (‖U s‖ ‖U p‖ r).

        What a token loses of its norm is not known, only what they lose together: r = ‖t‖ / ‖U p‖.
        """
        student_BCHW, reached_BCHW = self._on_grid()
        squared_norm_reached_B = reached_BCHW.square().sum(_OF_A_MAP)
        share_B = (squared_norm_reached_B / self._squared_norm_t_B.clamp(min=1e-30)).sqrt()
        return cosine_similarity(student_BCHW, reached_BCHW, dim=1) * share_B[:, None, None]

    def smooth_l1(self) -> Tensor:
        """Smooth-L1 (beta = 1) of U s against U p (B,), approximate: the mean over a map's elements.

        Its gradient is exact where all differences to t and to U p are below 1.
        """
        return F.smooth_l1_loss(*self._on_grid(), reduction="none").mean(_OF_A_MAP)

    def _exact_products(self) -> tuple[Tensor, Tensor]:
        """<U s, t> and ‖U s‖² (B,); the maps on `grid` are not formed."""
        if self._products is None:
            gram_s_BChw = gram(self._s_BChw, self._grid)
            product_B = (self._p_BChw * gram_s_BChw).sum(_OF_A_MAP)
            self._products = product_B, (self._s_BChw * gram_s_BChw).sum(_OF_A_MAP)
        return self._products

    def _on_grid(self) -> tuple[Tensor, Tensor]:
        """U s and U p (B, C, H, W)."""
        if self._upsampled is None:
            self._upsampled = upsample(self._s_BChw, self._grid), upsample(self._p_BChw, self._grid)
        return self._upsampled


@dataclass
class AdjointTarget(Target):
    """For the teacher's maps t on its `grid`: the maps on the student's grid (B, S, h, w, C) that come
    nearest to t when upsampled, and ‖t‖ (B, S); t is never formed.

    The flattened cosine and the squared error are those of the native map, exactly; the token cosine and
    smooth-L1 are approximations (`AdjointPair`).
    """

    norms_BS: Tensor = field(kw_only=True)
    grid: Grid = field(kw_only=True)

    def compare(
        self, level: int, student_BChw: Tensor, cosine: CosineKind, distance: DistanceKind
    ) -> tuple[Tensor, Tensor]:
        nearest_BChw = self.feature_maps_BSHWC[:, level].permute(0, 3, 1, 2)
        _require_width(level, student_BChw, nearest_BChw.shape[1])
        if student_BChw.shape[-2:] != nearest_BChw.shape[-2:]:
            raise ArgumentError(
                "An adjoint target holds for one student grid only.",
                got=f"a student on {tuple(student_BChw.shape[-2:])}",
                expected=f"{tuple(nearest_BChw.shape[-2:])}, the grid of the cache",
                do="build the cache with the student's grid as grid_size, or with grid: native",
            )
        pair = AdjointPair(student_BChw, nearest_BChw, self.norms_BS[:, level].square(), self.grid)
        cosines_B = pair.flattened_cosine() if cosine == "flattened" else pair.token_cosine().mean((1, 2))
        if distance == "smooth_l1":
            return 1 - cosines_B, pair.smooth_l1()
        height, width = self.grid.size if isinstance(self.grid, Places) else self.grid
        elements = height * width * nearest_BChw.shape[1]
        return 1 - cosines_B, pair.squared_error() / elements


def _require_width(level: int, student_BChw: Tensor, channels: int) -> None:
    if student_BChw.shape[1] != channels:
        raise ArgumentError(
            f"Student and teacher have different widths at level {level}.",
            got=f"{student_BChw.shape[1]} channels from the student",
            expected=f"{channels} channels, like the teacher",
            do="build the student with this width in teacher_dims",
        )


@dataclass
class LossOutput:
    """`total` has the gradient, and `samples`, (B,) for each teacher, whose means are its terms. The others
    are detached, (S,) for each teacher: `levels` are the terms of the sum before the teacher's weight,
    `cosine` (as 1 - cosine) and `distance` their parts."""

    total: Tensor
    samples: dict[str, Tensor]
    levels: dict[str, Tensor]
    cosine: dict[str, Tensor]
    distance: dict[str, Tensor]


class DistillationLoss(nn.Module):
    """Σ_teachers w · Σ_levels (0.9 · (1 - cosine) + 0.1 · smooth-L1) (SAK, Eq. 5).

    `cosine="flattened"` takes one cosine per image, over its whole map, as the authors' code does;
    `"token"` takes one per token of the teacher's grid. The cosines are then averaged; smooth-L1 (beta = 1),
    or the squared error, is averaged over all elements.
    `teacher_weights` are 1 by default.
    Computed in float32 (float64 stays float64), autocast or not.
    """

    def __init__(
        self,
        cosine: CosineKind = "flattened",
        cosine_weight: float = 0.9,
        distance: DistanceKind = "smooth_l1",
        distance_weight: float = 0.1,
        teacher_weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.cosine = cosine
        self.cosine_weight = cosine_weight
        self.distance = distance
        self.distance_weight = distance_weight
        self.teacher_weights = dict(teacher_weights or {})

    def forward(self, student: Mapping[str, Sequence[Tensor]], targets: Mapping[str, Target]) -> LossOutput:
        """`student`: for each teacher its levels, each (B, C, h, w).

        Raises `ValueError` where student and targets differ in teachers, levels or widths.
        """
        _require_pairs(student, targets)
        samples, levels, cosine, distance = {}, {}, {}, {}
        for teacher, maps_BChw in student.items():
            target = targets[teacher]
            with torch.autocast(maps_BChw[0].device.type, enabled=False):
                terms = [
                    target.compare(i, map_BChw, self.cosine, self.distance)
                    for i, map_BChw in enumerate(maps_BChw)
                ]
            cosine_SB, distance_SB = (torch.stack(values) for values in zip(*terms, strict=True))
            loss_SB = self.cosine_weight * cosine_SB + self.distance_weight * distance_SB
            samples[teacher] = self.teacher_weights.get(teacher, 1.0) * loss_SB.sum(0)
            levels[teacher] = loss_SB.detach().mean(1)
            cosine[teacher], distance[teacher] = cosine_SB.detach().mean(1), distance_SB.detach().mean(1)
        total = torch.stack([loss_B.mean() for loss_B in samples.values()]).sum()
        return LossOutput(total, samples, levels, cosine, distance)


def _require_pairs(student: Mapping[str, Sequence[Tensor]], targets: Mapping[str, Target]) -> None:
    ours = {teacher: len(levels) for teacher, levels in student.items()}
    theirs = {teacher: target.num_levels for teacher, target in targets.items()}
    if ours != theirs:
        got, expected = (
            ", ".join(f"{count} levels of {name}" for name, count in levels.items()) or "none"
            for levels in (ours, theirs)
        )
        raise ArgumentError(
            "Student and targets have different teachers or levels.",
            got=f"a student with {got}",
            expected=f"{expected}, like the targets",
            do="build the student for these teachers, of as many block_indices as it has levels",
        )
