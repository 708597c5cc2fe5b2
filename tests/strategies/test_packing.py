from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from torch import nn

from lifelong_ens.errors import InputError
from lifelong_ens.networks.plain import Body, lenet5
from lifelong_ens.training.fit import Fit
from strategies import packnet
from strategies.packing import Owners, PackedNetwork
from streams import split_digits


def conv_net() -> Body:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 7, 3)]
    return Body(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 7, None)


def take_steps(network: PackedNetwork, task: int, optimizer: type[torch.optim.Optimizer], **options) -> None:
    trained = [p for p in network.parameters() if p.requires_grad]
    stepper = optimizer(trained, lr=0.05, weight_decay=0.1, **options)
    for _ in range(4):
        stepper.zero_grad()
        network(torch.randn(8, 1, 8, 8), task).square().mean().backward()
        stepper.step()


def weights(network: PackedNetwork, task: int) -> list[torch.Tensor]:
    return [layer.task_weight(task).detach().clone() for layer in network.layers()]


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {}), (torch.optim.Adam, {})],
)
def test_what_earlier_tasks_own_does_not_move_to_the_bit(optimizer, options):
    network = PackedNetwork(conv_net(), prune=0.5).train()
    x = torch.randn(6, 1, 8, 8)
    outputs, used = [], []
    for task in range(4):
        network.begin_task(2)
        take_steps(network, task, optimizer, **options)
        network.prune_task()
        take_steps(network, task, optimizer, **options)
        in_training = weights(network, task)
        network.finish_task()
        assert all(map(torch.equal, in_training, weights(network, task)))
        outputs.append(network.eval()(x, task).detach())
        used.append(weights(network, task))
        network.train()
        for past in range(task + 1):
            assert all(map(torch.equal, used[past], weights(network, past)))
            assert torch.equal(network.eval()(x, past), outputs[past])
            network.train()
    assert not torch.equal(used[0][0], used[3][0])


def test_free_weights_follow_the_closed_form_and_earlier_ones_are_used_as_they_are():
    network = PackedNetwork(conv_net(), prune=0.7)
    free = [layer.weight.numel() for layer in network.layers()]
    owned = [0, 0]
    for task in range(5):
        network.begin_task(2)
        network.finish_task()
        for index, layer in enumerate(network.layers()):
            kept = free[index] - math.floor(0.7 * free[index])
            free[index] -= kept
            owned[index] += kept
            assert int(layer.owners.of(task).sum()) == kept
            assert int(layer.owners.free().sum()) == free[index]
            assert int(layer.owners.up_to(task).sum()) == owned[index]
            assert len(layer.owners.planes) == (task + 1).bit_length()
            assert layer.owners.planes.shape[1] == math.ceil(layer.weight.numel() / 8)


def test_pruning_keeps_the_largest_of_the_task_s_own():
    network = PackedNetwork(conv_net(), prune=0.5)
    network.begin_task(2)
    layer = next(network.layers())
    size = layer.active.detach().abs().flatten()
    network.prune_task()
    kept = layer.owners.of(0).flatten()
    assert size[kept].min() > size[~kept].max()


@pytest.mark.parametrize("free_weights", ["zero", "fresh"])
def test_retraining_moves_kept_weights_and_later_tasks_start_where_asked(free_weights):
    network = PackedNetwork(conv_net(), prune=0.5, free_weights=free_weights).train()
    network.begin_task(2)
    take_steps(network, 0, torch.optim.SGD)
    network.prune_task()
    before = weights(network, 0)
    take_steps(network, 0, torch.optim.SGD)
    after = weights(network, 0)
    assert not torch.equal(before[0], after[0])
    for layer, weight in zip(network.layers(), after, strict=True):
        assert not weight[layer.owners.free()].any()
    network.finish_task()
    network.begin_task(2)
    for layer, old, new in zip(network.layers(), after, weights(network, 1), strict=True):
        free = layer.owners.free()
        assert torch.equal(old[~free], new[~free])
        assert bool(new[free].any()) == (free_weights == "fresh")


def test_owners_are_packed_and_come_back_from_the_state():
    owners = Owners(torch.Size([3, 7]))
    expected = torch.randint(0, 6, (3, 7))
    for task in range(5):
        owners.reserve(task)
        owners.give(expected == task + 1, task)
    assert owners.planes.shape == (3, 3)
    assert owners.planes.dtype == torch.uint8
    other = Owners(torch.Size([3, 7]))
    other.load_state_dict(owners.state_dict())
    for task in range(5):
        assert torch.equal(other.of(task), expected == task + 1)
    assert torch.equal(other.free(), expected == 0)


def test_no_free_weight_is_said_once_and_the_head_still_learns(caplog):
    network = PackedNetwork(conv_net(), prune=0.0, norm="shared_frozen").regrow([2])
    with caplog.at_level(logging.WARNING):
        network.regrow([2, 2])
    assert caplog.text.count("no weight is free in 2 layers") == 1
    network.begin_task(2)
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {"heads.3.weight", "heads.3.bias"}
    take_steps(network.train(), 3, torch.optim.SGD)
    network.finish_task()
    assert all(map(torch.equal, weights(network, 0), weights(network, 3)))


def test_mixed_task_batch_equals_per_task_calls():
    network = PackedNetwork(conv_net(), norm="per_member", bias="per_member").regrow([2, 3, 2]).eval()
    x, task = torch.randn(9, 1, 8, 8), torch.tensor([2, 0, 1, 1, 0, 2, 2, 1, 0])
    logits = network(x, task)
    assert logits.shape == (9, 3)
    for one, classes in enumerate((2, 3, 2)):
        torch.testing.assert_close(logits[task == one][:, :classes], network(x[task == one], one))


def test_a_task_in_training_continues_from_its_state():
    network = PackedNetwork(conv_net()).regrow([2]).train()
    network.begin_task(2)
    take_steps(network, 1, torch.optim.SGD)
    other = PackedNetwork(conv_net()).regrow([2])
    other.begin_task(2)
    other.load_state_dict(network.state_dict())
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(network.eval()(x, 1), other.eval()(x, 1))


@pytest.mark.parametrize(("epochs", "retrain", "phases"), [(6, 1 / 3, [4, 2]), (1, 0.9, [1]), (4, 0, [4])])
def test_epochs_are_shared_by_training_and_retraining(epochs, retrain, phases, monkeypatch):
    strategy = packnet(lenet5(input_shape=(1, 16, 16)), retrain=retrain, fit=Fit(epochs=epochs))
    seen = []
    monkeypatch.setattr(strategy, "run_epochs", lambda count, validation: seen.append(count))
    strategy.train(split_digits(num_tasks=5).train_stream[0])
    assert seen == phases


def test_early_stopping_restores_within_each_phase():
    benchmark = split_digits(num_tasks=5, validation=0.2)
    body = Body(nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU()), 16, None)
    strategy = packnet(body, fit=Fit(epochs=6, patience=1))
    for train, held_out in zip(benchmark.train_stream, benchmark.valid_stream, strict=True):
        strategy.train(train, [held_out])
    network = strategy.network
    state = copy.deepcopy(network.state_dict())
    assert torch.isfinite(next(iter(network.layers())).weight).all()
    assert not any("active" in name for name in state)


@pytest.mark.parametrize("options", [{"prune": 1.0}, {"prune": -0.1}, {"retrain": 1.0}, {"retrain": -0.5}])
def test_shares_out_of_range_are_refused(options):
    with pytest.raises(InputError, match="is at least 0 and below 1"):
        packnet(conv_net(), **options)
