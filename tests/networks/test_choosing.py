from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lifelong_ens.networks.choosing import choose, discrepancy, divergence, mean_importance, member_of_rows


def test_choose_by_hand():
    importance = {"a": torch.tensor([0.9, 0.1, 0.5, 0.3]), "b": torch.tensor([9.0, 2.0, 3.0, 1.0])}
    free = {"a": torch.tensor([False, True, True, True]), "b": torch.tensor([True, True, True, True])}

    def chosen(**options: str) -> dict[str, list[int]]:
        found = choose(importance, free, 0.5, **options)
        return {name: units.nonzero().squeeze(1).tolist() for name, units in found.items()}

    assert chosen() == {"a": [2, 3], "b": [0, 2]}
    # over all units of a layer, 0.9 counts too: the quantile of a is 0.4
    assert chosen(pruning="soft") == {"a": [2], "b": [0, 2]}
    # among 7 free units the 4th is the threshold; b's are larger throughout, and a keeps its best
    assert chosen(scope="global") == {"a": [2], "b": [0, 1, 2, 3]}
    assert chosen(scope="global", pruning="soft") == {"a": [2], "b": [0, 1, 2, 3]}


def test_units_of_no_importance_take_no_more_than_their_share():
    free = {"a": torch.ones(10, dtype=torch.bool)}
    assert int(choose({"a": torch.zeros(10)}, free, 0.7)["a"].sum()) == 10 - math.ceil(0.7 * 9)
    assert not choose({"a": torch.rand(10)}, {"a": ~free["a"]}, 0.5)["a"].any()


def test_discrepancy_is_the_sum_of_its_kernels():
    a, b = torch.randn(7).double(), (torch.randn(7) + 0.5).double()

    def kernel(one: Tensor, other: Tensor) -> float:
        rows = [math.exp(-sum(float(i - j) ** 2 for j in other) / 7 / 7) for i in one]
        return sum(rows) / 7

    expected = kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)
    assert float(discrepancy(a, b)) == pytest.approx(expected, rel=1e-9)
    assert float(discrepancy(a, a)) == 0
    layers = [torch.stack([a, b, 2 * a]), torch.stack([b, a, a])]
    pairs = ((a, b), (a, 2 * a), (b, 2 * a), (b, a), (b, a), (a, a))
    assert float(divergence(layers)) == pytest.approx(sum(float(discrepancy(*pair)) for pair in pairs))


def test_rows_are_split_in_blocks_and_what_is_left_over_is_the_first_member_s():
    assert member_of_rows(7, 3).tolist() == [0, 0, 1, 1, 2, 2, 0]
    assert member_of_rows(2, 3).tolist() == [0, 0]


def test_importance_is_the_mean_size_of_the_gradient_of_every_batch():
    scale, unread = (torch.tensor([2.0, -1.0], requires_grad=True) for _ in range(2))
    losses = ((scale * torch.tensor(row)).sum() for row in ([3.0, -1.0], [-1.0, 0.0]))
    found = mean_importance(losses, {"a": scale, "b": unread})
    assert {name: values.tolist() for name, values in found.items()} == {"a": [2.0, 0.5], "b": [0.0, 0.0]}
