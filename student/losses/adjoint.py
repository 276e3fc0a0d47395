"""Distillation losses from what is stored of a teacher on the adjoint grid: p and ‖t‖, no teacher map.

With U the bilinear upsampling from the student's grid to the teacher's, p is the student map whose upsampling
is nearest to t (`teachercache.pipeline.grids.nearest`), so Uᵀt = UᵀU p, and <U s, t> = <U s, U p> = <p, UᵀU
s>. Hence SAK's flattened cosine and the squared error follow exactly, in value and gradient. Other losses see
t only through U p, the part of it that upsampled maps can reach: they are exact where the teacher's grid is
the coarser one and approximate elsewhere. benchmarks/grids.py measures how well.

Shapes: B batch, C channels, h×w the student's grid; `grid` = (H, W) is the teacher's. Everything is computed
in at least float32, autocast or not.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from teachercache.pipeline.grids import Grid, gram, upsample
from teachercache.student.losses.cosine import cosine_similarity


def flattened_cosine_from_adjoint(
    s_BChw: Tensor, p_BChw: Tensor, squared_norm_t_B: Tensor, grid: Grid, eps: float = 1e-8
) -> Tensor:
    """cos(U s, t) (B,), exact, over each sample's whole map: <p, UᵀU s> / (‖U s‖ ‖t‖).

    `eps` bounds each norm from below, as in `F.cosine_similarity`.
    """
    with torch.autocast(s_BChw.device.type, enabled=False):
        product_B, squared_norm_s_B, squared_norm_t_B = _products(s_BChw, p_BChw, squared_norm_t_B, grid)
        norms_B = squared_norm_s_B.clamp(min=eps**2).sqrt() * squared_norm_t_B.clamp(min=eps**2).sqrt()
        return product_B / norms_B


def squared_error_from_adjoint(
    s_BChw: Tensor, p_BChw: Tensor, squared_norm_t_B: Tensor, grid: Grid
) -> Tensor:
    """‖U s − t‖² (B,), exact, summed over the map: ‖U s‖² − 2 <p, UᵀU s> + ‖t‖².

    The three terms cancel as s nears t, so in float32 the value keeps an error of about 1e-7·‖t‖²; the
    gradient 2 UᵀU (s − p) has no such loss.
    """
    with torch.autocast(s_BChw.device.type, enabled=False):
        product_B, squared_norm_s_B, squared_norm_t_B = _products(s_BChw, p_BChw, squared_norm_t_B, grid)
        return squared_norm_s_B - 2 * product_B + squared_norm_t_B


def token_cosine_from_adjoint(s_BChw: Tensor, p_BChw: Tensor, squared_norm_t_B: Tensor, grid: Grid) -> Tensor:
    """cos(U s, t) of each teacher token (B, H, W), approximate: <U s, U p> / (‖U s‖ ‖U p‖ r).

    How much of its norm each token loses is unknown; r = ‖t‖ / ‖U p‖ is what they lose together.
    """
    with torch.autocast(s_BChw.device.type, enabled=False):
        s_BChw, p_BChw, squared_norm_t_B = _in_float(s_BChw, p_BChw, squared_norm_t_B)
        reached_BCHW = upsample(p_BChw, grid)
        squared_norm_reached_B = reached_BCHW.square().flatten(1).sum(1)
        share_B = (squared_norm_reached_B / squared_norm_t_B.clamp(min=1e-30)).sqrt()
        cosine_BHW = cosine_similarity(upsample(s_BChw, grid), reached_BCHW, dim=1)
        return cosine_BHW * share_B[:, None, None]


def smooth_l1_from_adjoint(s_BChw: Tensor, p_BChw: Tensor, grid: Grid) -> Tensor:
    """Smooth-L1 (beta = 1) of U s against U p, approximate: the mean over all elements, a scalar.

    Its gradient is exact where all differences to t and to U p are below 1.
    """
    with torch.autocast(s_BChw.device.type, enabled=False):
        s_BChw, p_BChw = _in_float(s_BChw, p_BChw)
        return F.smooth_l1_loss(upsample(s_BChw, grid), upsample(p_BChw, grid))


def _products(
    s_BChw: Tensor, p_BChw: Tensor, squared_norm_t_B: Tensor, grid: Grid
) -> tuple[Tensor, Tensor, Tensor]:
    """<U s, t>, ‖U s‖² and ‖t‖² (B,); the maps on `grid` are not formed."""
    s_BChw, p_BChw, squared_norm_t_B = _in_float(s_BChw, p_BChw, squared_norm_t_B)
    gram_s_BChw = gram(s_BChw, grid)
    product_B, squared_norm_s_B = ((one * gram_s_BChw).flatten(1).sum(1) for one in (p_BChw, s_BChw))
    return product_B, squared_norm_s_B, squared_norm_t_B


def _in_float(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]
