"""What teachers say of windows, from their maps of whole views: the tokens whose centres lie in a window.

They stay what they are. Where they lie is said beside them, and there the student's map is sampled: of these
tokens a window compares what the whole view would.

Shapes: B views, each with a window of its own; S levels, C channels; H×W the teacher's grid over the view,
h×w the student's. `windows_B2`: where the windows begin, (row, column) in pixels of the view.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teachercache.pipeline.grids import Grid, Places, interpolation_matrix, tent_weights
from teachercache.pipeline.records.strict import Size
from teachercache.pipeline.records.view_policy import ViewPolicy

Windows = NDArray[np.int64]


def cut(maps_BSHWC: Tensor, windows_B2: Windows, views: ViewPolicy) -> Tensor:
    """The tokens in the windows: (B, S, H, W, C) → (B, S, *views.seen_grid((H, W)), C)."""
    if not views.margin:
        return maps_BSHWC
    rows, columns = _axes((maps_BSHWC.shape[2], maps_BSHWC.shape[3]), views)
    places = zip(maps_BSHWC, windows_B2.tolist(), strict=True)
    return torch.stack([one[:, rows.tokens_in(top), columns.tokens_in(left)] for one, (top, left) in places])


def grid_in(grid: Size, windows_B2: Windows, views: ViewPolicy, device: torch.device) -> Grid:
    """Where the tokens of `cut` lie in their windows; `grid`, where these are the whole views."""
    if not views.margin:
        return grid
    axes = zip(_axes(grid, views), windows_B2.T.tolist(), strict=True)
    rows_BH, columns_BW = (torch.stack([axis.places(first) for first in starts]) for axis, starts in axes)
    return Places(rows_BH.to(device), columns_BW.to(device))


def cut_nearest(nearest_BShwC: Tensor, grid: Size, windows_B2: Windows, views: ViewPolicy) -> Tensor:
    """Of student maps p of views (`grids.nearest`), those of windows whose upsampling comes nearest to U p at
    the tokens in them, U being the upsampling to the teacher's `grid`."""
    if not views.margin:
        return nearest_BShwC
    axes = zip(_axes(grid, views), windows_B2.T.tolist(), strict=True)
    rows_Bih, columns_Bjw = (
        torch.stack([_nearest(axis, first) for first in starts]).to(nearest_BShwC) for axis, starts in axes
    )
    return torch.einsum("bih,bshwc,bjw->bsijc", rows_Bih, nearest_BShwC, columns_Bjw)


@dataclass(frozen=True)
class _Axis:
    """`tokens` of a teacher along one axis of views of `stored` pixels; their windows, of `seen` pixels,
    begin at pixel `first`. The student's tokens are of `patch` pixels."""

    tokens: int
    seen: int
    stored: int
    patch: int

    def tokens_in(self, first: int) -> slice:
        """From the first whose centre lies in the window, as many as in every window."""
        start = -((self.stored - 2 * first * self.tokens) // (2 * self.stored))
        return slice(start, start + max(1, self.tokens * self.seen // self.stored))

    def places(self, first: int) -> Tensor:
        """Their centres, as shares of the window; float64."""
        of_view = torch.arange(self.tokens, dtype=torch.float64)[self.tokens_in(first)] + 0.5
        return (of_view * self.stored / self.tokens - first) / self.seen


def _axes(grid: Size, views: ViewPolicy) -> list[_Axis]:
    sides = zip(grid, views.size, views.stored_size, strict=True)
    return [_Axis(*side, views.patch) for side in sides]


@cache
def _nearest(axis: _Axis, first: int) -> Tensor:
    """(the student's tokens of a window, those of a view), float64."""
    from_window = tent_weights(axis.places(first), axis.seen // axis.patch)
    from_view = interpolation_matrix(axis.stored // axis.patch, axis.tokens)[axis.tokens_in(first)]
    return torch.linalg.pinv(from_window) @ from_view
