"""Peaks of memory on fake CUDA tensors."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.memory import Peak


def test_the_peak_counts_what_is_held_at_once_and_views_once() -> None:
    peak = Peak()
    with FakeTensorMode(), peak:
        one = torch.empty(1000, device="cuda")
        view = one.view(10, 100)[3:]
        two = one + 1
        del one, two
        three = torch.empty(500, device="cuda")
        torch.empty(1 << 20)  # of the host
    assert (peak.held, peak.most) == (4 * 1500, 4 * 2000)
    del view, three
    assert peak.held == 0
