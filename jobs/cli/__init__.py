"""The `teachercache` command. Each verb takes a recipe or a cache, and `key=value` overrides."""

from importlib import metadata
from typing import Annotated, Any

import typer
from typer.main import get_command

from teachercache.jobs.cli import (
    building,
    inspection,
    integrity,
    listing,
    rearranging,
    students,
    training,
    zero_shot,
)
from teachercache.jobs.launch import run

app = typer.Typer(
    help="Run frozen vision teachers once, cache their features, train students from the cache.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

VERBS = {
    "From images to a student": (building.distill,),
    "Build a cache": (building.plan, building.build, building.submit, building.calibrate),
    "Check and mend a cache": (integrity.verify, integrity.repair),
    "Look at a cache": (inspection.inspect, inspection.report, inspection.view, inspection.norms),
    "Train a student": (training.train, students.remove_teacher, students.import_reference),
    "Train what uses its features": (training.train_decoders,),
    "Measure a student": (
        *(students.evaluate, students.repsim, students.probe, students.depth_probe, students.figure),
        students.gap,
    ),
    "Rearrange caches": (rearranging.merge, rearranging.subset, rearranging.convert),
    "Share on the Hugging Face Hub": (rearranging.push, rearranging.push_cache, rearranging.pull),
    "What there is": (
        *(listing.recipes, listing.presets, listing.codecs, listing.help_keys),
        *(students.datasets,),
    ),
}
for use, verbs in VERBS.items():
    for verb in verbs:
        app.command(rich_help_panel=use)(verb)
app.add_typer(zero_shot.app, name="zeroshot", rich_help_panel="Measure a student")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"teachercache {metadata.version('teachercache')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


def main(verb: str | None = None, *overrides: str) -> None:
    """The command; or a script that is one `verb`, with `overrides` of its recipe before the user's own."""
    command: Any = get_command(app)
    if verb is not None:
        command = command.commands[verb]
        call = command.callback
        command.callback = lambda **given: call(
            **given | {"overrides": [*overrides, *(given["overrides"] or ())]}
        )
    run(command)
