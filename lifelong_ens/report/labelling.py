"""Labels beside the points of a plot that cover neither a point nor each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_Box = tuple[float, float, float, float]

_MARGIN = 9.0
"""Pixels kept free around a point's centre."""
_RINGS = (1.0, 1.8, 2.8, 4.0, 5.5, 7.5)
_ANGLES = (0, 180, 90, 270, 45, 315, 135, 225, 20, 340, 160, 200, 70, 110, 250, 290)


def place_labels(
    axes: Axes,
    points: NDArray[np.float64],
    labels: Sequence[str],
    colours: Sequence[str],
    heights: NDArray[np.float64],
) -> None:
    """Write each label near its point ``(points, 2)``, with a thin line to it where it had to move away.

    ``heights`` ``(points,)`` are the half lengths of vertical error bars, which are kept free as well. A label for
    which there is no room at all lands where it overlaps least.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = axes.figure
    canvas = FigureCanvasAgg(figure)  # pyright: ignore[reportArgumentType]
    canvas.draw()  # settles the layout and the limits, without which pixels mean nothing
    renderer = canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    centres = axes.transData.transform(points)
    tops = axes.transData.transform(points + np.stack([np.zeros_like(heights), heights], axis=1))
    taken: list[_Box] = [_around(x, y, top - y) for (x, y), (_, top) in zip(centres, tops, strict=True)]
    for i in sorted(range(len(labels)), key=lambda i: -centres[i][1]):
        text = axes.annotate(
            labels[i], points[i], (0, 0), textcoords="offset pixels", color=colours[i], fontsize=10
        )
        size = text.get_window_extent(renderer)
        box, ring = _best_box(
            centres[i], size.width, size.height, taken, (frame.x0, frame.y0, frame.x1, frame.y1)
        )
        taken.append(box)
        text.set_position((box[0] - centres[i][0], box[1] - centres[i][1]))
        text.set_verticalalignment("bottom")
        if ring > 0:
            _draw_leader(axes, centres[i], box, colours[i])


def _best_box(
    centre: NDArray[np.float64], width: float, height: float, taken: list[_Box], frame: _Box
) -> tuple[_Box, int]:
    """The nearest place for a label of that size that is free, or else the least bad; and in which ring it is."""
    best: tuple[float, _Box, int] | None = None
    for ring, distance in enumerate(_RINGS):
        for angle in _ANGLES:
            across, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            x = centre[0] + distance * 1.5 * _MARGIN * across + (across - 1) * width / 2
            y = centre[1] + distance * 1.5 * _MARGIN * up + (up - 1) * height / 2
            box = (x, y, x + width, y + height)
            cost = sum(_overlap(box, other) for other in taken) + width * height - _overlap(box, frame)
            if cost <= 1e-6 * width * height:
                return box, ring
            if best is None or cost < best[0]:
                best = cost, box, ring
    if best is None:
        raise RuntimeError("no place was tried")
    return best[1], best[2]


def _around(x: float, y: float, bar: float) -> _Box:
    return x - _MARGIN, y - max(_MARGIN, bar), x + _MARGIN, y + max(_MARGIN, bar)


def _overlap(first: _Box, second: _Box) -> float:
    """The area that two boxes have in common, in square pixels."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return max(width, 0.0) * max(height, 0.0)


def _draw_leader(axes: Axes, centre: NDArray[np.float64], box: _Box, colour: str) -> None:
    """A thin line from a point to the nearest edge of its label."""
    end = (min(max(centre[0], box[0]), box[2]), min(max(centre[1], box[1]), box[3]))
    line = axes.transData.inverted().transform(np.array([centre, end]))
    axes.plot(
        line[:, 0], line[:, 1], color=colour, linewidth=0.8, alpha=0.6, zorder=1, scalex=False, scaley=False
    )
