"""Non-maximum suppression of soft boundary maps, as in SAK's evaluation, before matching.

A twin of `nms_process.m` of that evaluation, which is `edgesNmsMex` of Dollár's structured edge toolbox with
r = 4, s = 5, m = 1.01, on a map smoothed by `convTri(·, 1)` and oriented by `convTri(·, 4)`.
"""

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Floats = npt.NDArray[np.float32]

_TOLERANCE = 1.01  # a pixel survives a neighbour that is at most one percent stronger
_BORDER = 5  # pixels over which edges fade out towards the border of the image


def triangle_filter(image_HW: Floats, radius: int) -> Floats:
    """Convolution with the separable filter [1 … r, r+1, r … 1] / (r+1)², the image mirrored at borders."""
    rising = np.arange(1, radius + 1)
    weights = np.concatenate([rising, [radius + 1], rising[::-1]]) / (radius + 1) ** 2
    rows_filtered = ndimage.correlate1d(image_HW, weights, axis=0, mode="reflect")
    return ndimage.correlate1d(rows_filtered, weights, axis=1, mode="reflect")


def edge_nms(probability_HW: npt.ArrayLike, radius: int = 4) -> Floats:
    """Keep the pixels of a soft boundary map that are the strongest along the normal of their boundary.

    `probability_HW`: in [0, 1], at least 2×2. `radius`: pixels compared on either side, at whole distances,
    interpolated bilinearly. Returns the smoothed map, float32, with zeros where it was suppressed.
    """
    edge_HW = triangle_filter(np.asarray(probability_HW, np.float32), 1)
    slope_y, slope_x = np.gradient(triangle_filter(edge_HW, 4))
    curvature_xx = np.gradient(slope_x, axis=1)
    curvature_yy, curvature_xy = np.gradient(slope_y)
    # The toolbox takes atan(a / b) modulo π; atan2 differs by π at most, and both sides are compared.
    normal_HW = np.arctan2(curvature_yy * np.sign(-curvature_xy), curvature_xx + 1e-5)
    step_y, step_x = np.sin(normal_HW), np.cos(normal_HW)

    height, width = edge_HW.shape
    y, x = np.indices(edge_HW.shape, np.float32)
    strongest_HW = np.ones(edge_HW.shape, bool)
    for distance in (*range(-radius, 0), *range(1, radius + 1)):
        neighbour_y = np.clip(y + distance * step_y, 0, height - 1.001)
        neighbour_x = np.clip(x + distance * step_x, 0, width - 1.001)
        neighbour_HW = ndimage.map_coordinates(edge_HW, [neighbour_y, neighbour_x], order=1)
        strongest_HW &= _TOLERANCE * edge_HW >= neighbour_HW

    border = min(_BORDER, height // 2, width // 2)
    fade_H, fade_W = (
        np.minimum(1, np.minimum(np.arange(side), np.arange(side)[::-1]) / border) for side in edge_HW.shape
    )
    return np.where(strongest_HW, edge_HW * fade_H[:, None] * fade_W, 0).astype(np.float32)
