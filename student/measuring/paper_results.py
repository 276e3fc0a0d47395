"""The papers' results, `paper.yaml` with their units, and what compares ours with them."""

import json
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from teachercache.pipeline.errors import RecipeError, require_known
from teachercache.student.models.student import Student

_BACKBONES = {384: "ViT-S", 768: "ViT-B", 1024: "ViT-L"}


@dataclass(frozen=True)
class PaperRow:
    """`table`: of SAK. `parameters_m`: millions, if the paper counts all of them. `gain`: the printed Δm in
    percent (SAK, Eq. 7), against the single-task baseline of the same backbone, or None. Rows that are not
    `compared` are shown only when their table is requested."""

    model: str
    backbone: str
    table: int
    parameters_m: int | None
    scores: dict[str, float]
    gain: float | None
    compared: bool

    @property
    def title(self) -> str:
        count = f", {self.parameters_m}M parameters" if self.parameters_m else ""
        return f"{self.model} ({self.backbone}{count}; SAK, Table {self.table})"


def paper_rows(dataset: str, backbone: str | None, table: int | None = None) -> list[PaperRow]:
    """The paper's rows for a data set, if any: those of one table, or else those that compare students of one
    size, the single-task baseline first.

    Raises `RecipeError` for a table without rows of this data set.
    """
    rows = PAPER_ROWS.get(dataset, [])
    if table is None:
        return [row for row in rows if row.compared and row.backbone == backbone]
    chosen = [row for row in rows if row.table == table]
    if not chosen:
        raise RecipeError(
            f"This table of the paper has no row on {dataset}.",
            got=f"Table {table}",
            expected=", ".join(map(str, sorted({row.table for row in rows}))) or "a data set of the paper",
            do="name one of these tables, or leave it out",
        )
    return chosen


def single_task_scores(dataset: str, backbone: str | None) -> dict[str, float] | None:
    """The baseline of the paper's gains."""
    rows = paper_rows(dataset, backbone)
    return rows[0].scores if rows else None


def backbone_of(student: Student) -> str | None:
    """The paper's name, if any, for a student of this width (or of its teachers' width, without a stem)."""
    stem = getattr(student, "stem", None)
    width = stem.width if stem is not None else max(student.config["teacher_dims"].values())
    return _BACKBONES.get(width)


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown, a line for each row."""
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:]]) + "\n"


def cell(number: float | None, digits: int = 2) -> str:
    """A number in a table, and a dash for none."""
    return "–" if number is None or not math.isfinite(number) else f"{number:.{digits}f}"


PAPER: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("paper.yaml").read_text(encoding="utf-8"))
"""All of the file, by its keys: similarities, linear and depth probes, and GMACs as they are there."""

PAPER_ROWS = {
    dataset: [
        PaperRow(model, backbone, table, parameters_m, scores, gain, kind == "compared")
        for kind in ("compared", "ablations")
        for table, backbone, model, parameters_m, *numbers, gain in tables.get(kind, ())
        for scores in [dict(zip(tables["tasks"], numbers, strict=True))]
    ]
    for dataset, tables in PAPER["students"].items()
}
"""By data set."""

KPU_ROWS: list[tuple[int, str, dict[str, float], float | None]] = [
    (
        table,
        model,
        {name: one for name, one in zip(PAPER["kpu"]["scores"], scores, strict=False) if one},
        mean,
    )
    for table, model, *scores, mean in ([*row, None][:7] for row in PAPER["kpu"]["rows"])
]
"""Table, model, its scores in percent, and their mean where it is printed (KPU, Tables 1 to 3)."""


def kpu_rows(
    dataset: str, classes: int, scores: Collection[str], table: int | None = None
) -> dict[str, dict[str, float]]:
    """By title, the rows of KPU's tables (of one, or all) with some of these scores; none for a data set
    that is not the paper's. Raises `RecipeError` for another table."""
    require_known("table of KPU", str(table or 1), ["1", "2", "3"])
    if PAPER["kpu"]["classes"].get(dataset) != classes:
        return {}
    return {
        f"{model} (KPU, Table {number})": found
        for number, model, found, _ in KPU_ROWS
        if table in (None, number) and found.keys() & set(scores)
    }


def read_scores(file: str | Path, told: str = "") -> tuple[str, dict[str, float]]:
    """The data set, and the scores by task, that an evaluation wrote to its `scores.json`.

    Raises `RecipeError` for any other file; `told`: how the user is to name one.
    """
    try:
        record = json.loads(Path(file).read_text())
        scores = {task: float(score) for task, score in record["scores"].items() if score is not None}
        return str(record["dataset"]), scores
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(
            "This file has no scores.",
            got=f"{file}: {type(error).__name__}: {error}",
            expected=f"{told}the scores.json of an evaluation",
            do="evaluate a student with -o FOLDER, and give FOLDER/scores.json",
        ) from error


def read_baseline(files: Iterable[str | Path], dataset: str) -> dict[str, float]:
    """Single-task scores from the `scores.json` of evaluations, one or more tasks per file.

    Raises `RecipeError` for any other file, and for scores on another data set.
    """
    scores: dict[str, float] = {}
    for file in files:
        measured_on, measured = read_scores(file)
        if measured_on != dataset:
            raise RecipeError(
                f"{file} does not hold a baseline.",
                got=measured_on,
                expected=f"scores on {dataset}",
                do="evaluate the single-task students on it with -o FOLDER, and give the scores.json of each",
            )
        scores |= measured
    return scores
