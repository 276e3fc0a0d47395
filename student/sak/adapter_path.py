"""The Teacher-Specific Adapter Path: L+1 adapters next to the stem, and their outputs.

B  images          N  tokens, prefix tokens included      n  patch tokens = h·w
L  blocks          D  width of the stem                   C  width of the teacher
Z_l (B, N, D)      the stem's tokens after block l; Z_0 after the patch embedding
R_l (B, N, D)      the path's tokens next to them
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from teachercache.student.models.student import initialise_linear


class Adapter(nn.Module):
    """R_out = α · GELU(R_in W_down) W_up + R_in (SAK, Eq. 3), α one learnable number.

    The paper does not state the initial α. It is 1 here, as in the authors' code: the small initial weights
    (σ = 0.02) already make a new adapter nearly the identity, and zero would block the gradient of W_down
    and W_up at the first step.
    """

    def __init__(self, width: int, reduction: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, width // reduction)
        self.up = nn.Linear(width // reduction, width)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, tokens_BND: Tensor) -> Tensor:
        update_BND: Tensor = self.up(nn.functional.gelu(self.down(tokens_BND)))
        return self.scale * update_BND + tokens_BND


class AdapterPath(nn.Module):
    """The branch of one teacher; self-contained, so that teachers can be added and removed.

    `level_depths`: after how many blocks each level is read. If the teacher's width is not the stem's, an
    aligner (a linear layer) maps each level to it; only distillation needs the aligners.
    """

    def __init__(
        self, width: int, depth: int, level_depths: Sequence[int], teacher_width: int, reduction: int
    ) -> None:
        super().__init__()
        self.level_depths = tuple(level_depths)
        self.adapters = nn.ModuleList(Adapter(width, reduction) for _ in range(depth + 1))
        self.output_norms = nn.ModuleList(nn.LayerNorm(width) for _ in level_depths)
        self.aligners = nn.ModuleList(
            nn.Linear(width, teacher_width) for _ in level_depths if teacher_width != width
        )
        self.apply(initialise_linear)

    def forward(self, stem_tokens_BND: Sequence[Tensor], num_prefix_tokens: int) -> list[Tensor]:
        """[Z_0, …, Z_L] → the normalised patch tokens (B, n, D) of each level.

        R_0 = a_0(Z_0), R_l = a_l(R_{l-1} + Z_l) (SAK, Eq. 2).
        """
        tokens_BND = self.adapters[0](stem_tokens_BND[0])
        levels_BnD = []
        for block, stem_BND in enumerate(stem_tokens_BND[1:], start=1):
            tokens_BND = self.adapters[block](tokens_BND + stem_BND)
            if block in self.level_depths:
                levels_BnD.append(tokens_BND[:, num_prefix_tokens:])
        return [norm(tokens_BnD) for norm, tokens_BnD in zip(self.output_norms, levels_BnD, strict=True)]
