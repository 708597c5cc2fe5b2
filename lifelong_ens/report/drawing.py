"""What all plots have in common: figures of their own, frames, colours. Nothing global is read or changed."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's palette for all kinds of colour vision, without its yellow, too light for lines on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
GREY = "#767676"
_LINES = ("-", (0, (4, 1.5)), (0, (1, 1)))
_MARKERS = ("o", "s", "D", "^", "v", "P", "X")
_DPI = 140

Styles = Mapping[str, Mapping[str, Any]]


def styles_of(names: Iterable[str]) -> Styles:
    """A colour, a marker and a line for each name, the same in every plot; no two alike up to 21."""
    styles = {}
    for i, name in enumerate(dict.fromkeys(names)):
        turn, colour = divmod(i, len(COLOURS))
        styles[name] = {
            "color": COLOURS[colour],
            "marker": _MARKERS[(i + turn) % len(_MARKERS)],
            "linestyle": _LINES[turn % len(_LINES)],
        }
    return styles


def decorate(axes: Axes, x: str, y: str) -> None:
    """Name the axes and take away what is not needed."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()
