import math

import pytest
import torch

from teachercache.pipeline.codecs.normalisation import hadamard_factors, rotate

WIDTHS = [1, 2, 64, 192, 256, 384, 512, 640, 768, 896, 1024, 1152, 1280, 1408, 1536]
each_width = pytest.mark.parametrize("width", WIDTHS)


@each_width
def test_factors_make_an_exactly_orthogonal_hadamard_matrix(width: int) -> None:
    left, right = hadamard_factors(width)
    matrix = torch.kron(left, right)
    assert matrix.shape == (width, width)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width).double(), rtol=0, atol=1e-13)
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, 1 / math.sqrt(width)))


@pytest.mark.parametrize("width", [3, 97, 130, 184])
def test_other_widths_get_an_orthogonal_matrix_too(width: int) -> None:
    matrix = torch.kron(*hadamard_factors(width))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width).double(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("width", [384, 768, 1024, 1152, 1280, 1408, 1536])
def test_factors_are_small_for_the_widths_of_vision_transformers(width: int) -> None:
    assert sum(map(len, hadamard_factors(width))) <= 3 * math.sqrt(width)


@each_width
def test_rotate_is_the_dense_product_and_is_undone_by_the_transposes(width: int) -> None:
    left, right = hadamard_factors(width)
    tokens = torch.randn(3, 2, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotated = rotate(tokens, left, right)
    torch.testing.assert_close(rotated, tokens @ torch.kron(left, right).T)
    torch.testing.assert_close(rotate(rotated, left.T, right.T), tokens)
