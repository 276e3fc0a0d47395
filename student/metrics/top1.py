"""Top-1 accuracy of a classifier."""

from __future__ import annotations

from torch import Tensor

from teachercache.student.metrics.sum_metric import MeanMetric, check_same_shape


class Top1(MeanMetric):
    """The fraction of samples whose predicted class is the true one; nan without samples."""

    def update(self, prediction_B: Tensor, target_B: Tensor) -> None:
        """Class indices."""
        check_same_shape(prediction_B.shape, target_B.shape)
        self._add(prediction_B == target_B)
