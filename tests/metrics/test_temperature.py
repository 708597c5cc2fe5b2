from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch import Tensor

from lifelong_ens.metrics.temperature import BOUNDS, fit_temperature, tempered
from lifelong_ens.metrics.uncertainty import expected_calibration_error, nll


def drawn(scale: float, batch: int, seed: int, num_classes: int = 4) -> tuple[Tensor, Tensor]:
    """Log-probabilities too sure by the factor ``scale``, and labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, num_classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return (scale * logits).log_softmax(1), labels


@pytest.mark.parametrize("scale", [0.25, 1.0, 4.0])
def test_the_factor_of_over_and_underconfidence_is_found(scale: float) -> None:
    log_probs, labels = drawn(scale, 50_000, seed=0)
    temperature = fit_temperature(log_probs, labels)
    assert temperature == pytest.approx(scale, rel=0.03)
    assert expected_calibration_error(tempered(log_probs, temperature)[None], labels) < 0.01


@given(st.floats(0.05, 20), st.integers(1, 50), st.integers(0, 2**31))
def test_never_worse_on_validation_and_as_good_as_a_general_minimiser(
    scale: float, batch: int, seed: int
) -> None:
    log_probs, labels = drawn(scale, batch, seed)

    def loss(log_temperature: float) -> float:
        return nll(tempered(log_probs, 2.718281828459045**log_temperature)[None], labels).item()

    temperature = fit_temperature(log_probs, labels)
    found = nll(tempered(log_probs, temperature)[None], labels).item()
    assert BOUNDS[0] <= temperature <= BOUNDS[1]
    if BOUNDS[0] < temperature < BOUNDS[1]:
        assert found <= loss(0.0) + 1e-12
    best = minimize_scalar(loss, bounds=(-4.605, 4.605), method="bounded").fun
    assert found <= best + 1e-9


def test_a_minimum_outside_the_bounds_is_said(caplog: pytest.LogCaptureFixture) -> None:
    log_probs, _ = drawn(1.0, 20, seed=0)
    with caplog.at_level(logging.WARNING):
        assert fit_temperature(log_probs, log_probs.argmax(1)) == BOUNDS[0]
        assert fit_temperature(log_probs, log_probs.argmin(1)) == BOUNDS[1]
    assert len(caplog.records) == 2


def test_uniform_predictions_stay() -> None:
    uniform = torch.full((6, 5), -1.6094379)
    assert fit_temperature(uniform, torch.arange(6) % 5) == 1.0


def test_excluded_classes_stay_excluded() -> None:
    log_probs, labels = drawn(3.0, 500, seed=0)
    wider = torch.nn.functional.pad(log_probs, (0, 2), value=-torch.inf)
    temperature = fit_temperature(wider, labels)
    assert temperature == fit_temperature(log_probs, labels)
    assert (tempered(wider, temperature)[:, -2:] == -torch.inf).all()


def test_input_is_not_changed_and_half_precision_works() -> None:
    log_probs, labels = drawn(3.0, 100, seed=0)
    before = log_probs.clone()
    temperature = fit_temperature(log_probs, labels)
    assert torch.equal(log_probs, before)
    assert fit_temperature(log_probs.half(), labels) == pytest.approx(temperature, rel=0.01)
    assert tempered(log_probs.half(), 2.0).dtype == torch.float32


def test_what_cannot_be_fitted_is_refused() -> None:
    log_probs, labels = drawn(1.0, 5, seed=0)
    with pytest.raises(ValueError, match="batch, classes"):
        fit_temperature(log_probs[:0], labels[:0])
    with pytest.raises(ValueError, match="batch, classes"):
        fit_temperature(log_probs[None], labels)
    with pytest.raises(ValueError, match="labels"):
        fit_temperature(log_probs, labels[1:])
    log_probs[2, labels[2]] = -torch.inf
    with pytest.raises(ValueError, match="probability 0"):
        fit_temperature(log_probs, labels)
