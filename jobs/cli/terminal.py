"""What the verbs share: their terminal, and arguments with the same meaning everywhere."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated

import typer

from teachercache.pipeline.terminal import Terminal, progress_bar

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
    str | None, typer.Option(help="Where the source images are, if they moved or are at another URL.")
]
StudentArgument = Annotated[
    str, typer.Argument(metavar="STUDENT", help="A folder that `train` wrote (…/student).")
]
StudentOption = Annotated[
    str | None,
    typer.Option("--student", help="A student to look at: a folder that `train` wrote (…/student)."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def names(text: str) -> list[str]:
    """Those in `A,B`."""
    return [name.strip() for name in text.split(",")]


@contextmanager
def counting(doing: str, total: int) -> Iterator[Callable[..., None]]:
    """A bar, while something is done; what it yields is called after each step, or with a number of steps."""
    with progress_bar(console, transient=True) as bar:
        yield partial(bar.advance, bar.add_task(doing, total=total))


def print_result(record: object, shown: object, as_json: bool) -> None:
    """A result as JSON, or as what is shown of it: text in Markdown, or what rich draws."""
    if as_json:
        print_json(record)
    else:
        from rich.markdown import Markdown

        console.print(Markdown(shown) if isinstance(shown, str) else shown)


def print_json(data: object) -> None:
    """Print without colours, which took half the time of `inspect --json` with its thousands of shards."""
    typer.echo(json.dumps(data, indent=2))
