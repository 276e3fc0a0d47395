"""From the experts' representations to predictions: SAK's Mixture of Representations (SAK, 3.3), and heads.

B  images     E  experts: the stem, then the teachers' paths
S  levels     n  patch tokens = h·w          D  width of every expert
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from teachercache.pipeline.errors import RecipeError, require_known
from teachercache.pipeline.grids import upsample
from teachercache.pipeline.records.strict import Size
from teachercache.student.models.heads import HEADS
from teachercache.student.models.student import NUM_LEVELS, initialise_linear

Fusion = Literal["mor", "sum", "concat"]


class Router(nn.Module):
    """g = Softmax(h + N(0, 1) · Softplus(e)) of one level and one task (SAK, Eq. 4); noisy in training only.

    h and e are the outputs of a two-layer MLP on the stem's patch tokens, averaged over them. The first layer
    serves both and is followed by a LayerNorm, as follows from the paper's parameter counts. (The authors'
    code adds 0.01 to Softplus(e) and draws separate noise for each patch.)
    """

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, width // 2),
            nn.LayerNorm(width // 2),
            nn.GELU(),
            nn.Linear(width // 2, 2 * num_experts),
        )
        self.mlp.apply(initialise_linear)

    def forward(self, stem_tokens_BnD: Tensor) -> Tensor:
        """Patch tokens of the stem → gates (B, E), which add up to 1 for each image."""
        logits_BE, deviation_BE = self.mlp(stem_tokens_BnD).mean(dim=1).chunk(2, dim=-1)
        if self.training:
            logits_BE = logits_BE + torch.randn_like(logits_BE) * F.softplus(deviation_BE)
        return logits_BE.softmax(dim=-1)


class TaskDecoder(nn.Module):
    """Fuses the experts at each level, then applies a head, for each of `tasks` (name → output channels).

    `fusion` (SAK, Table 19): "mor" weighs the experts by a router per level and task, "sum" adds them up,
    "concat" makes the heads E times as wide. `decoder` names the heads, see
    `teachercache.student.models.heads`; they predict at a quarter of `image_size`, and predictions are
    resized to it. The experts may come from anywhere, even from a cache of teachers' features.
    """

    routers: Any  # a ModuleDict of ModuleLists, which its type cannot express

    def __init__(
        self,
        width: int,
        num_experts: int,
        tasks: Mapping[str, int],
        image_size: Size,
        fusion: str,
        decoder: str,
    ) -> None:
        super().__init__()
        require_known("fusion", fusion, get_args(Fusion))
        require_known("decoder", decoder, HEADS)
        if fusion == "mor" and num_experts == 1:
            raise RecipeError(
                "The stem is the only expert, so routers have nothing to choose from.",
                got="fusion mor",
                expected="fusion sum, which uses a single expert unchanged",
                do="set fusion to sum, or give the student teachers with adapter paths",
            )
        self.fusion = fusion
        self.image_size = image_size
        self.routers = nn.ModuleDict()
        if fusion == "mor":
            for task in tasks:
                self.routers[task] = nn.ModuleList(Router(width, num_experts) for _ in range(NUM_LEVELS))
        head_width = width * num_experts if fusion == "concat" else width
        quarter = (image_size[0] // 4, image_size[1] // 4)
        self.heads = nn.ModuleDict(
            {task: HEADS[decoder](head_width, channels, quarter) for task, channels in tasks.items()}
        )

    def forward(
        self, experts_SBEnD: Sequence[Tensor], grid: Size
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Levels (B, E, n, D), the stem first → for each task its prediction (B, channels, *image_size), and
        its gates (B, S, E) if there are routers."""
        gates_BSE = {
            task: torch.stack([router(x[:, 0]) for router, x in zip(routers, experts_SBEnD, strict=True)], 1)
            for task, routers in self.routers.items()
        }
        predictions = {}
        for task, levels_BnD in self._fuse(experts_SBEnD, gates_BSE).items():
            maps_BDhw = [tokens_BnD.unflatten(1, grid).permute(0, 3, 1, 2) for tokens_BnD in levels_BnD]
            quarter_BCHW = self.heads[task](maps_BDhw)
            predictions[task] = upsample(quarter_BCHW, self.image_size)
        return predictions, gates_BSE

    def _fuse(
        self, experts_SBEnD: Sequence[Tensor], gates_BSE: Mapping[str, Tensor]
    ) -> dict[str, list[Tensor]]:
        if self.fusion == "mor":
            return {
                task: [
                    torch.einsum("be,bend->bnd", gates_BE, experts_BEnD)
                    for gates_BE, experts_BEnD in zip(gates.unbind(1), experts_SBEnD, strict=True)
                ]
                for task, gates in gates_BSE.items()
            }
        if self.fusion == "sum":
            fused = [experts_BEnD.sum(1) for experts_BEnD in experts_SBEnD]
        else:
            fused = [experts_BEnD.transpose(1, 2).flatten(2) for experts_BEnD in experts_SBEnD]
        return dict.fromkeys(self.heads, fused)
