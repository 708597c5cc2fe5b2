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


def _interval(values: Any) -> dict[str, float]:
    from scipy import stats

    count, mean = len(values), float(values.mean())
    half = math.nan
    if count > 1:
        half = float(stats.t.ppf(0.975, count - 1) * values.std() / math.sqrt(count))
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
