from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lifelong_ens.metrics import uncertainty


def log_probs(*members: list[list[float]]) -> Tensor:
    return torch.tensor(members, dtype=torch.float64).log()


TWO = log_probs([[0.9, 0.1], [0.4, 0.6]], [[0.5, 0.5], [0.8, 0.2]])  # mean: [0.7, 0.3], [0.6, 0.4]
LABELS = torch.tensor([0, 1])


def test_nll_is_of_the_mean_probability() -> None:
    assert uncertainty.nll(TWO, LABELS).item() == pytest.approx(-(math.log(0.7) + math.log(0.4)) / 2)


def test_brier() -> None:
    assert uncertainty.brier(TWO, LABELS).item() == pytest.approx((2 * 0.3**2 + 2 * 0.6**2) / 2)
    wrong = log_probs([[1.0, 0.0]])
    assert uncertainty.brier(wrong, torch.tensor([1])).item() == 2.0


def test_calibration_error_in_one_bin_and_in_two() -> None:
    assert uncertainty.expected_calibration_error(TWO, LABELS, num_bins=1).item() == pytest.approx(0.15)
    # 0.7 falls in (10/15, 11/15] and is right; 0.6 falls in (8/15, 9/15] and is wrong
    assert uncertainty.expected_calibration_error(TWO, LABELS).item() == pytest.approx((0.3 + 0.6) / 2)


def test_calibration_bins_are_closed_above() -> None:
    half = log_probs([[0.5, 0.5], [0.75, 0.25]])
    # with two bins 0.5 belongs to (0, 0.5]: gaps 0.5 and 0.75 do not cancel
    error = uncertainty.expected_calibration_error(half, torch.tensor([0, 1]), num_bins=2)
    assert error.item() == pytest.approx((0.5 + 0.75) / 2)


def test_sure_and_right_is_perfectly_calibrated() -> None:
    sure = log_probs([[1.0, 0.0], [0.0, 1.0]])
    assert uncertainty.expected_calibration_error(sure, LABELS).item() == 0.0
    assert uncertainty.nll(sure, LABELS).item() == 0.0


def test_entropy_and_mutual_information_of_uniform_and_opposed_members() -> None:
    uniform = log_probs([[0.25] * 4], [[0.25] * 4])
    assert uncertainty.predictive_entropy(uniform).item() == pytest.approx(math.log(4))
    assert uncertainty.mutual_information(uniform).item() == pytest.approx(0.0)
    opposed = log_probs([[1.0, 0.0]], [[0.0, 1.0]])  # log 0 must not become NaN
    assert uncertainty.predictive_entropy(opposed).item() == pytest.approx(math.log(2))
    assert uncertainty.mutual_information(opposed).item() == pytest.approx(math.log(2))


def test_disagreement_averages_over_pairs() -> None:
    assert uncertainty.disagreement(TWO).item() == 0.5
    three = log_probs([[0.9, 0.1]], [[0.8, 0.2]], [[0.1, 0.9]])
    assert uncertainty.disagreement(three).item() == pytest.approx(2 / 3)
    assert math.isnan(uncertainty.disagreement(three[:1]).item())


@given(st.integers(1, 4), st.integers(1, 5), st.integers(2, 6), st.integers(0, 2**31))
def test_bounds(num_members: int, batch: int, num_classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(num_members, batch, num_classes, generator=generator)
    members = logits.log_softmax(-1)
    labels = torch.randint(num_classes, (batch,), generator=generator)
    gibbs = -members[:, torch.arange(batch), labels].mean()
    assert uncertainty.nll(members, labels) <= gibbs + 1e-5
    assert 0 <= uncertainty.brier(members, labels) <= 2 + 1e-5
    assert 0 <= uncertainty.expected_calibration_error(members, labels) <= 1
    assert (uncertainty.predictive_entropy(members) <= math.log(num_classes) + 1e-5).all()
    information = uncertainty.mutual_information(members)
    assert information.shape == (batch,)
    assert (information >= 0).all()
    assert (information <= math.log(num_members) + 1e-5).all()


def test_half_precision_is_computed_in_float32() -> None:
    assert uncertainty.nll(TWO.bfloat16(), LABELS).dtype == torch.float32


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="members, batch, classes"):
        uncertainty.nll(TWO[0], LABELS)
    with pytest.raises(ValueError, match="labels"):
        uncertainty.brier(TWO, LABELS[:1])


def test_pooled_tasks_equal_one_set_of_all_their_answers():
    narrow, wide = torch.randn(2, 5, 3).log_softmax(-1), torch.randn(4, 7, 6).log_softmax(-1)
    first, second = torch.randint(3, (5,)), torch.randint(6, (7,))
    log_probs, labels = uncertainty.pooled([(narrow, first), (wide, second)])
    assert log_probs.shape == (1, 12, 6)
    found = uncertainty.calibration(log_probs, labels)
    for name in ("nll", "brier"):
        alone = [uncertainty.calibration(narrow, first)[name], uncertainty.calibration(wide, second)[name]]
        assert found[name] == pytest.approx((5 * alone[0] + 7 * alone[1]) / 12, rel=1e-5)
    confidence = uncertainty.ensemble_log_probs(log_probs).exp().max(dim=1).values
    expected = torch.cat([narrow.exp().mean(0).max(1).values, wide.exp().mean(0).max(1).values])
    torch.testing.assert_close(confidence, expected)
