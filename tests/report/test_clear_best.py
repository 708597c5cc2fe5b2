from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lifelong_ens.report.significance import clear_best, half_interval


def table(**columns) -> pd.DataFrame:
    return pd.DataFrame(columns, dtype=float)


def test_half_interval_of_a_worked_example():
    values = pd.Series([1.0, 2.0, 4.0])
    low, high = stats.t.interval(0.95, 2, loc=values.mean(), scale=stats.sem(values))
    assert half_interval(values) == pytest.approx((high - low) / 2)
    assert np.isnan(half_interval(pd.Series([1.0])))


def test_the_best_is_clear_where_it_beats_every_other():
    clear = table(a=[0.90, 0.91, 0.92, 0.93], b=[0.80, 0.82, 0.81, 0.84], c=[0.70, 0.71, 0.74, 0.72])
    assert clear_best(clear, lowest=False) == "a"
    assert clear_best(-clear, lowest=True) == "a"
    assert clear_best(clear, lowest=True) == "c"
    close = clear.assign(d=clear["a"] + [0.01, -0.02, 0.005, 0.0])
    assert stats.ttest_rel(close["a"], close["d"]).pvalue > 0.05
    assert clear_best(close, lowest=False) is None


def test_what_cannot_be_told_is_not_marked():
    assert clear_best(table(a=[0.9], b=[0.1]), lowest=False) is None
    assert clear_best(table(a=[0.9, 0.95]), lowest=False) is None
    assert clear_best(table(a=[1, 1, 1], b=[1, 1, 1]), lowest=True, counted=True) is None
    apart = table(a=[0.9, 0.95, np.nan, np.nan], b=[np.nan, np.nan, 0.1, 0.2])
    assert clear_best(apart, lowest=False) is None


def test_a_constant_difference_counts_only_for_what_is_counted():
    sizes = table(a=[100, 100, 100], b=[200, 200, 200])
    assert clear_best(sizes, lowest=True, counted=True) == "a"
    assert clear_best(sizes, lowest=True) is None


def test_a_strategy_without_numbers_stands_aside():
    lacking = table(a=[3, 3], b=[4, 4], joint=[np.nan, np.nan])
    assert clear_best(lacking, lowest=True, counted=True) == "a"
