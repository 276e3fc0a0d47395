"""Multi-scale deformable attention (Zhu et al., Deformable DETR, 2021) in plain PyTorch.

B  images      Q  queries      N  tokens of all maps      n  of one map, h·w
D  width       M  heads        d  width of a head         S  maps      P  points
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from teachercache.pipeline.grids import made_once
from teachercache.pipeline.records.strict import Size

Grids = tuple[Size, ...]  # of several maps, whose tokens follow each other map by map


class DeformableAttention(nn.Module):
    """Σ_heads W_m Σ_maps Σ_points A · values(place) (Deformable DETR, Eq. 3).

    Each head of a query samples `num_points` places of every map, bilinearly, with zeros outside. The places,
    relative to the query's own, and the weights A are linear in the query. Values are half as wide.
    """

    def __init__(self, width: int, num_heads: int, num_maps: int, num_points: int = 4) -> None:
        super().__init__()
        self._shape = num_heads, num_maps, num_points
        value_width = width // 2 // num_heads * num_heads
        self.offsets = nn.Linear(width, num_heads * num_maps * num_points * 2)
        self.weights = nn.Linear(width, num_heads * num_maps * num_points)
        self.values = nn.Linear(width, value_width)
        self.output = nn.Linear(value_width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        look_around(self.offsets, self.weights, self.values, self.output, self._shape)

    def forward(
        self, queries_BQD: Tensor, query_grids: Grids, features_BND: Tensor, feature_grids: Grids
    ) -> Tensor:
        """(B, Q, D): what the queries, tokens of maps on `query_grids`, gather from maps on `feature_grids`.

        Grids need not match: a place is a fraction of height and width. Places, weights and sampling stay in
        float32 under autocast, since 16 bits would move a place by a quarter of a cell.
        """
        num_heads, num_maps, num_points = self._shape
        dtype = torch.promote_types(queries_BQD.dtype, torch.float32)
        offsets_BQMSP2 = self.offsets(queries_BQD).to(dtype).unflatten(-1, (*self._shape, 2))
        weights_BQMR = self.weights(queries_BQD).to(dtype).unflatten(-1, (num_heads, -1)).softmax(-1)
        weights_BQMSP = weights_BQMR.unflatten(-1, (num_maps, num_points))
        values_BNE = self.values(features_BND).to(dtype)
        values_SBnE = values_BNE.split([math.prod(grid) for grid in feature_grids], dim=1)
        centres_Q2 = centres(query_grids, values_BNE.device, dtype)
        of_maps = zip(
            feature_grids, values_SBnE, offsets_BQMSP2.unbind(3), weights_BQMSP.unbind(3), strict=True
        )
        gathered_GdQ = []  # G = B·M
        for grid, values_BnE, offsets_BQMP2, weights_BQMP in of_maps:
            places_BQMP2 = centres_Q2[:, None, None] + offsets_BQMP2 * cell(grid, values_BNE.device, dtype)
            maps_GdHW = values_BnE.transpose(1, 2).reshape(len(values_BnE) * num_heads, -1, *grid)
            places_GQP2, weights_GQP = (x.transpose(1, 2).flatten(0, 1) for x in (places_BQMP2, weights_BQMP))
            samples_GdQP = F.grid_sample(maps_GdHW, 2 * places_GQP2 - 1, align_corners=False)
            gathered_GdQ.append((samples_GdQP * weights_GQP[:, None]).sum(-1))
        gathered_BEQ = torch.stack(gathered_GdQ).sum(0).view(len(queries_BQD), values_BNE.shape[-1], -1)
        return self.output(gathered_BEQ.transpose(1, 2))


def look_around(
    offsets: nn.Linear, weights: nn.Linear, values: nn.Linear, output: nn.Linear, shape: tuple[int, int, int]
) -> None:
    """As in the original: each head looks in its own direction, its points 1 to P cells away, all with equal
    weight, whatever the query. `shape`: M, S, P."""
    num_heads, num_maps, num_points = shape
    angles_M = torch.arange(num_heads) * (2 * math.pi / num_heads)
    directions_M2 = torch.stack([angles_M.cos(), angles_M.sin()], dim=-1)
    directions_M2 = directions_M2 / directions_M2.abs().amax(-1, keepdim=True)
    steps_P = torch.arange(1, num_points + 1)
    places_MP2 = directions_M2[:, None] * steps_P[:, None]
    nn.init.zeros_(offsets.weight)
    with torch.no_grad():
        offsets.bias.copy_(places_MP2[:, None].expand(-1, num_maps, -1, -1).flatten())
    for layer in (weights.weight, weights.bias, values.bias, output.bias):
        nn.init.zeros_(layer)
    for layer in (values.weight, output.weight):
        nn.init.xavier_uniform_(layer)


@made_once
def centres(grids: Grids, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(Q, 2): x and y of the centre of every cell, as shares of width and height, map behind map."""
    maps = []
    for height, width in grids:
        y, x = ((torch.arange(n, device=device, dtype=dtype) + 0.5) / n for n in (height, width))
        maps.append(torch.cartesian_prod(y, x).flip(-1))
    return torch.cat(maps)


@made_once
def cell(grid: Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(2,): width and height of a cell, as shares of the map's."""
    return torch.tensor([1 / grid[1], 1 / grid[0]], device=device, dtype=dtype)
