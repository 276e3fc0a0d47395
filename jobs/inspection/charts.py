"""Charts as SVG, drawn with matplotlib in the colours of the page they are put into, light or dark."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray

SERIES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")  # Okabe & Ito, colour-blind safe
_LINES = tuple(zip(SERIES, ("-", "--", "-.", ":", "-", "--"), strict=True))  # where they meet, all are seen
_INK = "#010203"  # stands for the colour of the page's text
_DRAWN_IN_INK = dict.fromkeys(
    ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), _INK
)
_STYLE = _DRAWN_IN_INK | {
    "svg.fonttype": "none",  # text stays text, in the font of the page
    "svg.hashsalt": "teachercache",  # equal charts are equal bytes
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
_BINS = 60
_POINTS = 200


def norm_histogram(norms: Mapping[str, NDArray], title: str) -> str:
    """Distribution of token norms, a line for each level."""
    finite = {name: values[np.isfinite(values)] for name, values in norms.items()}
    largest = max((values.max() for values in finite.values() if values.size), default=1.0)
    smallest = min((values.min() for values in finite.values() if values.size), default=0.0)
    logarithmic = smallest > 0 and largest > 20 * smallest
    space = np.geomspace if logarithmic else np.linspace
    edges = space(smallest, max(largest, smallest * (1 + 1e-6) + 1e-9), _BINS + 1)

    def draw(axes: Axes) -> None:
        for (name, values), (colour, dashes) in zip(finite.items(), _LINES, strict=False):
            share = np.histogram(values, edges)[0] / max(values.size, 1)
            axes.stairs(share, edges, label=name, color=colour, linestyle=dashes, linewidth=1.5)
        axes.set(xlabel="token norm", ylabel="share of tokens", title=_plain(title))
        if logarithmic:
            _logarithmic(axes, "x")

    return _chart(draw)


def channel_curve(std: Mapping[str, NDArray], title: str) -> str:
    """Standard deviations of the channels of each level, sorted: outliers at the left, dead ones right."""

    positive = [values[values > 0].min() for values in std.values() if (values > 0).any()]
    floor = min(positive, default=1.0) / 2  # where dead channels are drawn

    def draw(axes: Axes) -> None:
        for (name, values), (colour, dashes) in zip(std.items(), _LINES, strict=False):
            ordered = np.maximum(np.sort(values)[::-1], floor)
            channels = np.arange(1, len(ordered) + 1)
            axes.plot(channels, ordered, dashes, label=name, color=colour, linewidth=1.5)
        axes.set(xlabel="channel, sorted", ylabel="standard deviation", title=_plain(title))
        _logarithmic(axes, "x")
        _logarithmic(axes, "y")
        axes.set_ylim(bottom=floor)

    return _chart(draw)


def error_curve(errors: Mapping[str, NDArray], title: str) -> str:
    """What share of tokens has an error of at most so much, a line for each codec."""

    def draw(axes: Axes) -> None:
        for (name, values), (colour, dashes) in zip(errors.items(), _LINES, strict=False):
            shares = np.linspace(0, 1, _POINTS)
            ordered = np.quantile(np.maximum(values, 1e-12), shares)
            axes.plot(ordered, shares, dashes, label=name, color=colour)
        axes.set(xlabel="1 − cosine of a token", ylabel="share of tokens below", title=_plain(title))
        _logarithmic(axes, "x")

    return _chart(draw)


def _text_on(red: float, green: float, blue: float) -> str:
    """Black or white, whichever can be read on this colour (0–1)."""
    return "#000" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "#fff"


def matrix(values: NDArray, names: Sequence[str]) -> str:
    """A square table of numbers in 0–1, coloured by them."""
    colours = matplotlib.colormaps["viridis"](np.clip(np.nan_to_num(values), 0, 1))
    head = "".join(f"<th>{escape(name).replace(' ', '<br>', 1)}</th>" for name in names)
    lines = [
        f"<tr><th>{escape(name)}</th>"
        + "".join(
            f'<td style="background:{matplotlib.colors.to_hex(colour)};color:{_text_on(*colour[:3])}">'
            f"{value:.2f}</td>"
            for value, colour in zip(row, row_colours, strict=True)
        )
        + "</tr>"
        for name, row, row_colours in zip(names, values, colours, strict=True)
    ]
    return f'<div class="scroll"><table class="matrix"><tr><th></th>{head}</tr>{"".join(lines)}</table></div>'


def _plain(text: str) -> str:
    """A name may hold a $, which would start a formula."""
    return text.replace("$", r"\$")


def _logarithmic(axes: Axes, which: Literal["x", "y"]) -> None:
    """With plain numbers at 1, 2 and 5 where the range may hold no power of ten."""
    axes.set(**{f"{which}scale": "log"})
    axis: Axis = getattr(axes, f"{which}axis")
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _chart(draw: Callable[[Axes], None]) -> str:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.2, 2.9), layout="constrained")
        draw(figure.subplots())
        figure.legend(loc="outside right upper")  # where no line can be
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    drawing = file.getvalue()
    return drawing[drawing.index("<svg") :].replace(_INK, "currentColor")
