"""Trellis-coded quantisation to even levels, in an entropy code of fixed length.

A value is ±(n + ½) steps. Which sign n has, the values before it decide (a trellis of `STATES` states): all
values together then lie on a lattice that is denser than that of each, by 1.2 dB of the 1.53 that there
are. The n of two neighbours have a rank, by their distance from zero. Ranks of Gaussian values fall
exponentially, for which Rice's code is the best: the lower 2·bits − 2 bits of a rank lie in a field, the
rest of it, its ring, in unary. A token has room for rings of 1 on average, and the smallest scale that keeps
to it.

    u(t)                  the bit that encoding chooses for value t; 0 before the token
    a(t)                  (−1)ⁿ (n + ½), and v(t) = ⌊a/2⌋ mod 2, which decoding sees; v(t) = u(t) ⊕ u(t−6)
    z(t)                  u(t−1) ⊕ u(t−4) ⊕ u(t−5), the sign of value t, which is (−1)ᶻ a;
                          so z(t) = z(t−6) ⊕ v(t−1) ⊕ v(t−4) ⊕ v(t−5)

Decoding is a prefix sum for the rings, a lookup for the pairs and a prefix sum for the signs, parallel over
all tokens and values. The trellis is as in Marcellin and Fischer 1990, with an entropy code as in Fischer
and Wang 1992; what they have not is that the code has one length.

Shapes: N tokens, C channels, P ranks.
"""

import math
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from teachercache.pipeline.codecs.kernels import has_kernel
from teachercache.pipeline.codecs.quantizer import (
    TokenQuantizer,
    divide_by_scales,
    pack,
    root_mean_square,
    take,
    unpack,
)

MEMORY, TAPS = 6, (1, 4, 5)  # of all choices of taps for this memory the one of least error
STATES = 2**MEMORY
# Of values, in 2^(bits−1) steps, whose rings are 1 on average; 1% less, so that most tokens fit at once.
_SPREAD = 0.99 * math.sqrt(2 / math.pi / math.log(2))
_FAR = 2**24  # the rank of a pair that has none
_FINER = 0.005  # a token that does not fit is tried at larger scales: 0.5% more, 1% more than that, …


@cache
def ring_levels(bits: int) -> NDArray[np.float32]:
    """(P, 2): the a of both values of a pair by its rank; those up to 8 standard deviations from zero."""
    n = np.arange(2 ** (bits + 2)) + 0.5
    radius = np.hypot(n[:, None], n).ravel()
    ranks = np.argsort(radius, kind="stable")[: np.count_nonzero(radius < 2 ** (bits + 2))]
    a = np.where(np.arange(len(n)) % 2, -n, n).astype(np.float32)
    return np.stack([a[ranks // len(n)], a[ranks % len(n)]], 1)


def ring_distortion(bits: int) -> float:
    """Mean squared error on unit Gaussian values: 0.44 dB above Shannon's bound (at 1 bit 0.6 dB)."""
    return float(4.0**-bits * 10**0.044) if bits else 1.0


class RingQuantizer(TokenQuantizer):
    """For tokens that are nearly Gaussian, of a multiple of 8 values. `levels_P2`: those of `ring_levels`."""

    def __init__(self, levels_P2: Tensor) -> None:
        self.bits = round(math.log2(len(levels_P2) * 4 / math.pi) / 2) - 2  # a quarter of a disc
        self.step = 2.0 ** (1 - self.bits)
        self._levels_of_rank = levels_P2.view(torch.float64).flatten()
        self._places_of_byte = _places_of_byte().to(levels_P2.device)
        n_P2 = (levels_P2.abs() - 0.5).int()
        ranks = torch.arange(len(n_P2), dtype=torch.int32, device=levels_P2.device)
        self._side = 2 ** (self.bits + 2) + 1  # the last n stands for all that are too large
        self._rank_of_pair = ranks.new_full((self._side**2,), _FAR)
        self._rank_of_pair[n_P2[:, 0] * self._side + n_P2[:, 1]] = ranks

    def quantise(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        tokens_NC = tokens.flatten(0, -2)
        width, shape = tokens.shape[-1], tokens.shape[:-1]
        finite_NC = tokens_NC.nan_to_num(0, 0, 0)  # in others no step is ever small enough; the scale tells
        base_N1 = root_mean_square(finite_NC) / _SPREAD
        if has_kernel(tokens.device):
            tables = tokens_NC.contiguous(), base_N1.squeeze(1), self._rank_of_pair
            ranks_Np, scales_N = torch.ops.teachercache.nearest_rings(*tables, self.bits, 1 + _FINER)
        else:
            ranks_Np, scales_N = self._search(tokens_NC, finite_NC, base_N1)
        return self._pack(ranks_Np).view(*shape, width * self.bits // 8), scales_N.view(shape)

    def _search(self, tokens_NC: Tensor, finite_NC: Tensor, base_N1: Tensor) -> tuple[Tensor, Tensor]:
        num_tokens, width = tokens_NC.shape
        levels_NC = torch.empty_like(tokens_NC)
        ranks_Np = self._rank_of_pair.new_empty(num_tokens, width // 2)
        left, scale, tries = torch.arange(num_tokens, device=tokens_NC.device), 1.0, 0
        while len(left):
            scales = (base_N1[left] * scale).half()
            levels, ranks = self._nearest(divide_by_scales(finite_NC[left], scales))
            fits = (ranks >> 2 * self.bits - 2).sum(-1) <= width // 2
            levels_NC[left[fits]], ranks_Np[left[fits]] = levels[fits], ranks[fits]
            left, tries = left[~fits], tries + 1
            scale *= (1 + _FINER) ** tries
        return ranks_Np, ((tokens_NC * levels_NC).sum(-1) / levels_NC.square().sum(-1)).half()

    def _nearest(self, unit_NC: Tensor) -> tuple[Tensor, Tensor]:
        """The levels nearest to these values that the trellis allows, and the ranks of their pairs."""
        unit_NC = unit_NC / self.step
        num_tokens = 512 if unit_NC.device.type == "cpu" else 16384
        u_NC = torch.cat([nearest_path(part) for part in unit_NC.split(num_tokens)])
        sign = 1 - 2 * (_sum_of_taps(u_NC) & 1).float()
        least = 0.5 + 2 * (u_NC ^ _before(u_NC, MEMORY)).float()
        a_NC = least + 4 * torch.round((sign * unit_NC - least) / 4)
        n_NC = (a_NC.abs() - 0.5).clamp(max=self._side - 1).int()
        return sign * a_NC * self.step, take(self._rank_of_pair, n_NC[:, ::2] * self._side + n_NC[:, 1::2])

    def _pack(self, ranks: Tensor) -> Tensor:
        width, low_bits = 2 * ranks.shape[-1], self.bits - 1
        rings = (ranks >> 2 * low_bits).cumsum(-1) + torch.arange(width // 2, device=ranks.device)
        unary = torch.zeros(*ranks.shape[:-1], width, dtype=torch.uint8, device=ranks.device)
        unary.scatter_(-1, rings, 1)
        if not low_bits:
            return pack(unary, 1)
        low = torch.stack([ranks, ranks >> low_bits], -1).flatten(-2) & (2**low_bits - 1)
        return torch.cat([pack(low.byte(), low_bits), pack(unary, 1)], -1)

    def dequantise(self, packed: Tensor, width: int) -> Tensor:
        low_bits = self.bits - 1
        low_bytes = width * low_bits // 8
        ranks = _rings(packed[..., low_bytes:], self._places_of_byte)
        if low_bits:
            low = unpack(packed[..., :low_bytes], low_bits, width).int()
            ranks = ranks << 2 * low_bits | low[..., 1::2] << low_bits | low[..., ::2]
        a = take(self._levels_of_rank, ranks.clamp(0, len(self._levels_of_rank) - 1)).view(torch.float32)
        v = (a * 0.5 - 0.25).to(torch.int8)
        sums = F.pad(_sum_of_taps(v), (0, -width % MEMORY)).unflatten(-1, (-1, MEMORY))
        z = sums.cumsum(-2, dtype=torch.int8).flatten(-2)[..., :width] & 1
        return a * (self.step - 2 * self.step * z)


def _places_of_byte() -> Tensor:
    """int16 (256, 9): how many ones are before each bit of a byte (very many if it is none); all its ones."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    places = torch.where(bits > 0, bits.cumsum(1) - 1, 2**14)
    return torch.cat([places, bits.sum(1, keepdim=True)], 1).short()


def _rings(unary: Tensor, places_of_byte: Tensor) -> Tensor:
    """int32 rings (…, C/2) of the bits (…, C/8): by a one each ends, and the zeros before it are the ring."""
    num_rings = 4 * unary.shape[-1]
    places = places_of_byte.index_select(0, unary.flatten().int()).view(*unary.shape, 9)
    ones = places[..., 8]
    order = places[..., :8] + (ones.cumsum(-1, dtype=torch.int16) - ones)[..., None]
    order = order.flatten(-2).clamp(max=num_rings).long()  # what is not a one goes last
    bits = torch.arange(2 * num_rings, dtype=torch.int32, device=unary.device).expand(order.shape)
    ends = bits.new_full((*unary.shape[:-1], num_rings + 2), -1)
    ends[..., 1:].scatter_(-1, order, bits)
    return ends[..., 1:-1] - ends[..., :-2] - 1


def _before(bits: Tensor, steps: int) -> Tensor:
    """What was `steps` values before, 0 at the beginning."""
    return F.pad(bits[..., :-steps], (steps, 0))


def _sum_of_taps(bits: Tensor) -> Tensor:
    one, *others = (_before(bits, tap) for tap in TAPS)
    return sum(others, one)


@cache
def _branches() -> Tensor:
    """(2·STATES,): z·2 + v of each branch, of state (u(t−1) lowest) · 2 + u(t)."""
    state, u = torch.arange(STATES)[:, None], torch.arange(2)
    z = sum((state >> tap - 1 for tap in TAPS), torch.tensor(0)) & 1
    return (2 * z + (state >> MEMORY - 1 ^ u)).flatten()


def nearest_path(unit_NC: Tensor) -> Tensor:
    """uint8 u (N, C) for which the values that the trellis then allows are nearest to each token's."""
    num_tokens, num_values = unit_NC.shape
    rows = _branches().to(unit_NC.device)
    starts = torch.tensor([0.5, 2.5, -0.5, -2.5], device=unit_NC.device)[:, None]  # by z·2 + v, all modulo 4
    from_start = unit_NC.T.contiguous()[:, None] - starts
    costs_C4N = (from_start - 4 * torch.round(from_start / 4)).square_()
    error = unit_NC.new_full((STATES, num_tokens), torch.inf)
    error[0] = 0
    oldest = torch.empty(num_values, STATES, num_tokens, dtype=torch.bool, device=unit_NC.device)
    for costs_4N, oldest_SN in zip(costs_C4N, oldest, strict=True):
        branches = costs_4N.index_select(0, rows).view(STATES, 2, num_tokens).add_(error[:, None])
        zero, one = branches.view(2, STATES, num_tokens)  # by the bit that leaves the state
        torch.lt(one, zero, out=oldest_SN)
        error = torch.minimum(zero, one)
    state_N = error.argmin(0)
    states_CN = torch.empty(num_values, num_tokens, dtype=torch.int64, device=unit_NC.device)
    for value in reversed(range(num_values)):
        states_CN[value] = state_N
        left_N = oldest[value].gather(0, state_N[None])[0]
        state_N = torch.add(state_N >> 1, left_N, alpha=STATES // 2)
    return (states_CN & 1).byte().T
