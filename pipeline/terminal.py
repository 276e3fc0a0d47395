"""What is printed is meant literally: `[b]`, `:smile:` and long lines are parts of paths that people copy.

Nothing else makes a terminal. Style is asked for by `style=` or by a `Text`.
"""

from __future__ import annotations

import re
from typing import Any

from rich.console import Console, RenderableType
from rich.control import Control
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.text import Text


class Terminal(Console):
    """Takes no text for markup, emoji or something to highlight, and breaks no line (the terminal does)."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        is_live = any(isinstance(one, Control) for one in objects)  # spinners and bars count their lines
        super().print(*objects, **{"soft_wrap": not is_live, **options})

    def status(self, status: RenderableType, **options: Any) -> Status:
        return _LiteralStatus(_literal(status), console=self, **options)


class _LiteralStatus(Status):
    def update(self, status: RenderableType | None = None, **options: Any) -> None:
        super().update(_literal(status), **options)


def _literal(text: Any) -> Any:
    """A string as a spinner takes it without looking for markup in it."""
    return Text(text) if isinstance(text, str) else text


def progress_bar(console: Console, *, disable: bool = False, transient: bool = False) -> Progress:
    """What is done, of how much, and when all will be."""
    what = TextColumn("{task.description}", markup=False)
    columns = what, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, disable=disable, transient=transient)


def in_markdown(text: str) -> str:
    """A name or path as Markdown that shows it as it is."""
    return re.sub(r"([\\`*\[\]<>|~&]|(?<![a-zA-Z0-9])_|_(?![a-zA-Z0-9]))", r"\\\1", text)
