"""What a trellis over even levels gains of the 1.53 dB that there are, by its parity checks.

    python -m benchmarks.lattices

Values are uniform; `int4-rings` has the last row of 64 states. Last, one line of JSON.

Shapes: C values, N tokens, S states.
"""

from __future__ import annotations

import argparse
import json
import math

import torch
from rich.console import Console
from rich.table import Table

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
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lattices = [
        {"states": 2**state, "h0": oct(h0), "h1": oct(h1), "gain_db": lattice(state, h0, h1, args.tokens)}
        for state, checks in LATTICES.items()
        for h0, h1 in checks
    ]
    table = Table(*lattices[0])
    for row in lattices:
        table.add_row(*(f"{x:.2f}" if isinstance(x, float) else str(x) for x in row.values()))
    Console(width=100).print(table)
    print(json.dumps({"benchmark": "lattices", "lattices": lattices}))


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
