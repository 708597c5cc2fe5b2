"""The log-uniform distribution against its formulas, Monte Carlo and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate

from lifelong_ens.layers.log_uniform import LogUniform

LOW, HIGH = (1e-3, 0.1), (0.9, 100.0)


def make(num_members: int = 2) -> LogUniform:
    bounds = LogUniform(num_members, *(torch.tensor(side, dtype=torch.double) for side in (LOW, HIGH)))
    with torch.no_grad():
        bounds.log_low += torch.tensor([[0.5, 0.1], [1.0, 2.0]], dtype=torch.double)[:num_members]
        bounds.log_high -= torch.tensor([[0.2, 1.0], [0.3, 0.7]], dtype=torch.double)[:num_members]
    return bounds


def test_starts_at_the_whole_range():
    bounds = LogUniform(3, torch.tensor(LOW), torch.tensor(HIGH))
    torch.testing.assert_close(bounds.log_low.exp(), torch.tensor(LOW).expand(3, 2))
    torch.testing.assert_close(bounds.log_high.exp(), torch.tensor(HIGH).expand(3, 2))
    # the whole range of the authors' L2 coefficients has this mean
    assert float(bounds.mean()[0, 1].detach()) == pytest.approx(14.46, abs=0.01)


def test_mean_and_entropy_are_integrals_of_the_density():
    bounds = make()
    for k in range(2):
        for j in range(2):
            a, b = (side[k, j].exp().item() for side in (bounds.log_low, bounds.log_high))

            def density(value, a=a, b=b):
                return 1 / (value * math.log(b / a))

            mean = integrate.quad(lambda v: v * density(v), a, b)[0]
            entropy = integrate.quad(lambda v: -density(v) * math.log(density(v)), a, b, limit=200)[0]
            assert bounds.mean()[k, j].item() == pytest.approx(mean, rel=1e-7)
            assert bounds.entropy()[k, j].item() == pytest.approx(entropy, rel=1e-7)


def test_samples_lie_between_the_bounds_and_have_mean_and_median():
    bounds = make()
    torch.manual_seed(0)
    values = bounds.sample(200_000).detach()
    assert values.shape == (2, 200_000, 2)
    assert (values >= bounds.log_low.exp().unsqueeze(1)).all()
    assert (values <= bounds.log_high.exp().unsqueeze(1)).all()
    torch.testing.assert_close(values.mean(dim=1), bounds.mean().detach(), rtol=0.01, atol=0)
    median = ((bounds.log_low + bounds.log_high) / 2).exp().detach()
    torch.testing.assert_close(values.median(dim=1).values, median, rtol=0.02, atol=0)


def test_gradients_are_the_formulas_and_finite_differences():
    bounds = make()
    torch.manual_seed(1)
    values = bounds.sample(5)
    low, high = bounds.log_low.unsqueeze(1), bounds.log_high.unsqueeze(1)
    u = (values.log() - low) / (high - low)
    by_low, by_high = torch.autograd.grad(values.sum(), [bounds.log_low, bounds.log_high])
    torch.testing.assert_close(by_low, ((1 - u) * values).sum(dim=1))
    torch.testing.assert_close(by_high, (u * values).sum(dim=1))

    def outputs(log_low, log_high):
        state = {"log_low": log_low, "log_high": log_high}
        torch.manual_seed(2)
        sample = torch.func.functional_call(bounds, state, (3,))
        return sample, torch.func.functional_call(
            Mean(bounds), {f"bounds.{k}": v for k, v in state.items()}, ()
        )

    bounds.forward = bounds.sample
    assert torch.autograd.gradcheck(
        outputs, (bounds.log_low.detach().requires_grad_(), bounds.log_high.detach().requires_grad_())
    )


class Mean(torch.nn.Module):
    def __init__(self, bounds: LogUniform) -> None:
        super().__init__()
        self.bounds = bounds

    def forward(self) -> torch.Tensor:
        return self.bounds.mean() + self.bounds.entropy()


def test_entropy_alone_widens_the_bounds_to_the_ends_and_no_further():
    bounds = make()
    optimizer = torch.optim.Adam(bounds.parameters(), lr=0.05)
    widths = []
    for _ in range(300):
        optimizer.zero_grad()
        (-bounds.entropy().mean()).backward()
        optimizer.step()
        bounds.project()
        widths.append((bounds.log_high - bounds.log_low).detach())
    # entropy grows with both bounds, more with the upper one: narrow at the top is worth less than high
    torch.testing.assert_close(bounds.log_high.detach(), bounds.log_max.expand(2, 2))
    assert (bounds.log_low >= bounds.log_min).all()
    assert (bounds.log_high > bounds.log_low).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_projection_keeps_order_and_range_in_float32(seed):
    torch.manual_seed(seed)
    bounds = LogUniform(3, torch.tensor(LOW), torch.tensor(HIGH))
    with torch.no_grad():
        bounds.log_low.normal_(std=10)
        bounds.log_high.normal_(std=10)
    bounds.project()
    assert (bounds.log_low >= bounds.log_min).all()
    assert (bounds.log_high <= bounds.log_max).all()
    assert (bounds.log_high > bounds.log_low).all()
    before = [parameter.clone() for parameter in bounds.parameters()]
    bounds.project()
    assert all(torch.equal(a, b) for a, b in zip(before, bounds.parameters(), strict=True))
    low, high = bounds.log_low.exp(), bounds.log_high.exp()
    assert ((bounds.mean() >= low * (1 - 1e-5)) & (bounds.mean() <= high * (1 + 1e-5))).all()
    assert bounds.entropy().isfinite().all()


def test_scaled_is_zero_and_one_at_the_ends():
    bounds = make()
    torch.testing.assert_close(bounds.scaled(torch.tensor(LOW, dtype=torch.double)), torch.zeros(2).double())
    torch.testing.assert_close(bounds.scaled(torch.tensor(HIGH, dtype=torch.double)), torch.ones(2).double())
