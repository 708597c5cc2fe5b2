"""Labels beside the points of a plot that cover neither a point nor each other."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_Box = tuple[float, float, float, float]  # left, bottom, right, top, in pixels

_FREE = 11.0  # pixels around the centre of a point
_RINGS = (1.5, 2.5, 4.0, 5.5, 7.5, 10.0)  # distances to try, in units of _FREE
_ANGLES = (0, 180, 90, 270, 45, 315, 135, 225, 20, 340, 160, 200, 70, 110, 250, 290)


def place_labels(
    axes: Axes,
    points: NDArray[np.float64],
    bars: NDArray[np.float64],
    labels: Sequence[str],
    colours: Sequence[str],
    groups: Sequence[str] | None = None,
) -> None:
    """Write each label near its point ``(points, 2)``, with a thin line to it where it had to move away.

    ``bars`` ``(points,)`` are the half lengths of vertical error bars, which are kept free as well. A label
    for which there is no room lands where it overlaps least. ``groups`` names each label and its line in the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(cast(Any, axes.figure))
    canvas.draw()  # settles the layout and the limits, without which pixels mean nothing
    renderer = canvas.get_renderer()
    frame = cast(_Box, axes.get_window_extent(renderer).extents)
    centres = axes.transData.transform(points)
    tops = axes.transData.transform(points + np.outer(bars, (0.0, 1.0)))
    taken = [_around(x, y, top - y) for (x, y), (_, top) in zip(centres, tops, strict=True)]
    for i in sorted(range(len(labels)), key=lambda i: -centres[i][1]):
        text = axes.annotate(
            wrapped(labels[i], 28),
            points[i],
            (0, 0),
            textcoords="offset pixels",
            va="bottom",
            color=colours[i],
        )
        size = text.get_window_extent(renderer)
        ring, box = _best_box(centres[i], size.width, size.height, taken, frame)
        taken.append(box)
        text.set_position((box[0] - centres[i][0], box[1] - centres[i][1]))
        text.set_gid(None if groups is None else groups[i])
        if ring > 0:
            _draw_leader(axes, centres[i], box, colours[i], text.get_gid())


def wrapped(text: str, width: int) -> str:
    """``text`` in lines of at most ``width`` characters, broken after ``. _ : / , =`` or a space."""
    lines = [""]
    for piece in re.findall(rf"[^ ._:/,=]{{0,{width - 1}}}(?:[ ._:/,=]|.|$)", text):
        if lines[-1] and len((lines[-1] + piece).rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


def _best_box(
    centre: NDArray[np.float64], width: float, height: float, taken: list[_Box], frame: _Box
) -> tuple[int, _Box]:
    """The nearest free place for a label of that size, or else the least bad; first the ring it is in."""
    best: tuple[float, int, _Box] | None = None
    for ring, distance in enumerate(_RINGS):
        for angle in _ANGLES:
            across, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            x = centre[0] + distance * _FREE * across + (across - 1) * width / 2
            y = centre[1] + distance * _FREE * up + (up - 1) * height / 2
            box = (x, y, x + width, y + height)
            bad = sum(_overlap(box, other) for other in taken) + width * height - _overlap(box, frame)
            if best is None or bad < best[0] - 1e-6 * width * height:
                best = bad, ring, box
    if best is None:
        raise RuntimeError("no place was tried")
    return best[1], best[2]


def _around(x: float, y: float, bar: float) -> _Box:
    return x - _FREE, y - max(_FREE, bar), x + _FREE, y + max(_FREE, bar)


def _overlap(first: _Box, second: _Box) -> float:
    """The area that two boxes have in common, in square pixels."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return max(width, 0.0) * max(height, 0.0)


def _draw_leader(axes: Axes, centre: NDArray[np.float64], box: _Box, colour: str, group: str | None) -> None:
    """A thin line from a point to the nearest edge of its label."""
    end = (min(max(centre[0], box[0]), box[2]), min(max(centre[1], box[1]), box[3]))
    line = axes.transData.inverted().transform(np.array([centre, end]))
    style: dict[str, Any] = {"color": colour, "linewidth": 0.8, "alpha": 0.6}
    axes.plot(line[:, 0], line[:, 1], **style, gid=group, scalex=False, scaley=False)
