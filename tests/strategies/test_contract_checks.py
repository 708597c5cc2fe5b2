"""The checks of the contract find what they are there for: strategies that break it in one way each are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lifelong_ens.networks.task import MultiHead
from strategies import contract, finetune
from strategies.base import Strategy
from streams import split_digits


@pytest.fixture(scope="module")
def benchmark():
    return split_digits(num_tasks=2, limit=20)


class PromisesTooMuch(MultiHead):
    """Goes on training everything."""

    frozen_past = True


class ForgetsNorms(MultiHead):
    """Freezes parameters, not running statistics."""

    frozen_past = True

    def add_task(self, num_classes):
        self.requires_grad_(self.num_tasks == 0)
        super().add_task(num_classes)


class LivesOutside(MultiHead):
    """Counts forward passes in training beside its state, and answers by the count."""

    def __init__(self, body):
        super().__init__(body)
        self.count = 0

    def forward(self, x, task):
        self.count += self.training
        return super().forward(x, task) * (1 + self.count / 100)


class GrowsAnyway(MultiHead):
    """Has a buffer that evaluation moves."""

    def __init__(self, body):
        super().__init__(body)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x, task):
        self.seen += 1
        return super().forward(x, task)


class OneTaskForAll(MultiHead):
    """Takes the first row's task for all rows."""

    def forward(self, x, task):
        return super().forward(x, task if isinstance(task, int) else int(task[0]))


class ExportsItself(MultiHead):
    """Gives a network of ours for a plain one."""

    def plain_network(self, task, member):
        class Whole(nn.Sequential):
            __module__ = "lifelong_ens.networks.own"

        return Whole(super().plain_network(task, member))


class DrawsGlobally(Strategy):
    """Leaves torch's generator elsewhere."""

    def train(self, *args, **kwargs):
        result = super().train(*args, **kwargs)
        torch.rand(1)
        return result


class FollowsTheClock(Strategy):
    """Is not repeatable."""

    drawn = 0

    def before_step(self):
        FollowsTheClock.drawn += 1
        for parameter in self.optimisation.parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(1 + FollowsTheClock.drawn / 1000)


def of(network):
    return lambda fit, seed: Strategy(network=network(contract.conv_net()), fit=fit, seed=seed)


def with_strategy(strategy):
    return lambda fit, seed: strategy(network=MultiHead(contract.small_mlp()), fit=fit, seed=seed)


BROKEN = [
    (contract.past_does_not_move_where_promised, of(PromisesTooMuch), "frozen_past is true"),
    (contract.past_does_not_move_where_promised, of(ForgetsNorms), "running statistics"),
    (contract.state_dict_restores_everything, of(LivesOutside), "a parameter or a buffer"),
    (contract.goes_on_after_a_task_as_if_never_interrupted, of(LivesOutside), "goes on after its first task"),
    (contract.evaluating_unseen_tasks_changes_nothing, of(GrowsAnyway), "evaluation changes the state"),
    (contract.rows_of_several_tasks_get_their_own_answers, of(OneTaskForAll), "among others"),
    (contract.a_task_is_exported_as_a_plain_network, of(ExportsItself), "no plain module"),
    (contract.caller_s_generator_is_left_alone, with_strategy(DrawsGlobally), "global generator"),
    (contract.same_seed_same_result_another_seed_another, with_strategy(FollowsTheClock), "one seed differ"),
    (
        contract.same_seed_same_result_another_seed_another,
        lambda fit, seed: finetune(contract.small_mlp(), fit=fit, seed=0),
        "two seeds are the same",
    ),
    (
        contract.learns_every_task,
        lambda fit, seed: finetune(contract.conv_net(), fit=contract.Fit(epochs=1, learning_rate=1e-9)),
        "chance is",
    ),
]


@pytest.mark.parametrize(("check", "build", "says"), BROKEN, ids=[says for *_, says in BROKEN])
def test_what_breaks_the_contract_is_refused(check, build, says, benchmark):
    with pytest.raises(contract.ContractError, match=says):
        check(build, benchmark)


def test_every_check_but_the_dtype_s_and_the_plugin_s_has_been_seen_to_fail():
    seen = {check for check, *_ in BROKEN}
    rest = {check.__name__ for check in contract.CHECKS if check not in seen}
    assert rest == {"autocast_keeps_bfloat16_between_all_layers", "plugins_of_steps_change_nothing"}
