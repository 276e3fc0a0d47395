"""Figures that explain a student: gates (SAK, Figures 7 and 8), norms of tokens (Figure 6), predictions
(Figures 9 to 11)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from pipeline.feature_pictures import Picture, heat, picture_grid, token_norms
from student.sak.model import SAK
from student.task_outputs import TASK_OUTPUTS

EXPERT_COLOURS = ("#777777", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
"""The stem grey, then Okabe and Ito's, which are told apart by every kind of colour vision."""


def gate_figure(gates: Mapping[str, NDArray], experts: Sequence[str]) -> Figure:
    """The weight of each expert, a bar for each level, by task. `gates`: (levels, experts), means over
    images."""
    figure = Figure(figsize=(1.2 + 2 * len(gates), 2.9), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(gates), sharey=True, squeeze=False)[0]
    for axis, (task, weights_SE) in zip(axes, gates.items(), strict=True):
        levels, bottom_S = np.arange(1, len(weights_SE) + 1), np.zeros(len(weights_SE))
        for expert, weights_S, colour in zip(experts, weights_SE.T, EXPERT_COLOURS, strict=False):
            axis.bar(levels, weights_S, 0.75, bottom=bottom_S, label=expert, color=colour)
            bottom_S = bottom_S + weights_S
        axis.set(title=TASK_OUTPUTS[task].title, xlabel="level", xticks=levels, ylim=(0, 1))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("weight")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.suptitle("What the routers take from each expert, mean over images", fontsize=10)
    return figure


@torch.no_grad()
def norm_figure(student: SAK, images_23HW: Tensor, level: int = -1) -> Figure:
    """Norms of the tokens of each expert for two images of one scene, and the norm of their difference.

    `images_23HW`: uint8, of the student's size. The two maps of an expert share one scale.
    """
    representations = student.representations(student.normalize(images_23HW.to(student.mean.device)))
    experts = {"stem": representations.stem, **representations.paths}
    pictures = [image.permute(1, 2, 0).cpu().numpy() for image in images_23HW]
    nothing = np.full_like(pictures[0], 255)
    columns: list[tuple[str, list[Picture]]] = [("image", [*pictures, nothing])]
    for name, levels in experts.items():
        maps_2hwD = levels[level].unflatten(1, student.stem.grid).float().cpu()
        norms_2hw, difference_hw = token_norms(maps_2hwD), token_norms(maps_2hwD[0] - maps_2hwD[1])
        low, high = float(norms_2hw.min()), float(norms_2hw.max())
        same = [heat(norms_hw, low, high) for norms_hw in norms_2hw]
        columns.append((name, [*same, heat(difference_hw, 0.0, float(difference_hw.max()))]))
    return picture_grid(columns, "Norms of tokens: first image, second image, and their difference")


def prediction_figure(
    images: Sequence[Picture],
    labels: Mapping[str, Sequence[NDArray]],
    estimates: Mapping[str, Sequence[NDArray]],
) -> Figure:
    """A line for each image: the image, then for each task the label and the prediction."""
    columns: list[tuple[str, Sequence[Picture]]] = [("image", images)]
    for task, values in estimates.items():
        show, title = TASK_OUTPUTS[task].picture, TASK_OUTPUTS[task].title
        columns.append((f"{title}\nlabel", [show(label) for label in labels[task]]))
        columns.append((f"{title}\nstudent", [show(estimate) for estimate in values]))
    return picture_grid(columns, "Labels and what the student makes of the images")
