"""What all plots have in common: figures of their own, frames, colours. Nothing global is read or changed."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's palette for all kinds of colour vision, without its yellow, too light for lines on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
GREY = "#767676"
GRID = "#E6E6E6"
# colours of a page that change with its scheme, by the colour they are drawn in
_PROPERTIES = {
    **{colour: f"s{i}" for i, colour in enumerate(COLOURS[:-1])},
    "#000000": "ink",
    "#ffffff": "surface",
    GREY: "muted",
    GRID: "rule",
}
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
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def svg(figure: Figure, salt: str) -> str:
    """The figure as an ``<svg>`` element; ``salt`` keeps its ids apart from those of other figures of a page.

    Colours become custom properties of the page, so that they follow its light or dark scheme, and what was drawn
    with the gid ``series-3`` becomes ``<g class="series" data-series="3">``.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "svg.id": None}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'id="series-(\d+)"', r'class="series" data-series="\1"', text)
    text = text.replace('id="front"', 'class="front"')
    text = re.sub(r' id="[a-zA-Z0-9.]+_\d+"', "", text)  # numbers of artists, which nothing refers to
    for colour, name in _PROPERTIES.items():
        text = re.sub(re.escape(colour), f"var(--{name})", text, flags=re.IGNORECASE)
    return re.sub(r"\s*\n\s*", "\n", text)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()
