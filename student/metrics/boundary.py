"""Boundary scores odsF, oisF and AP, as the BSDS benchmark and SEISM compute them (SAK, B.4).

    benchmark = BoundaryBenchmark(max_distance=0.0075)          # 0.011 on NYUD-v2
    for probability_HW, boundaries_AHW in images: benchmark.update(probability_HW, boundaries_AHW)
    print(benchmark.compute().ods_f)

Legend: H, W pixels, A annotators, T thresholds, U of them with different maps, N pixels predicted at any.
"""

from collections import deque
from concurrent.futures import Executor, Future
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor

from teachercache.pipeline.errors import ArgumentError, extra
from teachercache.student.metrics.matching import Bools, find_candidates, match
from teachercache.student.metrics.sum_metric import SumMetric, check_same_shape

Floats = npt.NDArray[np.floating]
Counts = npt.NDArray[np.int64]

_TOLERANCE = 1.01  # a pixel survives a neighbour that is at most one percent stronger
_BORDER = 5  # pixels over which edges fade out towards the border of the image
_MAX_PENDING_IMAGES = 64  # bounds the memory that waiting images take


def triangle_filter(image_HW: Floats, radius: int) -> Floats:
    """Convolution with the separable filter [1 … r, r+1, r … 1] / (r+1)², the image mirrored at borders."""
    box = np.ones(radius + 1)
    weights = np.convolve(box, box) / (radius + 1) ** 2
    rows_filtered = ndimage.correlate1d(image_HW, weights, axis=0, mode="reflect")
    return ndimage.correlate1d(rows_filtered, weights, axis=1, mode="reflect")


def edge_nms(probability_HW: npt.ArrayLike, radius: int = 4) -> Floats:
    """Keep the pixels of a soft boundary map that are the strongest along the normal of their boundary.

    A twin of `nms_process.m` of SAK's evaluation, which is `edgesNmsMex` of Dollár's structured edge toolbox
    with r = 4, s = 5, m = 1.01, on a map smoothed by `convTri(·, 1)` and oriented by `convTri(·, 4)`.
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


def boundary_counts(
    probability_HW: Floats, targets_AHW: Bools, thresholds_T: Floats, max_distance: float = 0.0075
) -> Counts:
    """One image's counts for precision and recall at every threshold (BSDS, `evaluation_bdry_image`).

    `max_distance`: how far apart matched pixels may be, as a fraction of the image diagonal.
    Returns int64 (T, 4): true pixels matched and in total, over all annotators; predicted pixels matched with
    any annotator and in total. Predictions are thinned at every threshold; targets are not changed.
    """
    with extra("train"):
        from skimage.morphology import thin
    radius_px = max_distance * float(np.hypot(*probability_HW.shape))
    # The maps are nested, so those of equal size are equal.
    size_T = np.count_nonzero(probability_HW >= thresholds_T[:, None, None], axis=(1, 2))
    _, first_U, map_T = np.unique(size_T, return_index=True, return_inverse=True)
    maps_UHW = np.stack([thin(probability_HW >= threshold) for threshold in thresholds_T[first_U]])
    any_HW: Bools = np.logical_or.reduce(maps_UHW)
    present_UN = maps_UHW[:, any_HW]

    matched_UN = np.zeros_like(present_UN)
    recalled_U = np.zeros(len(present_UN), np.int64)
    for target_HW in targets_AHW:
        candidates = find_candidates(any_HW, target_HW, radius_px)
        for index, present_N in enumerate(present_UN):
            prediction_K, target_K = match(candidates.subset(present_N[candidates.prediction_E]))
            matched_UN[index, prediction_K] = True
            recalled_U[index] += len(target_K)
    relevant_U = np.full_like(recalled_U, np.count_nonzero(targets_AHW))
    counts_U4 = np.stack([recalled_U, relevant_U, matched_UN.sum(1), present_UN.sum(1)], axis=1)
    return counts_U4[map_T]


@dataclass(frozen=True, kw_only=True)
class BoundaryScores:
    """Fractions. ODS: one threshold for the data set. OIS: the best threshold of every image."""

    ods_f: float
    ods_precision: float
    ods_recall: float
    ods_threshold: float
    ois_f: float
    ap: float
    precision_T: Floats
    recall_T: Floats


def scores_of(thresholds_T: Floats, counts_T4: Counts, ois_counts_4: Counts) -> BoundaryScores:
    """Scores from counts that are summed over images (BSDS, `collect_eval_bdry`).

    ODS interpolates precision and recall linearly between thresholds, in 100 steps, while SEISM takes the
    best threshold (use `precision_T` and `recall_T`; it is lower by about 1e-4). AP is the mean precision at
    recall 0, 0.01 … 1, and zero outside the recalls that were reached.
    """
    recall_T, precision_T = _recall_and_precision(counts_T4)
    step_S = np.linspace(0, 1, 100)
    threshold, recall, precision = (
        np.append(curve_T[0], curve_T[:-1, None] * (1 - step_S) + curve_T[1:, None] * step_S)
        for curve_T in (thresholds_T, recall_T, precision_T)
    )
    f = _f_measure(recall, precision)
    best = int(np.argmax(f))
    reached_R, where_R = np.unique(recall_T, return_index=True)
    at_recall = np.interp(np.linspace(0, 1, 101), reached_R, precision_T[where_R], left=0, right=0)
    return BoundaryScores(
        ods_f=float(f[best]),
        ods_precision=float(precision[best]),
        ods_recall=float(recall[best]),
        ods_threshold=float(threshold[best]),
        ois_f=float(_f_measure(*_recall_and_precision(ois_counts_4))),
        ap=float(at_recall.sum() / 100) if len(reached_R) > 1 else 0.0,
        precision_T=precision_T,
        recall_T=recall_T,
    )


def _recall_and_precision(counts_T4: Counts) -> tuple[Floats, Floats]:
    recalled_T, relevant_T, correct_T, predicted_T = counts_T4.T
    return recalled_T / np.maximum(relevant_T, 1), correct_T / np.maximum(predicted_T, 1)


def _f_measure(recall: Floats | float, precision: Floats | float) -> Floats:
    total = np.add(precision, recall)
    return 2 * np.multiply(precision, recall) / np.where(total == 0, 1, total)


class BoundaryBenchmark(SumMetric):
    """odsF, oisF and AP over a data set, image by image.

    `max_distance`: 0.0075 (BSDS, PASCAL-Context) or 0.011 (NYUD-v2) of the image diagonal.
    `nms_radius`: of the non-maximum suppression before thresholding (`edge_nms`); None skips it, as the BSDS
    benchmark itself does.
    `executor`: evaluates images in parallel; use processes, since the work holds the interpreter lock:
    `ProcessPoolExecutor(2, mp_context=get_context("spawn"))`.
    """

    def __init__(
        self,
        *,
        max_distance: float = 0.0075,
        nms_radius: int | None = 4,
        num_thresholds: int = 99,
        executor: Executor | None = None,
    ) -> None:
        super().__init__(
            counts_T4=torch.zeros(num_thresholds, 4, dtype=torch.int64),
            ois_counts_4=torch.zeros(4, dtype=torch.int64),
        )
        self.thresholds_T = np.arange(1, num_thresholds + 1) / (num_thresholds + 1)
        self.max_distance = max_distance
        self.nms_radius = nms_radius
        self.executor = executor
        self._pending: deque[Future[Counts]] = deque()

    def update(self, probability_HW: Tensor | Floats, targets_AHW: Tensor | npt.NDArray) -> None:
        """Add an image: boundary probabilities in [0, 1], and the boundary map (0 or 1) of every annotator.

        A single target may have the shape (H, W). With an executor this returns before the evaluation.
        Raises `ValueError` when sizes differ or values are not probabilities.
        """
        probability_HW, targets_AHW = _array(probability_HW), _array(targets_AHW)
        if targets_AHW.ndim == 2:
            targets_AHW = targets_AHW[None]
        check_same_shape(probability_HW.shape, targets_AHW.shape[1:])
        if not (probability_HW.min() >= 0 and probability_HW.max() <= 1):
            raise ArgumentError(
                "A boundary map holds values that are not probabilities.",
                got=f"{probability_HW.min()} to {probability_HW.max()}",
                expected="0 to 1",
                do="pass the logits through a sigmoid",
            )
        if self.nms_radius is not None:
            probability_HW = edge_nms(probability_HW, self.nms_radius)
        targets_AHW = targets_AHW.astype(bool)

        image = probability_HW, targets_AHW, self.thresholds_T, self.max_distance
        if self.executor is None:
            self._add(boundary_counts(*image))
            return
        self._pending.append(self.executor.submit(boundary_counts, *image))
        while len(self._pending) > _MAX_PENDING_IMAGES or (self._pending and self._pending[0].done()):
            self._add(self._pending.popleft().result())

    def _add(self, counts_T4: Counts) -> None:
        best = int(np.argmax(_f_measure(*_recall_and_precision(counts_T4))))
        self._sums["counts_T4"] += torch.from_numpy(counts_T4)
        self._sums["ois_counts_4"] += torch.from_numpy(counts_T4[best])

    def state(self) -> dict[str, Tensor]:
        while self._pending:
            self._add(self._pending.popleft().result())
        return self._sums

    def compute(self) -> BoundaryScores:
        sums = self.state()
        return scores_of(self.thresholds_T, sums["counts_T4"].numpy(), sums["ois_counts_4"].numpy())


def _array(values: Tensor | npt.NDArray) -> npt.NDArray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else values
