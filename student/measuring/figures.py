"""Figures that explain a student: gates (SAK, Figures 7 and 8), norms of tokens (Figure 6), predictions
(Figures 9 to 11)."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import RecipeError
from teachercache.pipeline.exploring.feature_pictures import (
    Picture,
    heat,
    picture_grid,
    range_words,
    token_norms,
)
from teachercache.pipeline.exploring.map_reader import MapReader
from teachercache.student.measuring.task_outputs import TASK_OUTPUTS
from teachercache.student.models.student import NUM_LEVELS, Student
from teachercache.student.sak.model import SAK

EXPERT_COLOURS = ("#777777", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
"""Grey for the stem, then Okabe and Ito's, which every kind of colour vision can distinguish."""


def gate_figure(gates: Mapping[str, NDArray], experts: Sequence[str]) -> Figure:
    """The weight of each expert by task, one bar per level. `gates`: (levels, experts), means over images."""
    figure = Figure(figsize=(1.2 + 2 * len(gates), 2.9), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(gates), sharey=True, squeeze=False)[0]
    for axis, (task, weights_SE) in zip(axes, gates.items(), strict=True):
        levels, bottom_S = np.arange(1, len(weights_SE) + 1), np.zeros(len(weights_SE))
        for number, (expert, weights_S) in enumerate(zip(experts, weights_SE.T, strict=True)):
            again, colour = divmod(number, len(EXPERT_COLOURS))
            style = {"color": EXPERT_COLOURS[colour], "hatch": "///" * again, "edgecolor": "white"}
            axis.bar(levels, weights_S, 0.75, bottom=bottom_S, label=expert, linewidth=0, **style)
            bottom_S = bottom_S + weights_S
        axis.set(title=TASK_OUTPUTS[task].title, xlabel="level", xticks=levels, ylim=(0, 1))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("weight")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.suptitle("The routers' weight of each expert, mean over images", fontsize=10)
    return figure


def norm_figure(
    cache: FeatureCache, keys: tuple[str, str], student: Student | None = None, level: int = -1
) -> Figure:
    """Norms of the tokens of two images of one scene, and of their difference (SAK, Figure 6): each teacher
    of the cache, next to it the student's version of that teacher, and the student's stem.

    Shows the first view of each sample. The two maps of a column share one scale, stated above it; the
    difference has its own, from 0. Raises `RecipeError` for a missing key or level and for a student of
    other views or teachers, otherwise as `FeatureCache.read` does.
    """
    rows = [int(cache.index.rows(cache.find(key), 0)) for key in keys]
    reader = MapReader(cache, window=student is not None)
    views = [reader.view(row) for row in rows]
    of_student = {} if student is None else _student_maps(student, cache, views, level)
    maps_2HWC: dict[str, Tensor] = {}
    for name in cache.teachers:
        maps_2HWC[f"{name}\nteacher"] = torch.stack([_level(reader.maps(name, row), level) for row in rows])
        if (title := f"{name}\nstudent") in of_student:
            maps_2HWC[title] = of_student.pop(title)
    maps_2HWC |= of_student  # the stem
    nothing = np.full_like(views[0], 255)
    columns: list[tuple[str, list[Picture]]] = [("view\n", [*views, nothing])]
    for title, both_2HWC in maps_2HWC.items():
        norms_2HW, difference_HW = token_norms(both_2HWC), token_norms(both_2HWC[0] - both_2HWC[1])
        low, high, most = float(norms_2HW.min()), float(norms_2HW.max()), float(difference_HW.max())
        pictures = [*(heat(norms_HW, low, high) for norms_HW in norms_2HW), heat(difference_HW, 0.0, most)]
        columns.append((f"{title}\n{range_words(low, high)}; {range_words(0, most)}", pictures))
    figure = picture_grid(
        columns,
        f"Norms of the tokens of two images and of their difference, level {level % NUM_LEVELS + 1}"
        + (" (random weights)" if cache.spec.random_weights else "")
        + "\nabove each column, from dark to bright: the range of the norms; the range of the difference",
    )
    text, corner = "norm of the\ndifference of\nthe tokens\nabove", figure.axes[2 * len(columns)]
    corner.text(0.5, 0.5, text, ha="center", va="center", fontsize=8, transform=corner.transAxes)
    return figure


@torch.no_grad()
def _student_maps(
    student: Student, cache: FeatureCache, views: Sequence[Picture], level: int
) -> dict[str, Tensor]:
    """(2, h, w, C) for the stem, and for each path in the space of its teacher."""
    if not isinstance(student, SAK) or student.image_size != cache.spec.views.size:
        raise RecipeError(
            "The student does not see the views of this cache.",
            got=f"a student of kind {student.kind} for {student.image_size}",
            expected=f"one of kind sak for views of {cache.spec.views.size}",
            do="choose the cache that it was trained on, or one with views of its size",
        )
    images_23HW = torch.stack([torch.from_numpy(view).permute(2, 0, 1) for view in views])
    pixels_23HW = student.eval().normalize(images_23HW.to(student.mean.device))
    stem_2nD = student.representations(pixels_23HW)[0][level]
    titled = {"student's\nstem": stem_2nD.unflatten(1, student.stem.grid)}
    feature_maps = student(pixels_23HW, full=True).feature_maps
    for name in cache.check_teachers(student.teachers):
        titled[f"{name}\nstudent"] = feature_maps[name][level].permute(0, 2, 3, 1)
    return {title: maps.float().cpu() for title, maps in titled.items()}


def _level(maps_SHWC: Tensor, level: int) -> Tensor:
    if not -len(maps_SHWC) <= level < len(maps_SHWC):
        raise RecipeError(
            "A teacher has no such level.",
            got=level,
            expected=f"-{len(maps_SHWC)} to {len(maps_SHWC) - 1}; -1 is the last",
            do="choose another level",
        )
    return maps_SHWC[level]


def prediction_figure(
    images: Sequence[Picture],
    labels: Mapping[str, Sequence[NDArray]],
    estimates: Mapping[str, Sequence[NDArray]],
) -> Figure:
    """One line per image: the image, then for each task the label and the prediction."""
    columns: list[tuple[str, Sequence[Picture]]] = [("image", images)]
    for task, values in estimates.items():
        show, title = TASK_OUTPUTS[task].picture, TASK_OUTPUTS[task].title
        columns.append((f"{title}\nlabel", [show(label) for label in labels[task]]))
        columns.append((f"{title}\nstudent", [show(estimate) for estimate in values]))
    return picture_grid(columns, "Labels and the student's predictions")
