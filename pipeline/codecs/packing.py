"""Codes of 1 to 8 bits, packed without gaps along the last axis: a little-endian bit stream for each token.

This is `np.packbits(…, bitorder="little")` of the codes' bits, lowest first.
"""

import math
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional as F

# By bits, the shortest run of (codes, bytes) that ends on a byte.
_GROUPS = {bits: (8 // math.gcd(bits, 8), bits // math.gcd(bits, 8)) for bits in range(1, 9)}


def packed_width(width: int, bits: int) -> int:
    """Bytes that `width` codes take."""
    return -(-width * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 (…, width), each below 2^bits → uint8 (…, packed_width)."""
    width = codes.shape[-1]
    codes_per_group, bytes_per_group = _GROUPS[bits]
    groups = F.pad(codes, (0, -width % codes_per_group)).unflatten(-1, (-1, codes_per_group))
    packed = []
    for byte in range(bytes_per_group):
        first, last = 8 * byte // bits, (8 * byte + 7) // bits
        shifts = [i * bits - 8 * byte for i in range(first, last + 1)]
        parts = [
            groups[..., i] << shift if shift >= 0 else groups[..., i] >> -shift
            for i, shift in enumerate(shifts, first)
        ]
        packed.append(reduce(torch.bitwise_or, parts))
    return torch.stack(packed, -1).flatten(-2)[..., : packed_width(width, bits)].contiguous()


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """uint8 (…, packed_width) → uint8 (…, width), the inverse of `pack`."""
    if bits == 8:
        return packed
    codes_per_group, bytes_per_group = _GROUPS[bits]
    groups = F.pad(packed, (0, -packed.shape[-1] % bytes_per_group)).unflatten(-1, (-1, bytes_per_group))
    codes = []
    for i in range(codes_per_group):
        byte, shift = divmod(i * bits, 8)
        code = groups[..., byte] >> shift
        if shift + bits > 8:
            code = code | groups[..., byte + 1] << (8 - shift)
        codes.append(code & (2**bits - 1))
    return torch.stack(codes, -1).flatten(-2)[..., :width]
