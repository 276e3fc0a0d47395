"""SAK's distillation loss against plain twins, in value and gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from teachercache.pipeline.grids import stored_form
from teachercache.pipeline.records.spec import GridSpec
from teachercache.student.losses.distillation import (
    AdjointTarget,
    CosineKind,
    DistillationLoss,
    Target,
    cosine_similarity,
)

B, S, C = 2, 4, 5
GRIDS = [((3, 4), (3, 4)), ((3, 4), (7, 9)), ((4, 4), (3, 2))]


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pair(grid: tuple[int, int], teacher_grid: tuple[int, int]) -> tuple[list[Tensor], Target]:
    student = [3 * maps(B, C, *grid, seed=level) for level in range(S)]
    return student, Target(maps(B, S, *teacher_grid, C, seed=9))


def bilinear_at(values_hw: list[list[float]], y: float, x: float) -> float:
    """`values` at a position in its own pixel coordinates, edges repeated."""
    height, width = len(values_hw), len(values_hw[0])
    total = 0.0
    for row in range(height):
        for column in range(width):
            weight = max(0.0, 1 - abs(y - row)) * max(0.0, 1 - abs(x - column))
            total += weight * values_hw[row][column]
    return total


def by_hand(student: list[Tensor], target: Target, cosine: CosineKind) -> float:
    """Eq. 5 with loops over numbers."""
    total = 0.0
    _, levels, height, width, channels = target.feature_maps_BSHWC.shape
    for level in range(levels):
        cosines, smooth = [], []
        for b in range(B):
            source = student[level][b].tolist()
            h, w = len(source[0]), len(source[0][0])
            tokens = []
            for i in range(height):
                for j in range(width):
                    y = min(max((i + 0.5) * h / height - 0.5, 0), h - 1)
                    x = min(max((j + 0.5) * w / width - 0.5, 0), w - 1)
                    s = [bilinear_at(source[c], y, x) for c in range(channels)]
                    t = target.feature_maps_BSHWC[b, level, i, j].tolist()
                    tokens.append((s, t))
                    for one, other in zip(s, t, strict=True):
                        d = abs(one - other)
                        smooth.append(0.5 * d * d if d < 1 else d - 0.5)
            if cosine == "flattened":
                tokens = [([v for s, _ in tokens for v in s], [v for _, t in tokens for v in t])]
            cosines += [
                sum(a * b for a, b in zip(s, t, strict=True)) / (math.hypot(*s) * math.hypot(*t))
                for s, t in tokens
            ]
        total += 0.9 * (1 - sum(cosines) / len(cosines)) + 0.1 * sum(smooth) / len(smooth)
    return total


@pytest.mark.parametrize("cosine", ["flattened", "token"])
@pytest.mark.parametrize(("grid", "teacher_grid"), GRIDS)
def test_value_equals_the_equation_by_hand(
    cosine: CosineKind, grid: tuple[int, int], teacher_grid: tuple[int, int]
) -> None:
    student, target = pair(grid, teacher_grid)
    loss = DistillationLoss(cosine)({"a": student}, {"a": target})
    assert loss.total.item() == pytest.approx(by_hand(student, target, cosine), rel=1e-12)


def test_value_equals_the_modules_that_the_authors_use() -> None:
    student, target = pair((3, 4), (7, 9))
    expected = torch.zeros((), dtype=torch.float64)
    for level, map_BChw in enumerate(student):
        s_BCHW = nn.functional.interpolate(map_BChw, size=(7, 9), mode="bilinear", align_corners=False)
        t_BCHW = target.feature_maps_BSHWC[:, level].permute(0, 3, 1, 2)
        expected += 0.9 * nn.CosineEmbeddingLoss()(s_BCHW.flatten(1), t_BCHW.flatten(1), torch.ones(B))
        expected += 0.1 * nn.SmoothL1Loss()(s_BCHW, t_BCHW)
    torch.testing.assert_close(DistillationLoss()({"a": student}, {"a": target}).total, expected)


def test_the_cosine_is_pytorchs_and_its_gradient_too() -> None:
    a, b = maps(3, 4, C), maps(3, 4, C, seed=1)
    a[0, 1], b[2] = 0, 0
    found, expected = a.clone().requires_grad_(), a.clone().requires_grad_()
    one = cosine_similarity(found, b, dim=-1)
    other = nn.functional.cosine_similarity(expected, b, dim=-1)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
    for value in (one, other):
        value.square().sum().backward()
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("cosine", ["flattened", "token"])
@pytest.mark.parametrize(("grid", "teacher_grid"), GRIDS)
def test_gradient(cosine: CosineKind, grid: tuple[int, int], teacher_grid: tuple[int, int]) -> None:
    student, target = pair(grid, teacher_grid)
    loss = DistillationLoss(cosine)

    def total(*levels: Tensor) -> Tensor:
        result: Tensor = loss({"a": list(levels)}, {"a": target}).total
        return result

    assert torch.autograd.gradcheck(total, [level.requires_grad_() for level in student])


def test_sums_over_teachers_with_their_weights() -> None:
    (student_a, target_a), (student_b, target_b) = pair((3, 4), (3, 4)), pair((3, 4), (7, 9))
    alone = [
        DistillationLoss()({"x": s}, {"x": t}).total
        for s, t in ((student_a, target_a), (student_b, target_b))
    ]
    students, targets = {"a": student_a, "b": student_b}, {"b": target_b, "a": target_a}
    together = DistillationLoss(teacher_weights={"b": 0.25})(students, targets)
    torch.testing.assert_close(together.total, alone[0] + 0.25 * alone[1])
    torch.testing.assert_close(together.levels["b"].sum(), alone[1])
    torch.testing.assert_close(
        together.levels["a"], 0.9 * together.cosine["a"] + 0.1 * together.distance["a"]
    )


def test_is_zero_for_a_perfect_student() -> None:
    target = Target(maps(B, S, 3, 4, C))
    student = [target.feature_maps_BSHWC[:, level].permute(0, 3, 1, 2) for level in range(S)]
    assert DistillationLoss()({"a": student}, {"a": target}).total.item() == pytest.approx(0, abs=1e-12)


def test_is_computed_in_float32_under_autocast() -> None:
    student, target = pair((3, 4), (7, 9))
    half = [level.bfloat16() for level in student]
    target = Target(target.feature_maps_BSHWC.half())
    expected = DistillationLoss()({"a": [level.float() for level in half]}, {"a": target}).total
    with torch.autocast("cpu", torch.bfloat16):
        got = DistillationLoss()({"a": half}, {"a": target}).total
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"b": [torch.zeros(1, C, 2, 2)] * S}, "have different teachers"),
        ({"a": [torch.zeros(1, C, 2, 2)] * 3}, "3 levels of a"),
        ({"a": [torch.zeros(1, C + 1, 2, 2)] * S}, f"{C + 1} channels from the student"),
    ],
)
def test_what_does_not_fit_says_why(student: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillationLoss()(student, {"a": Target(torch.zeros(1, S, 2, 2, C))})


ADJOINT_GRIDS = [  # student's, teacher's: those of SAK's teachers, and a teacher coarser than the student
    ((24, 24), (27, 27)),
    ((24, 24), (64, 64)),
    ((32, 32), (36, 36)),
    ((28, 36), (32, 41)),
    ((28, 36), (50, 64)),
    ((14, 14), (7, 7)),
]


@pytest.mark.parametrize(("grid", "teacher_grid"), ADJOINT_GRIDS)
def test_an_adjoint_target_is_worth_the_native_map(
    grid: tuple[int, int], teacher_grid: tuple[int, int]
) -> None:
    """Flattened cosine and squared error, in value and gradient."""
    student, native = pair(grid, teacher_grid)
    student = [level.requires_grad_() for level in student]
    stored, norms = stored_form(native.feature_maps_BSHWC, GridSpec(kind="adjoint", size=grid))
    assert norms is not None
    loss = DistillationLoss("flattened", distance="squared_error")
    results = []
    for target in (native, AdjointTarget(stored, norms_BS=norms, grid=teacher_grid)):
        output = loss({"a": student}, {"a": target})
        results.append((output.total, *torch.autograd.grad(output.total, student)))
    for exact, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-15)


def test_an_adjoint_target_is_for_one_grid() -> None:
    target = AdjointTarget(maps(B, S, 4, 4, C), norms_BS=maps(B, S).abs(), grid=(7, 9))
    with pytest.raises(ValueError, match="one student grid"):
        DistillationLoss()({"a": [maps(B, C, 3, 4)] * S}, {"a": target})
