"""Top-1 accuracy of a classifier."""

from __future__ import annotations

import torch
from torch import Tensor

from teachercache.student.metrics.sum_metric import SumMetric, check_same_shape


class Top1(SumMetric):
    """The fraction of samples whose predicted class is the true one; nan without samples."""

    def __init__(self) -> None:
        super().__init__(
            correct=torch.zeros((), dtype=torch.int64), samples=torch.zeros((), dtype=torch.int64)
        )

    def update(self, prediction_B: Tensor, target_B: Tensor) -> None:
        """Class indices."""
        check_same_shape(prediction_B.shape, target_B.shape)
        self._sums["correct"] += (prediction_B == target_B).sum().cpu()
        self._sums["samples"] += len(target_B)

    def compute(self) -> float:
        return float(self._sums["correct"].double() / self._sums["samples"])
