"""Distillation losses from an adjoint target: Uᵀt on the student's grid and ‖t‖², no teacher map.

With U the bilinear upsampling from the student's grid to the teacher's, <U s, t> = <s, Uᵀt>. Hence SAK's
flattened cosine and the squared error follow exactly, in value and gradient, from what
`pipeline.grids.adjoint` keeps.

Shapes: B batch, C channels, h×w the student's grid; `grid` = (H, W) is the teacher's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.grids import Size, interpolation_matrix, upsample


def squared_norm_upsampled(s_BChw: Tensor, grid: Size) -> Tensor:
    """‖U s‖² (B,) of the map that is upsampled to `grid`, which is not formed when it is the larger one.

    ‖U s‖² = <s, (A_HᵀA_H) s (A_WᵀA_W)> needs two small Gram matrices only.
    """
    height, width = s_BChw.shape[-2:]
    if grid[0] * grid[1] <= height * width:
        return upsample(s_BChw, grid).square().flatten(1).sum(1)
    rows_Hh = interpolation_matrix(height, grid[0], like=s_BChw)
    columns_Ww = interpolation_matrix(width, grid[1], like=s_BChw)
    gram_s_BChw = (rows_Hh.T @ rows_Hh) @ s_BChw @ (columns_Ww.T @ columns_Ww)
    return (s_BChw * gram_s_BChw).flatten(1).sum(1)


def flattened_cosine_from_adjoint(
    s_BChw: Tensor, adjoint_t_BChw: Tensor, squared_norm_t_B: Tensor, grid: Size, eps: float = 1e-8
) -> Tensor:
    """cos(U s, t) (B,) over each sample's flattened map: <s, Uᵀt> / (‖U s‖ ‖t‖).

    Computed in at least float32, autocast or not. `eps` bounds each norm from below, as in
    `F.cosine_similarity`.
    """
    with torch.autocast(s_BChw.device.type, enabled=False):
        s_BChw, adjoint_t_BChw, squared_norm_t_B = _in_float(s_BChw, adjoint_t_BChw, squared_norm_t_B)
        product_B = (s_BChw * adjoint_t_BChw).flatten(1).sum(1)
        squared_norm_s_B = squared_norm_upsampled(s_BChw, grid)
        norms_B = squared_norm_s_B.clamp(min=eps**2).sqrt() * squared_norm_t_B.clamp(min=eps**2).sqrt()
        return product_B / norms_B


def squared_error_from_adjoint(
    s_BChw: Tensor, adjoint_t_BChw: Tensor, squared_norm_t_B: Tensor, grid: Size
) -> Tensor:
    """‖U s − t‖² (B,), summed over the map: ‖U s‖² − 2 <s, Uᵀt> + ‖t‖².

    Computed in at least float32, autocast or not. The three terms cancel as s nears t, so the value keeps
    about 1e-7·‖t‖² in float32; the gradient 2 (UᵀU s − Uᵀt) has no such loss.
    """
    with torch.autocast(s_BChw.device.type, enabled=False):
        s_BChw, adjoint_t_BChw, squared_norm_t_B = _in_float(s_BChw, adjoint_t_BChw, squared_norm_t_B)
        product_B = (s_BChw * adjoint_t_BChw).flatten(1).sum(1)
        return squared_norm_upsampled(s_BChw, grid) - 2 * product_B + squared_norm_t_B


def _in_float(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]
