"""Distillation losses from an adjoint target: Uᵀt on the student's grid and ‖t‖², no teacher map.

With U the bilinear upsampling from the student's grid to the teacher's, <U s, t> = <s, Uᵀt>. Hence SAK's
flattened cosine and the squared error follow exactly, in value and gradient. Other losses see t only through
P t, the part of it that upsampled maps can reach, which Uᵀt determines (`pipeline.grids.least_squares`): they
are exact where the teacher's grid is the coarser one and approximate elsewhere. benchmarks/grids.py says how
well.

Shapes: B batch, C channels, h×w the student's grid; `grid` = (H, W) is the teacher's. All is computed in at
least float32, autocast or not.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.grids import gram, least_squares, upsample
from pipeline.spec import Size
from student.cosine import cosine_similarity


def flattened_cosine_from_adjoint(
    s_BChw: Tensor, adjoint_t_BChw: Tensor, squared_norm_t_B: Tensor, grid: Size, eps: float = 1e-8
) -> Tensor:
    """cos(U s, t) (B,), exact, over each sample's whole map: <s, Uᵀt> / (‖U s‖ ‖t‖).

    `eps` bounds each norm from below, as in `F.cosine_similarity`.
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
    """‖U s − t‖² (B,), exact, summed over the map: ‖U s‖² − 2 <s, Uᵀt> + ‖t‖².

    The three terms cancel as s nears t, so in float32 the value keeps an error of about 1e-7·‖t‖²; the
    gradient 2 (UᵀU s − Uᵀt) has no such loss.
    """
    with torch.autocast(s_BChw.device.type, enabled=False):
        s_BChw, adjoint_t_BChw, squared_norm_t_B = _in_float(s_BChw, adjoint_t_BChw, squared_norm_t_B)
        product_B = (s_BChw * adjoint_t_BChw).flatten(1).sum(1)
        return squared_norm_upsampled(s_BChw, grid) - 2 * product_B + squared_norm_t_B


def token_cosine_from_adjoint(
    s_BChw: Tensor, adjoint_t_BChw: Tensor, squared_norm_t_B: Tensor, grid: Size
) -> Tensor:
    """cos(U s, t) of each teacher token (B, H, W), approximate: <U s, P t> / (‖U s‖ ‖P t‖ r).

    What a token loses of its norm by P is not known, only what they lose together: r = ‖t‖ / ‖P t‖.
    """
    with torch.autocast(s_BChw.device.type, enabled=False):
        s_BChw, adjoint_t_BChw, squared_norm_t_B = _in_float(s_BChw, adjoint_t_BChw, squared_norm_t_B)
        reached_BCHW = upsample(least_squares(adjoint_t_BChw, grid), grid)
        squared_norm_reached_B = reached_BCHW.square().flatten(1).sum(1)
        share_B = (squared_norm_reached_B / squared_norm_t_B.clamp(min=1e-30)).sqrt()
        cosine_BHW = cosine_similarity(upsample(s_BChw, grid), reached_BCHW, dim=1)
        return cosine_BHW * share_B[:, None, None]


def smooth_l1_from_adjoint(s_BChw: Tensor, adjoint_t_BChw: Tensor, grid: Size) -> Tensor:
    """Smooth-L1 (beta = 1) of U s against P t, approximate: the mean over all elements, a scalar.

    Its gradient is exact where all differences to t and to P t are below 1.
    """
    with torch.autocast(s_BChw.device.type, enabled=False):
        s_BChw, adjoint_t_BChw = _in_float(s_BChw, adjoint_t_BChw)
        reached_BCHW = upsample(least_squares(adjoint_t_BChw, grid), grid)
        return F.smooth_l1_loss(upsample(s_BChw, grid), reached_BCHW)


def squared_norm_upsampled(s_BChw: Tensor, grid: Size) -> Tensor:
    """‖U s‖² (B,) of the map on `grid`, which is not formed where it is the larger one: <s, UᵀU s>."""
    if grid[0] * grid[1] <= s_BChw.shape[-2] * s_BChw.shape[-1]:
        return upsample(s_BChw, grid).square().flatten(1).sum(1)
    return (s_BChw * gram(s_BChw, grid)).flatten(1).sum(1)


def _in_float(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]
