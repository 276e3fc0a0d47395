"""Row arithmetic: which row is view v of sample s, and back, across the segments of a cache."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from teachercache.pipeline.records.spec import Segment

Ints = NDArray[np.int64]


def divide_views(views: tuple[int, int], rows_per_shard: int) -> list[tuple[int, int]]:
    """Divide `views` into as few blocks as possible whose sizes divide `rows_per_shard`."""
    blocks, (first, end) = list[tuple[int, int]](), views
    while first < end:
        size = next(size for size in range(end - first, 0, -1) if rows_per_shard % size == 0)
        blocks.append((first, first + size))
        first += size
    return blocks


class RowIndex:
    """Vectorised over rows. In a cache of one segment, row = sample_index * num_views + view_index."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = tuple(segments)
        parts = [(s.first_row, s.num_rows, s.samples[0], s.views[0], s.num_views) for s in segments]
        self._parts = np.array(parts, np.int64).T
        self._first_lines = np.cumsum(self._parts[1]) - self._parts[1]

    def rows(self, samples: ArrayLike, views: ArrayLike) -> Ints:
        """Rows of (sample, view) pairs. Raises `IndexError` for a pair that no segment holds."""
        samples, views = np.broadcast_arrays(np.asarray(samples, np.int64), np.asarray(views, np.int64))
        rows = np.full(samples.shape, -1, np.int64)
        for segment in self._segments:
            (start, end), (first, last) = segment.samples, segment.views
            held = (start <= samples) & (samples < end) & (first <= views) & (views < last)
            within = (samples - start) * segment.num_views + views - first
            rows = np.where(held, segment.first_row + within, rows)
        if (rows < 0).any():
            at = np.argmax(rows.ravel() < 0)
            raise IndexError(f"sample {samples.ravel()[at]}, view {views.ravel()[at]} is not in this cache")
        return rows

    def locate(self, rows: ArrayLike) -> tuple[Ints, Ints, Ints]:
        """(samples, views, lines in the view table) of rows. Raises `IndexError` for an unknown row."""
        rows = np.asarray(rows, np.int64)
        number = np.searchsorted(self._parts[0], rows, side="right") - 1
        first_rows, num_rows, samples, views, num_views = self._parts[:, number]
        within = rows - first_rows
        unknown = (within < 0) | (within >= num_rows)
        if unknown.any():
            raise IndexError(f"row {rows.ravel()[np.argmax(unknown.ravel())]} is not in this cache")
        return samples + within // num_views, views + within % num_views, self._first_lines[number] + within
