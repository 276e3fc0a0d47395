"""What trellises of other sizes and kinds than those of the codecs give, on Gaussian and on uniform values.

    python -m benchmarks.trellises                   some ten minutes
    python -m benchmarks.trellises --rounds 2        a look at it

Two tables. Windows: a table of levels, trained as that of int4-trellis is, for more states, where fewer of
the 4 bits of a value move the state and the others choose among the levels of a branch; what is left to
Shannon's bound. Lattices: what a trellis over even levels gains of the 1.53 dB that there are, by its parity
checks. Last, one line of JSON.

Shapes: C values, N tokens, S states, I inputs that move the state, W levels a branch.
"""

from __future__ import annotations

import argparse
import json
import math

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

BITS = 4
WINDOWS = ((4, 4), (8, 4), (8, 2), (8, 1), (10, 1))  # (bits of the state, bits a value that move it)
LATTICES = {  # bits of the state: (h0, h1), bit i is the coefficient of Dⁱ; Ungerboeck's, and ours last
    3: ((0o13, 0o4),),
    4: ((0o23, 0o4), (0o21, 0o6)),
    5: ((0o45, 0o10), (0o41, 0o26)),
    6: ((0o103, 0o24), (0o101, 0o62)),
    7: ((0o235, 0o126), (0o201, 0o166)),
    8: ((0o515, 0o362), (0o401, 0o166)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="of training a window's levels")
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    windows = [
        {"states": 2**state, "moving_bits": moving, "gap_db": window(state, moving, args.rounds, args.tokens)}
        for state, moving in WINDOWS
    ]
    lattices = [
        {"states": 2**state, "h0": oct(h0), "h1": oct(h1), "gain_db": lattice(state, h0, h1, args.tokens)}
        for state, checks in LATTICES.items()
        for h0, h1 in checks
    ]
    for rows in (windows, lattices):
        table = Table(*rows[0])
        for row in rows:
            table.add_row(*(f"{x:.2f}" if isinstance(x, float) else str(x) for x in row.values()))
        Console(width=100).print(table)
    print(json.dumps({"benchmark": "trellises", "windows": windows, "lattices": lattices}))


def window(state_bits: int, moving: int, rounds: int, tokens: int) -> float:
    """dB above Shannon's bound at 4 bits, after so many rounds of Lloyd's iteration from random quantiles."""
    generator = torch.Generator().manual_seed(0)
    branches, width = 2 ** (state_bits + moving), 2 ** (BITS - moving)
    quantiles = torch.special.ndtri((torch.arange(branches * width) + 0.5) / (branches * width))
    strata = quantiles.view(width, branches)  # so that the levels of a branch lie apart
    levels = torch.stack([part[torch.randperm(branches, generator=generator)] for part in strata], 1)
    sums, counts = torch.zeros(2, branches * width)
    for round_ in range(rounds):
        x = torch.randn(128, tokens, generator=generator)
        index, _ = _levels_of_path(x, levels, moving)
        kept = round_ / rounds
        sums = (kept * sums).index_add_(0, index.flatten(), x.flatten())
        counts = kept * counts + torch.bincount(index.flatten(), minlength=len(counts))
        levels = torch.where(counts > 0, sums / counts, levels.flatten()).view(branches, width)
    x = torch.randn(512, tokens, generator=generator)
    _, error = _levels_of_path(x, levels, moving)
    return 10 * math.log10(error * 4**BITS)


def _levels_of_path(x_CN: Tensor, levels_BW: Tensor, moving: int) -> tuple[Tensor, float]:
    """The places (C, N) of the levels on the best path, and its mean squared error."""
    (num_branches, width), inputs = levels_BW.shape, 2**moving
    states = num_branches // inputs
    error = torch.full((states, x_CN.shape[1]), math.inf)
    error[0] = 0
    left = []
    for x_N in x_CN:
        least = torch.stack([(x_N - level_B[:, None]).square() for level_B in levels_BW.T]).amin(0)
        error, oldest = (least.view(states, inputs, -1) + error[:, None]).view(inputs, states, -1).min(0)
        left.append(oldest)
    state_N, branches = error.argmin(0), []
    for oldest in reversed(left):
        branches.append(oldest.gather(0, state_N[None])[0] * states + state_N)
        state_N = branches[-1] >> moving
    branch_CN = torch.stack(branches[::-1])
    level_CN = (x_CN[..., None] - levels_BW[branch_CN]).abs().argmin(-1)
    return branch_CN * width + level_CN, (error.amin(0).mean() / len(x_CN)).item()


def lattice(state_bits: int, h0: int, h1: int, tokens: int) -> float:
    """dB that the trellis of h0 z + h1 v = 0 gains on uniform values over rounding each by itself."""
    states = 2**state_bits
    state_S, v = torch.arange(states)[:, None], torch.arange(2)
    z = state_S & 1
    following = state_S >> 1
    for i in range(1, state_bits + 1):
        following = following ^ (((h0 >> i & 1) * z ^ (h1 >> i & 1) * v) << i - 1)
    before_2S = following.flatten().argsort(stable=True).view(states, 2).T  # two branches lead to each state
    x_CN = 400 * torch.rand(512, tokens, generator=torch.Generator().manual_seed(0)) - 200
    starts = torch.tensor([0.5, 2.5, -0.5, -2.5])[:, None]
    rows = (2 * z + v).flatten()[before_2S]
    error = torch.full((states, tokens), math.inf)
    error[0] = 0
    for x_N in x_CN:
        off = x_N - starts
        error = (error[before_2S >> 1] + (off - 4 * torch.round(off / 4)).square()[rows]).amin(0)
    return 10 * math.log10(len(x_CN) / 3 / error.amin(0).mean().item())


if __name__ == "__main__":
    main()
