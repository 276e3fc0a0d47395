"""Labels of dense tasks as arrays, rendered in the view that the student sees; and the boundaries between
classes, those to learn from and those to measure against.

H, W  the source image     h, w  the view
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import laplace
from torch import Tensor

from teachercache.pipeline.errors import ArgumentError, extra
from teachercache.pipeline.records.strict import Size
from teachercache.pipeline.views import View, source_pixels
from teachercache.student.metrics.dense import IGNORE_INDEX

Labels = Mapping[str, NDArray]

IGNORE: dict[str, int] = {
    "semseg": IGNORE_INDEX,
    "parts": IGNORE_INDEX,
    "saliency": IGNORE_INDEX,
    "boundary": IGNORE_INDEX,
    "depth": 0,
    "normals": 0,
    "instances": 0,
}
"""By task: the value of a pixel without a label.

semseg, parts, saliency, boundary   uint8 (H, W)        the class; of saliency and boundary 0 or 1
depth                               float32 (H, W)      metres along the camera's axis
normals                             float32 (3, H, W)   unit vectors x, y, z; as each data set has the axes,
                                                        but x points along the image's rows in all of them
instances                           int32 (H, W)        256·n + class + 1 on the n-th thing, n from 1; 0
                                                        elsewhere
"""


def render_labels(labels: Labels, view: View, size: Size | None = None) -> dict[str, Tensor]:
    """The labels of `render_view(image, view, size)`, pixel by pixel; the dtypes stay.

    Nearest neighbour. Depth is divided by the view's magnification, since an object that is twice as large
    seems half as far away; a flip changes the sign of the normals' x; padding gets the ignored label. Parts
    are ignored as a whole where the view shows none, as in the data sets' reference code.

    Raises `ValueError` for a task that is not in `IGNORE`, or labels whose sizes differ.
    """
    rendered = {task: torch.from_numpy(array) for task, array in labels.items() if not array.ndim}
    labels = {task: array for task, array in labels.items() if array.ndim}  # of pixels, not of a whole image
    sizes = {array.shape[-2:] for array in labels.values()}
    if labels.keys() - IGNORE.keys() or len(sizes) > 1:
        raise ArgumentError(
            "These labels cannot be rendered.",
            got=f"{', '.join(f'{task} {array.shape}' for task, array in labels.items())}",
            expected=f"one size, and tasks among {', '.join(IGNORE)}",
            do="resize the labels to their image when you read them",
        )
    for image_size in sizes:
        rows, columns = source_pixels(view, image_size, size)
        outside = (rows < 0)[:, None] | (columns < 0)
        for task, array in labels.items():
            label = array[..., rows[:, None], columns]
            label[..., outside] = IGNORE[task]
            if task == "depth":
                label /= array.dtype.type(view.magnification)
            elif task == "normals" and view.flip:
                label[0] *= -1
            elif task == "parts":
                label = ignored_without_parts(label)
            rendered[task] = torch.from_numpy(label)
    return rendered


def ignored_without_parts(parts_HW: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """`parts_HW`, or an array that ignores every pixel if it names no part at all."""
    names_parts = bool(((parts_HW > 0) & (parts_HW != IGNORE_INDEX)).any())
    return parts_HW if names_parts else np.full_like(parts_HW, IGNORE_INDEX)


def partition_boundaries(classes_HW: NDArray) -> NDArray[np.uint8]:
    """1 where the pixel below, on the right, or below on the right has another class, thinned.

    SEISM measures predictions against this: `bwmorph(seg2bmap(classes), 'thin', 'Inf')`. It turns BSDS's
    segmentations into BSDS's own boundaries, to the pixel. Unthinned, diagonals are two pixels wide, and a
    prediction, which is thinned, could never match them all.
    """
    padded = np.pad(classes_HW, (0, 1), mode="edge")
    others = padded[1:, :-1], padded[:-1, 1:], padded[1:, 1:]
    return _thinned(np.logical_or.reduce([classes_HW != other for other in others]))


def label_boundaries(classes_HW: NDArray) -> NDArray[np.uint8]:
    """1 where the Laplacian of the class numbers is not zero, thinned, as ASTMT and its successors do."""
    return _thinned(laplace(classes_HW.astype(np.float64), mode="mirror") != 0)


def _thinned(edges_HW: NDArray[np.bool_]) -> NDArray[np.uint8]:
    with extra("train"):
        from skimage.morphology import thin
    return np.asarray(thin(edges_HW), np.uint8)
