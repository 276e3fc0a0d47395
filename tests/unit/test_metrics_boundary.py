"""odsF, oisF and AP against plain twins: loops, dense assignment, and the formulas of the BSDS benchmark."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from skimage.morphology import thin

from teachercache.student.metrics import BoundaryBenchmark
from teachercache.student.metrics.boundary import boundary_counts, edge_nms, scores_of, triangle_filter
from teachercache.student.metrics.matching import find_candidates, match

Array = npt.NDArray


def soft_map(seed: int, shape: tuple[int, int] = (26, 33)) -> Array:
    """Ridges of several widths, as a network draws boundaries."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 2.5)
    noise /= noise.std()
    ridges: Array = np.exp(-3 * noise**2)
    return ridges


def line_map(seed: int, shape: tuple[int, int] = (26, 33)) -> Array:
    """One annotator: the outlines of regions, a little displaced from one seed to the next."""
    displaced = soft_map(0, shape) + 0.15 * soft_map(seed + 100, shape)
    return np.asarray(thin(displaced > 0.6), bool)


def edges_nms_mex(edge: Array, normal: Array, r: int, s: int, m: float) -> Array:
    """Loops of Dollár's edgesNmsMex."""
    height, width = edge.shape

    def at(x: float, y: float) -> float:
        x, y = min(max(x, 0), width - 1.001), min(max(y, 0), height - 1.001)
        x0, y0 = int(x), int(y)
        dx, dy = x - x0, y - y0
        top = edge[y0, x0] * (1 - dx) + edge[y0, x0 + 1] * dx
        bottom = edge[y0 + 1, x0] * (1 - dx) + edge[y0 + 1, x0 + 1] * dx
        return float(top * (1 - dy) + bottom * dy)

    out = edge.copy()
    for y in range(height):
        for x in range(width):
            for d in range(-r, r + 1):
                cos, sin = math.cos(normal[y, x]), math.sin(normal[y, x])
                if d and m * edge[y, x] < at(x + d * cos, y + d * sin):
                    out[y, x] = 0
    s = min(s, width // 2, height // 2)
    for k in range(s):
        for line in (out[k], out[height - 1 - k], out[:, k], out[:, width - 1 - k]):
            line *= k / s
    return out


def test_nms_equals_the_toolbox() -> None:
    probability = soft_map(1).astype(np.float32)
    edge = triangle_filter(probability, 1)
    smooth = triangle_filter(edge, 4)
    oy, ox = np.gradient(smooth)
    oxx, oxy, oyy = np.gradient(ox, axis=1), np.gradient(oy, axis=1), np.gradient(oy, axis=0)
    normal = np.mod(np.arctan(oyy * np.sign(-oxy) / (oxx + 1e-5)), np.pi)
    expected = edges_nms_mex(edge, normal, r=4, s=5, m=1.01)
    found = edge_nms(probability)
    assert 0.05 < np.count_nonzero(found) / found.size < 0.5
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("radius", [1, 4])
def test_triangle_filter_equals_padding_and_convolution(radius: int) -> None:
    image = soft_map(2)
    weights = np.array([*range(1, radius + 1), radius + 1, *range(radius, 0, -1)]) / (radius + 1) ** 2
    padded = np.pad(image, radius, mode="symmetric")
    rows = np.array([np.convolve(row, weights, "valid") for row in padded])
    expected = np.array([np.convolve(column, weights, "valid") for column in rows.T]).T
    np.testing.assert_allclose(triangle_filter(image, radius), expected, atol=1e-12)


def bwmorph_thin(image: Array) -> Array:
    """Guo and Hall's conditions G1 to G3, as MATLAB documents bwmorph(…, 'thin', Inf), pixel by pixel."""
    image = np.pad(image, 1)
    while True:
        before = image.copy()
        for first in (True, False):
            doomed = []
            for y, x in np.argwhere(image):
                # x1 is the neighbour to the east, the others follow counterclockwise
                n = image[
                    [y, y - 1, y - 1, y - 1, y, y + 1, y + 1, y + 1],
                    [x + 1, x + 1, x, x - 1, x - 1, x - 1, x, x + 1],
                ]
                x1, x2, x3, x4, x5, x6, x7, x8 = n
                crossings = sum(
                    not a and (b or c) for a, b, c in ((x1, x2, x3), (x3, x4, x5), (x5, x6, x7), (x7, x8, x1))
                )
                n1 = (x1 | x2) + 0 + (x3 | x4) + (x5 | x6) + (x7 | x8)
                n2 = (x2 | x3) + 0 + (x4 | x5) + (x6 | x7) + (x8 | x1)
                g3 = ((x2 | x3 | (not x8)) & x1) if first else ((x6 | x7 | (not x4)) & x5)
                if crossings == 1 and 2 <= min(n1, n2) <= 3 and not g3:
                    doomed.append((y, x))
            for pixel in doomed:
                image[pixel] = False
        if (image == before).all():
            return image[1:-1, 1:-1]


def test_thinning_equals_bwmorph() -> None:
    blobs = soft_map(3) > 0.5
    assert (thin(blobs) == bwmorph_thin(blobs)).all()


def correspond_pixels(prediction: Array, target: Array, max_distance: float) -> tuple[Array, Array, float]:
    """BSDS's assignment problem in full, dense: matched pixels of both maps, and the cost."""
    a, b = np.argwhere(prediction), np.argwhere(target)
    distance = np.hypot(*(a[:, None] - b[None]).transpose(2, 0, 1))
    outlier = math.ceil(100 * 100 * max_distance)
    cost = np.full((len(a) + len(b), len(b) + len(a)), outlier, float)
    cost[: len(a), : len(b)] = np.where(distance <= max_distance, np.rint(100 * distance), 1e12)
    rows, columns = linear_sum_assignment(cost)
    paired = (rows < len(a)) & (columns < len(b))
    matched_a, matched_b = np.zeros_like(prediction), np.zeros_like(target)
    matched_a[tuple(a[rows[paired]].T)] = True
    matched_b[tuple(b[columns[paired]].T)] = True
    return matched_a, matched_b, float(cost[rows, columns].sum())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("max_distance", [1.0, 2.5, 4.3])
def test_matching_equals_the_dense_assignment(
    seed: int, max_distance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "teachercache.student.metrics.matching._EDGES_PER_CALL", 50
    )  # several calls on a small map
    prediction, target = np.asarray(thin(soft_map(seed) > 0.4)), line_map(seed)
    candidates = find_candidates(prediction, target, max_distance)
    prediction_K, target_K = match(candidates)
    expected, _, expected_cost = correspond_pixels(prediction, target, max_distance)

    assert len(prediction_K) == np.count_nonzero(expected) > 20
    assert len(set(prediction_K)) == len(set(target_K)) == len(prediction_K)
    offsets = np.argwhere(prediction)[prediction_K] - np.argwhere(target)[target_K]
    distance_K = np.hypot(*offsets.T)
    assert distance_K.max() <= max_distance
    alone = prediction.sum() + target.sum() - len(prediction_K)
    assert np.rint(100 * distance_K).sum() + candidates.outlier_cost * alone == expected_cost

    graph = csr_array(
        (np.ones(len(candidates.cost_E)), candidates[:2]), shape=(prediction.sum(), target.sum())
    )
    assert len(prediction_K) == np.count_nonzero(maximum_bipartite_matching(graph) >= 0)


def test_no_candidates_no_match() -> None:
    prediction, target = np.zeros((2, 9, 9), bool)
    prediction[0, 0] = target[8, 8] = True
    assert [len(side) for side in match(find_candidates(prediction, target, 3.0))] == [0, 0]


def plain_counts(probability: Array, targets: Array, thresholds: Array, max_distance: float) -> Array:
    """BSDS's evaluation_bdry_image, line by line."""
    counts = np.zeros((len(thresholds), 4), np.int64)
    for t, threshold in enumerate(thresholds):
        boundary = np.asarray(thin(probability >= threshold), bool)
        accumulated = np.zeros_like(boundary)
        for target in targets:
            matched_a, matched_b, _ = correspond_pixels(
                boundary, target, max_distance * np.hypot(*target.shape)
            )
            accumulated |= matched_a
            counts[t, :2] += matched_b.sum(), target.sum()
        counts[t, 2:] = accumulated.sum(), boundary.sum()
    return counts


THRESHOLDS = np.arange(1, 10) / 10


def test_counts_of_one_annotator_equal_the_plain_twin() -> None:
    probability, targets = edge_nms(soft_map(0)), line_map(1)[None]
    expected = plain_counts(probability, targets, THRESHOLDS, 0.06)
    found = boundary_counts(probability, targets, THRESHOLDS, 0.06)
    assert len(np.unique(found[:, 3])) > 5
    assert (found == expected).all()


def test_counts_of_three_annotators_equal_the_plain_twin() -> None:
    probability, targets = edge_nms(soft_map(0)), np.stack([line_map(seed) for seed in range(3)])
    expected = plain_counts(probability, targets, THRESHOLDS, 0.06)
    found = boundary_counts(probability, targets, THRESHOLDS, 0.06)
    assert (found[:, [0, 1, 3]] == expected[:, [0, 1, 3]]).all()
    # Which of several equally cheap predicted pixels is matched is open, and so a pixel of the union.
    assert np.abs(found[:, 2] - expected[:, 2]).max() <= 1


def test_displacement_within_the_tolerance_is_forgiven() -> None:
    target, near, far = np.zeros((3, 60, 80), bool)
    target[30, 10:70] = near[33, 10:70] = far[34, 10:70] = True
    for prediction, matched in ((near, 60), (far, 0)):
        counts = boundary_counts(prediction.astype(float), target[None], THRESHOLDS, 0.035)  # 3.5 pixels
        assert (counts == [matched, 60, matched, 60]).all()


def collect_eval_bdry(thresholds: Array, images: Array) -> tuple[float, float, float, float]:
    """BSDS's collect_eval_bdry in loops: threshold and F of ODS, F of OIS, AP."""

    def ratio(count: float, total: float) -> float:
        return count / (total + (total == 0))

    def f(r: float, p: float) -> float:
        return 2 * p * r / (p + r + (p + r == 0))

    best_counts = np.zeros(4)
    for counts in images:
        f_of_threshold = [f(ratio(c[0], c[1]), ratio(c[2], c[3])) for c in counts]
        best_counts += counts[f_of_threshold.index(max(f_of_threshold))]
    total = images.sum(0)
    r, p = [ratio(c[0], c[1]) for c in total], [ratio(c[2], c[3]) for c in total]
    best_t, best_f = thresholds[0], f(r[0], p[0])
    for i in range(1, len(thresholds)):
        for d in np.linspace(0, 1, 100):
            between = f(r[i] * d + r[i - 1] * (1 - d), p[i] * d + p[i - 1] * (1 - d))
            if between > best_f:
                best_f, best_t = between, thresholds[i] * d + thresholds[i - 1] * (1 - d)
    curve: dict[float, float] = {}
    for recall, precision in zip(r, p, strict=True):
        curve.setdefault(recall, precision)
    recalls = sorted(curve)
    area = 0.0
    for at in np.linspace(0, 1, 101):
        for low, high in pairwise(recalls):
            if low <= at <= high:
                area += 0.01 * (curve[low] + (curve[high] - curve[low]) * (at - low) / (high - low))
                break
    return (
        best_t,
        best_f,
        f(ratio(best_counts[0], best_counts[1]), ratio(best_counts[2], best_counts[3])),
        area,
    )


def test_scores_equal_collect_eval_bdry() -> None:
    rng = np.random.default_rng(5)
    falling = np.sort(rng.integers(0, 1000, (3, 9, 2)), axis=1)[:, ::-1]
    predicted = np.sort(rng.integers(1, 900, (3, 9)), axis=1)[:, ::-1]
    images = np.stack(
        [
            falling[..., 0],
            np.full((3, 9), 1000),
            (predicted * np.sort(rng.random((3, 9)), axis=1)).astype(int),
            predicted,
        ],
        axis=-1,
    )
    images[:, -1] = [0, 1000, 0, 0]  # nothing is predicted at the last threshold
    images[:, 0] = images[:, 1]  # two thresholds with the same map
    benchmark = BoundaryBenchmark(num_thresholds=9)
    for counts in images:
        benchmark._add(counts)
    scores = benchmark.compute()
    expected_t, expected_ods, expected_ois, expected_ap = collect_eval_bdry(THRESHOLDS, images)
    assert scores.ods_threshold == pytest.approx(expected_t)
    assert scores.ods_f == pytest.approx(expected_ods, rel=1e-12)
    assert scores.ois_f == pytest.approx(expected_ois, rel=1e-12)
    assert scores.ap == pytest.approx(expected_ap, rel=1e-12)
    assert scores.ods_f >= 2 * np.max(
        scores.precision_T * scores.recall_T / (scores.precision_T + scores.recall_T + 1e-9)
    )


def test_one_threshold_has_a_score() -> None:
    scores = scores_of(np.array([0.5]), np.array([[3, 4, 1, 2]]), np.array([3, 4, 1, 2]))
    assert scores.ods_f == pytest.approx(2 * 0.75 * 0.5 / 1.25)
    assert scores.ods_threshold == 0.5
    assert scores.ap == 0


def images() -> list[tuple[Array, Array]]:
    shapes = [(26, 33), (30, 24), (26, 33)]
    return [(soft_map(k, s), np.stack([line_map(k, s), line_map(k + 1, s)])) for k, s in enumerate(shapes)]


def test_split_and_parallel_evaluation_change_nothing() -> None:
    whole = BoundaryBenchmark(max_distance=0.05)
    for image in images():
        whole.update(*image)

    first, second = BoundaryBenchmark(max_distance=0.05), BoundaryBenchmark(max_distance=0.05)
    with ThreadPoolExecutor(2) as executor:
        parallel = BoundaryBenchmark(max_distance=0.05, executor=executor)
        for index, (probability, targets) in enumerate(images()):
            (first, second)[index % 2].update(torch.from_numpy(probability), torch.from_numpy(targets))
            parallel.update(probability, targets)
        parallel.state()
    second.merge(first)
    for other in (second, parallel):
        for name, total in whole.state().items():
            assert torch.equal(other.state()[name], total), name
    scores = whole.compute()
    assert 0 < scores.ods_f <= scores.ois_f < 1
    assert 0 < scores.ap < 1


def test_a_human_who_agrees_scores_one() -> None:
    target = line_map(0)
    benchmark = BoundaryBenchmark(nms_radius=None)
    benchmark.update(target.astype(float), target)
    assert benchmark.compute().ods_f == 1


def test_wrong_inputs_are_named() -> None:
    benchmark = BoundaryBenchmark()
    with pytest.raises(ValueError, match=r"differ in shape[\s\S]*\(9, 9\)[\s\S]*\(8, 9\)"):
        benchmark.update(np.zeros((9, 9)), np.zeros((2, 8, 9)))
    for wrong in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match="sigmoid"):
            benchmark.update(np.full((9, 9), wrong), np.zeros((9, 9)))


def test_pixels_just_within_reach_are_candidates() -> None:
    prediction_HW, target_HW = np.zeros((2, 8, 8), bool)
    prediction_HW[2, 3] = target_HW[4, 6] = True
    assert find_candidates(prediction_HW, target_HW, float(np.hypot(2, 3))).prediction_E.tolist() == [0]
