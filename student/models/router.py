"""The router of SAK's Mixture of Representations (SAK, 3.3): how much each expert counts for an image.

B  images     n  patch tokens     D  width of the stem     E  experts: the stem, then the teachers' paths
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, stem_tokens_BnD: Tensor) -> Tensor:
        """Patch tokens of the stem → gates (B, E), which add up to 1 for each image."""
        logits_BE, deviation_BE = self.mlp(stem_tokens_BnD).mean(dim=1).chunk(2, dim=-1)
        if self.training:
            logits_BE = logits_BE + torch.randn_like(logits_BE) * F.softplus(deviation_BE)
        return logits_BE.softmax(dim=-1)
