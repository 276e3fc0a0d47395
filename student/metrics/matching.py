"""One-to-one matching of boundary pixels at minimum cost, like `correspondPixels` of the BSDS benchmark.

Two pixels may be matched when they are at most a given distance apart. BSDS minimises

    Σ round(100 · distance) over matched pairs  +  outlier cost · (pixels of both maps − matched pairs),

with an outlier cost of a hundred times the largest distance: almost always a matching of maximum
cardinality, and among those one of minimum distance. Here this is minimised exactly, by scipy. BSDS ties each
pixel to six outliers drawn at random, and so leaves about one pair in a thousand unmatched, different ones in
each run; `benchmarks/boundary.py` runs its code for comparison and prints the effect on odsF.
"""

from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components, min_weight_full_bipartite_matching
from scipy.spatial import KDTree

Ints = npt.NDArray[np.intp]
Bools = npt.NDArray[np.bool_]

# The solver's time grows faster than its problem, and each call has a cost: small components share one.
_EDGES_PER_CALL = 1500


class Candidates(NamedTuple):
    """The E pairs that may be matched. The set pixels of each map are numbered row by row."""

    prediction_E: Ints
    target_E: Ints
    cost_E: npt.NDArray[np.float64]
    outlier_cost: float

    def subset(self, which_E: Ints | Bools) -> Self:
        return type(self)(
            self.prediction_E[which_E], self.target_E[which_E], self.cost_E[which_E], self.outlier_cost
        )


def find_candidates(prediction_HW: Bools, target_HW: Bools, max_distance_px: float) -> Candidates:
    """All pairs of a predicted and a true boundary pixel that are at most `max_distance_px` apart."""
    predicted, true = (KDTree(np.argwhere(map_HW)) for map_HW in (prediction_HW, target_HW))
    reach_px = np.nextafter(max_distance_px, np.inf)  # it compares squares, which are not exact
    found = predicted.sparse_distance_matrix(true, reach_px, output_type="ndarray")
    order_E = np.lexsort((found["j"], found["i"]))
    prediction_E, target_E, distance_E = (found[name][order_E] for name in "ijv")
    outlier_cost = float(np.ceil(100 * 100 * max_distance_px))
    return Candidates(prediction_E, target_E, np.rint(100 * distance_E), outlier_cost)


def match(candidates: Candidates) -> tuple[Ints, Ints]:
    """The pixels (of the prediction, of the target) that a matching of minimum cost pairs."""
    if not len(candidates.prediction_E):
        return candidates.prediction_E, candidates.target_E
    pairs = [_solve(candidates.subset(part)) for part in _independent_parts(candidates)]
    prediction_K, target_K = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return prediction_K, target_K


def _independent_parts(candidates: Candidates) -> list[Ints]:
    """Indices of the candidates, divided into groups of whole connected components."""
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
    """Solve one part as a square assignment problem, the only kind that the solver starts with a good guess.

    Rows are the P predicted pixels and a stand-in for each of the T true ones; columns are the true pixels
    and a stand-in for each predicted one. An unmatched pixel takes its own stand-in; the stand-ins of two
    matched pixels take each other.
    """
    prediction_ids, prediction_E = np.unique(candidates.prediction_E, return_inverse=True)
    target_ids, target_E = np.unique(candidates.target_E, return_inverse=True)
    num_predicted, num_true = len(prediction_ids), len(target_ids)
    prediction_P, target_T = np.arange(num_predicted), np.arange(num_true)
    blocks = [
        (prediction_E, target_E, candidates.cost_E),
        (prediction_P, num_true + prediction_P, np.full(num_predicted, candidates.outlier_cost)),
        (num_predicted + target_T, target_T, np.zeros(num_true)),
        (num_predicted + target_E, num_true + prediction_E, np.zeros(len(target_E))),
    ]
    row, column, weight = (np.concatenate(part) for part in zip(*blocks, strict=True))
    # Edges of a sparse graph cannot weigh zero. All assignments have as many edges, so each weighs one more.
    side = num_predicted + num_true
    row, column = min_weight_full_bipartite_matching(
        csr_array((1 + weight, (row, column)), shape=(side, side))
    )
    paired = (row < num_predicted) & (column < num_true)
    return prediction_ids[row[paired]], target_ids[column[paired]]
