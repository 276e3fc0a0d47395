"""Seconds that odsF takes per image, and how far its matching is from that of the BSDS benchmark.

    python -m benchmarks.boundary [--images 4] [--bsds FOLDER]

Images are 481×321 with 5 annotators and 99 thresholds: drawn (regions, outlined by annotators who disagree,
and a soft prediction of them), or with --bsds from a folder of BSDS500 ground truth (*.mat), where every
human is also scored against the others. Prints a table, then the same as one line of JSON. Two CPU cores, a
minute.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from scipy import ndimage
from scipy.io import loadmat
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from skimage.morphology import thin

from student.metrics import BoundaryBenchmark
from student.metrics.boundary import BoundaryScores, boundary_counts, scores_of
from student.metrics.edge_nms import edge_nms
from student.metrics.matching import Bools, Candidates, Ints, find_candidates

Image = tuple[npt.NDArray[np.float64], Bools]  # a prediction (H, W) and the maps of its annotators (A, H, W)

HEIGHT, WIDTH, ANNOTATORS = 321, 481, 5
MAX_DISTANCE = 0.0075
OUTLIER_DEGREE = 6


def smooth_noise(rng: np.random.Generator, sigma: float, fields: int = 1) -> npt.NDArray[np.float64]:
    noise: npt.NDArray[np.float64] = ndimage.gaussian_filter(
        rng.standard_normal((fields, HEIGHT, WIDTH)), (0, sigma, sigma)
    )
    noise /= noise.std(axis=(1, 2), keepdims=True)
    return noise


def soft_prediction(rng: np.random.Generator, targets_AHW: Bools) -> npt.NDArray[np.float64]:
    """What a network might say: the annotators' mean, blurred, and ridges that none of them drew."""
    blurred_HW = ndimage.gaussian_filter(targets_AHW.mean(axis=0), 1.5)
    noise_HW = ndimage.gaussian_filter(rng.standard_normal(blurred_HW.shape), 3)
    ridges_HW = np.exp(-((noise_HW / noise_HW.std()) ** 2) * 4)
    return np.asarray(np.clip(0.8 * blurred_HW / blurred_HW.max() + 0.25 * ridges_HW * rng.random(), 0, 1))


def drawn_image(seed: int) -> Image:
    rng = np.random.default_rng(seed)
    fields_KHW = smooth_noise(rng, sigma=45, fields=14)
    targets = []
    for _ in range(ANNOTATORS):
        shake_HW = 0.04 * smooth_noise(rng, sigma=8, fields=14)
        regions_HW = (fields_KHW + shake_HW)[rng.random(14) < 0.85].argmax(axis=0)
        outline_HW = np.zeros((HEIGHT, WIDTH), bool)
        outline_HW[:, :-1] |= regions_HW[:, :-1] != regions_HW[:, 1:]
        outline_HW[:-1] |= regions_HW[:-1] != regions_HW[1:]
        targets.append(thin(outline_HW))
    targets_AHW = np.stack(targets)
    return soft_prediction(rng, targets_AHW), targets_AHW


def bsds_image(path: Path) -> Image:
    ground_truth = loadmat(path)["groundTruth"][0]
    targets_AHW = np.stack([human["Boundaries"][0, 0].astype(bool) for human in ground_truth])[:ANNOTATORS]
    return soft_prediction(np.random.default_rng(0), targets_AHW), targets_AHW


def timed(images: list[Image], executor: ProcessPoolExecutor | None) -> tuple[float, BoundaryScores]:
    benchmark = BoundaryBenchmark(max_distance=MAX_DISTANCE, executor=executor)
    start = time.perf_counter()
    for image in images:
        benchmark.update(*image)
    scores = benchmark.compute()
    return (time.perf_counter() - start) / len(images), scores


def match_as_bsds(candidates: Candidates, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """The assignment problem that BSDS's `matchEdgeMaps` poses, outliers drawn at random, solved exactly."""
    if not len(candidates.cost_E):
        return candidates.prediction_E, candidates.target_E
    prediction_ids, prediction_E = np.unique(candidates.prediction_E, return_inverse=True)
    target_ids, target_E = np.unique(candidates.target_E, return_inverse=True)
    n1, n2, alone = len(prediction_ids), len(target_ids), candidates.outlier_cost

    def drawn(nodes: int, among: int, skip_own: bool) -> tuple[Ints, Ints]:
        degree = max(0, min(OUTLIER_DEGREE, among - skip_own))
        draws = np.array([rng.permutation(among - skip_own)[:degree] for _ in range(nodes)], np.intp)
        if skip_own:
            draws += draws >= np.arange(nodes)[:, None]
        return np.repeat(np.arange(nodes), degree), draws.ravel()

    of_prediction, of_target = drawn(n1, n1, skip_own=True), drawn(n2, n2, skip_own=True)
    among_outliers = drawn(max(n1, n2), min(n1, n2), skip_own=False)
    outlier_row, outlier_column = among_outliers if n1 < n2 else among_outliers[::-1]
    blocks = [
        (prediction_E, target_E, candidates.cost_E),
        (of_prediction[0], n2 + of_prediction[1], np.full(len(of_prediction[0]), alone)),
        (n1 + of_target[1], of_target[0], np.full(len(of_target[0]), alone)),
        (n1 + outlier_row, n2 + outlier_column, np.full(len(outlier_row), alone)),
        (np.arange(n1), n2 + np.arange(n1), np.full(n1, 100 * alone)),
        (n1 + np.arange(n2), np.arange(n2), np.full(n2, 100 * alone)),
    ]
    row, column, weight = (np.concatenate(part) for part in zip(*blocks, strict=True))
    graph = csr_array((1 + weight, (row, column)), shape=(n1 + n2, n1 + n2))
    row, column = min_weight_full_bipartite_matching(graph)
    real = (row < n1) & (column < n2)
    return prediction_ids[row[real]], target_ids[column[real]]


def scores_as_bsds(images: list[Image], thresholds_T: npt.NDArray[np.float64]) -> tuple[float, float]:
    """odsF of our matching, and of BSDS's, at the same thresholds."""
    rng = np.random.default_rng(0)
    ours, theirs = np.zeros((2, len(thresholds_T), 4), np.int64)
    for probability_HW, targets_AHW in images:
        thinned = edge_nms(probability_HW)
        ours += boundary_counts(thinned, targets_AHW, thresholds_T, MAX_DISTANCE)
        for counts_4, threshold in zip(theirs, thresholds_T, strict=True):
            map_HW = np.asarray(thin(thinned >= threshold), bool)
            matched_N = np.zeros(np.count_nonzero(map_HW), bool)
            for target_HW in targets_AHW:
                candidates = find_candidates(map_HW, target_HW, MAX_DISTANCE * float(np.hypot(*map_HW.shape)))
                prediction_K, target_K = match_as_bsds(candidates, rng)
                matched_N[prediction_K] = True
                counts_4 += len(target_K), np.count_nonzero(target_HW), 0, 0
            counts_4 += 0, 0, np.count_nonzero(matched_N), len(matched_N)
    our_scores, their_scores = (scores_of(thresholds_T, counts, counts[0]) for counts in (ours, theirs))
    return our_scores.ods_f, their_scores.ods_f


def human_agreement(images: list[Image]) -> BoundaryScores:
    """Every human against the others."""
    benchmark = BoundaryBenchmark(max_distance=MAX_DISTANCE, nms_radius=None)
    for _, targets_AHW in images:
        for index, human_HW in enumerate(targets_AHW):
            benchmark.update(human_HW.astype(float), np.delete(targets_AHW, index, axis=0))
    return benchmark.compute()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--bsds", type=Path, help="folder of BSDS500 ground truth (*.mat)")
    arguments = parser.parse_args()
    if arguments.bsds is None:
        images = [drawn_image(seed) for seed in range(arguments.images)]
    else:
        images = [bsds_image(path) for path in sorted(arguments.bsds.glob("*.mat"))[: arguments.images]]

    rows: dict[str, float] = {}
    cpu_start_s = time.process_time()
    rows["seconds per image, one process"], scores = timed(images, None)
    rows["CPU seconds per image, one process"] = (time.process_time() - cpu_start_s) / len(images)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as executor:
        timed(images[:1], executor)  # starts the processes
        rows["seconds per image, two processes"], _ = timed(images, executor)
        rows["seconds for one image alone, two processes"] = max(
            timed([image], executor)[0] for image in images
        )
    rows |= {"odsF": scores.ods_f, "oisF": scores.ois_f, "AP": scores.ap}
    ours, theirs = scores_as_bsds(images, np.arange(1, 10) / 10)
    rows |= {"odsF at 9 thresholds": ours, "odsF at 9 thresholds, BSDS's graph": theirs}
    if arguments.bsds is not None:
        human = human_agreement(images)
        rows |= {
            "human against the others, F": human.ods_f,
            "human against the others, precision": human.ods_precision,
            "human against the others, recall": human.ods_recall,
        }

    table = Table("figure", "value", title=f"{len(images)} images")
    for name, value in rows.items():
        table.add_row(name, f"{value:.4f}")
    Console().print(table)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
