from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torchmetrics.functional.classification import binary_auroc

from lifelong_ens.metrics import out_of_distribution as ood
from lifelong_ens.metrics import uncertainty

scores = st.lists(st.integers(-5, 5), min_size=1, max_size=40).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)
METRICS = [ood.auroc, ood.aupr, ood.fpr_at_95_tpr]


@given(scores, scores)
def test_equal_to_scikit_learn_with_ties(inside: torch.Tensor, outside: torch.Tensor) -> None:
    truth = torch.cat([torch.zeros(len(inside)), torch.ones(len(outside))]).numpy()
    both = torch.cat([inside, outside]).numpy()
    assert ood.auroc(inside, outside).item() == pytest.approx(roc_auc_score(truth, both))
    assert ood.aupr(inside, outside).item() == pytest.approx(average_precision_score(truth, both))
    fpr, tpr, _ = roc_curve(truth, both, drop_intermediate=False)
    assert ood.fpr_at_95_tpr(inside, outside).item() == pytest.approx(fpr[tpr >= 0.95 - 1e-12][0])


def test_auroc_equals_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(0)
    inside, outside = torch.rand(300, generator=generator), torch.rand(200, generator=generator) + 0.3
    both, truth = torch.cat([inside, outside]), torch.cat([torch.zeros(300), torch.ones(200)]).long()
    theirs = binary_auroc(both / 2, truth)
    torch.testing.assert_close(ood.auroc(inside, outside), theirs, check_dtype=False)


@given(scores, scores)
def test_invariant_to_monotone_maps_and_antisymmetric(inside: torch.Tensor, outside: torch.Tensor) -> None:
    for metric in METRICS:
        assert metric(inside, outside) == metric(inside.exp() * 3 - 7, outside.exp() * 3 - 7)
    flipped = ood.auroc(outside, inside)
    assert flipped.item() == pytest.approx(1 - ood.auroc(inside, outside).item())


def test_perfect_chance_and_reversed() -> None:
    low, high = torch.arange(20.0), torch.arange(20.0) + 20
    assert [metric(low, high).item() for metric in METRICS] == [1.0, 1.0, 0.0]
    assert [metric(low, low).item() for metric in METRICS[:1]] == [0.5]
    constant = torch.zeros(10), torch.zeros(30)
    assert [metric(*constant).item() for metric in METRICS] == [0.5, 0.75, 1.0]
    assert ood.auroc(high, low).item() == 0.0
    assert ood.fpr_at_95_tpr(high, low).item() == 1.0


def test_false_positives_at_95_percent_of_a_worked_example() -> None:
    outside = torch.arange(1.0, 21)  # 19 of 20 are at least 2
    inside = torch.tensor([0.0, 1.0, 1.5, 2.0, 30.0])
    assert ood.fpr_at_95_tpr(inside, outside).item() == pytest.approx(2 / 5)


@pytest.mark.parametrize("metric", METRICS)
def test_nothing_nan_half_precision_and_wrong_shapes(metric) -> None:
    some, nothing = torch.rand(5), torch.zeros(0)
    assert metric(some, nothing).isnan()
    assert metric(nothing, some).isnan()
    assert metric(nothing, nothing).isnan()
    assert metric(some, torch.tensor([0.5, float("nan")])).isnan()
    assert metric(torch.tensor([0.5, float("nan")]), some).isnan()
    assert metric(torch.tensor([1.0]).half(), torch.tensor([2.0, math.inf]).half()) in (0.0, 1.0)
    with pytest.raises(ValueError, match="examples"):
        metric(some[None], some)


def test_scores() -> None:
    two = torch.tensor([[[0.9, 0.1], [0.4, 0.6]], [[0.5, 0.5], [0.8, 0.2]]], dtype=torch.float64).log()
    assert ood.ood_scores(two).tolist() == pytest.approx([0.3, 0.4])
    torch.testing.assert_close(ood.ood_scores(two, "entropy"), uncertainty.predictive_entropy(two))
    torch.testing.assert_close(ood.ood_scores(two, "mutual_information"), uncertainty.mutual_information(two))
    with pytest.raises(ValueError, match="score"):
        ood.ood_scores(two, "margin")  # pyright: ignore


def test_scores_of_very_sure_examples_stay_apart() -> None:
    sure = torch.tensor([[[-1e-12, -27.6], [-1e-13, -29.9]]])
    first, second = ood.ood_scores(sure)
    assert first > second > 0
