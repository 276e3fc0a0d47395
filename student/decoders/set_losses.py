"""What predictions as a set cost against the things that are there: each thing is matched with one of them.

B  images     Q  queries     C  classes     N  things of an image     P  points
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, distributed, nn

from teachercache.pipeline.errors import extra

with extra("decoders"):
    from transformers import Mask2FormerConfig
    from transformers.loss.loss_for_object_detection import generalized_box_iou, sigmoid_focal_loss
    from transformers.models.mask2former import modeling_mask2former as mask2former
    from transformers.models.rt_detr.modeling_rt_detr import (
        center_to_corners_format,
        corners_to_center_format,
    )

from torchvision.ops import masks_to_boxes

Matches = list[tuple[Tensor, Tensor]]
"""For each image: the queries, and the things that these are matched with."""

WEIGHTS = {"class": 4.0, "box": 5.0, "giou": 2.0, "mask": 5.0, "dice": 5.0}
"""MaskDINO's, of the losses and of the costs to match by."""


@dataclass(frozen=True)
class Thing:
    """The things of an image: `classes` (N,), `boxes` (N, 4) as (centre, size) in fractions, `masks` (N, H,
    W)."""

    classes: Tensor
    boxes: Tensor
    masks: Tensor

    @classmethod
    def of(cls, map_HW: Tensor) -> Self:
        """From a map as `labels.IGNORE` says of instances."""
        codes_N = map_HW[map_HW > 0].unique()
        masks_NHW = map_HW == codes_N[:, None, None]
        return cls(codes_N.long() % 256 - 1, boxes_around(masks_NHW), masks_NHW.float())


def boxes_around(masks_NHW: Tensor) -> Tensor:
    """(N, 4), as a thing's."""
    corners_N4 = masks_to_boxes(masks_NHW) + torch.tensor([0, 0, 1, 1], device=masks_NHW.device)
    height, width = masks_NHW.shape[1:]
    return corners_to_center_format(corners_N4 / torch.tensor([width, height] * 2, device=masks_NHW.device))


class SetLosses(nn.Module):
    """Focal loss of classes, L1 and generalised IoU of boxes, cross-entropy and Dice of masks at points,
    over the things of all processes. Every layer's predictions are matched anew."""

    def __init__(self, classes: int, points: int) -> None:
        super().__init__()
        self.points = points
        self._masks = mask2former.Mask2FormerLoss(
            Mask2FormerConfig(num_labels=classes, train_num_points=points), {}
        )

    def forward(
        self, predictions: Sequence[Any], things: Sequence[Thing], noisy: Any = None
    ) -> dict[str, Tensor]:
        """`predictions`: of the encoder, then of each layer, logits (B, Q, C), boxes (B, Q, 4), masks (B, Q,
        h, w). `noisy`: what transformers' denoising group says of the queries that come first in the
        layers'."""
        count = _mean_over_processes(sum(len(one.classes) for one in things), predictions[0].logits.device)
        totals = list[dict[str, Tensor]]()
        for layer, prediction in enumerate(predictions):
            predicted = prediction
            if layer and noisy is not None:
                known, _ = noisy["dn_num_split"]
                groups = noisy["dn_num_group"]
                matches = [
                    (queries, torch.arange(len(one.classes), device=queries.device).repeat(groups))
                    for queries, one in zip(noisy["dn_positive_idx"], things, strict=True)
                ]
                totals.append(self._losses(prediction.of(slice(known)), things, matches, count * groups))
                predicted = prediction.of(slice(known, None))
            totals.append(self._losses(predicted, things, self.match(predicted, things), count))
        return {
            name: weight * torch.stack([one[name] for one in totals]).sum()
            for name, weight in WEIGHTS.items()
        }

    @torch.no_grad()
    def match(self, prediction: Any, things: Sequence[Thing]) -> Matches:
        """One query for each thing, so that the sum of their costs is the smallest; masks at random
        points."""
        matches = []
        for logits_QC, boxes_Q4, masks_Qhw, one in zip(*prediction, things, strict=True):
            places_1P2 = torch.rand(1, self.points, 2, device=logits_QC.device)
            found_QP, there_NP = (
                mask2former.sample_point(masks[None], places_1P2, align_corners=False)[0]
                for masks in (masks_Qhw, one.masks)
            )
            corners = center_to_corners_format(boxes_Q4), center_to_corners_format(one.boxes)
            costs = {
                "class": _class_cost(logits_QC)[:, one.classes],
                "box": torch.cdist(boxes_Q4, one.boxes, p=1),
                "giou": -generalized_box_iou(*corners),
                "mask": mask2former.pair_wise_sigmoid_cross_entropy_loss(found_QP, there_NP),
                "dice": mask2former.pair_wise_dice_loss(found_QP, there_NP),
            }
            cost_QN = torch.stack([weight * costs[name] for name, weight in WEIGHTS.items()]).sum(0)
            pairs = linear_sum_assignment(cost_QN.nan_to_num(1e6).cpu())
            queries, own = (torch.as_tensor(part, device=logits_QC.device) for part in pairs)
            matches.append((queries, own))
        return matches

    def _losses(
        self, predicted: Any, things: Sequence[Thing], matches: Matches, count: Tensor
    ) -> dict[str, Tensor]:
        queries = self._masks._get_predictions_permutation_indices(matches)
        classes_M = torch.cat([one.classes[own] for one, (_, own) in zip(things, matches, strict=True)])
        boxes_M4 = torch.cat([one.boxes[own] for one, (_, own) in zip(things, matches, strict=True)])
        there_BQC = torch.zeros_like(predicted.logits)
        there_BQC[(*queries, classes_M)] = 1
        predicted_M4 = predicted.boxes[queries]
        overlap = generalized_box_iou(
            center_to_corners_format(predicted_M4), center_to_corners_format(boxes_M4)
        )
        masks = self._masks.loss_masks(predicted.masks, [one.masks for one in things], matches, count)
        return {
            "class": sigmoid_focal_loss(predicted.logits, there_BQC, count) * predicted.logits.shape[1],
            "box": (predicted_M4 - boxes_M4).abs().sum() / count,
            "giou": (1 - overlap.diagonal()).sum() / count,
            "mask": masks["loss_mask"],
            "dice": masks["loss_dice"],
        }


def _class_cost(logits_QC: Tensor, alpha: float = 0.25) -> Tensor:
    """By how much the focal loss of each class falls where it is the right one, γ = 2."""
    p = logits_QC.sigmoid()
    there, not_there = alpha * (1 - p) ** 2 * -(p + 1e-8).log(), (1 - alpha) * p**2 * -(1 - p + 1e-8).log()
    return there - not_there


def _mean_over_processes(count: int, device: torch.device) -> Tensor:
    """How many things a process has on average, so that losses add up as those of one process do; at least
    1."""
    mean = torch.tensor(float(count), device=device)
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(mean)
        mean /= distributed.get_world_size()
    return mean.clamp(min=1)
