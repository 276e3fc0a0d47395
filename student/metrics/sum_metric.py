"""Metrics whose entire state is sums: they stream, merge, and add up over processes."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from teachercache.pipeline.errors import ArgumentError


class SumMetric:
    """A metric that is a function of sums over the data.

    Counts are int64, so they do not depend on how the data is split. The float64 sums (angles, squared
    errors, F-measures of images) depend on it only by rounding, about 1e-15 per term.
    """

    def __init__(self, **sums: Tensor) -> None:
        self._sums = sums

    def state(self) -> dict[str, Tensor]:
        """The sums by name, on the CPU: the entire state of this metric."""
        return self._sums

    def merge(self, other: Self) -> None:
        """Add the sums of `other`, a metric made with the same arguments."""
        mine, theirs = self.state(), other.state()
        shapes, other_shapes = ({n: tuple(s.shape) for n, s in sums.items()} for sums in (mine, theirs))
        if type(self) is not type(other) or shapes != other_shapes:
            raise ArgumentError(
                "Only metrics of one kind, made with the same arguments, can be merged.",
                got=f"{type(other).__name__} {other_shapes}",
                expected=f"{type(self).__name__} {shapes}",
                do="make all parts of a metric with the same arguments",
            )
        for name, addend in theirs.items():
            mine[name] += addend

    def reduce(self, add_up: Callable[[Tensor], Tensor]) -> None:
        """Replace every sum by its sum over all processes; call this once, after the last update.

        `add_up` sums a CPU tensor over the processes; with accelerate
        `lambda x: accelerator.reduce(x.to(accelerator.device), "sum").cpu()`.
        """
        sums = self.state()
        for name in sums:
            sums[name] = add_up(sums[name])


class MeanMetric(SumMetric):
    """The mean of values, such as the errors of pixels; nan without any."""

    def __init__(self) -> None:
        super().__init__(total=torch.tensor(0.0, dtype=torch.float64), count=torch.tensor(0))

    def _add(self, values_N: Tensor) -> None:
        self._sums["total"] += values_N.double().sum().cpu()
        self._sums["count"] += len(values_N)

    def compute(self) -> float:
        return float(self._sums["total"] / self._sums["count"])


class Top1(MeanMetric):
    """The fraction of samples whose predicted class is the true one; nan without samples."""

    def update(self, prediction_B: Tensor, target_B: Tensor) -> None:
        """Class indices."""
        check_same_shape(prediction_B.shape, target_B.shape)
        self._add(prediction_B == target_B)


def check_same_shape(prediction_shape: tuple[int, ...], target_shape: tuple[int, ...]) -> None:
    """Raise `ValueError` unless prediction and target have the same shape: broadcasting would hide it."""
    if tuple(prediction_shape) != tuple(target_shape):
        raise ArgumentError(
            "Prediction and target differ in shape.",
            got=f"prediction {tuple(prediction_shape)}, target {tuple(target_shape)}",
            expected="the same shape",
            do="resize the prediction to the size of the target, and drop channels of size 1",
        )
