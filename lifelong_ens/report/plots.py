"""The plots of a report, as PNG bytes. Drawn on figures of their own: nothing global is read or changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from lifelong_ens.report.drawing import GREY, Styles, decorate, new_figure, png, styles_of
from lifelong_ens.report.labelling import place_labels, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 10.0
_UNMEASURED = "#E4E4E4"

_KEYS = ["stream", "setting", "strategy"]
_Labels = Mapping[tuple[str, str], str]
# what a pandas method returns is typed as a union of every scalar and container; Any keeps the rest checked
_Pandas = Any


def draw_all(
    runs: pd.DataFrame, accuracy: pd.DataFrame, tasks: pd.DataFrame, labels: _Labels
) -> dict[str, bytes]:
    """Every plot under its file name; ``labels`` names each (stream, setting), one panel for each."""
    return {
        "accuracy_over_tasks.png": accuracy_over_tasks(tasks, runs, labels),
        "forgetting_matrix.png": forgetting_matrix(accuracy, runs, labels),
        "accuracy_against_memory.png": accuracy_against_memory(runs, labels),
    }


def accuracy_over_tasks(tasks: _Pandas, runs: _Pandas, labels: _Labels) -> bytes:
    """The average accuracy over the tasks seen so far, after each task: mean over seeds, band of one std."""
    styles = styles_of(runs["strategy"])
    figure, panels = _panels(labels, height=max(5.2, 0.4 * len(styles) / len(labels)))
    for key, axes in zip(labels, panels, strict=True):
        for strategy, curve in _of(tasks, key).groupby("strategy", sort=False):
            _draw_curve(axes, curve, styles[strategy])
        num_tasks = int(_of(runs, key)["num_tasks"].iloc[0])
        decorate(axes, "tasks learned", "average accuracy over tasks seen, %")
        axes.set_xlim(1 - 0.05 * num_tasks, 1.05 * num_tasks)
        axes.set_xticks(task_ticks(num_tasks))
    final = runs.groupby("strategy", sort=False)["average_accuracy"].mean()
    _draw_legend(figure, list(final.sort_values(ascending=False, kind="stable").index), styles)
    return png(figure)


def forgetting_matrix(accuracy: _Pandas, runs: _Pandas, labels: _Labels) -> bytes:
    """One heat map of the accuracy matrix per strategy, mean over seeds; rows trained, columns evaluated."""
    from matplotlib.colors import Normalize

    cells = 100 * accuracy.groupby([*_KEYS, "trained_task", "eval_task"])["accuracy"].mean()
    lowest = min((math.floor(cell) for cell in cells), default=0)
    norm = Normalize(min(lowest, 99), 100)
    groups = list(runs.groupby(_KEYS, sort=False)["num_tasks"].first().items())
    num_columns = min(len(groups), 4)
    figure, grid = _matrix_grid(len(groups), num_columns)
    image: Any = None
    for axes, (key, num_tasks) in zip(grid.flat, groups, strict=False):
        matrix = np.full((int(num_tasks), int(num_tasks)), np.nan)
        own = cells[cells.index.droplevel([3, 4]) == key]
        for (*_, trained, evaluated), value in own.items():
            matrix[trained, evaluated] = value
        image = draw_matrix(axes, matrix, norm, annotate=len(matrix) * num_columns <= 24)
        stream, setting, strategy = key
        lines = [strategy] if len(labels) == 1 else [labels[stream, setting], strategy]
        axes.set_title("\n".join(wrapped(line, 88 // max(num_columns, 2)) for line in lines), fontsize=11)
    bar = figure.colorbar(image, ax=grid, fraction=0.03, pad=0.015, aspect=30)
    bar.set_label("accuracy, % (grey: not measured)")
    bar.ax.spines[:].set_visible(False)
    return png(figure)


def accuracy_against_memory(runs: _Pandas, labels: _Labels) -> bytes:
    """Average accuracy against the memory of the stored model: mean over seeds, bars of one std."""
    styles = styles_of(runs["strategy"])
    relative = bool(runs["ratio_bytes"].notna().all())
    points = runs.assign(x=runs["ratio_bytes" if relative else "bytes"], y=100 * runs["average_accuracy"])
    figure, panels = _panels(labels, height=5.8)
    unit = "ratio to the vanilla network" if relative else "bytes"
    for key, axes in zip(labels, panels, strict=True):
        groups = _of(points, key).dropna(subset=["x", "y"]).groupby("strategy", sort=False)[["x", "y"]]
        middle, spread = groups.mean(), groups.std().fillna(0.0)
        for strategy, (x, y) in middle.iterrows():
            style, (x_error, y_error) = styles[strategy], spread.loc[strategy]
            bars = {"xerr": x_error or None, "yerr": y_error or None, "elinewidth": 1.4, "capsize": 3}
            axes.errorbar(x, y, fmt="none", color=style["color"], zorder=2, **bars)
            axes.plot(x, y, marker=style["marker"], color=style["color"], markersize=9, zorder=3)
        decorate(axes, f"memory of the stored model, {unit}", "average accuracy after the last task, %")
        if len(middle):
            scale_memory(axes, middle["x"].to_numpy(), relative)
            colours = [styles[name]["color"] for name in middle.index]
            place_labels(axes, middle.to_numpy(), spread["y"].to_numpy(), list(middle.index), colours)
    return png(figure)


def memory_over_tasks(costs: _Pandas, runs: _Pandas, labels: _Labels) -> bytes:
    """Memory of what is stored after each task, mean over seeds; on a log scale where it spans much."""
    styles = styles_of(runs["strategy"])
    figure, panels = _panels(labels, height=5.2)
    for key, axes in zip(labels, panels, strict=True):
        stored = _of(costs, key)
        stored = stored[stored["component"] != "optimizer"]
        totals = stored.groupby(["strategy", "seed", "trained_task"], sort=False)["bytes"].sum()
        means = totals.groupby(["strategy", "trained_task"], sort=False).mean()
        for strategy, curve in means.groupby(level="strategy", sort=False):
            tasks = curve.index.get_level_values("trained_task").to_numpy() + 1
            axes.plot(tasks, curve.to_numpy(), **styles[strategy], linewidth=2, markeredgecolor="white")
        decorate(axes, "tasks learned", "memory of the stored model")
        axes.set_xticks(task_ticks(int(_of(runs, key)["num_tasks"].iloc[0])))
        scale_memory(axes, means.to_numpy(), relative=False, axis="y")
    final = runs.groupby("strategy", sort=False)["bytes"].mean().sort_values(ascending=False, kind="stable")
    _draw_legend(figure, list(final.index), styles)
    return png(figure)


def _of(table: _Pandas, key: tuple[str, str]) -> _Pandas:
    """The rows of one (stream, setting)."""
    return table[(table["stream"] == key[0]) & (table["setting"] == key[1])]


def _draw_curve(axes: Axes, tasks: _Pandas, style: Mapping[str, Any]) -> None:
    curves = 100 * tasks.set_index("trained_task")["average_accuracy"].dropna()
    by_task = curves.groupby(level=0)
    mean, std = by_task.mean(), by_task.std()
    x = mean.index.to_numpy() + 1
    if len(x) == 1 and x[0] > 1:  # joint training has only this end point: a line to hold the others against
        axes.axhline(mean.iloc[0], color=style["color"], linewidth=1, linestyle=":", zorder=1)
    axes.plot(x, mean, **style, linewidth=2, markersize=6, markeredgecolor="white", zorder=3)
    if len(x) > 1:
        low, high = (mean - std).clip(lower=0), (mean + std).clip(upper=100)
        axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0, zorder=2)
    elif std.notna().all():
        axes.errorbar(x, mean, yerr=std, fmt="none", color=style["color"], capsize=3, zorder=2)


def _matrix_grid(num_panels: int, num_columns: int) -> tuple[Figure, np.ndarray]:
    """A grid of square panels with room for a colour bar; names only at the outer left and bottom axes."""
    num_rows = math.ceil(num_panels / num_columns)
    side = min((_WIDTH - 1.2) / num_columns - 0.4, 4.6)
    figure = new_figure((side + 0.4) * num_columns + 1.2, (side + 0.6) * num_rows + 0.3)
    grid: np.ndarray = figure.subplots(num_rows, num_columns, squeeze=False)
    for i, axes in enumerate(grid.flat):
        axes.set_visible(i < num_panels)
        if i % num_columns == 0:
            axes.set_ylabel("after training task")
        if i + num_columns >= num_panels:
            axes.set_xlabel("accuracy on task")
    return figure, grid


def draw_matrix(
    axes: Axes, matrix: np.ndarray, norm: Any, annotate: bool, unmeasured: Any = _UNMEASURED
) -> Any:
    """One heat map of percentages ``(T, T)``; dark text on light cells."""
    from matplotlib import colormaps

    palette = colormaps["viridis"].with_extremes(bad=unmeasured)
    image = axes.imshow(np.ma.masked_invalid(matrix), cmap=palette, norm=norm, interpolation="nearest")
    ticks = task_ticks(len(matrix))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks([tick - 1 for tick in ticks], labels=[str(tick) for tick in ticks], fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if annotate:
        for (row, column), value in np.ndenumerate(matrix):
            if not math.isnan(value):
                colour = "#111111" if norm(value) > 0.6 else "#fafafa"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=9)
    return image


def _panels(labels: _Labels, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with one titled panel per stream and setting."""
    figure = new_figure(_WIDTH, height * len(labels))
    panels: list[Axes] = list(figure.subplots(len(labels), squeeze=False)[:, 0])
    for axes, label in zip(panels, labels.values(), strict=True):
        axes.set_title(label)
    return figure, panels


def _draw_legend(figure: Figure, strategies: Sequence[str], styles: Styles) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **styles[name], linewidth=2, markeredgecolor="white") for name in strategies]
    names = [wrapped(name, 24) for name in strategies]
    figure.legend(handles, names, loc="outside right upper", frameon=False, labelspacing=0.7)


def scale_memory(axes: Axes, values: np.ndarray, relative: bool, axis: Literal["x", "y"] = "x") -> None:
    """A log scale where the values span more than a factor of four, and ticks that people can read."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    scaled = axes.xaxis if axis == "x" else axes.yaxis
    if values.min() > 0 and values.max() > 4 * values.min():
        axes.set(**{f"{axis}scale": "log"})
        scaled.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        scaled.set_minor_formatter(NullFormatter())
    scaled.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x" if relative else readable_bytes(x)))
    if relative:
        axes.axvline(1, color=GREY, linewidth=1, linestyle="--", zorder=1)
    axes.margins(x=0.12, y=0.12)


def readable_bytes(value: float) -> str:
    """``310 kB``, with a decimal prefix."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:g} {unit}"
        value /= 1000
    return f"{value:g} TB"


def task_ticks(num_tasks: int) -> list[int]:
    """At most about ten task numbers, counted from 1."""
    step = next(step for step in (1, 5, 10, 20, 50, 100, num_tasks) if num_tasks <= 10 * step)
    return sorted({1, *range(step, num_tasks + 1, step)})
