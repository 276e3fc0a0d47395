"""Figures that compare models (SAK, Figures 1 left, 3 and 5), from the paper's tables and your own scores."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from teachercache.pipeline.errors import RecipeError
from teachercache.student.measuring.evaluate import read_scores
from teachercache.student.measuring.figures import EXPERT_COLOURS
from teachercache.student.measuring.paper_results import paper_rows, single_task_scores
from teachercache.student.measuring.task_outputs import TASK_OUTPUTS, gains

_COLOURS = EXPERT_COLOURS[1:]  # without the stem's grey
_SHARE = re.compile(r"(?P<model>.+), (?P<percent>[\d.]+)% of the data$")
_BACKBONE = "ViT-B"  # of all models in these figures


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
    for model, found in _gains_of(models, own, "pascal_context", rows["ViT, Freeze"]):
        values = list(found.values())
        panel.models[f"{model}\nμ/σ {np.mean(values) / np.std(values):.2f}"] = found
    return [panel]


def _students(own: Sequence[Scores]) -> list[Panel]:
    panels = []
    for dataset, title, table in (("pascal_context", "PASCAL-Context", 13), ("nyud", "NYUD-v2", 14)):
        baseline, *rows = (row for row in paper_rows(dataset, None, table) if row.backbone == _BACKBONE)
        models = {row.model: row.scores for row in rows}
        panel = Panel(f"{title} (SAK, Figure 3; Table {table})", "% better than single-task")
        for model, found in _gains_of(models, own, dataset, baseline.scores):
            panel.models[f"{model}\nΔm {np.mean([*found.values()]):.2f}"] = found
        panels.append(panel)
    return panels


def _shares(own: Sequence[Scores]) -> list[Panel]:
    baseline = single_task_scores("pascal_context", _BACKBONE)
    assert baseline
    models = {row.model: row.scores for row in paper_rows("pascal_context", None, 18)}
    panel = Panel("PASCAL-Context, parts of the data (SAK, Figure 5; Table 18)", "Δm, %")
    for name, found in _gains_of(models, own, "pascal_context", baseline):
        match = _SHARE.fullmatch(name)
        if match is None:
            raise RecipeError(
                "The name does not say which part of the data this model was trained on.",
                got=name,
                expected='a name such as "mine, 25% of the data"',
                do="give it such a name, with the percent of multitask.dataset.fraction",
            )
        panel.models.setdefault(match["model"], {})[match["percent"]] = float(np.mean([*found.values()]))
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
        again, colour = divmod(number, len(_COLOURS))
        left = np.arange(len(tasks)) + (number - (len(panel.models) - 1) / 2) * width
        heights = [values[task] for task in tasks]
        style: dict[str, Any] = {"color": _COLOURS[colour], "hatch": "///" * again, "edgecolor": "white"}
        axes.bar(left, heights, width, label=model, linewidth=0, **style)
    axes.set_xticks(range(len(tasks)), [TASK_OUTPUTS[task].title for task in tasks])


def _lines(axes: Axes, panel: Panel) -> None:
    for number, (model, values) in enumerate(panel.models.items()):
        again, colour = divmod(number, len(_COLOURS))
        shares, heights = zip(*sorted((float(share), gain) for share, gain in values.items()), strict=True)
        axes.plot(shares, heights, ("o-", "s--")[again % 2], color=_COLOURS[colour], label=model)
    axes.set(xlabel="% of the training images", xticks=[25, 50, 75, 100])
