"""The pieces of a page of HTML: `html` has the macros of page.html, which escape what comes from a cache."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from teachercache.pipeline.errors import extra

with extra("view"):
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup, escape


class Section(NamedTuple):
    title: str
    content: Markup


def section(title: str, *parts: Markup, note: str = "") -> Section:
    return Section(title, Markup("").join([html.paragraph(note), *parts]))


def _prose(text: str) -> Markup:
    """A sentence, whose `commands` stand between backticks in a terminal."""
    return Markup(re.sub(r"`(.+?)`", r"<code>\1</code>", str(escape(text))))


_templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
_templates.filters["prose"] = _prose
html: Any = _templates.get_template("page.html").module
