"""Token grids: bilinear resampling, its exact adjoint, and the pooling that is stored.

Shapes: B batch, S levels, C channels, h×w the student's grid, H×W the teacher's. Any of the two may be the
finer one. Resampling is `align_corners=False` and separable: U = A_H ⊗ A_W with A_H (H, h) and A_W (W, w),
so Uᵀt = A_Hᵀ t A_W, and <U s, t> = <s, Uᵀ t> holds to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.spec import GridSpec

Size = tuple[int, int]  # (height, width)


def upsample(s_BChw: Tensor, grid: Size) -> Tensor:
    """U s: (B, C, h, w) → (B, C, *grid), bilinear, `align_corners=False`, no antialiasing.

    This is the resampling that SAK's loss applies to the student. Where `grid` is the coarser one it samples,
    as `F.interpolate` does.
    """
    return F.interpolate(s_BChw, size=grid, mode="bilinear", align_corners=False)


def adjoint(t_BCHW: Tensor, grid: Size) -> Tensor:
    """Uᵀ t: (B, C, H, W) → (B, C, *grid), the exact transpose of `upsample` from `grid` to (H, W).

    A transpose sums, it does not average: for constant t its values are `adjoint_weight`. Computed in at
    least float32, autocast or not, and returned in the dtype of `t`; differentiable.
    """
    working = t_BCHW.to(torch.promote_types(t_BCHW.dtype, torch.float32))
    (height, width), (h, w) = t_BCHW.shape[-2:], grid
    with torch.autocast(t_BCHW.device.type, enabled=False):
        rows_Hh = interpolation_matrix(h, height, like=working)
        columns_Ww = interpolation_matrix(w, width, like=working)
        return (rows_Hh.T @ working @ columns_Ww).to(t_BCHW.dtype)


def adjoint_weight(grid: Size, teacher_grid: Size, like: Tensor) -> Tensor:
    """Uᵀ 1 (*grid): how many teacher tokens each student token stands for."""
    return adjoint(torch.ones(1, 1, *teacher_grid, dtype=like.dtype, device=like.device), grid)[0, 0]


def interpolation_matrix(source: int, target: int, like: Tensor) -> Tensor:
    """A (target, source) with `A @ s` = s resampled along one axis; device and dtype as `like`.

    It is what `F.interpolate` makes of the unit vectors, in float64, so it cannot differ from it.
    """
    basis = torch.eye(source, dtype=torch.float64, device=like.device)
    resampled_st: Tensor = F.interpolate(basis[None], size=target, mode="linear", align_corners=False)[0]
    return resampled_st.T.to(like.dtype)


def pool(feature_maps_BSHWC: Tensor, grid: GridSpec) -> Tensor:
    """Feature maps on the grid that is stored: (B, S, H, W, C) → (B, S, h, w, C), same dtype.

    `native` returns the input as it is. `bilinear` resamples, and along an axis that shrinks the triangle
    filter widens with the step (antialiasing), so that every teacher token counts; an axis that grows is
    plain bilinear. float16 and bfloat16 are resampled in float32.
    """
    if grid.size is None:
        return feature_maps_BSHWC
    maps_NCHW = feature_maps_BSHWC.flatten(0, 1).permute(0, 3, 1, 2)
    working = maps_NCHW.to(torch.promote_types(maps_NCHW.dtype, torch.float32))
    pooled_NChw = F.interpolate(working, size=grid.size, mode="bilinear", align_corners=False, antialias=True)
    pooled_NhwC = pooled_NChw.permute(0, 2, 3, 1).to(feature_maps_BSHWC.dtype).contiguous()
    return pooled_NhwC.view(*feature_maps_BSHWC.shape[:2], *pooled_NhwC.shape[1:])
