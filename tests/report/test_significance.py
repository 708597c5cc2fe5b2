"""Intervals and paired tests over seeds."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from lifelong_ens.report.significance import significance

LABELS = {("s", "x"): "s"}


def runs(**accuracies: list[float]) -> pd.DataFrame:
    rows = [
        {"stream": "s", "setting": "x", "strategy": name, "seed": seed, "average_accuracy": value}
        for name, values in accuracies.items()
        for seed, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


def test_interval_and_paired_test_against_hand_calculation():
    a, b = [0.80, 0.82, 0.87], [0.70, 0.75, 0.71]
    table = significance(runs(finetune=b, other=a), LABELS, "finetune").set_index("strategy")
    half = 4.302653 * np.std(a, ddof=1) / math.sqrt(3)
    assert table.loc["other", "low"] == pytest.approx(np.mean(a) - half, abs=1e-6)
    assert table.loc["other", "high"] == pytest.approx(np.mean(a) + half, abs=1e-6)
    difference = np.subtract(a, b)
    t = difference.mean() / (difference.std(ddof=1) / math.sqrt(3))
    # two-sided Student distribution with two degrees of freedom, in closed form
    expected = 1 - t / math.sqrt(t * t + 2)
    assert table.loc["other", "p_value"] == pytest.approx(expected, rel=1e-9)
    assert table.loc["other", "difference"] == pytest.approx(difference.mean())
    assert table.loc["finetune", "note"] == "the baseline"


def test_only_seeds_that_both_have_are_paired():
    table = significance(runs(finetune=[0.5, 0.6], other=[0.7, 0.9, 0.1]), LABELS, "finetune")
    row = table.set_index("strategy").loc["other"]
    assert row["difference"] == pytest.approx(0.25)
    assert row["seeds"] == 3


@pytest.mark.parametrize(
    ("accuracies", "note"),
    [
        ({"finetune": [0.5], "other": [0.7]}, "one seed"),
        ({"other": [0.7, 0.8]}, "finetune did not run"),
        ({"finetune": [0.5, 0.5], "other": [0.75, 0.75]}, "equal difference"),
    ],
)
def test_what_is_undefined_says_why(accuracies, note):
    row = significance(runs(**accuracies), LABELS, "finetune").set_index("strategy").loc["other"]
    assert note in row["note"]
    assert math.isnan(row["p_value"])
