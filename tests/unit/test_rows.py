"""Row numbers and their inverse, for one segment and for a cache that has grown."""

from __future__ import annotations

import numpy as np
import pytest

from teachercache.pipeline.records.rows import RowIndex
from teachercache.pipeline.records.spec import Segment

GROWN = [
    Segment(first_row=0, samples=(0, 5), views=(0, 2)),
    Segment(first_row=12, samples=(5, 9), views=(0, 2)),
    Segment(first_row=24, samples=(0, 9), views=(2, 3)),
]


def test_one_segment_is_the_formula() -> None:
    index = RowIndex([Segment(first_row=0, samples=(0, 7), views=(0, 3))])
    for sample in range(7):
        for view in range(3):
            row = sample * 3 + view
            assert index.rows(sample, view) == row
            assert [int(value) for value in index.locate(row)] == [sample, view, row]


def test_growth_keeps_every_row_where_it_was() -> None:
    index = RowIndex(GROWN)
    pairs = [(s, v) for s in range(9) for v in range(3)]
    samples, views = np.array(pairs).T
    rows = index.rows(samples, views)
    assert len(set(rows.tolist())) == len(pairs)
    back_samples, back_views, lines = index.locate(rows)
    np.testing.assert_array_equal(back_samples, samples)
    np.testing.assert_array_equal(back_views, views)
    assert sorted(lines.tolist()) == list(range(len(pairs)))
    np.testing.assert_array_equal(index.rows(samples[:2], 1), [1, 1])


@pytest.mark.parametrize("row", [-1, 10, 11, 20, 33])
def test_a_row_in_the_padding_is_an_error(row: int) -> None:
    with pytest.raises(IndexError, match=f"row {row}"):
        RowIndex(GROWN).locate(row)


def test_a_view_that_is_not_there_is_an_error() -> None:
    with pytest.raises(IndexError, match="sample 1, view 3"):
        RowIndex(GROWN).rows([0, 1], [0, 3])
