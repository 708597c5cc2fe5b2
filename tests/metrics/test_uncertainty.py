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


def predictions(
    num_members: int = 3, batch: int = 500, num_classes: int = 7, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Members that know something of the labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (batch,), generator=generator)
    logits = torch.randn(num_members, batch, num_classes, generator=generator, dtype=torch.float64)
    logits += 1.5 * torch.nn.functional.one_hot(labels, num_classes)
    return logits.log_softmax(-1), labels


def test_accuracy_is_of_the_mean_probability() -> None:
    assert uncertainty.accuracy(TWO, LABELS).item() == 0.5
    assert uncertainty.accuracy(TWO[1:], LABELS).item() == 0.5  # 0.5 against 0.5: the first class


def test_calibration_error_equals_torchmetrics() -> None:
    from torchmetrics.functional.classification import multiclass_calibration_error

    log_probs, labels = predictions()
    probs = uncertainty.ensemble_log_probs(log_probs).exp()
    for bins in (5, 15, 40):
        theirs = multiclass_calibration_error(probs, labels, num_classes=7, n_bins=bins, norm="l1")
        ours = uncertainty.expected_calibration_error(log_probs, labels, bins)
        torch.testing.assert_close(ours, theirs, check_dtype=False, rtol=1e-6, atol=0)


def test_class_wise_error_is_the_mean_of_one_calibration_error_per_class() -> None:
    from torchmetrics.functional.classification import binary_calibration_error

    log_probs, labels = predictions()
    probs = uncertainty.ensemble_log_probs(log_probs).exp()
    each = [
        binary_calibration_error(probs[:, c].float(), (labels == c).long(), n_bins=15, norm="l1")
        for c in range(7)
    ]
    ours = uncertainty.classwise_calibration_error(log_probs, labels)
    assert ours.item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-4)


def test_brier_equals_scikit_learn() -> None:
    from sklearn.metrics import brier_score_loss

    log_probs, labels = predictions()
    probs = uncertainty.ensemble_log_probs(log_probs).exp()
    # scikit-learn's score of two classes is half of ours
    two = torch.stack([probs[:, 0], 1 - probs[:, 0]], dim=1).log()[None]
    ours = uncertainty.brier(two, (labels != 0).long())
    assert ours.item() == pytest.approx(2 * brier_score_loss((labels == 0).numpy(), probs[:, 0].numpy()))


@pytest.mark.parametrize("num_classes", [2, 10, 100])
def test_brier_of_the_uniform_prediction(num_classes: int) -> None:
    uniform = torch.full((1, 8, num_classes), -math.log(num_classes), dtype=torch.float64)
    labels = torch.zeros(8, dtype=torch.long)
    assert uncertainty.brier(uniform, labels).item() == pytest.approx(1 - 1 / num_classes)


def test_calibrated_predictions_have_calibration_errors_near_0() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(100_000, 4, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]  # drawn from the predictions
    right, sharp = logits.log_softmax(-1)[None], (3 * logits).log_softmax(-1)[None]
    for error in (
        uncertainty.expected_calibration_error,
        uncertainty.adaptive_calibration_error,
        uncertainty.classwise_calibration_error,
    ):
        assert error(right, labels) < 0.01
        assert error(sharp, labels) > 0.1


def test_reliability_of_a_worked_example() -> None:
    three = log_probs([[0.7, 0.3], [0.6, 0.4], [0.35, 0.65]])
    diagram = uncertainty.reliability(three, torch.tensor([0, 1, 1]), num_bins=4)
    assert diagram.count.tolist() == [0, 0, 3, 0]
    assert diagram.confidence[2].item() == pytest.approx(0.65)
    assert diagram.accuracy[2].item() == pytest.approx(2 / 3)
    assert diagram.confidence.isnan().tolist() == [True, True, False, True]


def test_adaptive_error_of_bins_of_equal_mass() -> None:
    five = log_probs([[0.6, 0.4], [0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.95, 0.05]])
    labels = torch.tensor([1, 0, 1, 0, 0])
    # in order of confidence 0.6 w, 0.7 r, 0.8 w | 0.9 r, 0.95 r
    expected = (abs(1 - 2.1) + abs(2 - 1.85)) / 5
    error = uncertainty.adaptive_calibration_error(five, labels, num_bins=2)
    assert error.item() == pytest.approx(expected)
    one_each = uncertainty.adaptive_calibration_error(five, labels, num_bins=15)  # ten bins stay empty
    assert one_each.item() == pytest.approx((0.6 + 0.3 + 0.8 + 0.1 + 0.05) / 5)


def test_area_under_risk_coverage_of_a_worked_example() -> None:
    three = log_probs([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
    # the most confident is right, the second wrong, the third right: risks 0, 1/2, 1/3
    aurc = uncertainty.area_under_risk_coverage(three, torch.tensor([0, 1, 0]))
    assert aurc.item() == pytest.approx((0 + 1 / 2 + 1 / 3) / 3)
    tied = log_probs([[0.8, 0.2], [0.8, 0.2]])
    # either order of the two: (1 + 1/2) / 2 and (0 + 1/2) / 2
    aurc = uncertainty.area_under_risk_coverage(tied, torch.tensor([0, 1]))
    assert aurc.item() == pytest.approx((0.75 + 0.25) / 2)


@given(st.integers(1, 30), st.integers(0, 2**31))
def test_order_of_the_examples_does_not_matter(batch: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # rounded logits: many equal confidences
    log_probs = torch.randn(1, batch, 3, generator=generator, dtype=torch.float64).round().log_softmax(-1)
    labels = torch.randint(3, (batch,), generator=generator)
    order = torch.randperm(batch, generator=generator)
    for metric in (uncertainty.adaptive_calibration_error, uncertainty.area_under_risk_coverage):
        once, again = metric(log_probs, labels), metric(log_probs[:, order], labels[order])
        torch.testing.assert_close(once, again)
        assert 0 <= once <= 1 + 1e-6


METRICS = [
    uncertainty.accuracy,
    uncertainty.nll,
    uncertainty.brier,
    uncertainty.expected_calibration_error,
    uncertainty.adaptive_calibration_error,
    uncertainty.classwise_calibration_error,
    uncertainty.area_under_risk_coverage,
]


@pytest.mark.parametrize("metric", METRICS)
def test_no_examples_and_nan_give_nan_and_half_precision_a_float32(metric) -> None:
    assert metric(torch.zeros(2, 0, 3), torch.zeros(0, dtype=torch.long)).isnan()
    broken, labels = predictions(batch=20)
    broken[0, 3, 2] = float("nan")
    assert metric(broken, labels).isnan()
    with pytest.raises(ValueError, match="labels"):
        metric(broken, labels[1:])
    half = metric(predictions(batch=20)[0].bfloat16(), labels)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(metric(predictions(batch=20)[0], labels).item(), abs=0.05)
