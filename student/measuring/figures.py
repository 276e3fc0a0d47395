"""Figures that explain a student: gates (SAK, Figures 7 and 8), norms of tokens (Figure 6), predictions
(Figures 9 to 11); and that compare models (Figures 1 left, 3 and 5), from the paper's tables and your own
scores."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
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
from teachercache.student.measuring.paper_results import paper_rows, read_scores, single_task_scores
from teachercache.student.measuring.task_outputs import TASK_OUTPUTS, gains
from teachercache.student.models.student import NUM_LEVELS, Student
from teachercache.student.sak.model import SAK

EXPERT_COLOURS = ("#777777", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
"""Grey for the stem, then Okabe and Ito's, which every kind of colour vision can distinguish."""

_SHARE = re.compile(r"(?P<model>.+), (?P<percent>[\d.]+)% of the data$")
_BACKBONE = "ViT-B"  # of all models in these figures


def gate_figure(gates: Mapping[str, NDArray], experts: Sequence[str]) -> Figure:
    """The weight of each expert by task, one bar per level. `gates`: (levels, experts), means over images."""
    figure = Figure(figsize=(1.2 + 2 * len(gates), 2.9), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(gates), sharey=True, squeeze=False)[0]
    for axis, (task, weights_SE) in zip(axes, gates.items(), strict=True):
        levels, bottom_S = np.arange(1, len(weights_SE) + 1), np.zeros(len(weights_SE))
        for number, (expert, weights_S) in enumerate(zip(experts, weights_SE.T, strict=True)):
            axis.bar(levels, weights_S, 0.75, bottom=bottom_S, label=expert, **_bar(number, EXPERT_COLOURS))
            bottom_S = bottom_S + weights_S
        axis.set(title=TASK_OUTPUTS[task].title, xlabel="level", xticks=levels, ylim=(0, 1))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("weight")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.suptitle("The routers' weight of each expert, mean over images", fontsize=10)
    return figure


def _bar(number: int, colours: Sequence[str]) -> dict[str, Any]:
    """How the bars of a model look: by colour, and hatched where all colours are taken."""
    again, colour = divmod(number, len(colours))
    return {"color": colours[colour], "hatch": "///" * again, "edgecolor": "white", "linewidth": 0}


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


@dataclass(frozen=True)
class Scores:
    """A model's scores on a data set, by task, as in `scores.json` and the paper's tables."""

    name: str
    dataset: str
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Panel:
    """The numbers of one part of a figure: each model's values by task, or by percent of the data."""

    title: str
    ylabel: str
    models: dict[str, dict[str, float]] = field(default_factory=dict)


def comparison(number: int, own: Sequence[Scores] = ()) -> list[Panel]:
    """The numbers of Figure `number`, the paper's and below them those of `own`, in percent.

    1: gains of frozen models over the frozen ViT; the name states their mean over their standard deviation
    across tasks. 3: gains over the single-task baseline on each data set; the name states their mean, Δm.
    5: Δm by the percent of the data; your own names must end as in ", 25% of the data".
    Raises `RecipeError` for other figures or names, and for scores that the figure does not show.
    """
    if number not in _FIGURES:
        raise RecipeError(
            "The paper has no figure with this number that compares models.",
            got=f"Figure {number}",
            expected="1 (its left half), 3 or 5",
            do="see docs/recipes.md for the others",
        )
    panels = _FIGURES[number](own)
    shown = {name.partition("\n")[0] for panel in panels for name in panel.models}
    if left := [one.name for one in own if _SHARE.sub(r"\g<model>", one.name) not in shown]:
        raise RecipeError(
            f"Figure {number} has no place for these scores.",
            got=", ".join(left),
            expected="scores of pascal_context" + (" or nyud" if number == 3 else ""),
            do="evaluate on the figure's data set, or leave them out",
        )
    return panels


def comparison_figure(number: int, own: Sequence[Scores] = ()) -> Figure:
    """Draw `comparison`: bars by task, or lines over the percent of the data."""
    panels = comparison(number, own)
    figure = Figure(figsize=(8, 3.6 * len(panels)), dpi=150, layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        (_lines if number == 5 else _bars)(axes, panel)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set(title=panel.title, ylabel=panel.ylabel)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    return figure


def read_own(named: str) -> Scores:
    """ "NAME=FILE", a scores.json from `teachercache evaluate -o`. Raises `RecipeError` for anything else."""
    name, _, file = named.partition("=")
    return Scores(name, *read_scores(file, "NAME=FILE, where FILE is "))


def _frozen(own: Sequence[Scores]) -> list[Panel]:
    rows = {row.model: row.scores for row in paper_rows("pascal_context", None, 12)}
    models = {name: rows[f"{name}, Freeze"] for name in ("DINOv2", "CLIP", "SAM")}
    models["SAK"] = rows["SAK of ViT-B teachers, frozen"]
    title = "Frozen models on PASCAL-Context (SAK, Figure 1 left; Table 12)"
    panel = Panel(title, "% better than frozen ViT")
    for model, by_task in _gains_of(models, own, "pascal_context", rows["ViT, Freeze"]):
        values = list(by_task.values())
        panel.models[f"{model}\nμ/σ {np.mean(values) / np.std(values):.2f}"] = by_task
    return [panel]


def _students(own: Sequence[Scores]) -> list[Panel]:
    panels = []
    for dataset, title, table in (("pascal_context", "PASCAL-Context", 13), ("nyud", "NYUD-v2", 14)):
        baseline, *rows = (row for row in paper_rows(dataset, None, table) if row.backbone == _BACKBONE)
        models = {row.model: row.scores for row in rows}
        panel = Panel(f"{title} (SAK, Figure 3; Table {table})", "% better than single-task")
        for model, by_task in _gains_of(models, own, dataset, baseline.scores):
            panel.models[f"{model}\nΔm {np.mean([*by_task.values()]):.2f}"] = by_task
        panels.append(panel)
    return panels


def _shares(own: Sequence[Scores]) -> list[Panel]:
    baseline = single_task_scores("pascal_context", _BACKBONE)
    assert baseline
    models = {row.model: row.scores for row in paper_rows("pascal_context", None, 18)}
    panel = Panel("PASCAL-Context, parts of the data (SAK, Figure 5; Table 18)", "Δm, %")
    for name, by_task in _gains_of(models, own, "pascal_context", baseline):
        match = _SHARE.fullmatch(name)
        if match is None:
            raise RecipeError(
                "The name does not say which part of the data this model was trained on.",
                got=name,
                expected='a name such as "mine, 25% of the data"',
                do="give it such a name, with the percent of multitask.dataset.fraction",
            )
        panel.models.setdefault(match["model"], {})[match["percent"]] = float(np.mean([*by_task.values()]))
    return [panel]


_FIGURES: dict[int, Callable[[Sequence[Scores]], list[Panel]]] = {1: _frozen, 3: _students, 5: _shares}


def _gains_of(
    models: Mapping[str, Mapping[str, float]],
    own: Sequence[Scores],
    dataset: str,
    baseline: Mapping[str, float],
) -> Iterator[tuple[str, dict[str, float]]]:
    """Each model's gains by task, those of `own` last. Raises `RecipeError` where a task of the baseline is
    missing: means need the same tasks."""
    mine = {one.name: one.scores for one in own if one.dataset == dataset}
    for model, scores in {**models, **mine}.items():
        if missing := baseline.keys() - scores.keys():
            raise RecipeError(
                "A figure needs scores of all its tasks.",
                got=f"no score of {', '.join(sorted(missing))}",
                expected=", ".join(baseline),
                do="give the scores of a student of all these tasks",
            )
        yield model, gains(scores, baseline)


def _bars(axes: Axes, panel: Panel) -> None:
    tasks = list(next(iter(panel.models.values())))
    width = 0.8 / len(panel.models)
    for number, (model, values) in enumerate(panel.models.items()):
        left = np.arange(len(tasks)) + (number - (len(panel.models) - 1) / 2) * width
        heights = [values[task] for task in tasks]
        axes.bar(left, heights, width, label=model, **_bar(number, EXPERT_COLOURS[1:]))  # without the grey
    axes.set_xticks(range(len(tasks)), [TASK_OUTPUTS[task].title for task in tasks])


def _lines(axes: Axes, panel: Panel) -> None:
    for number, (model, values) in enumerate(panel.models.items()):
        again, colour = divmod(number, len(EXPERT_COLOURS) - 1)
        shares, heights = zip(*sorted((float(share), gain) for share, gain in values.items()), strict=True)
        axes.plot(shares, heights, ("o-", "s--")[again % 2], color=EXPERT_COLOURS[1 + colour], label=model)
    axes.set(xlabel="% of the training images", xticks=[25, 50, 75, 100])
