"""The learning rate as a function of the step, so that a resumed run needs no scheduler state."""

import math


def rate_at(
    step: int, *, kind: str = "cosine", peak: float, final: float, warmup_steps: int, total_steps: int
) -> float:
    """Of optimizer step `step` (from 0): linear to `peak`, then to `final`.

    The last step of the warm-up has exactly `peak`; `final` would be reached at `total_steps`. `cosine` falls
    by half a cosine; `poly` by (1 - t)^0.9, with the power of DeepLab and of the authors' code.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(1, total_steps - warmup_steps), 1.0)
    left = 0.5 * (1 + math.cos(math.pi * progress)) if kind == "cosine" else (1 - progress) ** 0.9
    return final + (peak - final) * left
