"""What the verbs share: their terminal, and the arguments that mean the same everywhere."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from teachercache.pipeline.terminal import Terminal

console = Terminal()

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or a recipe of jobs/recipes by name.")
]
CacheArgument = Annotated[
    str, typer.Argument(metavar="CACHE", help="A folder or URL (s3://…) that holds a cache.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides, such as views.num_views=4.")
]
Images = Annotated[
    str | None, typer.Option(help="Where the source images are, if they moved, or are at another URL.")
]
StudentArgument = Annotated[
    str, typer.Argument(metavar="STUDENT", help="A folder that `train` wrote (…/student).")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def print_result(record: object, markdown: str, as_json: bool) -> None:
    """A result as JSON, or as text."""
    if as_json:
        print_json(record)
    else:
        from rich.markdown import Markdown

        console.print(Markdown(markdown))


def print_json(data: object) -> None:
    """Without colours: `inspect --json` lists thousands of shards, and drawing them took half its time."""
    typer.echo(json.dumps(data, indent=2))
