from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lifelong_ens.accounting.components import (
    Size,
    component_of_modules,
    optimizer_size,
    sizes,
    stored_tensors,
)
from lifelong_ens.networks.batch_ensemble import BatchEnsembleNetwork
from lifelong_ens.networks.plain import lenet5, mlp, resnet18
from lifelong_ens.networks.task import Independent, MultiHead

CONVS, AFFINE, FAST, HEAD = 1_090_140, 3_000, 2_703, 805  # of the reduced ResNet-18, per network or task
NUM_BATCH_NORMS = 20


def total(network: nn.Module) -> int:
    return sum(size.parameters for size in sizes(network).values())


def reduced_resnet18(**options: Any) -> BatchEnsembleNetwork:
    return BatchEnsembleNetwork(resnet18(width=20), **options).regrow([5] * 20)


def test_twenty_tasks_with_statistics_of_their_own() -> None:
    network = reduced_resnet18()
    assert total(network) == 1_163_300
    assert sizes(network) == {
        "shared": Size(CONVS, 4 * CONVS),
        "norm_affine": Size(AFFINE, 4 * AFFINE),
        "norm_statistics": Size(0, 20 * 4 * AFFINE),
        "fast_weights": Size(20 * FAST, 20 * 4 * FAST),
        "head": Size(20 * HEAD, 20 * 4 * HEAD),
    }


def test_twenty_tasks_with_norms_of_their_own() -> None:
    network = reduced_resnet18(norm="per_member")
    assert total(network) == 1_220_300
    assert sizes(network)["norm_affine"] == Size(20 * AFFINE, 20 * 4 * AFFINE)
    assert sizes(network)["norm_statistics"] == Size(0, 20 * 4 * AFFINE)


def test_twenty_tasks_with_norms_left_as_they_are() -> None:
    network = reduced_resnet18(norm="shared_frozen")
    assert total(network) == 1_163_300
    assert sizes(network)["norm_statistics"] == Size(0, 4 * AFFINE + 8 * NUM_BATCH_NORMS)


def test_twenty_tasks_of_the_vanilla_network() -> None:
    network = MultiHead(resnet18(width=20)).regrow([5] * 20)
    assert total(network) == 1_109_240
    assert sizes(network)["norm_statistics"] == Size(0, 4 * AFFINE + 8 * NUM_BATCH_NORMS)


def test_a_task_in_training_counts_like_a_committed_one() -> None:
    network = BatchEnsembleNetwork(resnet18(width=4), norm="per_member").regrow([5, 5])
    network.begin_task(5)
    before = sizes(network)
    network.finish_task()
    assert sizes(network) == before


@pytest.mark.parametrize(("first_task", "ratio"), [("shared", 1.098), ("member", 1.108)])
def test_ten_tasks_of_lenet5(first_task: Any, ratio: float) -> None:
    vanilla = total(MultiHead(lenet5()).regrow([10] * 10))
    assert vanilla == 61_156 + 8_500
    network = BatchEnsembleNetwork(lenet5(), bias="shared", first_task=first_task).regrow([10] * 10)
    assert round(total(network) / vanilla, 3) == ratio


def test_biases_of_their_own_are_a_component() -> None:
    network = BatchEnsembleNetwork(lenet5(), bias="per_member").regrow([10] * 10)
    biases = 6 + 16 + 120 + 84
    assert sizes(network)["bias"] == Size(10 * biases, 40 * biases)
    assert sizes(network)["shared"].parameters == 61_156 - biases


def test_members_of_a_task_count_each() -> None:
    body = mlp(input_shape=(1, 2, 2), hidden=(3,))
    network = BatchEnsembleNetwork(body, members_per_task=3).regrow([2, 2])
    assert sizes(network)["fast_weights"].parameters == 2 * 3 * (4 + 3)


def test_independent_networks_are_columns_norms_included() -> None:
    network = Independent(resnet18(width=4)).regrow([5, 5, 5])
    body = sum(parameter.numel() for parameter in network.columns[0].parameters())
    statistics = sum(buffer.numel() * buffer.element_size() for buffer in network.columns[0].buffers())
    found = sizes(network)
    assert set(found) == {"column", "head"}
    assert found["column"] == Size(3 * body, 3 * (4 * body + statistics))


def test_bytes_are_of_the_true_dtype() -> None:
    network = nn.Sequential(nn.Linear(3, 2).half(), nn.Linear(2, 2, bias=False).double())
    network.register_buffer("mask", torch.zeros(5, dtype=torch.uint8))
    network.register_buffer("scratch", torch.zeros(100), persistent=False)
    assert sizes(network) == {"shared": Size(8 + 4, 8 * 2 + 4 * 8 + 5)}


def test_tied_tensors_and_shared_modules_come_once() -> None:
    one, other = nn.Linear(3, 3), nn.Linear(3, 3)
    other.weight = one.weight
    network = nn.ModuleList([one, nn.Sequential(one), other])
    assert total(network) == 9 + 3 + 3
    assert len(list(stored_tensors(network))) == 3
    modules = [module for module, _ in component_of_modules(network)]
    assert len(modules) == len(set(modules)) == 4


def test_a_component_is_the_nearest_one_above() -> None:
    inner, outer = nn.Linear(1, 1), nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
    inner.component, outer.component = "lateral", "column"  # type: ignore[assignment]
    outer.append(inner)
    network = nn.Sequential(outer, nn.LayerNorm(4), nn.Linear(3, 3))
    assert sizes(network) == {
        "column": Size(6, 24),
        "lateral": Size(2, 8),
        "norm_affine": Size(8, 32),
        "shared": Size(12, 48),
    }


def test_all_that_is_stored_is_in_the_state_and_the_other_way_round() -> None:
    network = reduced_resnet18(norm="per_member")
    stored = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    assert sum(size.bytes for size in sizes(network).values()) == stored


@pytest.mark.parametrize(("kind", "copies"), [(torch.optim.SGD, 1), (torch.optim.Adam, 2)])
def test_optimizer_state(kind: Any, copies: int) -> None:
    network = nn.Linear(3, 2)
    network.bias.requires_grad_(False)
    optimizer = kind([network.weight], lr=0.1, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    assert optimizer_size(optimizer) == Size()
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    step_counter = 4 if kind is torch.optim.Adam else 0
    assert optimizer_size(optimizer) == Size(0, copies * 6 * 4 + step_counter)
