"""The figures of a page as SVG, small enough to be read on a telephone; each series is a group of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lifelong_ens.report.drawing import GREY, decorate, svg
from lifelong_ens.report.labelling import place_labels
from lifelong_ens.report.page.model import Series
from lifelong_ens.report.plots import draw_matrix, readable_bytes, scale_memory, task_ticks
from lifelong_ens.report.significance import half_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# what a pandas method returns is typed as a union of every scalar and container; Any keeps the rest checked
_Pandas = Any
# inches, and the axes' left, bottom, width and height as shares; laid out by hand, which is several times as fast
_WIDE = (5.4, 3.6), (0.115, 0.135, 0.87, 0.84)
_SMALL = (2.6, 2.5), (0.26, 0.185, 0.71, 0.79)
RELIABILITY_TEXT = (
    "How often answers of a confidence are right, over {}, seeds together. On the dashed line confidence is what it "
    "says; bars are shares of images."
)
# for components of memory: apart from each other and from the ground in both schemes
COMPONENT_COLOURS = (
    "#4C78A8", "#F2A03D", "#54A27B", "#D8606B", "#8E79B9", "#9C7A5B", "#E58FB4", "#8C9BA8", "#B9B14A", "#3FA7B5",
)  # fmt: skip


def curves(tasks: _Pandas, series: Mapping[str, Series], num_tasks: int, salt: str) -> str:
    """Average accuracy over the tasks seen so far, after each task: mean and 95 % interval over seeds."""
    figure, axes = _panel(*_WIDE)
    for name, own in tasks.groupby("name", sort=False):
        one = series[name]
        by_task = (100 * own.set_index("trained_task")["average_accuracy"].dropna()).groupby(level=0)
        mean, half = by_task.mean(), by_task.apply(half_interval)
        if mean.empty:
            continue
        x = mean.index.to_numpy() + 1
        low, high = (mean - half).clip(lower=0), (mean + half).clip(upper=100)
        if len(x) == 1:
            axes.axhline(mean.iloc[0], color=one.style["color"], linewidth=1, linestyle=":", gid=one.group)
            error = None if half.isna().any() else [mean - low, high - mean]
            axes.errorbar(x, mean, yerr=error, fmt="none", color=one.style["color"], capsize=3, gid=one.group)
        else:
            axes.fill_between(x, low, high, color=one.style["color"], alpha=0.1, linewidth=0, gid=one.group)
        axes.plot(x, mean, **one.style, linewidth=2, markersize=5, markeredgecolor="white", gid=one.group)
    decorate(axes, "tasks learned", "average accuracy, %")
    axes.set_xticks(task_ticks(num_tasks))
    return svg(figure, salt)


def front(
    points: _Pandas, series: Mapping[str, Series], axes_names: tuple[str, str], lower: bool, salt: str
) -> str:
    """Quality against a cost relative to the reference: mean over seeds, 95 % intervals, what is on the front joined.

    Args:
        points: Columns ``name``, ``x``, ``y``, a row for each run.
        series: By name.
        axes_names: What is on the axis below and to the left.
        lower: Whether a lower ``y`` is better, which then has no upper bound; else it is a percentage.
        salt: See ``svg``.
    """
    figure, axes = _panel(*_WIDE)
    bounds = (0.0, math.inf if lower else 100.0)
    groups = points.dropna(subset=["x", "y"]).groupby("name", sort=False)
    middle = groups[["x", "y"]].mean()
    half = groups["y"].apply(half_interval).fillna(0.0)
    decorate(axes, *axes_names)
    if len(middle):
        scale_memory(axes, middle["x"].to_numpy(), relative=True)
        axes.margins(x=0.16, y=0.14)
        edge = pareto(middle["x"].to_numpy(), middle["y"].to_numpy(), lower)
        axes.plot(*edge, color=GREY, linewidth=1, drawstyle="steps-post", zorder=1, gid="front")
    for name, (at_x, at_y) in middle.iterrows():
        one = series[name]
        reach = np.clip([at_y - half[name], at_y + half[name]], *bounds)
        error = None if half[name] == 0 else [[at_y - reach[0]], [reach[1] - at_y]]
        axes.errorbar(at_x, at_y, yerr=error, fmt="none", color=one.style["color"], capsize=2, gid=one.group)
        axes.plot(
            at_x, at_y, marker=one.style["marker"], color=one.style["color"], markersize=7, gid=one.group
        )
    if len(middle):
        ink = ["#000000"] * len(middle)  # light colours cannot be read as text
        groups_of = [series[name].group for name in middle.index]
        place_labels(axes, middle.to_numpy(), half.to_numpy(), list(middle.index), ink, groups_of)
    return svg(figure, salt)


def _panel(size: tuple[float, float], place: tuple[float, float, float, float]) -> tuple[Figure, Axes]:
    """A figure of one panel whose pixels are points, as those of ``svg`` are."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=72)
    return figure, figure.add_axes(place)


def pareto(x: np.ndarray, y: np.ndarray, lower: bool) -> tuple[list[float], list[float]]:
    """Those points that no other beats in both, by rising ``x``."""
    kept: tuple[list[float], list[float]] = ([], [])
    best = math.inf
    for i in np.lexsort((y if lower else -y, x)):
        value = float(y[i] if lower else -y[i])
        if value < best:
            best = value
            kept[0].append(float(x[i]))
            kept[1].append(float(y[i]))
    return kept


def matrix(cells: np.ndarray, lowest: float, salt: str) -> str:
    """A heat map of an accuracy matrix in percent ``(T, T)``; rows trained, columns evaluated."""
    from matplotlib.colors import Normalize

    figure, axes = _panel(*_SMALL)
    draw_matrix(
        axes, cells, Normalize(min(lowest, 99), 100), annotate=len(cells) <= 8, unmeasured=(0, 0, 0, 0)
    )
    axes.set_ylabel("after training task")
    axes.set_xlabel("accuracy on task")
    return svg(figure, salt)


def memory(costs: _Pandas, colours: Mapping[str, str], num_tasks: int, salt: str) -> str:
    """Bytes of what is stored after each task, stacked by component: mean over seeds."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure, axes = _panel(*_SMALL)
    table = costs.groupby(["trained_task", "component"])["bytes"].mean().unstack(fill_value=0.0)
    below = np.zeros(len(table))
    # joint training stores nothing before its end
    edges = np.append(table.index.to_numpy() + 0.5, table.index.max() + 1.5)
    for component in (one for one in colours if one in table):
        top = below + table[component].to_numpy()
        axes.stairs(top, edges, baseline=below, fill=True, color=colours[component], linewidth=0)
        below = top
    decorate(axes, "tasks learned", "")
    axes.set_xlim(0.5, num_tasks + 0.5)
    axes.set_ylim(0)
    axes.set_xticks(task_ticks(num_tasks))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: readable_bytes(round(value, 3))))
    return svg(figure, salt)


def reliability(bins: _Pandas, colour: str, salt: str) -> str:
    """Accuracy over confidence, seeds together; the bars below are the share of images."""
    from lifelong_ens.report.ensemble_plots import draw_reliability

    figure, axes = _panel(*_SMALL)
    draw_reliability(axes, bins, colour)
    decorate(axes, "confidence", "accuracy")
    return svg(figure, salt)


def reliability_words(name: str, bins: _Pandas) -> str:
    """What a reliability diagram shows, for those who do not see it."""
    filled = bins[bins["count"] > 0]
    share = filled["count"] / filled["count"].sum()
    gap = float((share * (filled["accuracy"] - filled["confidence"])).sum())
    which = "less" if gap > 0 else "more"
    return f"Reliability of {name}: its answers are on the whole {abs(100 * gap):.1f} points {which} sure than right."


def colours_of(components: Sequence[str]) -> dict[str, str]:
    """A colour for each component of memory."""
    return {one: COMPONENT_COLOURS[i % len(COMPONENT_COLOURS)] for i, one in enumerate(components)}
