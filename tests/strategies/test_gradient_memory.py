"""GEM's and A-GEM's projections against quadratic programmes, formulas and Avalanche."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from avalanche.training.plugins import AGEMPlugin
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import nn

from lifelong_ens.errors import InputError
from lifelong_ens.networks.plain import Body, mlp
from lifelong_ens.training.fit import Fit
from strategies import agem, finetune, gem
from strategies.gradient_memory import AveragedGem, Gem, project
from streams import split_digits

FIT = Fit(epochs=2, batch_size=32, momentum=0.9, weight_decay=5e-3)


@pytest.fixture(scope="module")
def benchmark():
    return split_digits(num_tasks=4, seed=0)


def conv_body() -> Body:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()]
    return Body(nn.Sequential(*layers), 144, None)


def primal(gradient: np.ndarray, references: np.ndarray) -> np.ndarray:
    """The nearest vector to ``gradient`` that no reference objects to, by a general solver."""
    found = minimize(
        lambda z: 0.5 * ((z - gradient) ** 2).sum(),
        gradient,
        jac=lambda z: z - gradient,
        constraints={"type": "ineq", "fun": lambda z: references @ z, "jac": lambda z: references},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    return found.x


def dual(gradient: np.ndarray, references: np.ndarray, margin: float) -> np.ndarray:
    """The shortest ``gradient + references.T v`` with ``v >= margin``, by a general solver."""
    found = minimize(
        lambda v: 0.5 * ((gradient + references.T @ v) ** 2).sum(),
        np.full(len(references), margin),
        jac=lambda v: references @ (gradient + references.T @ v),
        bounds=[(margin, None)] * len(references),
        method="L-BFGS-B",
        options={"ftol": 1e-15, "gtol": 1e-12, "maxiter": 10_000},
    )
    return gradient + references.T @ found.x


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5), st.integers(0, 1000), st.sampled_from([0.0, 0.5]), st.sampled_from([1e-4, 1.0, 30.0])
)
def test_projection_is_the_quadratic_programme_s_and_keeps_its_constraints(tasks, seed, margin, scale):
    rng = np.random.default_rng(seed)
    references = rng.normal(size=(tasks, 8))
    gradient = rng.normal(size=8) - references.sum(axis=0)
    found = (
        project(torch.from_numpy(gradient * scale), torch.from_numpy(references * scale), margin).numpy()
        / scale
    )
    if (references @ gradient >= 0).all():
        assert np.array_equal(found * scale, gradient * scale)
        return
    assert (references @ found).min() > -1e-6
    np.testing.assert_allclose(found, dual(gradient, references, margin), atol=1e-4)
    if margin == 0:
        np.testing.assert_allclose(found, primal(gradient, references), atol=1e-4)


def test_projection_of_dependent_and_vanishing_references():
    torch.manual_seed(0)
    one = torch.randn(6)
    references = torch.stack([one, one, 2 * one, torch.zeros(6)])
    gradient = torch.randn(6) - 3 * one
    expected = gradient - gradient.dot(one) / one.dot(one) * one
    torch.testing.assert_close(project(gradient, references), expected, rtol=1e-5, atol=1e-6)


def test_nothing_is_changed_where_nobody_objects():
    gradient = torch.ones(4)
    assert project(gradient, torch.eye(4), 0.5) is gradient


def test_agem_s_correction_is_avalanche_s(monkeypatch):
    torch.manual_seed(0)
    model = mlp(3, input_shape=(1, 4, 4), hidden=(5,))
    plugin = AGEMPlugin(1, 1)
    plugin.buffers = [None]
    for seed in range(6):
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        plugin.reference_gradients = torch.randn_like(gradient)
        strategy = AveragedGem.__new__(AveragedGem)
        monkeypatch.setattr(strategy, "draw", lambda count: None, raising=False)
        monkeypatch.setattr(strategy, "reference", lambda rows: plugin.reference_gradients, raising=False)
        found = strategy.corrected(gradient)
        plugin.after_backward(SimpleNamespace(model=model, device="cpu"))
        expected = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        torch.testing.assert_close(found, expected)


def steps_taken(strategy, benchmark) -> list:
    """Trains the stream; the gradient of every step and what the memory said to it."""
    steps, references = [], []
    reference, before_step = strategy.reference, strategy.before_step

    def note_reference(rows):
        references.append(reference(rows))
        return references[-1]

    def note_step():
        references.clear()
        before_step()
        parameters = strategy.optimisation.parameters
        taken = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        if references:
            steps.append((taken, torch.stack(references)))

    strategy.reference, strategy.before_step = note_reference, note_step
    for experience in benchmark.train_stream:
        strategy.train(experience)
    return steps


@pytest.mark.parametrize("build", [agem, gem])
def test_no_step_raises_the_loss_of_the_memory_to_first_order(benchmark, build):
    steps = steps_taken(build(conv_body(), fit=FIT, memory=60), benchmark)
    active = 0
    for taken, references in steps:
        cosine = references @ taken / (references.norm(dim=1) * taken.norm())
        assert float(cosine.min()) > -1e-4
        active += int((cosine.abs() < 1e-4).any())
    # the correction was needed, and reached the heads of earlier tasks too
    assert active > 0


def test_gem_asks_each_earlier_task_for_all_its_images(benchmark, monkeypatch):
    asked = []
    original = Gem.reference
    monkeypatch.setattr(Gem, "reference", lambda self, rows: asked.append(rows) or original(self, rows))
    strategy = gem(conv_body(), fit=Fit(epochs=1, batch_size=1000), memory=60)
    for experience in benchmark.train_stream[:3]:
        strategy.train(experience)
    assert [len(rows) for rows in asked] == [60, 30, 30]


@pytest.mark.parametrize(("build", "rows"), [(gem, 40), (agem, 30)])
def test_reference_passes_are_counted_at_every_step(benchmark, build, rows):
    fit = Fit(epochs=2, batch_size=64)
    options = {"reference_rows": 30} if build is agem else {}
    flops = []
    for strategy in (finetune(conv_body(), fit=fit), build(conv_body(), fit=fit, memory=40, **options)):
        for experience in benchmark.train_stream[:2]:
            strategy.train(experience)
            flops.append(strategy.meter.flops)
    size = len(benchmark.train_stream[1].dataset)
    per_row = (flops[1] - flops[0]) / (2 * size)
    extra = (flops[3] - flops[2]) - (flops[1] - flops[0])
    # heads of tasks with two and three classes differ a little
    assert extra == pytest.approx(2 * -(-size // 64) * rows * per_row, rel=0.05)


@pytest.mark.parametrize(("build", "options"), [(gem, {"margin": -0.5}), (agem, {"reference_rows": 0})])
def test_wrong_options_are_refused(build, options):
    with pytest.raises(InputError, match=next(iter(options))):
        build(conv_body(), **options)
