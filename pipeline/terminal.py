"""Text is printed literally: `[b]`, `:smile:` and long lines are parts of paths that people copy.

All terminals are made here. Callers ask for style with `style=` or a `Text`.
"""

import re
from typing import Any

from rich.console import Console, RenderableType
from rich.control import Control
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.text import Text


class Terminal(Console):
    """Interprets no markup or emoji, highlights nothing and wraps no lines (the terminal does)."""

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
    """A string in a form in which a spinner does not look for markup."""
    return Text(text) if isinstance(text, str) else text


def progress_bar(console: Console, *, disable: bool = False, transient: bool = False) -> Progress:
    """Shows how much is done, of how much, and when it will finish."""
    what = TextColumn("{task.description}", markup=False)
    columns = what, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, disable=disable, transient=transient)


def in_markdown(text: str) -> str:
    """A name or path as Markdown that shows it literally."""
    return re.sub(r"([\\`*\[\]<>|~&]|(?<![a-zA-Z0-9])_|_(?![a-zA-Z0-9]))", r"\\\1", text)
