"""Pages of HTML as templates, which escape what comes from a cache; `html` has the macros of page.html."""

import re
from pathlib import Path
from typing import Any

from teachercache.pipeline.errors import extra

with extra("view"):
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup, escape


def _prose(text: str) -> Markup:
    """A sentence, whose `commands` stand between backticks in a terminal."""
    return Markup(re.sub(r"`(.+?)`", r"<code>\1</code>", str(escape(text))))


templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
templates.filters["prose"] = _prose
html: Any = templates.get_template("page.html").module
