"""SAM's attention without its bias of N × N for each head, which torch cannot fuse and no memory should hold.

B  images or windows     n  heads     d  channels of a head     H, W  grid     N = H·W tokens

timm adds rel_h[q, row of k] + rel_w[q, column of k] to every logit scale·<q, k>. Both are products, too: with
what marks the row and the column of each key, [q, rel_h / scale, rel_w / scale] · [k, row, column] is all.
"""

from typing import Any

import torch
from timm.models.vision_transformer_sam import VisionTransformerSAM, get_rel_pos
from torch import Tensor, nn
from torch.nn import functional as F

from teachercache.pipeline.records.strict import Size

_ALIGNMENT = 8  # channels of a head; what fused attention asks for


class FoldedAttention(nn.Module):
    """Stands for an `Attention` of timm, whose parameters it has under the same names, on one `grid`."""

    rows: Tensor
    columns: Tensor
    places: Tensor

    def __init__(self, attention: Any, grid: Size) -> None:
        super().__init__()
        self.num_heads, self.scale = attention.num_heads, attention.scale
        self.qkv, self.q_norm, self.k_norm = attention.qkv, attention.q_norm, attention.k_norm
        self.proj = attention.proj
        self.rel_pos_h, self.rel_pos_w = attention.rel_pos_h, attention.rel_pos_w
        height, width = grid
        places_NE = [torch.eye(height).repeat_interleave(width, dim=0), torch.eye(width).repeat(height, 1)]
        tables = {
            "rows": get_rel_pos(height, height, attention.rel_pos_h.detach()) / self.scale,
            "columns": get_rel_pos(width, width, attention.rel_pos_w.detach()) / self.scale,
            "places": F.pad(torch.cat(places_NE, dim=1), (0, -(height + width) % _ALIGNMENT)),
        }
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def forward(self, tokens_BHWD: Tensor) -> Tensor:
        grid = tokens_BHWD.shape[1:3]
        q, k, v = (
            self.qkv(tokens_BHWD).flatten(1, 2).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        )
        q, k = self.q_norm(q), self.k_norm(k)
        q_BnHWd = q.unflatten(2, grid)
        rel_h = torch.einsum("bnhwd,hkd->bnhwk", q_BnHWd, self.rows)
        rel_w = torch.einsum("bnhwd,wkd->bnhwk", q_BnHWd, self.columns)
        q = torch.cat([q, rel_h.flatten(2, 3), rel_w.flatten(2, 3)], dim=-1)
        k = torch.cat([k, self.places.to(k.dtype).expand(*k.shape[:2], -1, -1)], dim=-1)
        q, widened = (F.pad(one, (0, k.shape[-1] - one.shape[-1])) for one in (q, v))
        heads_BnNd = F.scaled_dot_product_attention(q, k, widened, scale=self.scale)[..., : v.shape[-1]]
        return self.proj(heads_BnNd.transpose(1, 2).flatten(2).unflatten(1, grid))


def fold_positions(model: Any, grid: Size) -> None:
    """Give a SAM the attention above for images of `grid` tokens; other models stay as they are."""
    for block in model.blocks if isinstance(model, VisionTransformerSAM) else ():
        if block.attn.use_rel_pos:
            side = block.window_size
            block.attn = FoldedAttention(block.attn, (side, side) if side else grid)
