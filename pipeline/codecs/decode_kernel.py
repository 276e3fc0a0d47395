"""Decoding of the Hadamard codecs in one kernel; what PyTorch's own operations do in 45 passes is its twin.

A program unpacks a few tokens of one level, looks their levels up, rotates them back by two small products
and gives them their scale, std and mean, all in registers: codes are read once, and features written once. A
second kernel sets the outliers. Products are TF32's, whose rounding is half precision's; for float32 features
three of them, which keep float32's. Imported where a GPU decodes; Triton comes with PyTorch for CUDA.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_VALUES = 4096  # that a program holds; padded to powers of two, as Triton wants
_SLOTS = 128  # of outliers, that a program sets


@torch.library.custom_op("teachercache::decode_hadamard", mutates_args=())
def decode_hadamard(
    codes: Tensor,
    scales: Tensor,
    places: Tensor,
    values: Tensor,
    levels: Tensor,
    mean: Tensor,
    std: Tensor,
    signed_std: Tensor,
    left: Tensor,
    right: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Features (R, S, H, W, C) of the arrays of a codec and its tables; all contiguous, on one device."""
    rows, num_levels, height, width = scales.shape
    tokens, channels = height * width, mean.shape[1]
    out = torch.empty(rows, num_levels, height, width, channels, dtype=dtype, device=codes.device)
    sides = [max(16, triton.next_power_of_2(len(factor))) for factor in (left, right)]
    at_once = max(1, _VALUES // (sides[0] * sides[1]))
    blocks = -(-tokens // at_once)
    if rows:
        with torch.cuda.device_of(out):  # Triton launches on the current one
            _decode[(rows * num_levels * blocks,)](
                *(codes, scales, levels, mean, signed_std, left, right, out, tokens, blocks, num_levels),
                BITS=len(levels).bit_length() - 1,
                M=len(left),
                K=len(right),
                PADDED_M=sides[0],
                PADDED_K=sides[1],
                TOKENS=at_once,
                PRECISION="tf32x3" if dtype == torch.float32 else "tf32",
                enable_fp_fusion=True,
            )
            slots = places.shape[2]
            _restore[(rows * num_levels, -(-slots // _SLOTS))](
                *(places, values, mean, std, out, slots, num_levels, tokens * channels),
                CHANNELS=channels,
                SLOTS=_SLOTS,
            )
    return out


@decode_hadamard.register_fake
def _(codes: Tensor, scales: Tensor, *rest: Any) -> Tensor:
    mean, dtype = rest[3], rest[-1]
    return codes.new_empty((*scales.shape, mean.shape[1]), dtype=dtype)


@triton.jit
def _decode(
    codes,
    scales,
    levels,
    mean,
    signed_std,
    left,
    right,
    out,
    num_tokens,
    num_blocks,
    num_levels,
    BITS: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    PADDED_M: tl.constexpr,
    PADDED_K: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Channel i·K + j of a token is row i, column j of a matrix: y = leftᵀ levels right · scale."""
    program = tl.program_id(0).to(tl.int64)
    map_, block = program // num_blocks, program % num_blocks
    level = map_ % num_levels
    lines, j = tl.arange(0, TOKENS * PADDED_M), tl.arange(0, PADDED_K)
    i, token = lines % PADDED_M, block * TOKENS + lines // PADDED_M
    channel = i[:, None] * K + j[None, :]
    is_token = token < num_tokens
    held = (is_token & (i < M))[:, None] & (j < K)[None, :]
    place = map_ * num_tokens + token

    bit = channel * BITS
    at = codes + place[:, None] * ((M * K * BITS + 7) // 8) + bit // 8
    word = tl.load(at, mask=held, other=0).to(tl.int32)
    if 8 % BITS != 0:  # a code may lie in two bytes
        word |= tl.load(at + 1, mask=held & (bit % 8 + BITS > 8), other=0).to(tl.int32) << 8
    code = (word >> (bit % 8)) & ((1 << BITS) - 1)
    unit = tl.load(levels + code, mask=held, other=0.0)

    column = tl.arange(0, PADDED_K)
    inside = (column < K)[:, None] & (j < K)[None, :]
    right_KK = tl.load(right + column[:, None] * K + j[None, :], mask=inside, other=0.0)
    row, other = tl.arange(0, PADDED_M), tl.arange(0, PADDED_M)
    inside = (row < M)[:, None] & (other < M)[None, :]
    left_MM = tl.load(left + row[:, None] * M + other[None, :], mask=inside, other=0.0)
    half = tl.dot(unit, right_KK, input_precision=PRECISION)
    half = tl.permute(tl.reshape(half, (TOKENS, PADDED_M, PADDED_K)), (0, 2, 1))
    signed = tl.dot(tl.reshape(half, (TOKENS * PADDED_K, PADDED_M)), left_MM, input_precision=PRECISION)
    signed = tl.permute(tl.reshape(signed, (TOKENS, PADDED_K, PADDED_M)), (0, 2, 1))
    signed = tl.reshape(signed, (TOKENS * PADDED_M, PADDED_K))

    scale = tl.load(scales + place, mask=is_token, other=0.0).to(tl.float32)
    of_level = level * (M * K) + channel
    spread = tl.load(signed_std + of_level, mask=held, other=0.0)
    centre = tl.load(mean + of_level, mask=held, other=0.0)
    features = centre + signed * scale[:, None] * spread
    tl.store(out + place[:, None] * (M * K) + channel, features.to(out.dtype.element_ty), mask=held)


@triton.jit
def _restore(
    places,
    values,
    mean,
    std,
    out,
    num_slots,
    num_levels,
    length,
    CHANNELS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """A place beyond the level is damage, and sets its end."""
    map_ = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    held = slot < num_slots
    place = tl.load(places + map_ * num_slots + slot, mask=held, other=0)
    place = tl.minimum(tl.maximum(place, 0), length - 1)
    of_level = map_ % num_levels * CHANNELS + place % CHANNELS
    value = tl.load(values + map_ * num_slots + slot, mask=held, other=0.0).to(tl.float32)
    centre, spread = tl.load(mean + of_level, mask=held), tl.load(std + of_level, mask=held)
    tl.store(out + map_ * length + place, (centre + value * spread).to(out.dtype.element_ty), mask=held)
