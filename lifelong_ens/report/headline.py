"""The table to print: numbers as people read them, mean ± std over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

_SI = ("", "k", "M", "G", "T", "P", "E")
_UNKNOWN = "–"


def headline(runs: pd.DataFrame, labels: Mapping[tuple[str, str], str]) -> pd.DataFrame:
    """One row of strings per strategy; with several ``labels`` the first level of the index is the stream."""
    rows, index = [], []
    groups: Any = runs.groupby(["stream", "setting", "strategy"], sort=False)
    for (stream, setting, strategy), group in groups:
        index.append((labels[stream, setting], strategy))
        rows.append(_row(group))
    table = pd.DataFrame(rows, index=pd.MultiIndex.from_tuples(index, names=["stream", "strategy"]))
    if len(labels) == 1:
        return table.droplevel("stream")
    order = list(labels.values())
    return table.sort_index(level="stream", key=lambda level: level.map(order.index), sort_remaining=False)


def _row(group: pd.DataFrame) -> dict[str, str]:
    """The cells of one strategy, of its runs with different seeds."""

    def values(name: str) -> list[float]:
        return [float(value) for value in group[name]]

    return {
        "accuracy %": percent(values("average_accuracy")),
        "forgetting, points": percent(values("forgetting")),
        "parameters": with_ratio(quantity(values("parameters")), values("ratio_parameters")),
        "on disk": with_ratio(quantity(values("disk_bytes"), "B"), values("ratio_disk_bytes")),
        "forward FLOPs/image": quantity(values("flops_forward")),
        "training FLOPs": with_ratio(quantity(values("flops_training")), values("ratio_flops_training")),
        "training time": with_ratio(duration(values("seconds_training")), values("ratio_seconds_training")),
    }


def percent(shares: Sequence[float]) -> str:
    """Shares of one as hundredths, ``84.21 ± 0.52``; a bare ``0`` says exactly zero."""
    if all(share == 0 for share in shares):
        return "0"
    return _mean_std([100 * share for share in shares], 2)


def quantity(values: Sequence[float], unit: str = "") -> str:
    """Three digits and a decimal prefix, ``1.16 M`` or ``310 kB``."""
    mean, _ = mean_and_std(values)
    if math.isnan(mean):
        return _UNKNOWN
    power = 0
    while abs(mean) >= 999.5 * 1000**power and power < len(_SI) - 1:
        power += 1
    scaled = [value / 1000**power for value in values]
    whole = power == 0 and all(float(value).is_integer() for value in values)
    text = _mean_std(scaled, 0 if whole else _decimals(mean / 1000**power))
    return f"{text} {_SI[power]}{unit}".strip()


def duration(seconds: Sequence[float]) -> str:
    """``12.3 s``, and from ten minutes and ten hours on in ``min`` and ``h``."""
    mean, _ = mean_and_std(seconds)
    if math.isnan(mean):
        return _UNKNOWN
    unit, length = ("s", 1) if mean < 600 else ("min", 60) if mean < 36_000 else ("h", 3600)
    return f"{_mean_std([value / length for value in seconds], _decimals(mean / length))} {unit}"


def with_ratio(text: str, ratios: Sequence[float]) -> str:
    """``text`` with the mean ratio to the vanilla network, if there is one: ``1.16 M (1.05x)``."""
    mean, _ = mean_and_std(ratios)
    return text if math.isnan(mean) else f"{text} ({mean:.{max(2, _decimals(mean))}f}x)"


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """The mean and the sample standard deviation (NaN for one value); NaN where a value is."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _mean_std(values: Sequence[float], decimals: int) -> str:
    """``mean ± std``; only the mean where all values are equal or there is one."""
    mean, std = mean_and_std(values)
    if math.isnan(mean):
        return _UNKNOWN
    text = f"{mean:.{decimals}f}"
    if float(text) == 0:
        text = text.removeprefix("-")
    return text if math.isnan(std) or len(set(values)) == 1 else f"{text} ± {std:.{decimals}f}"


def _decimals(value: float) -> int:
    """How many decimals show three significant digits of ``value``, at most two."""
    return 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
