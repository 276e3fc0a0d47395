"""How a row of one array is laid out: known without torch, which is needed only where rows are decoded."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teachercache.pipeline.records.limits import MAX_VALUES_PER_ROW


@dataclass(frozen=True)
class ArrayLayout:
    """One array of a teacher: its shape behind the row axis, its dtype, its axes' names, and attributes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    axes: tuple[str, ...]
    attributes: dict[str, Any]

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row in memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    def empty(self, num_rows: int) -> NDArray:
        """Memory for as many rows, rows first; what it holds is undefined."""
        return np.empty((num_rows, *self.shape), self.dtype)


def stored_layout(
    shape: Sequence[int], dtype: str, axes: Sequence[str], attributes: dict[str, Any]
) -> ArrayLayout:
    """What a file says of an array. Raises `TypeError`, or `ValueError` for what no row of ours can be."""
    layout = ArrayLayout(tuple(shape), np.dtype(dtype), tuple(axes), dict(attributes))
    if layout.dtype.kind not in "iuf" or not all(type(size) is int and size > 0 for size in layout.shape):
        raise ValueError(f"rows of {layout.dtype} {layout.shape}")
    if math.prod(layout.shape) > MAX_VALUES_PER_ROW:
        raise ValueError(f"rows of {math.prod(layout.shape):,} values")
    return layout
