"""Tables of measured numbers: mean, interval over seeds, and a mark where the best is clearly best."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lifelong_ens.report.headline import duration, quantity
from lifelong_ens.report.page.model import Block, Cell, Head, Row, Series, Table
from lifelong_ens.report.significance import clear_best, half_interval

_Pandas = Any
UNKNOWN = "–"
BEST_NOTE = (
    "Small numbers are 95 % intervals (Student's t over seeds); with one seed there is none. A number is marked as the "
    "best of its column only where it is better than every other one by a paired t-test over seeds (p < 0.05); what is "
    "counted and not measured, as bytes, is marked where the difference is the same for all of several seeds."
)


@dataclass(frozen=True)
class Measure:
    """A column of a table.

    Attributes:
        column: Of the runs; of a ratio, that of the ratio.
        label: Its head.
        meaning: In words.
        better: ``up``, ``down`` or neither.
        form: A number as people read it.
        counted: Whether it is counted rather than measured.
        amount: For a ratio, the column with the amount itself and how that is read.
        bounds: No interval goes beyond.
    """

    column: str
    label: str
    meaning: str
    better: str
    form: Callable[[float], str]
    counted: bool = False
    amount: tuple[str, Callable[[float], str]] | None = None
    bounds: tuple[float, float] = (-math.inf, math.inf)


def table_block(
    title: str, runs: _Pandas, series: Mapping[str, Series], measures: Sequence[Measure], text: str = ""
) -> Block:
    """A table with a row for each series; columns that no run has a number for are left out.

    Args:
        title: Of the table.
        runs: A row for each run; the column ``name`` is that of its series.
        series: By name.
        measures: The columns.
        text: Above the table.
    """
    shown = [
        one for one in map(lambda one: _with_amount(one, runs), measures) if runs[one.column].notna().any()
    ]
    best = {one.column: _best(one, runs) for one in shown}
    rows = []
    for label, own in runs.groupby("name", sort=False):
        cells = [_cell(one, own, best[one.column] == label) for one in shown]
        rows.append(Row(series[label], [Cell(str(len(own)), sort=len(own)), *cells]))
    heads = [Head(one.label, one.meaning, one.better) for one in shown]
    heads = [Head("name"), Head("seeds", "finished runs"), *heads]
    return Block(title, text, tables=[Table(title, heads, rows, BEST_NOTE)])


def percent(share: float) -> str:
    """``84.21``; a bare ``0`` says exactly zero."""
    return "0" if share == 0 else f"{100 * share:.2f}"


def three(value: float) -> str:
    """Three decimals."""
    return f"{value:.3f}"


def ratio(value: float) -> str:
    """``1.05x``; three digits."""
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}x"


def count(value: float) -> str:
    """``1.16 M``."""
    return quantity([value])


def size(value: float) -> str:
    """``310 kB``."""
    return quantity([value], "B")


def seconds(value: float) -> str:
    """``12.3 s``."""
    return duration([value])


def _with_amount(one: Measure, runs: _Pandas) -> Measure:
    """A ratio, or the amount alone where there is nothing to divide by."""
    if one.amount is None or runs[one.column].notna().any():
        return one
    column, form = one.amount
    return Measure(column, one.label, one.meaning, one.better, form, one.counted)


def _best(one: Measure, runs: _Pandas) -> str | None:
    if not one.better:
        return None
    by_seed = runs.pivot_table(index="seed", columns="name", values=one.column, sort=False, aggfunc="last")
    return clear_best(by_seed, one.better == "down", one.counted)


def _cell(one: Measure, own: _Pandas, best: bool) -> Cell:
    values = own[one.column].astype(float)
    if values.isna().any():
        return Cell(UNKNOWN)
    mean, half = float(values.mean()), half_interval(values)
    details = []
    if not math.isnan(half) and half > 1e-9 * abs(mean):
        low, high = (min(max(mean + sign * half, one.bounds[0]), one.bounds[1]) for sign in (-1, 1))
        texts = one.form(low), one.form(high)
        if texts[0] != texts[1]:
            details.append(" to ".join(texts))
    if one.amount is not None and one.amount[0] != one.column:
        amount = own[one.amount[0]].astype(float).mean()
        details.append(UNKNOWN if math.isnan(amount) else one.amount[1](float(amount)))
    return Cell(one.form(mean), " · ".join(reversed(details)), mean, best)
