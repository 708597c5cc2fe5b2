from __future__ import annotations

import pytest
import torch

from lifelong_ens.training.proximal import shrink, shrink_groups, step_size


def minimum(x: torch.Tensor, penalty) -> torch.Tensor:
    """``argmin_w 1/2 ||w - x||^2 + penalty(w)`` by plain gradient descent with ever smaller steps."""
    w = x.clone().requires_grad_()
    for step in range(4000):
        (gradient,) = torch.autograd.grad((w - x).square().sum() / 2 + penalty(w), w)
        w = (w - 0.5 / (1 + step) ** 0.7 * gradient).detach().requires_grad_()
    return w.detach()


def test_shrink_is_the_proximal_step_of_l1():
    x = torch.tensor([[0.5, -0.2], [-0.9, 0.05]])
    found = x.clone()
    shrink(found, 0.2)
    torch.testing.assert_close(found, torch.tensor([[0.3, 0.0], [-0.7, 0.0]]))
    torch.testing.assert_close(found, minimum(x, lambda w: 0.2 * w.abs().sum()), atol=2e-3, rtol=0)


def test_groups_shrink_by_their_norm_over_all_parts():
    rows, bias = torch.tensor([[3.0, 0.0], [0.3, 0.0], [0.0, 0.0]]), torch.tensor([4.0, 0.4, 0.0])
    expected = minimum(torch.cat([rows, bias.unsqueeze(1)], dim=1)[:1], lambda w: 1.0 * w.norm(dim=1).sum())
    shrink_groups([rows, bias], 1.0)
    torch.testing.assert_close(rows, torch.tensor([[2.4, 0.0], [0.0, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(bias, torch.tensor([3.2, 0.0, 0.0]))
    torch.testing.assert_close(torch.cat([rows[0], bias[:1]]), expected[0], atol=2e-3, rtol=0)


def test_l1_before_the_group_lasso_is_the_proximal_step_of_both():
    x = torch.tensor([[0.9, -0.5, 0.1]])
    found = x.clone()
    shrink(found, 0.2)
    shrink_groups([found], 0.3)
    both = minimum(x, lambda w: 0.2 * w.abs().sum() + 0.3 * w.norm())
    torch.testing.assert_close(found, both, atol=2e-3, rtol=0)


def test_filters_are_groups_of_any_shape():
    filters = torch.ones(2, 3, 2, 2)
    filters[1] *= 0.1
    shrink_groups([filters], 0.5)
    assert filters[0].norm() == pytest.approx(12**0.5 - 0.5)
    assert not filters[1].any()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_and_proximal_steps_end_at_the_minimum_of_both(momentum):
    """A lasso whose answer is known: ``1/2 ||w - a||^2 + mu ||w||_1`` has it at the shrunken ``a``."""
    a = torch.tensor([1.0, -0.3, 0.1, 0.0])
    w = torch.nn.Parameter(torch.randn(4, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.SGD([w], lr=0.02, momentum=momentum)
    for _ in range(1500):
        optimizer.zero_grad()
        ((w - a).square().sum() / 2).backward()
        optimizer.step()
        shrink(w, 0.2 * step_size(optimizer))
    torch.testing.assert_close(w.detach(), torch.tensor([0.8, -0.1, 0.0, 0.0]), atol=1e-4, rtol=0)
    assert w[2] == 0
    assert w[3] == 0
