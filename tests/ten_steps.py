"""Ten steps of AdamW on one fixed batch, for goldens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def ten_steps(student: nn.Module, loss: Callable[[], Tensor], lr: float, weight_decay: float) -> list[float]:
    """The losses; what of the student is frozen stays as it is."""
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    losses = []
    for _ in range(10):
        total = loss()
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    return losses
