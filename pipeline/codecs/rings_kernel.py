"""Encoding of rings in one kernel; the loops of `RingQuantizer` in PyTorch's own operations are its twin.

A thread has a token, and the errors of all states of the trellis in registers: a step moves nothing between
threads, and writes two words, a bit for each state, from which the way back is read. The tokens whose rings
do not fit are gathered and tried again, each at the next scales at once, since a pass over few takes a GPU
nearly as long as one over many. The host waits for none. Imported where a GPU encodes.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, misc"
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_THREADS = 32  # of a program
_TRIES = 4  # at once


@torch.library.custom_op("teachercache::nearest_rings", mutates_args=())
def nearest_rings(
    tokens: Tensor, bases: Tensor, rank_of_pair: Tensor, bits: int, finer: float
) -> tuple[Tensor, Tensor]:
    """Ranks (N, C/2), int32, and scales (N,), float16, of tokens (N, C); all contiguous, on one device.

    `bases` (N,) are the first scales that are tried; then they grow by `finer`, its square, …
    """
    ranks, scales = _empty(tokens)
    num_tokens, width = tokens.shape
    num_programs = -(-num_tokens // _THREADS)
    choices = tokens.new_empty(num_programs * width * 2 * _THREADS, dtype=torch.int32)
    is_left = torch.ones(num_tokens, dtype=torch.int32, device=tokens.device)
    for first, at_once, rounds in ((0, 1, 1), (1, _TRIES, 2**30)) if num_tokens else ():
        order, num_left = is_left.argsort(descending=True), is_left.sum()
        with torch.cuda.device_of(tokens):  # Triton launches on the current one
            _nearest[(num_programs,)](
                *(tokens, bases, rank_of_pair, order, num_left, is_left, choices, ranks, scales),
                *(width, num_programs, math.log2(finer) / 2, first, rounds),
                BITS=bits,
                TRIES=at_once,
                THREADS=_THREADS,
                num_warps=1,
                enable_fp_fusion=False,  # so that near ties end as in the twin
            )
    return ranks, scales


@nearest_rings.register_fake
def _(tokens: Tensor, bases: Tensor, rank_of_pair: Tensor, bits: int, finer: float) -> tuple[Tensor, Tensor]:
    return _empty(tokens)


def _empty(tokens: Tensor) -> tuple[Tensor, Tensor]:
    num_tokens, width = tokens.shape
    ranks = tokens.new_empty(num_tokens, width // 2, dtype=torch.int32)
    return ranks, tokens.new_empty(num_tokens, dtype=torch.float16)


@triton.jit
def _least(one, other):
    return tl.minimum(one, other)


@triton.jit(do_not_specialize=["num_programs", "first", "rounds"])  # else a kernel for 1, too
def _nearest(
    tokens,
    bases,
    rank_of_pair,
    order,
    num_left,
    is_left,
    choices,
    ranks,
    scales,
    width,
    num_programs,
    growth,
    first,
    rounds,
    BITS: tl.constexpr,
    TRIES: tl.constexpr,
    THREADS: tl.constexpr,
):
    """The trellis and its names are those of `pipeline/codecs/rings.py`; values are in steps."""
    SIDE: tl.constexpr = 2 ** (BITS + 2) + 1
    PER_STEP: tl.constexpr = 2.0 ** (BITS - 1)
    TOKENS: tl.constexpr = THREADS // TRIES
    NONE: tl.constexpr = 2**30
    program, lane = tl.program_id(0).to(tl.int64), tl.arange(0, THREADS)
    words = choices + program * width * 2 * THREADS + lane
    count = tl.load(num_left)
    for block in range(program, (count + TOKENS - 1) // TOKENS, num_programs):
        place = block * TOKENS + lane // TRIES
        held = place < count
        token = tl.load(order + place, mask=held, other=0)
        base = tl.load(bases + token, mask=held, other=0.0)
        left, trial, remaining = held.to(tl.int32), first + lane % TRIES, rounds
        while (tl.reduce(-left, 0, _least) < 0) & (remaining > 0):
            scale = tl.exp2((trial * (trial + 1)).to(tl.float32) * growth)
            scale = (base * scale).to(tl.float16).to(tl.float32)
            per_step = tl.div_rn((scale > 0).to(tl.float32), tl.maximum(scale, 2.0**-24)) * PER_STEP

            error = (tl.full([THREADS], 0, tl.float32),)
            for _ in tl.static_range(63):
                error += (tl.full([THREADS], 1e30, tl.float32),)
            for value in range(width):
                x = tl.load(tokens + token * width + value, mask=left > 0, other=0.0)
                x = tl.where(tl.abs(x) < float("inf"), x, 0.0) * per_step
                costs = ()  # by z·2 + v
                for branch in tl.static_range(4):
                    off = x - (0.5 + 2 * (branch % 2)) * (1 - 2 * (branch // 2))
                    off -= 4 * tl.floor(off / 4 + 0.5)
                    costs += (off * off,)
                # No choice depends on what all have in common; −0 is what a compiler knows to add nothing.
                costs = (-0.0, costs[1] - costs[0], costs[2] - costs[0], costs[3] - costs[0])
                after = ()
                low, high = tl.full([THREADS], 0, tl.uint32), tl.full([THREADS], 0, tl.uint32)
                for j in tl.static_range(32):  # states j and j + 32 go to 2j + u
                    for u in tl.static_range(2):
                        zero = error[j] + costs[2 * ((j ^ (j >> 3) ^ (j >> 4)) & 1) + u]
                        one = error[j + 32] + costs[2 * ((j ^ (j >> 3) ^ (j >> 4)) & 1) + 1 - u]
                        bit = (one - zero).to(tl.uint32, bitcast=True) >> 31  # of the sign
                        if j < 16:
                            low = (low << 1) | bit
                        else:
                            high = (high << 1) | bit
                        after += (tl.minimum(zero, one),)
                error = after
                tl.store(words + value * 2 * THREADS, low)
                tl.store(words + value * 2 * THREADS + THREADS, high)

            least, state = error[0], tl.full([THREADS], 0, tl.int32)
            for j in tl.static_range(1, 64):
                state = tl.where(error[j] < least, j, state)
                least = tl.minimum(error[j], least)
            total = tl.full([THREADS], 0, tl.int32)
            product, squares = tl.full([THREADS], 0, tl.float32), tl.full([THREADS], 0, tl.float32)
            for pair_from_end in range(width // 2):
                pair = width // 2 - 1 - pair_from_end
                index = tl.full([THREADS], 0, tl.int32)
                for second in tl.static_range(2):
                    value = 2 * pair + 1 - second
                    low = tl.load(words + value * 2 * THREADS)
                    high = tl.load(words + value * 2 * THREADS + THREADS)
                    oldest = (tl.where(state < 32, low, high) >> (31 - (state & 31))) & 1
                    before = (state >> 1) | (oldest << 5)
                    start = 0.5 + 2 * (oldest ^ (state & 1)).to(tl.float32)
                    sign = 1.0 - 2 * ((before ^ (before >> 3) ^ (before >> 4)) & 1).to(tl.float32)
                    raw = tl.load(tokens + token * width + value, mask=left > 0, other=0.0)
                    x = tl.where(tl.abs(raw) < float("inf"), raw, 0.0) * per_step
                    a = start + 4 * tl.floor((sign * x - start) / 4 + 0.5)
                    n = tl.minimum(tl.abs(a) - 0.5, SIDE - 1.0).to(tl.int32)
                    index += n * SIDE if second else n
                    product += raw * sign * a
                    squares += a * a
                    state = before
                rank = tl.load(rank_of_pair + index)
                total += tl.minimum(rank >> (2 * BITS - 2), width)
                if TRIES == 1:
                    tl.store(ranks + token * (width // 2) + pair, rank, mask=left > 0)
                else:  # in the place of what was read
                    tl.store(words + value * 2 * THREADS, rank)

            fits = tl.where((left > 0) & (total <= width // 2), trial, NONE)
            best = tl.reduce(tl.reshape(fits, (TOKENS, TRIES)), 1, _least)
            best = tl.reshape(tl.broadcast_to(best[:, None], (TOKENS, TRIES)), (THREADS,))
            is_best = (left > 0) & (fits == best) & (best < NONE)
            if TRIES > 1:
                for pair in range(width // 2):
                    rank = tl.load(words + pair * 4 * THREADS)
                    tl.store(ranks + token * (width // 2) + pair, rank, mask=is_best)
            # What is not finite shows in the scale.
            tl.store(scales + token, (product / squares * PER_STEP).to(tl.float16), mask=is_best)
            left = tl.where(best < NONE, 0, left)
            trial += TRIES
            remaining -= 1
        tl.store(is_left + token, left, mask=held)
