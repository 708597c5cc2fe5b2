"""The plots of a report, as PNG bytes. Drawn on figures of their own: nothing global is read or changed."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lifelong_ens.report.labelling import place_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's palette for all kinds of colour vision, without its yellow, which is too light for lines on white
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "p", "h", "*", "d", "8")
_DPI = 140
_GREY = "#767676"
_UNMEASURED = "#E4E4E4"

_Labels = Mapping[tuple[str, str], str]
_Styles = Mapping[str, Mapping[str, Any]]


def draw_all(
    runs: pd.DataFrame, accuracy: pd.DataFrame, tasks: pd.DataFrame, labels: _Labels
) -> dict[str, bytes]:
    """Every plot under its file name."""
    return {
        "accuracy_over_tasks.png": accuracy_over_tasks(tasks, runs, labels),
        "forgetting_matrix.png": forgetting_matrix(accuracy, runs, labels),
        "accuracy_against_memory.png": accuracy_against_memory(runs, labels),
    }


def accuracy_over_tasks(tasks: pd.DataFrame, runs: pd.DataFrame, labels: _Labels) -> bytes:
    """The average accuracy over the tasks seen so far, after each task: mean over seeds, band of one std."""
    styles = _styles(runs)
    figure, panels, legend = _panels(labels, width=10.0, height=5.2)
    for (stream, setting), axes in zip(labels, panels, strict=True):
        group = tasks[(tasks["stream"] == stream) & (tasks["setting"] == setting)]
        for strategy, own in group.groupby("strategy", sort=False):
            _draw_curve(axes, own, styles[str(strategy)])
        num_tasks = int(
            runs.loc[(runs["stream"] == stream) & (runs["setting"] == setting), "num_tasks"].iloc[0]
        )
        _decorate(axes, "tasks learned", "average accuracy over tasks seen, %")
        axes.set_xlim(0.8, num_tasks + 0.2 + 0.02 * num_tasks)
        axes.set_xticks(_task_ticks(num_tasks))
    final = runs.groupby("strategy", sort=False)["average_accuracy"].mean()
    _legend(legend, list(final.sort_values(ascending=False, kind="stable").index), styles)
    return _png(figure)


def forgetting_matrix(accuracy: pd.DataFrame, runs: pd.DataFrame, labels: _Labels) -> bytes:
    """One heat map of the accuracy matrix per strategy, mean over seeds; rows are tasks trained, columns evaluated."""
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    groups = list(runs.groupby(["stream", "setting", "strategy"], sort=False))
    num_columns = min(len(groups), 4 if len(groups) != 3 else 3)
    num_rows = math.ceil(len(groups) / num_columns)
    size = 9.6 / max(num_columns, 2)
    figure = Figure(
        figsize=(10.0 if num_columns > 1 else 6.4, num_rows * (size + 0.35) + 0.7), layout="constrained"
    )
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    cells = accuracy.groupby(["stream", "setting", "strategy", "trained_task", "eval_task"])[
        "accuracy"
    ].mean()
    norm = Normalize(math.floor(1000 * min(cells.min(), 0.999)) / 10, 100)
    image = None
    for axes, (key, group) in zip(grid.flat, groups, strict=False):
        matrix = _matrix(cells, key, int(group["num_tasks"].iloc[0]))
        image = _draw_matrix(
            axes, matrix, norm, annotate=len(matrix) <= 6 or (len(matrix) <= 10 and num_columns < 3)
        )
        stream, setting, strategy = key
        axes.set_title(
            _wrapped(strategy if len(labels) == 1 else f"{labels[stream, setting]}: {strategy}", 30)
        )
    for i, axes in enumerate(grid.flat):
        axes.set_visible(i < len(groups))
        if i % num_columns == 0:
            axes.set_ylabel("after training task")
        if i + num_columns >= len(groups):
            axes.set_xlabel("accuracy on task")
    if image is not None:
        bar = figure.colorbar(image, ax=grid, fraction=0.03, pad=0.015, aspect=30)
        bar.set_label("accuracy, % (grey: not measured)")
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    return _png(figure)


def accuracy_against_memory(runs: pd.DataFrame, labels: _Labels) -> bytes:
    """Average accuracy against the memory of the stored model: mean over seeds, bars of one std."""
    styles = _styles(runs)
    relative = bool(runs["ratio_bytes"].notna().all())
    x = runs["ratio_bytes"] if relative else runs["bytes"]
    figure, panels, _ = _panels(labels, width=10.0, height=5.8, legend=False)
    for (stream, setting), axes in zip(labels, panels, strict=True):
        chosen = (runs["stream"] == stream) & (runs["setting"] == setting)
        points = pd.DataFrame({"strategy": runs["strategy"], "x": x, "y": 100 * runs["average_accuracy"]})[
            chosen
        ].dropna()
        middle, spread = (getattr(points.groupby("strategy", sort=False), name)() for name in ("mean", "std"))
        for strategy, (at_x, at_y) in middle.iterrows():
            style, error = styles[str(strategy)], spread.loc[strategy].fillna(0.0)
            axes.errorbar(
                at_x, at_y, yerr=error["y"] or None, xerr=error["x"] or None, color=style["color"], marker=style["marker"],
                markersize=8, markeredgecolor="white", elinewidth=1.4, capsize=3, linestyle="none", zorder=3,
            )  # fmt: skip
        unit = (
            "memory of the stored model, ratio to the vanilla network"
            if relative
            else "memory of the stored model, bytes"
        )
        _decorate(axes, unit, "average accuracy after the last task, %")
        _scale_memory(axes, middle["x"], relative)
        axes.margins(x=0.12, y=0.12)
        place_labels(axes, middle[["x", "y"]].to_numpy(), [_wrapped(str(name), 28) for name in middle.index],
                     [styles[str(name)]["color"] for name in middle.index], spread["y"].fillna(0.0).to_numpy())  # fmt: skip
    return _png(figure)


def _draw_curve(axes: Axes, tasks: pd.DataFrame, style: Mapping[str, Any]) -> None:
    curves = tasks.groupby("trained_task")["average_accuracy"]
    mean, std = (100 * curves.mean()).dropna(), 100 * curves.std()
    x = mean.index.to_numpy() + 1
    if len(x) == 1 and x[0] > 1:
        axes.axhline(mean.iloc[0], color=style["color"], linewidth=1, linestyle=":", zorder=1)
    axes.plot(x, mean, **style, linewidth=2, markersize=6, markeredgecolor="white", zorder=3)
    band = std.reindex(mean.index)
    if len(x) > 1:
        axes.fill_between(
            x, mean - band, mean + band, color=style["color"], alpha=0.15, linewidth=0, zorder=2
        )
    elif band.notna().all():
        axes.errorbar(x, mean, yerr=band, color=style["color"], capsize=3, zorder=2)


def _draw_matrix(axes: Axes, matrix: np.ndarray, norm: Any, annotate: bool) -> Any:
    """One heat map of percentages; light text on dark cells."""
    from matplotlib import colormaps

    palette = colormaps["viridis"].with_extremes(bad=_UNMEASURED)
    image = axes.imshow(np.ma.masked_invalid(matrix), cmap=palette, norm=norm, interpolation="nearest")
    ticks = [tick - 1 for tick in _task_ticks(len(matrix))]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, labels=[str(tick + 1) for tick in ticks])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if annotate:
        for (row, column), value in np.ndenumerate(matrix):
            if not math.isnan(value):
                colour = "black" if norm(value) > 0.6 else "white"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=9)
    return image


def _matrix(cells: pd.Series, key: tuple[Any, ...], num_tasks: int) -> np.ndarray:
    """The mean accuracy matrix of one strategy in percent, ``(T, T)``, NaN where nothing was measured."""
    matrix = np.full((num_tasks, num_tasks), np.nan)
    if key in cells.index.droplevel(["trained_task", "eval_task"]):
        for (row, column), value in cells.loc[key].items():  # pyright: ignore[reportGeneralTypeIssues]
            matrix[row, column] = 100 * value
    return matrix


def _panels(
    labels: _Labels, width: float, height: float, legend: bool = True
) -> tuple[Figure, list[Axes], Axes | None]:
    """A figure with one panel per stream and setting, titled, and room at the right for the legend."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height * len(labels)), layout="constrained")
    ratios = [4.0, 1.0] if legend else [1.0]
    grid = figure.subplots(len(labels), len(ratios), squeeze=False, width_ratios=ratios)
    for row, label in zip(grid, labels.values(), strict=True):
        row[0].set_title(label)
        for axes in row[1:]:
            axes.axis("off")
    return figure, list(grid[:, 0]), grid[0, 1] if legend else None


def _legend(axes: Axes | None, strategies: Sequence[str], styles: _Styles) -> None:
    from matplotlib.lines import Line2D

    if axes is not None:
        handles = [
            Line2D([], [], **styles[name], linewidth=2, markeredgecolor="white") for name in strategies
        ]
        names = [_wrapped(name, 26) for name in strategies]
        axes.legend(handles, names, loc="upper left", borderaxespad=0, frameon=False, labelspacing=0.7)


def _styles(runs: pd.DataFrame) -> _Styles:
    """A colour, a marker and a line per strategy, the same in every plot."""
    names = list(dict.fromkeys(runs["strategy"]))
    return {
        name: {
            "color": _COLOURS[i % len(_COLOURS)],
            "marker": _MARKERS[i % len(_MARKERS)],
            "linestyle": ("-", (0, (4, 1.5)), (0, (1, 1)))[i // len(_COLOURS) % 3],
        }
        for i, name in enumerate(names)
    }


def _scale_memory(axes: Axes, values: pd.Series, relative: bool) -> None:
    """A log scale where the values span more than a factor of four, and ticks that people can read."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if values.min() > 0 and values.max() > 4 * values.min():
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:g}x" if relative else _bytes(value))
    )
    if relative:
        axes.axvline(1, color=_GREY, linewidth=1, linestyle="--", zorder=1)


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:g} {unit}"
        value /= 1000
    return f"{value:g} TB"


def _decorate(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _task_ticks(num_tasks: int) -> list[int]:
    """At most about ten task numbers, counted from 1."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, num_tasks) if num_tasks / step <= 10)
    return list(range(1, num_tasks + 1)) if step == 1 else [1, *range(step, num_tasks + 1, step)]


def _wrapped(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width, break_long_words=True)) or text


def _png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()
