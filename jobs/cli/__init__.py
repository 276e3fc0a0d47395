"""The `teachercache` command. Each verb takes a recipe or a cache, and `key=value` overrides."""

from __future__ import annotations

import typer

from teachercache.jobs.cli import building, inspection, integrity, rearranging, students
from teachercache.jobs.launch import run

app = typer.Typer(
    help="Run frozen vision teachers once, cache their features, train students from the cache.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

for verb in (
    *(building.plan, building.build, building.calibrate),
    *(integrity.verify, integrity.repair),
    *(inspection.inspect, inspection.report, inspection.view),
    *(students.train, students.evaluate, students.repsim, students.probe, students.depth_probe),
    *(students.figure, students.remove_teacher, students.push, students.import_reference),
    *(inspection.norms, students.datasets),
    *(rearranging.merge, rearranging.subset, rearranging.convert),
):
    app.command()(verb)


def main() -> None:
    run(app)
