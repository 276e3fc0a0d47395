"""LoRA (Hu et al., 2022): train W + B·A in place of W, with A and B of low rank and W frozen.

    add_lora(student.stem, rank=16)      before the optimizer is made
    merge_lora(student.stem)             afterwards: the same function, as plain layers

It is a way to train, not part of a student: `save_pretrained` writes merged weights.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class LowRank(nn.Module):
    """A weight (out, in) → itself + up (out, rank) · down (rank, in); `up` starts at zero."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.up = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        self.down = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def add_lora(module: nn.Module, rank: int) -> None:
    """Freeze `module`, and give each of its linear layers a trainable update of this rank.

    This replaces the weight itself, not the layer's forward, because some of timm's attentions use the
    weight without calling the layer.
    """
    module.requires_grad_(False)
    for linear in [child for child in module.modules() if isinstance(child, nn.Linear)]:
        parametrize.register_parametrization(linear, "weight", LowRank(linear.weight, rank))


def merge_lora(module: nn.Module) -> None:
    """Merge every update into its weight; frozen parameters stay frozen."""
    for _, child in _adapted(module):
        parametrize.remove_parametrizations(child, "weight", leave_parametrized=True)


@torch.no_grad()
def merged_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The state dict that `module` would have after `merge_lora`; `module` is not changed."""
    state = dict(module.state_dict())
    for name, child in _adapted(module):
        for key in [key for key in state if key.startswith(f"{name}.parametrizations.")]:
            del state[key]
        state[f"{name}.weight"] = child.weight
    return state


def _adapted(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, child) for name, child in module.named_modules() if parametrize.is_parametrized(child)]
