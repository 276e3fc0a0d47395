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
        self._first_rows = np.array([segment.first_row for segment in segments], np.int64)
        self._first_lines = np.cumsum([0, *(segment.num_rows for segment in segments)])[:-1]

    def rows(self, samples: ArrayLike, views: ArrayLike) -> Ints:
        """Rows of (sample, view) pairs. Raises `IndexError` for a pair that no segment holds."""
        samples, views = np.broadcast_arrays(np.asarray(samples, np.int64), np.asarray(views, np.int64))
        rows = np.full(samples.shape, -1, np.int64)
        for segment in self._segments:
            held = (
                (samples >= segment.samples[0])
                & (samples < segment.samples[1])
                & (views >= segment.views[0])
                & (views < segment.views[1])
            )
            within = (samples - segment.samples[0]) * segment.num_views + views - segment.views[0]
            rows = np.where(held, segment.first_row + within, rows)
        if (rows < 0).any():
            first = np.argmax(rows.ravel() < 0)
            raise IndexError(
                f"sample {samples.ravel()[first]}, view {views.ravel()[first]} is not in this cache"
            )
        return rows

    def locate(self, rows: ArrayLike) -> tuple[Ints, Ints, Ints]:
        """(samples, views, lines in the view table) of rows. Raises `IndexError` for an unknown row."""
        rows = np.asarray(rows, np.int64)
        number = np.searchsorted(self._first_rows, rows, side="right") - 1
        samples, views, lines = (np.zeros(rows.shape, np.int64) for _ in range(3))
        for i, segment in enumerate(self._segments):
            inside = (number == i) & (rows < segment.first_row + segment.num_rows)
            within = rows - segment.first_row
            samples = np.where(inside, segment.samples[0] + within // segment.num_views, samples)
            views = np.where(inside, segment.views[0] + within % segment.num_views, views)
            lines = np.where(inside, self._first_lines[i] + within, lines)
            number = np.where(inside, i, np.where(number == i, -1, number))
        if (number < 0).any():
            raise IndexError(f"row {rows.ravel()[np.argmax(number.ravel() < 0)]} is not in this cache")
        return samples, views, lines
