"""The learning rate as a function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math


def cosine_with_warmup(step: int, *, peak: float, final: float, warmup_steps: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0): linear to `peak`, then a half cosine to `final`.

    The last step of the warm-up has exactly `peak`; `final` would be reached at `total_steps`.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def polynomial(step: int, *, peak: float, final: float, warmup_steps: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0): linear to `peak`, then (1 - t)^0.9 towards `final`.

    The "poly" of dense prediction, with the power of DeepLab and of the authors' code.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return final + (peak - final) * float((1 - min(progress, 1.0)) ** 0.9)


SCHEDULES = {"cosine": cosine_with_warmup, "poly": polynomial}
