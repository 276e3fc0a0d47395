"""Boundaries between the classes of a label map: those to learn from, and those to measure against."""

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import laplace

from teachercache.pipeline.errors import extra

with extra("train"):
    from skimage.morphology import thin


def partition_boundaries(classes_HW: NDArray) -> NDArray[np.uint8]:
    """1 where the pixel below, on the right, or below on the right has another class, thinned.

    SEISM measures predictions against this: `bwmorph(seg2bmap(classes), 'thin', 'Inf')`. It turns BSDS's
    segmentations into BSDS's own boundaries, to the pixel. Unthinned, diagonals are two pixels wide, and a
    prediction, which is thinned, could never match them all.
    """
    padded = np.pad(classes_HW, (0, 1), mode="edge")
    others = padded[1:, :-1], padded[:-1, 1:], padded[1:, 1:]
    return np.asarray(thin(np.logical_or.reduce([classes_HW != other for other in others])), np.uint8)


def label_boundaries(classes_HW: NDArray) -> NDArray[np.uint8]:
    """1 where the Laplacian of the class numbers is not zero, thinned, as ASTMT and its successors do."""
    return np.asarray(thin(laplace(classes_HW.astype(np.float64), mode="mirror") != 0), np.uint8)
