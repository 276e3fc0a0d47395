"""One-to-one matching of boundary pixels at minimum cost, as `correspondPixels` of the BSDS benchmark.

Two pixels may be matched when they are at most a given distance apart. BSDS minimises

    Σ round(100 · distance) over matched pairs  +  outlier cost · (pixels of both maps − matched pairs),

with an outlier cost of a hundred times the greatest distance: nearly always a matching of maximum
cardinality, and among those one of least distance. Here this is minimised exactly (shortest augmenting paths,
in scipy): every pixel of the smaller side is matched, or stays alone at the outlier cost.

BSDS minimises it by Goldberg's CSA on a graph with outliers, which must be matched too: a pixel is tied to six
of them, and each of them to six others, all drawn at random. An outlier that nobody drew takes a pixel away, so
BSDS leaves two or so in a thousand pairs unmatched, other ones from run to run; `benchmarks/boundary.py` prints
what that does to odsF. Where several matchings cost the same, which pixels are matched is open in both.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components, min_weight_full_bipartite_matching

Ints = npt.NDArray[np.intp]
Bools = npt.NDArray[np.bool_]

# The solver's time grows faster than its problem, and a call has a price: small components share one.
_EDGES_PER_CALL = 1500


class Candidates(NamedTuple):
    """The E pairs that may be matched. Pixels are numbered row by row among those set in their map."""

    prediction_E: Ints
    target_E: Ints
    cost_E: npt.NDArray[np.float64]
    outlier_cost: float

    def subset(self, which_E: Ints | Bools) -> Candidates:
        return Candidates(
            self.prediction_E[which_E], self.target_E[which_E], self.cost_E[which_E], self.outlier_cost
        )


def find_candidates(prediction_HW: Bools, target_HW: Bools, max_distance_px: float) -> Candidates:
    """All pairs of a predicted and a true boundary pixel that are at most `max_distance_px` apart."""
    reach = int(np.ceil(max_distance_px))
    offset_y, offset_x = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1)
    distance_D = np.hypot(offset_y, offset_x)
    near_D = distance_D <= max_distance_px

    number_HW = np.full(target_HW.shape, -1, np.intp)
    number_HW[target_HW] = np.arange(np.count_nonzero(target_HW))
    number_HW = np.pad(number_HW, reach, constant_values=-1)
    y_N, x_N = np.nonzero(prediction_HW)
    target_ND = number_HW[
        y_N[:, None] + reach + offset_y[near_D],
        x_N[:, None] + reach + offset_x[near_D],
    ]
    prediction_E, offset_E = np.nonzero(target_ND >= 0)
    return Candidates(
        prediction_E,
        target_ND[prediction_E, offset_E],
        np.rint(100 * distance_D[near_D])[offset_E],
        float(np.ceil(100 * 100 * max_distance_px)),
    )


def match(candidates: Candidates) -> tuple[Ints, Ints]:
    """The pixels (of the prediction, of the target) of the pairs of a matching of minimum cost."""
    if not len(candidates.prediction_E):
        return candidates.prediction_E, candidates.target_E
    pairs = [_solve(candidates.subset(part)) for part in _independent_parts(candidates)]
    prediction_K, target_K = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return prediction_K, target_K


def _independent_parts(candidates: Candidates) -> list[Ints]:
    """Indices of the candidates, cut into runs of whole connected components."""
    first_target = candidates.prediction_E.max() + 1
    nodes = first_target + candidates.target_E.max() + 1
    edges = (candidates.prediction_E, first_target + candidates.target_E)
    graph = csr_array((np.ones(len(candidates.cost_E), np.int8), edges), shape=(nodes, nodes))
    component_E = connected_components(graph, directed=False)[1][candidates.prediction_E]
    order_E = np.argsort(component_E, kind="stable")
    starts = np.flatnonzero(np.diff(component_E[order_E], prepend=-1))
    new_part = np.diff(starts // _EDGES_PER_CALL) > 0
    return np.split(order_E, starts[1:][new_part])


def _solve(candidates: Candidates) -> tuple[Ints, Ints]:
    prediction_ids, prediction_E = np.unique(candidates.prediction_E, return_inverse=True)
    target_ids, target_E = np.unique(candidates.target_E, return_inverse=True)
    swap = len(prediction_ids) > len(target_ids)  # the rows are the smaller side
    row_ids, column_ids = (target_ids, prediction_ids) if swap else (prediction_ids, target_ids)
    row_E, column_E = (target_E, prediction_E) if swap else (prediction_E, target_E)

    rows, columns = len(row_ids), len(column_ids)
    alone = np.arange(rows)  # every row has one more column, of its own, that stands for staying alone
    # A sparse graph has no edge of weight zero, and each row has one edge in the end: so all weigh one more.
    weight = 1 + np.concatenate([candidates.cost_E, np.full(rows, candidates.outlier_cost)])
    ends = (np.concatenate([row_E, alone]), np.concatenate([column_E, columns + alone]))
    row_R, column_R = min_weight_full_bipartite_matching(
        csr_array((weight, ends), shape=(rows, columns + rows))
    )
    paired_R = column_R < columns
    row_K, column_K = row_ids[row_R[paired_R]], column_ids[column_R[paired_R]]
    return (column_K, row_K) if swap else (row_K, column_K)
