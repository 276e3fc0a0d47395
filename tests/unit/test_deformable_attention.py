"""Deformable attention against its equation written as loops, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from teachercache.pipeline.records.strict import Size
from teachercache.student.kpu.deformable_attention import DeformableAttention, Grids, centres

QUERY_GRIDS = ((2, 3), (1, 2))
FEATURE_GRIDS = ((3, 5), (2, 2))


def attention(
    width: int = 8, num_heads: int = 2, num_maps: int = 2, num_points: int = 3
) -> DeformableAttention:
    """With values that no initialisation hides; some places lie outside of the maps."""
    torch.manual_seed(0)
    module = DeformableAttention(width, num_heads, num_maps, num_points).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module


def inputs(width: int = 8) -> tuple[Tensor, Tensor]:
    queries, tokens = (sum(h * w for h, w in grids) for grids in (QUERY_GRIDS, FEATURE_GRIDS))
    generator = torch.Generator().manual_seed(1)
    shapes = (2, queries, width), (2, tokens, width)
    queries_BQD, features_BND = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return queries_BQD.requires_grad_(), features_BND.requires_grad_()


def bilinear(map_HWd: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The map at (x, y), counted in cells from the centre of the first one; zeros outside."""
    height, width = map_HWd.shape[:2]
    total = torch.zeros_like(map_HWd[0, 0])
    top, left = math.floor(y.item()), math.floor(x.item())
    for row in (top, top + 1):
        for column in (left, left + 1):
            if 0 <= row < height and 0 <= column < width:
                total = total + (1 - (x - column).abs()) * (1 - (y - row).abs()) * map_HWd[row, column]
    return total


def by_hand(
    module: DeformableAttention, queries_BQD: Tensor, query_grids: Grids, features_BND: Tensor, grids: Grids
) -> Tensor:
    num_heads, num_maps, num_points = module._shape
    places: list[tuple[float, float]] = [
        ((column + 0.5) / width, (row + 0.5) / height)
        for height, width in query_grids
        for row in range(height)
        for column in range(width)
    ]
    rows = []
    for queries_QD, features_ND in zip(queries_BQD, features_BND, strict=True):
        values_ND = module.values(features_ND)
        head_width = values_ND.shape[1] // num_heads
        for query_D, (x, y) in zip(queries_QD, places, strict=True):
            offsets = module.offsets(query_D).view(num_heads, num_maps, num_points, 2)
            weights = module.weights(query_D).view(num_heads, -1).softmax(-1).view(num_heads, num_maps, -1)
            heads = []
            for head in range(num_heads):
                total = torch.zeros(head_width, dtype=torch.float64)
                start = 0
                for i, (height, width) in enumerate(grids):
                    part = values_ND[start : start + height * width]
                    start += height * width
                    map_HWd = part[:, head * head_width : (head + 1) * head_width].view(height, width, -1)
                    for point in range(num_points):
                        column = x * width - 0.5 + offsets[head, i, point, 0]
                        row = y * height - 0.5 + offsets[head, i, point, 1]
                        total = total + weights[head, i, point] * bilinear(map_HWd, column, row)
                heads.append(total)
            rows.append(module.output(torch.cat(heads)))
    return torch.stack(rows).view_as(queries_BQD)


def test_values_and_gradients_are_those_of_the_loops() -> None:
    module, (queries_BQD, features_BND) = attention(), inputs()
    tensors = [queries_BQD, features_BND, *module.parameters()]
    got = module(queries_BQD, QUERY_GRIDS, features_BND, FEATURE_GRIDS)
    expected = by_hand(module, queries_BQD, QUERY_GRIDS, features_BND, FEATURE_GRIDS)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(got)
    gradients, wanted = (torch.autograd.grad((out * weights).sum(), tensors) for out in (got, expected))
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_gradients_are_those_of_differences() -> None:
    module = attention(width=4, num_heads=2, num_maps=2, num_points=1)
    queries_BQD, features_BND = (tensor[:1].detach().requires_grad_() for tensor in inputs(4))
    assert torch.autograd.gradcheck(
        lambda queries, features: module(queries, QUERY_GRIDS, features, FEATURE_GRIDS),
        (queries_BQD, features_BND),
    )


def test_a_new_one_looks_around_each_query_in_every_direction() -> None:
    module = DeformableAttention(width=16, num_heads=4, num_maps=2, num_points=3)
    steps_MSP2 = module.offsets.bias.detach().view(4, 2, 3, 2)
    assert not module.offsets.weight.any()
    assert not module.weights.weight.any()
    directions = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    for point in range(3):
        for i in range(2):
            torch.testing.assert_close(steps_MSP2[:, i, point], directions * (point + 1))


@pytest.mark.parametrize("grid", [(1, 1), (2, 3)])
def test_places_are_shares_of_the_map(grid: Size) -> None:
    centres_Q2 = centres((grid,), torch.device("cpu"), torch.float64)
    assert centres_Q2.shape == (grid[0] * grid[1], 2)
    torch.testing.assert_close(centres_Q2.mean(0), torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert centres_Q2[0].tolist() == [0.5 / grid[1], 0.5 / grid[0]]
