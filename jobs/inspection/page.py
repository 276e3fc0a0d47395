"""The pieces of a page of HTML. Every text that comes from a cache passes `escape` here."""

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

STYLE = Path(__file__).with_name("page.css").read_text()


class Section(NamedTuple):
    title: str
    content: str


def page(title: str, warnings: Sequence[str], sections: Sequence[Section]) -> str:
    """A whole file that needs nothing from outside; the policy in it would refuse anything."""
    contents = "".join(
        f'<li><a href="#section{n}">{escape(section.title)}</a></li>' for n, section in enumerate(sections)
    )
    body = "".join(
        f'<section id="section{n}"><h2>{escape(section.title)}</h2>{section.content}</section>'
        for n, section in enumerate(sections)
    )
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">'
        f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1>{bullets(warnings, 'banner')}"
        f"<nav><ol>{contents}</ol></nav>{body}</body></html>\n"
    )


def section(title: str, *parts: str, note: str = "") -> Section:
    return Section(title, paragraph(note) + "".join(parts))


def prose(text: str) -> str:
    """A sentence, whose `commands` stand between backticks in a terminal."""
    return re.sub(r"`(.+?)`", r"<code>\1</code>", escape(text))


def paragraph(text: str) -> str:
    return f"<p>{prose(text)}</p>" if text else ""


def bullets(lines: Sequence[str], kind: str = "") -> str:
    return f'<ul class="{kind}">{"".join(f"<li>{prose(line)}</li>" for line in lines)}</ul>' if lines else ""


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Texts in a table that scrolls by itself where it is wider than the page."""
    head = "".join(f"<th>{escape(title)}</th>" for title in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def facts(values: Mapping[str, object]) -> str:
    """Names and values, one under the other."""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in values.items())
    return f"<dl>{rows}</dl>"


def picture(uri: str, description: str, kind: str = "map") -> str:
    return f'<img class="{kind}" src="{uri}" alt="{escape(description)}" title="{escape(description)}">'


def placeholder(reason: str) -> str:
    """In place of a picture that cannot be had."""
    return f'<div class="missing">{prose(reason)}</div>'


def heading(text: str, strong: bool = False) -> str:
    """A title in a grid of maps."""
    kind = "b" if strong else "span"
    return f"<{kind}>{escape(text)}</{kind}>"


def map_grid(cells: Iterable[str], *columns: str | int) -> str:
    """Cells line by line; `columns` are widths, or how many maps stand there. Scrolls where it is wider."""
    widths = " ".join(f"repeat({one},var(--map))" if isinstance(one, int) else one for one in columns)
    grid = f'<div class="maps" style="grid-template-columns:{widths}">{"".join(cells)}</div>'
    return f'<div class="scroll">{grid}</div>'


def timeline_rows(lanes: Iterable[tuple[str, str]]) -> str:
    """(worker, picture) one under the other."""
    rows = "".join(
        f'<span>{escape(worker)}</span><img src="{uri}" alt="activity of {escape(worker)}">'
        for worker, uri in lanes
    )
    return f'<div class="timeline">{rows}</div>'


def figure(content: str, caption: str) -> str:
    legend = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{content}{legend}</figure>"


def scale(low: str, high: str, caption: str) -> str:
    """The colours of `heat`, with what their ends mean."""
    return (
        f'<p class="scale">{escape(caption)} <span>{escape(low)}</span><i></i><span>{escape(high)}</span></p>'
    )
