"""A fast orthonormal rotation for any number of channels: H = left ⊗ right, both small.

A Hadamard matrix has entries of one magnitude, so rotating by it spreads an outlier channel evenly over all.
With `width = m·k` the rotation of a token is two small matrix products, left (m, m) @ token (m, k) @
rightᵀ (k, k): 2·(m + k) flops a value where a dense rotation takes 2·m·k.
"""

import math

import torch
from scipy.fft import dct
from torch import Tensor


def hadamard_factors(width: int) -> tuple[Tensor, Tensor]:
    """Orthonormal (left, right) in float64 with left ⊗ right of size `width`, about √width each.

    Hadamard for each width that is a power of two times a Paley order: all of 256, 384, 512, 768, 1024,
    1152, 1280, 1408, 1536 and more. Else the odd part of the width is served by a DCT, also orthonormal.
    """
    left, right = _core(width), torch.ones(1, 1, dtype=torch.float64)
    doublings = (width // len(left)).bit_length() - 1
    for _ in range(doublings):
        if len(left) < len(right):
            left = _double(left)
        else:
            right = _double(right)
    return left, right


def rotate(tokens: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """H x along the last axis of `tokens` (…, width). With the factors transposed: Hᵀ x."""
    blocks = tokens.reshape(-1, len(left), len(right))
    return (left @ (blocks @ right.T)).view(tokens.shape)


def _core(width: int) -> Tensor:
    """The smallest orthonormal matrix from which doubling reaches `width`."""
    odd = width // (width & -width)
    if odd == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    order = 4 * odd
    while width % order == 0:
        if _is_prime(order - 1):
            return _paley(order - 1)
        order *= 2
    return torch.from_numpy(dct(torch.eye(odd, dtype=torch.float64).numpy(), norm="ortho"))


def _double(matrix: Tensor) -> Tensor:
    """Sylvester's step, orthonormal."""
    return torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=matrix.dtype), matrix) / math.sqrt(2)


def _paley(q: int) -> Tensor:
    """Paley's first construction, orthonormal: order q + 1 for a prime q ≡ 3 (mod 4)."""
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[torch.arange(1, q) ** 2 % q] = 1
    character[0] = 0
    index = torch.arange(q)
    matrix = torch.ones(q + 1, q + 1, dtype=torch.float64)
    matrix[1:, 0] = -1
    matrix[1:, 1:] = character[(index - index[:, None]) % q] + torch.eye(q, dtype=torch.float64)
    return matrix / math.sqrt(q + 1)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))
