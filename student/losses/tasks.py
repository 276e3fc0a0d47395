"""The losses of the tasks, and their weighted sum (SAK, B.5 and Eq. 6).

B  images     C  channels of a prediction     H, W  the image

Each loss is a mean over the annotated pixels of the batch, and 0 if there are none. It is computed in at
least float32, autocast or not, and without waiting for the device.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from teachercache.pipeline.errors import ArgumentError, require_known
from teachercache.student.metrics.dense import IGNORE_INDEX, have_direction

BOUNDARY_WEIGHT = 0.95  # for boundary pixels; the others weigh 1 - 0.95


def cross_entropy(logits_BCHW: Tensor, labels_BHW: Tensor) -> Tensor:
    """The loss of segmentation and parts; labels of any integer dtype."""
    loss_BHW = F.cross_entropy(logits_BCHW, labels_BHW.long(), ignore_index=IGNORE_INDEX, reduction="none")
    return _mean(loss_BHW, labels_BHW != IGNORE_INDEX)


def balanced_cross_entropy(logits_B2HW: Tensor, labels_BHW: Tensor) -> Tensor:
    """The loss of saliency (class 1): each class weighs the other's share of the batch's annotated pixels."""
    valid_BHW, salient_BHW = labels_BHW != IGNORE_INDEX, labels_BHW == 1
    share = _mean(salient_BHW.to(logits_B2HW.dtype), valid_BHW)
    loss_BHW = F.cross_entropy(logits_B2HW, labels_BHW.long(), ignore_index=IGNORE_INDEX, reduction="none")
    return _mean(loss_BHW * torch.where(salient_BHW, 1 - share, share), valid_BHW)


def normals_l1(normals_B3HW: Tensor, target_B3HW: Tensor) -> Tensor:
    """|n - t| summed over x, y and z, with n scaled to unit length. Pixels whose target has no direction, or
    the ignore index in a channel, are left out."""
    return _mean((F.normalize(normals_B3HW, dim=1) - target_B3HW).abs().sum(1), have_direction(target_B3HW))


def depth_l1(depth_B1HW: Tensor, target_BHW: Tensor) -> Tensor:
    """|d - t| in the unit of the depths; t ≤ 0 means no measurement."""
    return _mean((depth_B1HW.squeeze(1) - target_BHW).abs(), target_BHW > 0)


def boundary_cross_entropy(logits_B1HW: Tensor, labels_BHW: Tensor) -> Tensor:
    """Binary cross-entropy that weighs boundary pixels 0.95 and all others 0.05."""
    logits_BHW = logits_B1HW.squeeze(1)
    boundary_BHW = (labels_BHW == 1).to(logits_BHW.dtype)
    weight_BHW = BOUNDARY_WEIGHT * boundary_BHW + (1 - BOUNDARY_WEIGHT) * (1 - boundary_BHW)
    loss_BHW = F.binary_cross_entropy_with_logits(logits_BHW, boundary_BHW, weight_BHW, reduction="none")
    return _mean(loss_BHW, labels_BHW != IGNORE_INDEX)


@dataclass(frozen=True)
class TaskLoss:
    """`channels` of the prediction (None for any number) and of the target (None for no channel axis)."""

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
"""By task: its loss and the paper's weight."""


@dataclass
class TaskLossOutput:
    """`total` has the gradient; `tasks` are the losses before their weights, detached."""

    total: Tensor
    tasks: dict[str, Tensor]


class MultiTaskLoss(nn.Module):
    """Σ_tasks w_t · L_t, the second term of SAK's Eq. 6, by default with the weights of B.5.

    Raises `RecipeError` for a task without a loss, and for the weight of a task that is not trained.
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
        """`predictions` (B, C, H, W) from the student; `targets` (B, H, W), normals (B, 3, H, W).

        Raises `ValueError` unless their shapes fit each other and the task.
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
        raise ArgumentError(
            f"The prediction and the target of {task} do not fit each other.",
            got=f"a prediction {tuple(prediction_BCHW.shape)}, a target {tuple(target.shape)}",
            expected=f"{loss.channels or 'any number of'} channels predicted, a target {expected}",
            do="check the channels in the student's `tasks`, and the size of its images",
        )
