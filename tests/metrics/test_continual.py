from __future__ import annotations

import numpy as np
import pytest

from lifelong_ens.metrics import continual

R = np.array([[0.90, 0.20, 0.10], [0.70, 0.80, 0.30], [0.60, 0.75, 0.85]])
BASELINE = (0.1, 0.1, 0.1)
NAN = float("nan")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (continual.average_accuracy(R), 0.7333),
        (continual.backward_transfer(R), -0.1750),
        (continual.backward_transfer(R) * 2 / 3, -0.1167),  # what the code released with GEM prints
        (continual.backward_transfer_diaz_rodriguez(R), -0.1833),
        (continual.forward_transfer(R, BASELINE), 0.1500),
        (continual.forward_transfer(R, BASELINE) * 2 / 3, 0.1000),
        (continual.forward_transfer_diaz_rodriguez(R), 0.2000),
        (continual.accuracy_diaz_rodriguez(R), 0.7667),
        (continual.remembering(R), 0.8167),
        (continual.positive_backward_transfer(R), 0.0),
        (continual.forgetting(R), 0.1750),
        (continual.learning_accuracy(R), 0.8500),
        (continual.backward_transfer_and_interference(R), -0.1167),
        (continual.intransigence(R, 0.88), 0.0300),
        (continual.model_size_efficiency((1, 1.5, 2)), 0.7222),
    ],
)
def test_worked_example(value: float, expected: float) -> None:
    assert value == pytest.approx(expected, abs=5e-5)


def test_average_accuracy_so_far_ends_in_the_average_accuracy() -> None:
    assert continual.average_accuracy_so_far(R) == pytest.approx([0.9, 0.75, 0.7333], abs=5e-5)


def test_forgetting_is_exactly_zero_where_nothing_moved() -> None:
    random = np.random.default_rng(0)
    still = np.tril(np.tile(random.random(7), (7, 1)))
    still[np.triu_indices(7, k=1)] = np.nan
    assert continual.forgetting(still) == 0.0
    assert continual.backward_transfer(still) == 0.0
    assert continual.remembering(still) == 1.0


def test_forgetting_takes_the_best_earlier_accuracy_and_may_be_negative() -> None:
    assert continual.forgetting([[0.5, 0.9, 0], [0.8, 0.7, 0], [0.6, 0.7, 0.1]]) == pytest.approx(0.2)
    assert continual.forgetting([[0.5, 0.1], [0.75, 0.9]]) == -0.25


def test_one_task() -> None:
    one = np.array([[0.75]])
    assert continual.average_accuracy(one) == continual.learning_accuracy(one) == 0.75
    assert continual.accuracy_diaz_rodriguez(one) == 0.75
    assert continual.backward_transfer_and_interference(one) == 0.0
    for metric in (
        continual.forgetting,
        continual.backward_transfer,
        continual.backward_transfer_diaz_rodriguez,
        continual.forward_transfer_diaz_rodriguez,
        continual.remembering,
        continual.positive_backward_transfer,
    ):
        assert np.isnan(metric(one))
    assert np.isnan(continual.forward_transfer(one, [0.1]))


def test_lower_triangle_is_enough_for_all_but_forward_transfer() -> None:
    lower = R.copy()
    lower[np.triu_indices(3, k=1)] = np.nan
    for metric in (
        continual.average_accuracy,
        continual.forgetting,
        continual.backward_transfer,
        continual.learning_accuracy,
        continual.accuracy_diaz_rodriguez,
        continual.backward_transfer_diaz_rodriguez,
    ):
        assert metric(lower) == metric(R)
    assert np.isnan(continual.forward_transfer(lower, BASELINE))
    assert np.isnan(continual.forward_transfer_diaz_rodriguez(lower))


def test_only_the_last_row_as_joint_training_leaves_it() -> None:
    joint = np.full((3, 3), np.nan)
    joint[-1] = (0.9, 0.8, 0.7)
    assert continual.average_accuracy(joint) == pytest.approx(0.8)
    for metric in (continual.forgetting, continual.backward_transfer, continual.learning_accuracy):
        assert np.isnan(metric(joint))
    assert np.isnan(continual.average_accuracy_so_far(joint)[:-1]).all()


def test_a_missing_entry_that_is_needed_is_nan_and_not_a_smaller_mean() -> None:
    hole = R.copy()
    hole[2, 1] = np.nan
    assert np.isnan(continual.average_accuracy(hole))
    assert np.isnan(continual.forgetting(hole))
    skipped = R.copy()
    skipped[1, 0] = np.nan  # not the maximum, and forgetting looks past it
    assert continual.forgetting(skipped) == continual.forgetting(R)


def test_no_baseline_no_forward_transfer() -> None:
    assert np.isnan(continual.forward_transfer(R))


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(T, T\)"):
        continual.average_accuracy(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="percentages"):
        continual.average_accuracy([[75.0]])
    with pytest.raises(ValueError, match="one accuracy per task"):
        continual.forward_transfer(R, [0.1])
    with pytest.raises(ValueError, match="positive"):
        continual.model_size_efficiency([1.0, 0.0])


def test_arguments_are_left_as_they_were() -> None:
    before = R.copy()
    continual.forgetting(R)
    continual.backward_transfer_diaz_rodriguez(R)
    assert np.array_equal(before, R)
