"""Token grids: bilinear resampling, its adjoint and least squares, and the pooling that is stored.

Shapes: B batch, S levels, C channels, h×w the student's grid, H×W the teacher's; either may be the finer.
Resampling is `align_corners=False` and separable, U = A_H ⊗ A_W with A_H (H, h) and A_W (W, w). So are
Uᵀ and UᵀU, which need those small matrices only: <U s, t> = <s, Uᵀt> holds to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from teachercache.pipeline.records.spec import GridSpec, TeacherSpec
from teachercache.pipeline.records.strict import Size


class Places(NamedTuple):
    """A grid of tokens that does not fill the student's map evenly, and another in each image: the centres of
    its rows (B, H) and columns (B, W), as shares of the map."""

    rows_BH: Tensor
    columns_BW: Tensor

    @property
    def size(self) -> Size:
        return self.rows_BH.shape[1], self.columns_BW.shape[1]

    def weights(self, maps_BChw: Tensor) -> tuple[Tensor, Tensor]:
        """A_H (B, 1, H, h) and A_W (B, 1, W, w) of U for such maps."""
        rows, columns = (
            tent_weights(centres, side)[:, None].to(maps_BChw.dtype)
            for centres, side in zip(self, maps_BChw.shape[2:], strict=True)
        )
        return rows, columns


Grid = Size | Places


def upsample(s_BChw: Tensor, grid: Grid) -> Tensor:
    """U s: (B, C, h, w) → (B, C, *grid), bilinear, `align_corners=False`, no antialiasing.

    This is the resampling that SAK's loss applies to the student. Where `grid` is the coarser one it samples,
    as `F.interpolate` does.
    """
    if isinstance(grid, Places):
        rows, columns = grid.weights(s_BChw)
        return _sandwich(rows, s_BChw, columns)
    if s_BChw.shape[-2:] == tuple(grid):
        return s_BChw
    return F.interpolate(s_BChw, size=grid, mode="bilinear", align_corners=False)


def adjoint(t_BCHW: Tensor, grid: Size) -> Tensor:
    """Uᵀt: (B, C, H, W) → (B, C, *grid), the exact transpose of `upsample` from `grid` to (H, W).

    A transpose sums, it does not average. Computed in at least float32, autocast or not, and returned in
    the dtype of `t`; differentiable.
    """
    return _separable(_adjoint_matrix, grid, (t_BCHW.shape[-2], t_BCHW.shape[-1]), t_BCHW)


def gram(s_BChw: Tensor, grid: Grid) -> Tensor:
    """UᵀU s: what `adjoint` gives for a teacher map that is U s; the map on `grid` is never formed."""
    if isinstance(grid, Places):
        with torch.autocast(s_BChw.device.type, enabled=False):
            rows, columns = grid.weights(s_BChw)
            return _sandwich(rows.mT @ rows, s_BChw, columns.mT @ columns)
    return _separable(_gram_matrix, (s_BChw.shape[-2], s_BChw.shape[-1]), grid, s_BChw)


def nearest(t_BCHW: Tensor, grid: Size) -> Tensor:
    """(UᵀU)⁺ Uᵀt: (B, C, H, W) → (B, C, *grid), the student map whose upsampling comes nearest to t.

    It carries the same information as Uᵀt and looks like features: a constant t gives the same constant.
    Upsampled again, it is all of t that a student on this grid can reach.
    """
    return _separable(_nearest_matrix, grid, (t_BCHW.shape[-2], t_BCHW.shape[-1]), t_BCHW)


def upsampled_norms(maps_BShwC: Tensor, grid: Grid) -> Tensor:
    """‖U s‖ (B, S) of student maps (B, S, h, w, C)."""
    levels = [level_BhwC.permute(0, 3, 1, 2) for level_BhwC in maps_BShwC.unbind(1)]
    squares = [(level_BChw * gram(level_BChw, grid)).flatten(1).sum(1) for level_BChw in levels]
    return torch.stack(squares, 1).clamp(min=0).sqrt()


def stored_form(feature_maps_BSHWC: Tensor, grid: GridSpec) -> tuple[Tensor, Tensor | None]:
    """What is stored of a teacher's maps: (features on the stored grid, ‖t‖ (B, S) for the adjoint grid).

    On the adjoint grid that is the `nearest` map: it is equivalent to Uᵀt, looks like other features, and
    UᵀU damps a codec's errors before a loss sees them.
    """
    if grid.kind != "adjoint":
        return pool(feature_maps_BSHWC, grid), None
    assert grid.size is not None
    working = feature_maps_BSHWC.to(torch.promote_types(feature_maps_BSHWC.dtype, torch.float32))
    height, width = working.shape[2:4]
    rows, columns = _axes(_nearest_matrix, grid.size, (height, width), working)
    with torch.autocast(working.device.type, enabled=False):  # channels stay last: a GPU need not turn maps
        along_rows_BShWC = (rows @ working.flatten(3)).unflatten(3, (width, -1))
        nearest_BShwC = columns @ along_rows_BShWC
    return nearest_BShwC, torch.linalg.vector_norm(working.flatten(2), dim=2)


def pool(feature_maps_BSHWC: Tensor, grid: GridSpec) -> Tensor:
    """Feature maps on the grid that is stored: (B, S, H, W, C) → (B, S, h, w, C), same dtype.

    `native` returns the input unchanged. `bilinear` resamples; along an axis that shrinks, the triangle
    filter widens with the step (antialiasing), so that every teacher token counts, and an axis that grows
    is plain bilinear. float16 and bfloat16 are resampled in float32.
    """
    if grid.size is None:
        return feature_maps_BSHWC
    maps_NCHW = feature_maps_BSHWC.flatten(0, 1).permute(0, 3, 1, 2)
    working = maps_NCHW.to(torch.promote_types(maps_NCHW.dtype, torch.float32))
    pooled_NChw = F.interpolate(working, size=grid.size, mode="bilinear", align_corners=False, antialias=True)
    pooled_NhwC = pooled_NChw.permute(0, 2, 3, 1).to(feature_maps_BSHWC.dtype).contiguous()
    return pooled_NhwC.view(*feature_maps_BSHWC.shape[:2], *pooled_NhwC.shape[1:])


def tent_weights(centres: Tensor, source: int) -> Tensor:
    """(…, target, source): what bilinear sampling at `centres` (…, target), shares of an axis, takes of each
    of its tokens. `interpolation_matrix` for centres anywhere."""
    tokens = torch.arange(source, device=centres.device)
    places = (centres * source - 0.5).clamp(0, source - 1)
    return (1 - (places[..., None] - tokens).abs()).clamp(min=0)


@cache
def interpolation_matrix(source: int, target: int) -> Tensor:
    """A (target, source), float64 on the CPU, with `A @ s` = s resampled along one axis.

    It is what `F.interpolate` makes of the unit vectors, so it cannot differ from it.
    """
    with torch.inference_mode(False), torch.device("cpu"):
        basis = torch.eye(source, dtype=torch.float64)
        columns: Tensor = F.interpolate(basis[None], size=target, mode="linear", align_corners=False)[0]
        return columns.T.contiguous()


def _adjoint_matrix(source: int, target: int) -> Tensor:
    return interpolation_matrix(source, target).T


def _gram_matrix(source: int, target: int) -> Tensor:
    matrix = interpolation_matrix(source, target)
    return matrix.T @ matrix


def _nearest_matrix(source: int, target: int) -> Tensor:
    """(UᵀU)⁺ Uᵀ along one axis."""
    return torch.linalg.pinv(_gram_matrix(source, target), hermitian=True) @ _adjoint_matrix(source, target)


def made_once(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`cache` for small tensors on their device, where a copy from the CPU at every step would hold up a GPU;
    for compiled code they are constants."""
    cached = cache(make)

    def find(*arguments: Hashable) -> Tensor:
        with torch.inference_mode(False):
            return cached(*arguments)

    return torch.compiler.assume_constant_result(find)


@made_once
def _placed(
    matrix: Callable[[int, int], Tensor], source: int, target: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    return matrix(source, target).to(device, dtype)


def _separable(matrix: Callable[[int, int], Tensor], source: Size, target: Size, maps: Tensor) -> Tensor:
    """rows @ map @ columnsᵀ for each map of (B, C, height, width): `matrix` of either axis."""
    working = maps.to(torch.promote_types(maps.dtype, torch.float32))
    rows, columns = _axes(matrix, source, target, working)
    return _sandwich(rows, working, columns).to(maps.dtype)


def _axes(
    matrix: Callable[[int, int], Tensor], source: Size, target: Size, like: Tensor
) -> tuple[Tensor, Tensor]:
    rows, columns = (
        _placed(matrix, *sides, like.device, like.dtype) for sides in zip(source, target, strict=True)
    )
    return rows, columns


def _sandwich(rows: Tensor, maps: Tensor, columns: Tensor) -> Tensor:
    """rows @ map @ columnsᵀ in the dtype of the maps, autocast or not."""
    with torch.autocast(maps.device.type, enabled=False):
        return rows @ maps @ columns.mT


def mean_token(tokens_BNC: Tensor, spec: TeacherSpec) -> Tensor:
    """(B, C): the mean of the tokens on a teacher's own grid, from features as the cache holds them.

    It is exact for an adjoint grid: upsampling can reach a constant map, so that U p and t have the same sum.
    """
    if spec.grid.kind == "adjoint":
        ones = torch.ones(1, 1, *spec.native_grid, dtype=tokens_BNC.dtype, device=tokens_BNC.device)
        shares_N = adjoint(ones / ones.sum(), spec.stored_grid).flatten()
        return shares_N @ tokens_BNC
    return tokens_BNC.mean(1)
