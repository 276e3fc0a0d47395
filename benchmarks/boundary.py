"""Seconds that odsF takes per image, and how far its scores are from those of the BSDS benchmark's own code.

    python -m benchmarks.boundary [--images 4] [--bsds FOLDER]

Images are 481×321 with 5 annotators and 99 thresholds: drawn (regions, outlined by annotators who disagree,
and a soft prediction of them), or with --bsds from a folder of BSDS500 images and ground truth (*.jpg and
*.mat), where an edge detector predicts, every human is also scored against the others, and outlines of BSDS's
segmentations are compared with BSDS's own boundaries, which MATLAB thinned. Where pyEdgeEval is installed
(pip install pyEdgeEval; it needs a C++ compiler), which compiles BSDS's matching, that scores the same
predictions, which takes minutes. Prints a table, then the same as one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from scipy import ndimage
from scipy.io import loadmat
from skimage.io import imread
from skimage.morphology import thin

from teachercache.student.datasets.labels import partition_boundaries
from teachercache.student.metrics import BoundaryBenchmark
from teachercache.student.metrics.boundary import BoundaryScores, edge_nms, scores_of
from teachercache.student.metrics.matching import Bools

Image = tuple[npt.NDArray[np.float64], Bools]  # a prediction (H, W) and the maps of its annotators (A, H, W)

HEIGHT, WIDTH, ANNOTATORS = 321, 481, 5
MAX_DISTANCE = 0.0075
THRESHOLD_STEP = 6  # of the 99, for BSDS's own code: a minute an image otherwise


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
    """The gradient of an image smoothed by 2 pixels, strongest of its colours, as its prediction."""
    ground_truth = loadmat(path)["groundTruth"][0]
    targets_AHW = np.stack([human["Boundaries"][0, 0].astype(bool) for human in ground_truth])
    image_HW3 = imread(path.with_suffix(".jpg")) / 255
    slopes = [ndimage.gaussian_filter(image_HW3, (2, 2, 0), order=order) for order in ((0, 1, 0), (1, 0, 0))]
    gradient_HW = np.hypot(*slopes).max(axis=2)
    return np.clip(gradient_HW / np.quantile(gradient_HW, 0.995), 0, 1), targets_AHW


def unlike_outlines(folder: Path) -> int:
    """Pixels by which our outlines of all segmentations differ from BSDS's own boundaries."""
    humans = [human for path in folder.glob("*.mat") for human in loadmat(path)["groundTruth"][0]]
    return sum(
        int(np.count_nonzero(partition_boundaries(human["Segmentation"][0, 0]) != human["Boundaries"][0, 0]))
        for human in humans
    )


def timed(images: list[Image], executor: ProcessPoolExecutor | None) -> tuple[float, BoundaryScores]:
    benchmark = BoundaryBenchmark(max_distance=MAX_DISTANCE, executor=executor)
    start = time.perf_counter()
    for image in images:
        benchmark.update(*image)
    scores = benchmark.compute()
    return (time.perf_counter() - start) / len(images), scores


def scores_by_bsds(images: list[Image]) -> BoundaryScores:
    """What the benchmark's own C++ matches, thresholded and thinned as its `evaluation_bdry_image` does."""
    from pyEdgeEval import correspond_pixels

    thresholds_T = BoundaryBenchmark().thresholds_T[::THRESHOLD_STEP]
    sums, best = np.zeros((len(thresholds_T), 4), np.int64), np.zeros(4, np.int64)
    for probability_HW, targets_AHW in images:
        thinned_HW, counts = edge_nms(probability_HW), np.zeros_like(sums)
        for counts_4, threshold in zip(counts, thresholds_T, strict=True):
            map_HW = thin(thinned_HW >= threshold)
            correct_HW = np.zeros_like(map_HW)
            for target_HW in targets_AHW:
                of_prediction_HW, of_target_HW, *_ = correspond_pixels(map_HW, target_HW, MAX_DISTANCE)
                correct_HW |= of_prediction_HW > 0
                counts_4[:2] += [np.count_nonzero(of_target_HW), np.count_nonzero(target_HW)]
            counts_4[2:] = [np.count_nonzero(correct_HW), np.count_nonzero(map_HW)]
        sums += counts
        best += counts[np.argmax([scores_of(thresholds_T[:1], one[None], one).ods_f for one in counts])]
    return scores_of(thresholds_T, sums, best)


def our_scores(images: list[Image]) -> BoundaryScores:
    """Ours at the same thresholds."""
    thresholds_T = BoundaryBenchmark().thresholds_T[::THRESHOLD_STEP]
    benchmark = BoundaryBenchmark(max_distance=MAX_DISTANCE, num_thresholds=len(thresholds_T))
    benchmark.thresholds_T = thresholds_T
    for image in images:
        benchmark.update(*image)
    return benchmark.compute()


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
    parser.add_argument("--bsds", type=Path, help="folder of BSDS500 images (*.jpg) and ground truth (*.mat)")
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
    if find_spec("pyEdgeEval"):
        start = time.perf_counter()
        ours = our_scores(images)
        between = time.perf_counter()
        theirs = scores_by_bsds(images)
        rows["BSDS's own matching, times our seconds"] = (time.perf_counter() - between) / (between - start)
        for name in ("ods_f", "ois_f", "ap"):
            rows |= {
                f"{name}, every {THRESHOLD_STEP}th threshold": getattr(ours, name),
                f"{name}, the same by BSDS's own matching": getattr(theirs, name),
            }
    if arguments.bsds is not None:
        human = human_agreement(images)
        rows |= {
            "human against the others, F": human.ods_f,
            "human against the others, precision": human.ods_precision,
            "human against the others, recall": human.ods_recall,
            "outlines of segmentations, pixels unlike BSDS's own": unlike_outlines(arguments.bsds),
        }

    table = Table("figure", "value", title=f"{len(images)} images")
    for name, value in rows.items():
        table.add_row(name, f"{value:.4f}")
    Console().print(table)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
