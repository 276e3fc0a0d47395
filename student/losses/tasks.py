"""The losses of the tasks, and their weighted sum (SAK, B.5 and Eq. 6).

B  images     C  channels of a prediction     H, W  the image

Each loss is a mean over the pixels of the batch that are annotated, and 0 where none is. It is computed in
at least float32, autocast or not, and without waiting for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from teachercache.pipeline.errors import explain
from teachercache.student.metrics.dense import IGNORE_INDEX
from teachercache.student.models.student import require_known

BOUNDARY_WEIGHT = 0.95  # of boundary pixels; the others weigh 1 - 0.95


def cross_entropy(logits_BCHW: Tensor, labels_BHW: Tensor) -> Tensor:
    """Of classes, segmentation and parts; labels of any integer dtype."""
    loss_BHW = F.cross_entropy(logits_BCHW, labels_BHW.long(), ignore_index=IGNORE_INDEX, reduction="none")
    return _mean(loss_BHW, labels_BHW != IGNORE_INDEX)


def balanced_cross_entropy(logits_B2HW: Tensor, labels_BHW: Tensor) -> Tensor:
    """Of saliency (class 1): a class weighs the share that the other has of the batch's annotated pixels."""
    valid_BHW, salient_BHW = labels_BHW != IGNORE_INDEX, labels_BHW == 1
    share = _mean(salient_BHW.to(logits_B2HW.dtype), valid_BHW)
    loss_BHW = F.cross_entropy(logits_B2HW, labels_BHW.long(), ignore_index=IGNORE_INDEX, reduction="none")
    return _mean(loss_BHW * torch.where(salient_BHW, 1 - share, share), valid_BHW)


def normals_l1(normals_B3HW: Tensor, target_B3HW: Tensor) -> Tensor:
    """|n - t| summed over x, y and z, n scaled to unit length. A pixel is left out whose target has no
    direction or the ignore index in a channel."""
    valid_BHW = (target_B3HW != IGNORE_INDEX).all(1) & (target_B3HW != 0).any(1)
    return _mean((F.normalize(normals_B3HW, dim=1) - target_B3HW).abs().sum(1), valid_BHW)


def depth_l1(depth_B1HW: Tensor, target_BHW: Tensor) -> Tensor:
    """|d - t| in the unit of the depths; without a measurement where t ≤ 0."""
    return _mean((depth_B1HW.squeeze(1) - target_BHW).abs(), target_BHW > 0)


def boundary_cross_entropy(logits_B1HW: Tensor, labels_BHW: Tensor) -> Tensor:
    """Binary cross-entropy that weighs a boundary pixel 0.95 and another 0.05."""
    logits_BHW = logits_B1HW.squeeze(1)
    boundary_BHW = (labels_BHW == 1).to(logits_BHW.dtype)
    weight_BHW = BOUNDARY_WEIGHT * boundary_BHW + (1 - BOUNDARY_WEIGHT) * (1 - boundary_BHW)
    loss_BHW = F.binary_cross_entropy_with_logits(logits_BHW, boundary_BHW, weight_BHW, reduction="none")
    return _mean(loss_BHW, labels_BHW != IGNORE_INDEX)


@dataclass(frozen=True)
class TaskLoss:
    """`channels` of the prediction and of the target, None for any number and for a target without a
    channel axis."""

    function: Callable[[Tensor, Tensor], Tensor]
    weight: float
    channels: int | None = None
    target_channels: int | None = None


TASK_LOSSES: dict[str, TaskLoss] = {
    "semseg": TaskLoss(cross_entropy, 1.0),
    "parts": TaskLoss(cross_entropy, 2.0),
    "saliency": TaskLoss(balanced_cross_entropy, 5.0, channels=2),
    "normals": TaskLoss(normals_l1, 10.0, channels=3, target_channels=3),
    "boundary": TaskLoss(boundary_cross_entropy, 50.0, channels=1),
    "depth": TaskLoss(depth_l1, 1.0, channels=1),
}
"""By name of the task: its loss and the weight that the paper gives it."""


@dataclass
class TaskLossOutput:
    """`total` has the gradient; `tasks` are the losses before their weights, detached."""

    total: Tensor
    tasks: dict[str, Tensor]


class MultiTaskLoss(nn.Module):
    """Σ_tasks w_t · L_t, the second term of SAK's Eq. 6, with the weights of B.5 where none is given.

    Raises `RecipeError` for a task that has no loss, and for the weight of a task that is not trained.
    """

    def __init__(self, tasks: Iterable[str], weights: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        for task in self.tasks:
            require_known("task", task, TASK_LOSSES)
        for task in weights or {}:
            require_known("task of this run", task, self.tasks)
        self.weights = {task: TASK_LOSSES[task].weight for task in self.tasks} | dict(weights or {})

    def forward(self, predictions: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> TaskLossOutput:
        """`predictions` (B, C, H, W) as the student gives them; `targets` (B, H, W), normals (B, 3, H, W).

        Raises `ValueError` where their shapes do not fit each other and the task.
        """
        losses = {}
        for task in self.tasks:
            prediction_BCHW, target = predictions[task], targets[task]
            _require_shapes(task, prediction_BCHW, target)
            dtype = torch.promote_types(prediction_BCHW.dtype, torch.float32)
            with torch.autocast(prediction_BCHW.device.type, enabled=False):
                losses[task] = TASK_LOSSES[task].function(prediction_BCHW.to(dtype), target)
        total = torch.stack([self.weights[task] * loss for task, loss in losses.items()]).sum()
        return TaskLossOutput(total, {task: loss.detach() for task, loss in losses.items()})


def _mean(values_BHW: Tensor, valid_BHW: Tensor) -> Tensor:
    return torch.where(valid_BHW, values_BHW, 0).sum() / valid_BHW.sum().clamp(min=1)


def _require_shapes(task: str, prediction_BCHW: Tensor, target: Tensor) -> None:
    loss = TASK_LOSSES[task]
    batch, channels, *size = prediction_BCHW.shape
    expected = (batch, *([loss.target_channels] if loss.target_channels else []), *size)
    if loss.channels not in (None, channels) or tuple(target.shape) != expected:
        raise ValueError(
            explain(
                f"The prediction and the target of {task} do not fit each other.",
                got=f"a prediction {tuple(prediction_BCHW.shape)}, a target {tuple(target.shape)}",
                expected=f"{loss.channels or 'any number of'} channels predicted, a target {expected}",
                do="check the channels in the student's `tasks`, and the size of its images",
            )
        )
