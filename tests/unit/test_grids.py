import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from teachercache.pipeline.grids import (
    adjoint,
    gram,
    interpolation_matrix,
    nearest,
    pool,
    upsample,
)
from teachercache.pipeline.records.spec import GridSpec
from teachercache.pipeline.records.strict import Size
from teachercache.student.losses.distillation import AdjointPair

COARSER_TEACHERS: list[tuple[Size, Size]] = [
    ((32, 32), (24, 24)),
    ((32, 32), (27, 27)),
    ((28, 36), (24, 24)),
    ((14, 18), (12, 17)),
]
PAIRS: list[tuple[Size, Size]] = [  # (student, teacher)
    ((24, 24), (24, 24)),
    ((24, 24), (27, 27)),
    ((24, 24), (64, 64)),
    ((32, 32), (36, 36)),
    ((32, 32), (64, 64)),
    ((28, 36), (27, 27)),
    ((28, 36), (32, 41)),
    ((28, 36), (64, 64)),
    ((1, 1), (3, 2)),
    *COARSER_TEACHERS,
]
each_pair = pytest.mark.parametrize(("student", "teacher"), PAIRS, ids=str)


def maps(student: Size, teacher: Size) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    s = torch.randn(2, 5, *student, generator=generator, dtype=torch.float64)
    t = torch.randn(2, 5, *teacher, generator=generator, dtype=torch.float64) + 0.5
    return s.requires_grad_(), t


def squared_norm(t: Tensor) -> Tensor:
    return t.square().flatten(1).sum(1)


def require_equal_with_gradient(actual: Tensor, expected: Tensor, s: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    gradients = [torch.autograd.grad(value.sum(), s, retain_graph=True)[0] for value in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-14)


@each_pair
def test_adjoint_is_the_transpose_of_upsample(student: Size, teacher: Size) -> None:
    s, t = maps(student, teacher)
    left, right = (upsample(s, teacher) * t).sum(), (s * adjoint(t, student)).sum()
    assert abs(left - right) <= 1e-12 * s.norm() * t.norm()


@each_pair
def test_upsample_is_its_matrices(student: Size, teacher: Size) -> None:
    s, _ = maps(student, teacher)
    rows = interpolation_matrix(student[0], teacher[0])
    columns = interpolation_matrix(student[1], teacher[1])
    torch.testing.assert_close(upsample(s, teacher), rows @ s @ columns.T, rtol=1e-13, atol=1e-13)


@each_pair
def test_gram_is_adjoint_of_upsample_and_no_map_is_nearer(student: Size, teacher: Size) -> None:
    s, t = maps(student, teacher)
    torch.testing.assert_close(gram(s, teacher), adjoint(upsample(s, teacher), student))
    residual = t - upsample(nearest(t, student), teacher)
    assert adjoint(residual, student).abs().max() < 1e-12  # orthogonal to all that upsampling can reach


def test_the_nearest_map_keeps_a_constant() -> None:
    t = torch.full((1, 2, 27, 64), 3.5)
    torch.testing.assert_close(nearest(t, (24, 24)), torch.full((1, 2, 24, 24), 3.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_adjoint_of_any_dtype_under_autocast(dtype: torch.dtype) -> None:
    t = maps((24, 24), (64, 64))[1].to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = adjoint(t, (24, 24))
    assert actual.dtype == dtype
    expected = adjoint(t.double(), (24, 24)).to(dtype)
    torch.testing.assert_close(actual, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_adjoint_is_differentiable() -> None:
    t = torch.randn(1, 2, 5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: adjoint(t, (4, 3)), t)


@each_pair
def test_flattened_cosine_and_squared_error_equal_the_native_ones(student: Size, teacher: Size) -> None:
    s, t = maps(student, teacher)
    known = nearest(t, student), squared_norm(t), teacher
    native = F.cosine_similarity(upsample(s, teacher).flatten(1), t.flatten(1))
    require_equal_with_gradient(AdjointPair(s, *known).flattened_cosine(), native, s)
    native = squared_norm(upsample(s, teacher) - t)
    require_equal_with_gradient(AdjointPair(s, *known).squared_error(), native, s)


@pytest.mark.parametrize(("student", "teacher"), COARSER_TEACHERS, ids=str)
def test_every_loss_is_exact_for_a_coarser_teacher(student: Size, teacher: Size) -> None:
    s, t = maps(student, teacher)
    pair = AdjointPair(s, nearest(t, student), squared_norm(t), teacher)
    native = F.cosine_similarity(upsample(s, teacher), t, dim=1)
    require_equal_with_gradient(pair.token_cosine(), native, s)
    native = F.smooth_l1_loss(upsample(s, teacher), t)
    require_equal_with_gradient(pair.smooth_l1().mean(), native, s)


def test_smooth_l1_has_the_exact_gradient_in_its_quadratic_zone() -> None:
    s, t = (0.1 * x for x in maps((24, 24), (64, 64)))
    native = F.smooth_l1_loss(upsample(s, (64, 64)), t)
    ours = AdjointPair(s, nearest(t, (24, 24)), squared_norm(t), (64, 64)).smooth_l1().mean()
    torch.testing.assert_close(
        torch.autograd.grad(ours, s)[0], torch.autograd.grad(native, s)[0], rtol=1e-9, atol=1e-15
    )


def test_losses_of_zeros_are_finite() -> None:
    s = torch.zeros(1, 2, 3, 3, requires_grad=True)
    zeros = torch.zeros(1, 2, 3, 3), torch.zeros(1), (4, 4)
    pair = AdjointPair(s, *zeros)
    for loss in (pair.flattened_cosine(), pair.token_cosine()):
        assert not loss.any()
        assert torch.autograd.grad(loss.sum(), s)[0].isfinite().all()


def test_losses_are_computed_in_float32_under_autocast() -> None:
    s, t = (x.detach().float() for x in maps((24, 24), (27, 27)))
    known = nearest(t, (24, 24)), squared_norm(t), (27, 27)
    expected = AdjointPair(s, *known).flattened_cosine()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(AdjointPair(s, *known).flattened_cosine(), expected)


def test_pool_native_is_the_input() -> None:
    features = torch.randn(2, 3, 4, 5, 6)
    assert pool(features, GridSpec()) is features


@pytest.mark.parametrize("size", [(3, 2), (4, 5), (9, 8), (3, 9)])
def test_pool_bilinear_is_interpolate_of_each_level(size: Size) -> None:
    features = torch.randn(2, 3, 4, 5, 6)
    pooled = pool(features, GridSpec(kind="bilinear", size=size))
    for level in range(3):
        maps_BCHW = features[:, level].permute(0, 3, 1, 2)
        expected = F.interpolate(maps_BCHW, size=size, mode="bilinear", antialias=True)
        assert torch.equal(pooled[:, level], expected.permute(0, 2, 3, 1))


def test_pool_that_shrinks_uses_every_token_and_one_that_grows_is_upsample() -> None:
    for row in range(12):
        features = torch.zeros(1, 1, 12, 12, 1)
        features[:, :, row] = 1
        assert pool(features, GridSpec(kind="bilinear", size=(3, 3))).sum() > 0
    features = torch.randn(1, 1, 5, 5, 2)
    grown = pool(features, GridSpec(kind="bilinear", size=(8, 7)))[0].permute(0, 3, 1, 2)
    torch.testing.assert_close(grown, upsample(features[0].permute(0, 3, 1, 2), (8, 7)))


def test_pool_of_halves_is_computed_in_float32() -> None:
    features = torch.randn(1, 2, 16, 16, 3).half()
    spec = GridSpec(kind="bilinear", size=(5, 5))
    assert torch.equal(pool(features, spec), pool(features.float(), spec).half())


def test_pool_of_no_rows() -> None:
    pooled = pool(torch.zeros(0, 2, 4, 4, 3), GridSpec(kind="bilinear", size=(2, 2)))
    assert pooled.shape == (0, 2, 2, 2, 3)
