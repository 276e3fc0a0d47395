"""The pieces of a page of HTML. Every text that comes from a cache passes `escape` here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

STYLE = Path(__file__).with_name("page.css").read_text()


def page(title: str, sections: Iterable[str]) -> str:
    """A whole file that needs nothing from outside; the policy in it would refuse anything."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">'
        f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1>{''.join(sections)}</body></html>\n"
    )


def section(title: str, *parts: str, note: str = "") -> str:
    return f"<section><h2>{escape(title)}</h2>{paragraph(note)}{''.join(parts)}</section>"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>" if text else ""


def bullets(lines: Sequence[str], kind: str = "") -> str:
    return f'<ul class="{kind}">' + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


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
    return f'<div class="missing">{escape(reason)}</div>'


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
