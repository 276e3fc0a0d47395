"""Charts as SVG, drawn with matplotlib in the colours of the page they are put into, light or dark."""

import io
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from teachercache.pipeline.errors import extra

with extra("view"):
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

SERIES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")  # Okabe & Ito, colour-blind safe
_DASHES = ("-", "--", "-.", ":", (0, (8, 2)), (0, (4, 1, 1, 1, 1, 1)), (0, (1, 3)))  # of no common period
_STYLE = Path(__file__).with_name("charts.mplstyle")
_INK = "#010203"  # stands in it for the colour of the page's text
_LEGEND_LINES = 13
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_BINS = 60
_POINTS = 200


def _chart(draw: Callable[[Axes, Mapping[str, NDArray]], None]) -> Callable[[Mapping[str, NDArray]], Markup]:
    """What draws a line for each of the values, as a function from these to a chart with a legend."""

    @wraps(draw)
    def drawn(values: Mapping[str, NDArray]) -> Markup:
        with matplotlib.rc_context(fname=_STYLE):
            figure = Figure(figsize=(5.2, 2.9), layout="constrained")
            axes = figure.subplots()
            draw(axes, values)
            names = [name.replace("$", r"\$") for name in values]  # a $ would start a formula
            columns = -(-len(names) // _LEGEND_LINES)
            figure.set_figwidth(figure.get_figwidth() + 1.6 * max(columns - 1, 0))
            figure.legend(labels=names, loc="outside right upper", ncols=columns)  # where no line can be
            file = io.StringIO()
            figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        drawing = file.getvalue()
        return Markup(drawing[drawing.index("<svg") :].replace(_INK, "currentColor"))

    return drawn


@_chart
def norm_histogram(axes: Axes, norms: Mapping[str, NDArray]) -> None:
    """Distribution of token norms, a line for each level."""
    finite = {name: values[np.isfinite(values)] for name, values in norms.items()}
    largest = max((values.max() for values in finite.values() if values.size), default=1.0)
    smallest = min((values.min() for values in finite.values() if values.size), default=0.0)
    logarithmic = smallest > 0 and largest > 20 * smallest
    space = np.geomspace if logarithmic else np.linspace
    edges = space(smallest, max(largest, smallest * (1 + 1e-6) + 1e-9), _BINS + 1)
    for name, values, style in _lines(finite):
        axes.stairs(np.histogram(values, edges)[0] / max(values.size, 1), edges, label=name, **style)
    axes.set(xlabel="token norm", ylabel="share of tokens")
    if logarithmic:
        _logarithmic(axes, "x")


@_chart
def channel_curve(axes: Axes, std: Mapping[str, NDArray]) -> None:
    """Standard deviations of the channels of each level, sorted: outliers at the left, dead ones right."""
    positive = [values[values > 0].min() for values in std.values() if (values > 0).any()]
    floor = min(positive, default=1.0) / 2  # where dead channels are drawn
    for name, values, style in _lines(std):
        ordered = np.maximum(np.sort(values)[::-1], floor)
        channels = np.arange(1, len(ordered) + 1)
        axes.plot(channels, ordered, label=name, marker="o" if len(ordered) == 1 else "", **style)
    axes.set(xlabel="channel, sorted", ylabel="standard deviation")
    _logarithmic(axes, "x")
    _logarithmic(axes, "y")
    axes.set_ylim(bottom=floor)


@_chart
def error_curve(axes: Axes, errors: Mapping[str, NDArray]) -> None:
    """What share of tokens has an error of at most so much, a line for each codec."""
    shares = np.linspace(0, 1, _POINTS)
    for name, values, style in _lines(errors):
        axes.plot(np.quantile(np.maximum(values, 1e-12), shares), shares, label=name, **style)
    axes.set(xlabel="1 − cosine of a token", ylabel="share of tokens below")
    _logarithmic(axes, "x")


def _lines(values: Mapping[str, NDArray]) -> Iterator[tuple[str, NDArray, dict[str, Any]]]:
    """A colour and dashes for each, which differ in 42 lines and let all be seen where they meet."""
    for (name, array), colour, dashes in zip(values.items(), cycle(SERIES), cycle(_DASHES), strict=False):
        yield name, array, {"color": colour, "linestyle": dashes, "linewidth": 1.5}


def coloured(values: NDArray) -> list[list[tuple[str, str, str]]]:
    """Numbers in 0–1 as text, each with a colour for it, and black or white: what can be read on that."""
    colours = matplotlib.colormaps["viridis"](np.clip(np.nan_to_num(values), 0, 1))[..., :3]
    inks = np.where(colours @ (0.299, 0.587, 0.114) > 0.5, "#000", "#fff")
    return [
        [
            (f"{value:z.2f}", matplotlib.colors.to_hex(colour), ink)
            for value, colour, ink in zip(*row, strict=True)
        ]
        for row in zip(values, colours, inks, strict=True)
    ]


def number(value: float, _: object = None) -> str:
    """0.05, 20, or 2·10⁻⁶."""
    if 1e-3 <= value < 1e5:
        return f"{value:g}"
    factor, exponent = f"{value:.0e}".split("e")
    return f"{'' if factor == '1' else f'{factor}·'}10{str(int(exponent)).translate(_SUPERSCRIPT)}"


def _logarithmic(axes: Axes, which: Literal["x", "y"]) -> None:
    """With numbers at 1, 2 and 5 where the range may hold no power of ten."""
    axes.set(**{f"{which}scale": "log"})
    axis: Axis = getattr(axes, f"{which}axis")
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,), numticks=6))
    axis.set_major_formatter(number)
    axis.set_minor_formatter(NullFormatter())
