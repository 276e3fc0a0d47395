"""Metrics of the dense tasks (SAK, B.4): segmentation, saliency, surface normals, depth; and of them all.

Legend: B images, C classes, H, W pixels, T thresholds. Ratios are fractions, not percent.
`update` takes tensors on any device; `compute` returns nan if there was nothing to measure.
"""

import math
from collections.abc import Collection, Mapping
from typing import Literal

import torch
from torch import Tensor

from teachercache.pipeline.errors import ArgumentError
from teachercache.student.metrics.sum_metric import MeanMetric, SumMetric, check_same_shape

IGNORE_INDEX = 255
"""The label of unannotated pixels, in every data set of the multi-task community."""

_BETA_SQUARED = 0.3  # weighs precision over recall, both in SAK and in the salient-object literature


class MeanIoU(SumMetric):
    """Mean over classes of intersection over union, pooled over all pixels.

    `absent`: a class that neither a prediction nor a label names counts 0 ("zero", as in SAK's code and its
    predecessors), or is left out of the mean ("skip", the usual convention).
    """

    def __init__(self, num_classes: int, absent: Literal["zero", "skip"] = "zero") -> None:
        super().__init__(confusion_CC=torch.zeros(num_classes, num_classes, dtype=torch.int64))
        self.num_classes = num_classes
        self.absent = absent

    def update(self, prediction_BHW: Tensor, target_BHW: Tensor) -> None:
        """Class indices, of any integer dtype. Raises `ValueError` for an index outside the classes."""
        check_same_shape(prediction_BHW.shape, target_BHW.shape)
        valid_BHW = target_BHW != IGNORE_INDEX
        prediction_N, target_N = prediction_BHW[valid_BHW].long(), target_BHW[valid_BHW].long()
        for name, labels_N in (("prediction", prediction_N), ("target", target_N)):
            outside_N = labels_N[(labels_N < 0) | (labels_N >= self.num_classes)]
            if outside_N.numel():
                raise ArgumentError(
                    f"The {name} names a class that does not exist.",
                    got=f"class {int(outside_N[0])}",
                    expected=f"0 to {self.num_classes - 1}, or {IGNORE_INDEX} in a target",
                    do="check num_classes",
                )
        pair_N = target_N * self.num_classes + prediction_N
        counts = torch.bincount(pair_N, minlength=self.num_classes**2).cpu()
        self._sums["confusion_CC"] += counts.view(self.num_classes, self.num_classes)

    def per_class(self) -> Tensor:
        """IoU of every class, float64 (C,); an absent class is nan."""
        confusion_CC = self._sums["confusion_CC"]
        hits_C = confusion_CC.diagonal()
        return hits_C / (confusion_CC.sum(0) + confusion_CC.sum(1) - hits_C).double()

    def compute(self) -> float:
        iou_C = self.per_class()
        return float(iou_C.nan_to_num(0).mean() if self.absent == "zero" else iou_C.nanmean())


class MaxF(SumMetric):
    """Maximum over thresholds of the F-measure of saliency, beta² = 0.3.

    `definition`
        "pooled": one F-measure over all pixels of the data set, 19 thresholds 0.05 … 0.95 (SAK's code).
        "per_image": the F-measures of the images are averaged at each of the 255 thresholds 1/255 … 1
        (the salient-object literature; an image without salient pixels counts 0).
    """

    def __init__(self, definition: Literal["pooled", "per_image"] = "pooled") -> None:
        self.definition = definition
        if definition == "pooled":
            self.thresholds_T = torch.arange(1, 20) / 20
            super().__init__(counts_3T=torch.zeros(3, 19, dtype=torch.int64))
        else:
            self.thresholds_T = torch.arange(1, 256) / 255
            super().__init__(f_T=torch.zeros(255, dtype=torch.float64), images=torch.tensor(0))

    def update(self, prediction_BHW: Tensor, target_BHW: Tensor) -> None:
        """Probabilities in [0, 1], and labels 0, 1 or `IGNORE_INDEX`."""
        check_same_shape(prediction_BHW.shape, target_BHW.shape)
        for prediction_HW, target_HW in zip(prediction_BHW, target_BHW, strict=True):
            counts_3T = self._count(prediction_HW, target_HW)
            if self.definition == "pooled":
                self._sums["counts_3T"] += counts_3T
            else:
                self._sums["f_T"] += _f_measure(counts_3T)
                self._sums["images"] += 1

    def _count(self, prediction_HW: Tensor, target_HW: Tensor) -> Tensor:
        """(3, T), on the CPU: pixels hit, predicted and salient at every threshold."""
        valid_HW = target_HW != IGNORE_INDEX
        salient_N = target_HW[valid_HW] > 0
        # The number of thresholds that a pixel reaches tells for each threshold whether it is reached.
        thresholds_T = self.thresholds_T.to(prediction_HW.device)
        reached_N = torch.bucketize(prediction_HW[valid_HW].float(), thresholds_T, right=True)
        bins = len(thresholds_T) + 1
        histogram_2b = torch.bincount(salient_N * bins + reached_N, minlength=2 * bins).view(2, bins).cpu()
        at_least_2b = histogram_2b.flip(1).cumsum(1).flip(1)
        hits_T = at_least_2b[1, 1:]
        return torch.stack([hits_T, at_least_2b.sum(0)[1:], at_least_2b[1, 0].expand_as(hits_T)])

    def compute(self) -> float:
        sums = self._sums
        pooled = self.definition == "pooled"
        f_T = _f_measure(sums["counts_3T"]) if pooled else sums["f_T"] / sums["images"]
        return float(f_T.max())


def _f_measure(counts_3T: Tensor) -> Tensor:
    # (1 + β²)PR / (β²P + R) with P = hits / predicted and R = hits / salient
    hits_T, predicted_T, salient_T = counts_3T
    denominator_T = _BETA_SQUARED * salient_T.double() + predicted_T
    return ((1 + _BETA_SQUARED) * hits_T / denominator_T).nan_to_num(0)


def have_direction(target_B3HW: Tensor) -> Tensor:
    """(B, H, W): where surface normals are annotated, and are not the zero vector."""
    return (target_B3HW != IGNORE_INDEX).all(1) & (target_B3HW != 0).any(1)


class MeanAngularError(MeanMetric):
    """Mean angle between predicted and true surface normals, in degrees, over all annotated pixels.

    Pixels whose target has `IGNORE_INDEX` in a channel or no direction (the zero vector) are left out.
    A prediction of zero length is 90° off, as in SAK's code.
    """

    def update(self, prediction_B3HW: Tensor, target_B3HW: Tensor) -> None:
        """Vectors of any length; both are normalised here."""
        check_same_shape(prediction_B3HW.shape, target_B3HW.shape)
        valid_BHW = have_direction(target_B3HW)
        prediction_N3, target_N3 = (
            torch.nn.functional.normalize(normals.movedim(1, -1)[valid_BHW].double(), dim=1)
            for normals in (prediction_B3HW, target_B3HW)
        )
        # The arc cosine of a dot product would lose half the digits of small angles.
        angle_N = 2 * torch.atan2(
            (prediction_N3 - target_N3).norm(dim=1), (prediction_N3 + target_N3).norm(dim=1)
        )
        self._add(angle_N.rad2deg())


class RMSE(MeanMetric):
    """Root mean squared error of depth, in the unit of the depths, pooled over pixels with 0 < depth < 80.

    Predictions below zero count as zero (both as in SAK's code).
    """

    def update(self, prediction_BHW: Tensor, target_BHW: Tensor) -> None:
        check_same_shape(prediction_BHW.shape, target_BHW.shape)
        valid_BHW = (target_BHW > 0) & (target_BHW < 80)
        error_N = prediction_BHW[valid_BHW].double().clamp(min=0) - target_BHW[valid_BHW]
        self._add(error_N.square())

    def compute(self) -> float:
        return math.sqrt(super().compute())


def mtl_gain(
    scores: Mapping[str, float], single_task: Mapping[str, float], lower_is_better: Collection[str]
) -> float:
    """Mean relative gain over the single-task baseline (SAK, Eq. 7), a fraction: times 100 it is Δm%.

    `scores`, `single_task`: task → its metric, in any unit that is the same in both.
    `lower_is_better`: the tasks whose metric is an error (normals, depth).
    Raises `ValueError` when the tasks differ or a baseline is zero.
    """
    same = scores.keys() == single_task.keys() >= set(lower_is_better)
    if not (scores and same and all(single_task.values())):
        raise ArgumentError(
            "The multi-task gain compares the same tasks, with baselines that are not zero.",
            got=f"{dict(scores)}, baselines {dict(single_task)}, errors {sorted(lower_is_better)}",
            expected="one score and one baseline other than 0 for every task",
            do="leave out the tasks that have no baseline, from every argument",
        )
    gains = [
        (-1 if task in lower_is_better else 1) * (score - single_task[task]) / single_task[task]
        for task, score in scores.items()
    ]
    return sum(gains) / len(gains)
