"""For each task, what a prediction means, how it is measured, and how it is shown.

B  images     C  channels     H, W  the image
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass

import matplotlib
import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from teachercache.student.metrics import RMSE, BoundaryBenchmark, MaxF, MeanAngularError, MeanIoU, mtl_gain
from teachercache.student.metrics.dense import IGNORE_INDEX

Rgb = NDArray[np.uint8]
_MAX_DEPTH_M = 10.0  # in pictures; indoor scenes and ours end there


Metric = MeanIoU | MaxF | MeanAngularError | RMSE | BoundaryBenchmark


@dataclass(frozen=True)
class TaskOutput:
    """`estimate`: the student's (B, C, H, W) → classes (B, H, W), probabilities (B, H, W), unit vectors
    (B, 3, H, W) or metres (B, H, W). `picture` shows one of them, or one label, as uint8 RGB; `encode` turns
    it into the pixels of a file.
    `new_metric` takes the number of channels and, for boundaries, the largest distance of a match as a
    fraction of the diagonal, and an executor. `new_second` is another definition of the metric, with its own
    name, which is reported in addition and does not enter gains."""

    title: str
    metric: str
    unit: str
    estimate: Callable[[Tensor], Tensor]
    picture: Callable[[NDArray], Rgb]
    encode: Callable[[NDArray], NDArray]
    new_metric: Callable[[int, float, Executor | None], Metric]
    lower_is_better: bool = False
    new_second: tuple[str, Callable[[], Metric]] | None = None


def update(metric: Metric, estimates: Tensor, labels: Tensor) -> None:
    """Add a batch: results of `TaskOutput.estimate`, and the labels. Boundaries are measured image by image,
    without the padding."""
    if not isinstance(metric, BoundaryBenchmark):
        metric.update(estimates, labels)
        return
    for probability_HW, label_HW in zip(estimates.float().cpu(), labels.cpu(), strict=True):
        rows, columns = (label_HW != IGNORE_INDEX).nonzero(as_tuple=True)
        if len(rows):
            box = slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)
            metric.update(probability_HW[box], label_HW[box] == 1)


def value(metric: Metric) -> float:
    """The metric's value in percent, degrees or metres."""
    if isinstance(metric, BoundaryBenchmark):
        return 100 * metric.compute().ods_f
    return metric.compute() * (100 if isinstance(metric, MeanIoU | MaxF) else 1)


def further(task: str, metric: Metric, second: Metric | None) -> dict[str, float]:
    """Other measures of a task by name, in percent: oisF and AP for boundaries, else that of `new_second`."""
    if isinstance(metric, BoundaryBenchmark):
        scores = metric.compute()
        return {"oisF": 100 * scores.ois_f, "AP": 100 * scores.ap}
    named = TASK_OUTPUTS[task].new_second
    return {} if named is None or second is None else {named[0]: value(second)}


def gains(scores: Mapping[str, float], baseline: Mapping[str, float]) -> dict[str, float]:
    """By task of both: the gain over a single-task baseline in percent; their mean is Δm (SAK, Eq. 7)."""
    return {
        task: 100 * mtl_gain({task: scores[task]}, {task: base}, [task] * TASK_OUTPUTS[task].lower_is_better)
        for task, base in baseline.items()
        if task in scores
    }


def _classes(logits_BCHW: Tensor) -> Tensor:
    return logits_BCHW.argmax(1)


def _salient(logits_B2HW: Tensor) -> Tensor:
    return logits_B2HW.softmax(1)[:, 1]


def _unit(normals_B3HW: Tensor) -> Tensor:
    return F.normalize(normals_B3HW, dim=1)


def _depth(depth_B1HW: Tensor) -> Tensor:
    return depth_B1HW.squeeze(1)


def _probability(logits_B1HW: Tensor) -> Tensor:
    return logits_B1HW.squeeze(1).sigmoid()


def _palette_picture(classes_HW: NDArray) -> Rgb:
    """Class 0 is black, unannotated pixels are white, the others have colours in equal lightness steps."""
    names = "tab20", "tab20b", "tab20c"
    colours = np.vstack([matplotlib.colormaps[name](np.arange(20))[:, :3] for name in names])
    palette = np.full((256, 3), 255, np.uint8)
    palette[0] = 0
    palette[1 : 1 + len(colours)] = np.rint(255 * colours)
    return palette[classes_HW.astype(np.uint8)]


def _grey_picture(values_HW: NDArray) -> Rgb:
    grey_HW = np.where(values_HW == IGNORE_INDEX, 1, values_HW).clip(0, 1)
    return np.repeat(np.rint(255 * grey_HW).astype(np.uint8)[..., None], 3, axis=2)


def _normals_picture(normals_3HW: NDArray) -> Rgb:
    known_HW = (normals_3HW != IGNORE_INDEX).all(0) & (normals_3HW != 0).any(0)
    rgb = np.rint(127.5 * (1 + np.moveaxis(normals_3HW, 0, 2))).clip(0, 255)
    return np.where(known_HW[..., None], rgb, 255).astype(np.uint8)


def _depth_picture(depth_HW: NDArray) -> Rgb:
    rgba = matplotlib.colormaps["viridis"](1 - depth_HW / _MAX_DEPTH_M)
    return np.where((depth_HW > 0)[..., None], np.rint(255 * rgba[..., :3]), 255).astype(np.uint8)


def _bytes(classes_HW: NDArray) -> NDArray:
    return classes_HW.astype(np.uint8)


def _share(probability_HW: NDArray) -> NDArray:
    return np.rint(255 * probability_HW).astype(np.uint8)


def _millimetres(depth_HW: NDArray) -> NDArray:
    return np.rint(1000 * depth_HW).clip(0, 65535).astype(np.uint16)


def _miou(channels: int, *_: object) -> MeanIoU:
    return MeanIoU(channels)


def _boundary(_: int, distance: float, executor: Executor | None) -> BoundaryBenchmark:
    return BoundaryBenchmark(max_distance=distance, executor=executor)


TASK_OUTPUTS: dict[str, TaskOutput] = {
    "semseg": TaskOutput("Segmentation", "mIoU", "%", _classes, _palette_picture, _bytes, _miou),
    "parts": TaskOutput("Human parts", "mIoU", "%", _classes, _palette_picture, _bytes, _miou),
    "saliency": TaskOutput(
        "Saliency",
        "maxF",
        "%",
        _salient,
        _grey_picture,
        _share,
        lambda *_: MaxF(),
        new_second=("maxF per image", lambda: MaxF("per_image")),
    ),
    "normals": TaskOutput(
        "Normals", "mErr", "°", _unit, _normals_picture, _normals_picture, lambda *_: MeanAngularError(), True
    ),
    "depth": TaskOutput(
        "Depth", "RMSE", "m", _depth, _depth_picture, _millimetres, lambda *_: RMSE(), lower_is_better=True
    ),
    "boundary": TaskOutput("Boundaries", "odsF", "%", _probability, _grey_picture, _share, _boundary),
}
