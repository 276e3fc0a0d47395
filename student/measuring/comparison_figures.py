"""Figures that compare models (SAK, Figures 1 left, 3 and 5), from the paper's tables and your own scores."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from teachercache.pipeline.errors import RecipeError
from teachercache.student.measuring.figures import EXPERT_COLOURS
from teachercache.student.measuring.paper_results import paper_rows, single_task_scores
from teachercache.student.measuring.task_outputs import TASK_OUTPUTS
from teachercache.student.metrics import mtl_gain

_COLOURS = EXPERT_COLOURS[1:]  # without the stem's grey
_SHARE = re.compile(r"(?P<model>.+), (?P<percent>[\d.]+)% of the data")
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
    if left := [one.name for one in own if _model(one.name) not in shown]:
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


def read_scores(named: str) -> Scores:
    """ "NAME=FILE", a scores.json from `teachercache evaluate -o`. Raises `RecipeError` for anything else."""
    name, _, file = named.partition("=")
    try:
        record = json.loads(Path(file).read_text())
        scores = {task: float(score) for task, score in record["scores"].items() if score is not None}
        return Scores(name, str(record["dataset"]), scores)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(
            "This file has no scores.",
            got=f"{named}: {type(error).__name__}: {error}",
            expected="NAME=FILE, where FILE is the scores.json of an evaluation",
            do="evaluate a student with -o FOLDER, and give NAME=FOLDER/scores.json",
        ) from error


def _frozen(own: Sequence[Scores]) -> list[Panel]:
    rows = {row.model: row.scores for row in paper_rows("pascal_context", None, 12)}
    names = {f"{teacher}, Freeze": teacher for teacher in ("DINOv2", "CLIP", "SAM")}
    models = {names.get(model, model): scores for model, scores in rows.items() if model in names}
    models["SAK"] = rows["SAK of ViT-B teachers, frozen"]
    models |= {one.name: dict(one.scores) for one in own if one.dataset == "pascal_context"}
    panel = Panel(
        "Frozen models on PASCAL-Context (SAK, Figure 1 left; Table 12)", "% better than frozen ViT"
    )
    for model, scores in models.items():
        gains = _gains(scores, rows["ViT, Freeze"])
        values = list(gains.values())
        panel.models[f"{model}\nμ/σ {np.mean(values) / np.std(values):.2f}"] = gains
    return [panel]


def _students(own: Sequence[Scores]) -> list[Panel]:
    panels = []
    for dataset, title, table in (("pascal_context", "PASCAL-Context", 13), ("nyud", "NYUD-v2", 14)):
        rows = [row for row in paper_rows(dataset, _BACKBONE, table) if row.backbone == _BACKBONE]
        models = {row.model: row.scores for row in rows[1:]}
        models |= {one.name: dict(one.scores) for one in own if one.dataset == dataset}
        panel = Panel(f"{title} (SAK, Figure 3; Table {table})", "% better than single-task")
        for model, scores in models.items():
            gains = _gains(scores, rows[0].scores)
            panel.models[f"{model}\nΔm {np.mean(list(gains.values())):.2f}"] = gains
        panels.append(panel)
    return panels


def _shares(own: Sequence[Scores]) -> list[Panel]:
    baseline = single_task_scores("pascal_context", _BACKBONE)
    assert baseline
    panel = Panel("PASCAL-Context, parts of the data (SAK, Figure 5; Table 18)", "Δm, %")
    rows = [Scores(row.model, "pascal_context", row.scores) for row in paper_rows("pascal_context", None, 18)]
    for one in [*rows, *(one for one in own if one.dataset == "pascal_context")]:
        match = _SHARE.fullmatch(one.name)
        if match is None:
            raise RecipeError(
                "The name does not say which part of the data this model was trained on.",
                got=one.name,
                expected='a name such as "mine, 25% of the data"',
                do="give it such a name, with the percent of multitask.dataset.fraction",
            )
        gain = float(np.mean(list(_gains(one.scores, baseline).values())))
        panel.models.setdefault(match["model"], {})[match["percent"]] = gain
    return [panel]


_FIGURES: dict[int, Callable[[Sequence[Scores]], list[Panel]]] = {1: _frozen, 3: _students, 5: _shares}


def _model(name: str) -> str:
    match = _SHARE.fullmatch(name)
    return match["model"] if match else name


def _gains(scores: Mapping[str, float], baseline: Mapping[str, float]) -> dict[str, float]:
    """Gains by task, in percent. Raises `RecipeError` for missing tasks: means need the same tasks."""
    if missing := baseline.keys() - scores.keys():
        raise RecipeError(
            "A figure needs scores of all its tasks.",
            got=f"no score of {', '.join(sorted(missing))}",
            expected=", ".join(baseline),
            do="give the scores of a student of all these tasks",
        )
    gains = {}
    for task, base in baseline.items():
        lower = [task] if TASK_OUTPUTS[task].lower_is_better else []
        gains[task] = 100 * mtl_gain({task: scores[task]}, {task: base}, lower)
    return gains


def _bars(axes: Axes, panel: Panel) -> None:
    tasks = list(next(iter(panel.models.values())))
    width = 0.8 / len(panel.models)
    for number, (model, gains) in enumerate(panel.models.items()):
        again, colour = divmod(number, len(_COLOURS))
        left = np.arange(len(tasks)) + (number - (len(panel.models) - 1) / 2) * width
        heights = [gains[task] for task in tasks]
        style: dict[str, Any] = {"color": _COLOURS[colour], "hatch": "///" * again, "edgecolor": "white"}
        axes.bar(left, heights, width, label=model, linewidth=0, **style)
    axes.set_xticks(range(len(tasks)), [TASK_OUTPUTS[task].title for task in tasks])


def _lines(axes: Axes, panel: Panel) -> None:
    for number, (model, gains) in enumerate(panel.models.items()):
        again, colour = divmod(number, len(_COLOURS))
        shares, heights = zip(*sorted((float(share), gain) for share, gain in gains.items()), strict=True)
        axes.plot(shares, heights, ("o-", "s--")[again % 2], color=_COLOURS[colour], label=model)
    axes.set(xlabel="% of the training images", xticks=[25, 50, 75, 100])
