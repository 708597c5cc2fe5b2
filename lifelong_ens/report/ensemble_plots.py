"""The plots of a comparison of ensembles, as PNG bytes."""

from __future__ import annotations

from typing import Any

import numpy as np

from lifelong_ens.report.drawing import COLOURS, GREY, decorate, new_figure, png, styles_of
from lifelong_ens.report.labelling import place_labels

_Pandas = Any
COLUMNS = 4


def draw_all(runs: _Pandas, reliability: _Pandas) -> dict[str, bytes]:
    """Every plot under its file name; of several data sets and settings, one picture each."""
    plots: dict[str, bytes] = {}
    groups = list(runs.groupby(["data", "setting"], sort=False))
    for (data, setting), group in groups:
        own = reliability[(reliability["data"] == data) & (reliability["setting"] == setting)]
        suffix = "" if len(groups) == 1 else f"_{data}_{setting}"
        plots[f"reliability{suffix}.png"] = reliability_diagrams(own)
        plots[f"nll_against_cost{suffix}.png"] = against_cost(group)
    return plots


def reliability_diagrams(bins: _Pandas) -> bytes:
    """A diagram for each method: accuracy over confidence, seeds together; the bars below count images."""
    methods = list(bins["method"].unique())
    count = min(len(methods), COLUMNS)
    rows = -(-len(methods) // count)
    figure = new_figure(3.0 * max(count, 2), 3.2 * rows)
    panels = figure.subplots(rows, count, squeeze=False).flat
    for unused in panels[len(methods) :]:
        unused.set_visible(False)
    for method, axes in zip(methods, panels, strict=False):
        gap = draw_reliability(axes, bins[bins["method"] == method])
        decorate(axes, "confidence", "accuracy")
        axes.set_title(f"{method}\nECE {gap:.3f}", fontsize=10)
    return png(figure)


def draw_reliability(axes: Any, bins: _Pandas, colour: str = COLOURS[0]) -> float:
    """The diagram of one method, from a row for each seed and bin; returns its expected calibration error."""
    own = bins[bins["count"] > 0]
    weight = own["count"].groupby(own["bin"]).sum()
    confidence = (own["confidence"] * own["count"]).groupby(own["bin"]).sum() / weight
    accuracy = (own["accuracy"] * own["count"]).groupby(own["bin"]).sum() / weight
    width = 1 / (int(bins["bin"].max()) + 1)
    share = weight / weight.sum()
    middle = (weight.index.to_numpy() + 0.5) * width
    axes.bar(middle, share, 0.9 * width, color=GREY, alpha=0.35, zorder=1)
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=(0, (4, 2)), zorder=2)
    axes.plot(confidence, accuracy, marker="o", markersize=4, color=colour, zorder=3)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    return float((share * (accuracy - confidence).abs()).sum())


def against_cost(runs: _Pandas) -> bytes:
    """NLL against stored bytes and against training FLOPs, relative to the single network: mean over seeds."""
    styles = styles_of(list(runs["method"].unique()))
    figure = new_figure(12.0, 5.2)
    panels = figure.subplots(1, 2, squeeze=False)[0]
    costs = {"ratio_bytes": "stored bytes", "ratio_flops_training_effective": "training FLOPs"}
    for (name, words), axes in zip(costs.items(), panels, strict=True):
        groups = runs.dropna(subset=[name]).groupby("method", sort=False)[[name, "nll"]]
        middle, spread = groups.mean(), groups.std().fillna(0.0)
        for method, (x, y) in middle.iterrows():
            style = styles[method]
            error = float(spread.loc[method, "nll"])
            axes.errorbar(x, y, yerr=error or None, fmt="none", color=style["color"], capsize=3, zorder=2)
            axes.plot(x, y, marker=style["marker"], color=style["color"], markersize=8, zorder=3)
        decorate(axes, f"{words}, ratio to one network", "NLL on test images, nats (lower is better)")
        if len(middle):
            axes.set_xscale("log")
            _ratio_ticks(axes, middle[name].to_numpy())
            colours = [styles[method]["color"] for method in middle.index]
            errors = spread["nll"].to_numpy()
            place_labels(axes, middle.to_numpy(), errors, list(middle.index), colours)
    return png(figure)


def _ratio_ticks(axes: Any, values: np.ndarray) -> None:
    """Ticks at round ratios on a logarithmic axis."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    low, high = float(values.min()) / 1.4, float(values.max()) * 1.4
    ticks = [one * 10.0**power for power in range(-3, 5) for one in (1, 2, 5)]
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.xaxis.set_minor_formatter(NullFormatter())
