from __future__ import annotations

import pytest
import torch

from strategies.controller import Controller, LinearCritic, MeanCritic

LIMITS = [3, 5, 2]


def controller(limits=LIMITS, *, learning_rate: float = 0.01, seed: int = 0, released: bool = False):
    torch.manual_seed(seed)
    return Controller(limits, learning_rate=learning_rate, released=released)


def share_drawn(policy: Controller, draws: int = 100) -> float:
    """Mean units drawn, as a share of the most there could be."""
    return sum(sum(policy.sample()) for _ in range(draws)) / draws / sum(policy.limits)


def share_after(trials: int, cost: float, seed: int, **options) -> float:
    """Share of units drawn after trials in which units cost something and bring nothing."""
    policy = controller([29, 29], seed=seed, **options)
    for _ in range(trials):
        units = policy.sample()
        policy.learn(units, 0.95 - cost * sum(units))
    return share_drawn(policy)


@pytest.mark.parametrize("released", [False, True])
def test_probabilities_of_all_choices_add_up_to_one(released):
    policy = controller(released=released)
    every = [(a, b, c) for a in range(4) for b in range(6) for c in range(3)]
    with torch.no_grad():
        assert float(sum(policy.log_prob(units).exp() for units in every)) == pytest.approx(1, abs=1e-5)


def test_draws_stay_within_the_limits_reach_them_and_follow_the_probabilities():
    policy = controller([2, 1], learning_rate=0.3)
    for _ in range(3):
        policy.learn([2, 0], 1.0)
        policy.learn([0, 1], 0.0)
    torch.manual_seed(1)
    drawn = [tuple(policy.sample()) for _ in range(3000)]
    every = [(a, b) for a in range(3) for b in range(2)]
    assert set(drawn) <= set(every)
    for units in every:
        expected = float(policy.log_prob(units).exp().detach())
        assert drawn.count(units) / len(drawn) == pytest.approx(expected, abs=0.04)


def test_draws_depend_on_earlier_ones_unless_as_released():
    """Whether the second number's distribution moves with the first."""
    for released in (False, True):
        policy = controller([3, 3], released=released)
        with torch.no_grad():
            policy.output.weight.mul_(100)
            # log pi(a, b) - log pi(a, b') is what the first number leaves of the second
            first, second = (policy.log_prob([a, 0]) - policy.log_prob([a, 1]) for a in (0, 3))
        assert bool((first - second).abs() < 1e-6) == released


def test_gradient_is_that_of_reinforce():
    """One step of plain SGD against ``sum_k pi(k) A(k) grad log pi(k)`` written out for one group."""
    policy = controller([2])
    policy.optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    policy.learn([1], 0.2)
    before = policy.output.bias.detach().clone()
    with torch.no_grad():
        probabilities = torch.stack([policy.log_prob([units]) for units in range(3)]).exp()
    policy.learn([1], 0.7)
    expected = 0.5 * (torch.eye(3)[1] - probabilities)
    torch.testing.assert_close(policy.output.bias.detach() - before, expected)


def test_first_reward_is_what_was_expected_and_the_mean_afterwards():
    critic = MeanCritic()
    assert [critic.learn(reward) for reward in (0.6, 0.8, 0.1)] == pytest.approx([0.6, 0.6, 0.7])
    policy = controller()
    before = policy.output.weight.detach().clone()
    policy.learn([1, 1, 1], 0.9)
    assert torch.equal(policy.output.weight, before)


def test_released_critic_starts_at_zero_and_approaches_the_reward_in_large_steps():
    torch.manual_seed(0)
    state = torch.rand(30)
    critic = LinearCritic(state)
    expected = [critic.learn(0.9) for _ in range(40)]
    assert expected[0] == 0
    # Adam's first step moves every weight by its learning rate
    assert expected[1] == pytest.approx(0.005 * (1 + float(state.sum())), rel=1e-3)
    assert abs(expected[-1] - 0.9) < 0.2


def test_fewer_units_are_drawn_where_they_bring_nothing():
    """The share falls by far, with the cost that is the default; a cost of nothing moves nothing."""
    seeds = range(4)
    start = sum(share_after(0, 1e-4, seed) for seed in seeds) / 4
    after_20 = sum(share_after(20, 1e-4, seed) for seed in seeds) / 4
    after_50 = sum(share_after(50, 1e-4, seed) for seed in seeds) / 4
    assert start == pytest.approx(0.5, abs=0.05)
    assert after_20 < 0.4
    assert after_50 < 0.3
    assert share_after(20, 0.0, 0) == pytest.approx(0.5, abs=0.05)


def test_more_units_are_drawn_where_they_pay():
    assert sum(share_after(50, -1e-4, seed) for seed in range(4)) / 4 > 0.65


def test_released_numbers_leave_the_controller_where_it_was():
    shares = [share_after(50, 1e-4, seed, learning_rate=0.001, released=True) for seed in range(4)]
    assert sum(shares) / 4 == pytest.approx(0.5, abs=0.05)


def test_same_seed_draws_the_same():
    policies = [controller(seed=seed) for seed in (3, 3, 4)]
    draws = []
    for policy in policies:
        torch.manual_seed(0)
        draws.append([policy.sample() for _ in range(5)])
    assert torch.equal(policies[0].start, policies[1].start)
    assert draws[0] == draws[1]
    assert not torch.equal(policies[0].start, policies[2].start)
