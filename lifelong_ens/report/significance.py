"""How sure the differences between strategies are: intervals over seeds and paired tests."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

KEYS = ["stream", "setting"]


def significance(runs: pd.DataFrame, labels: Mapping[tuple[str, str], str], baseline: str) -> pd.DataFrame:
    """Average accuracy of every strategy with its interval, and its difference to a baseline.

    The interval is Student's for the mean over seeds, the test the two-sided paired t-test over the seeds that both
    have run; seeds change class order and initial weights alike for all strategies, which is what pairs them.

    Args:
        runs: The table ``runs`` of a report.
        labels: The name of every (stream, setting).
        baseline: The strategy to hold the others against.

    Returns:
        A row for each stream and strategy: ``seeds``; ``mean``, ``low`` and ``high`` in [0, 1]; ``difference`` to the
        baseline and its ``p_value``; and ``note``, why something is undefined.
    """
    rows = []
    groups: Any = runs.groupby(KEYS, sort=False)
    for key, group in groups:
        by_seed: Any = group.set_index(["seed", "strategy"])["average_accuracy"].unstack()
        for strategy in group["strategy"].unique():
            row = {"stream": labels[key], "strategy": strategy}
            rows.append(row | _interval(by_seed[strategy].dropna()) | _test(by_seed, strategy, baseline))
    return pd.DataFrame(rows)


def half_interval(values: Any) -> float:
    """Half of Student's 95 % interval for the mean of a series; NaN for one value."""
    from scipy import stats

    count = len(values)
    return float(stats.t.ppf(0.975, count - 1) * values.std() / math.sqrt(count)) if count > 1 else math.nan


def clear_best(by_seed: pd.DataFrame, lowest: bool, counted: bool = False) -> str | None:
    """The best column, if it is better than every other one; None where that cannot be told.

    Better is: the two-sided paired t-test over the seeds that both have gives p < 0.05. All comparisons have to, so
    that their number needs no correction (an intersection-union test).

    Args:
        by_seed: A row for each seed, a column for each strategy; columns without a number are left out.
        lowest: Whether less is better.
        counted: Whether the numbers are counted rather than measured, so that a difference that is the same in all
            of several seeds is no chance.
    """
    from scipy import stats

    known: Any = by_seed.dropna(axis="columns", how="all")
    if known.shape[1] < 2:
        return None
    means = known.mean()
    best = means.idxmin() if lowest else means.idxmax()
    for other in known.columns.drop(best):
        pairs = known[[best, other]].dropna()
        difference = pairs[best] - pairs[other]
        if len(pairs) < 2 or math.isclose(difference.mean(), 0.0, abs_tol=1e-12):
            return None
        constant = float(difference.std()) <= 1e-9 * abs(float(difference.mean()))
        test: Any = None if constant else stats.ttest_rel(pairs[best], pairs[other])
        if not (counted if constant else test.pvalue < 0.05):
            return None
    return str(best)


def _interval(values: Any) -> dict[str, float]:
    count, mean = len(values), float(values.mean())
    half = half_interval(values)
    # no accuracy lies outside [0, 1], whatever the interval says
    low, high = (half if math.isnan(half) else min(max(mean + sign * half, 0.0), 1.0) for sign in (-1, 1))
    return {"seeds": count, "mean": mean, "low": low, "high": high}


def _test(by_seed: Any, strategy: str, baseline: str) -> dict[str, float | str]:
    from scipy import stats

    undefined = {"difference": math.nan, "p_value": math.nan}
    if strategy == baseline:
        return {**undefined, "note": "the baseline"}
    if baseline not in by_seed:
        return {**undefined, "note": f"{baseline} did not run"}
    pairs = by_seed[[strategy, baseline]].dropna()
    difference = pairs[strategy] - pairs[baseline]
    if len(pairs) < 2:
        reason = "no seed in common" if pairs.empty else "one seed has no spread to test against"
        return {**undefined, "difference": float(difference.mean()), "note": reason}
    if float(difference.std()) == 0.0:
        return {
            "difference": float(difference.mean()),
            "p_value": math.nan,
            "note": "equal difference in all seeds",
        }
    test: Any = stats.ttest_rel(pairs[strategy], pairs[baseline])
    return {"difference": float(difference.mean()), "p_value": float(test.pvalue), "note": ""}
