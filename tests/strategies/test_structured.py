from __future__ import annotations

import copy
import logging
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from avalanche.core import SupervisedPlugin
from torch import nn

from lifelong_ens.accounting.components import Size, sizes
from lifelong_ens.errors import InputError
from lifelong_ens.networks.choosing import divergence
from lifelong_ens.networks.plain import mlp
from lifelong_ens.networks.structured import StructuredNetwork
from lifelong_ens.training.fit import Fit
from strategies import structured_ensemble
from strategies.evaluation import accuracy
from strategies.structured import StructuredEnsemble
from streams import split_digits

TASKS = 5
FIT = Fit(epochs=2, batch_size=64, learning_rate=0.05, momentum=0.9, weight_decay=0.1)


@pytest.fixture(scope="module")
def benchmark():
    return split_digits(num_tasks=TASKS, seed=0)


def digits_mlp(*hidden: int):
    torch.manual_seed(0)
    return mlp(input_shape=(1, 8, 8), hidden=hidden)


def taken(count: int, quantile: float) -> int:
    """Units of ``count`` free ones that reach the quantile, which lies between the ranks."""
    return count - math.ceil(quantile * (count - 1) - 1e-9)


@pytest.mark.parametrize("quantile", [0.25, 0.5, 0.9])
def test_each_task_takes_its_share_of_the_free_units(benchmark, quantile):
    widths = (64, 33)
    strategy = structured_ensemble(digits_mlp(*widths), quantile=quantile, mask_epochs=1, fit=FIT)
    free = list(widths)
    for task in range(TASKS):
        strategy.train(benchmark.train_stream[task])
        layers = [layer for _, layer in strategy.network.layers()]
        for index, layer in enumerate(layers):
            own = layer.masks.used(task) & ~layer.masks.used(task - 1)
            assert int(own.sum()) == taken(free[index], quantile)
            # (1 - p) p^(t-1) of the layer, each earlier task off by less than one unit, and the last by one
            ideal = widths[index] * (1 - quantile) * quantile**task
            assert abs(int(own.sum()) - ideal) < 2
            free[index] -= int(own.sum())
            assert int(layer.free_units(task + 1).sum()) == free[index]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_no_optimizer_moves_rows_of_other_tasks(benchmark, optimizer):
    fit = Fit(
        epochs=2, batch_size=64, optimizer=optimizer, learning_rate=0.01, momentum=0.9, weight_decay=0.1
    )
    strategy = structured_ensemble(digits_mlp(32, 24), mask_epochs=2, fit=fit)
    for task in range(3):
        before = {name: copy.deepcopy(layer.layer) for name, layer in strategy.network.layers()}
        strategy.train(benchmark.train_stream[task])
        for name, layer in strategy.network.layers():
            own = layer.masks.used(task) & ~layer.masks.used(task - 1)
            for part in ("weight", "bias"):
                old, new = getattr(before[name], part), getattr(layer.layer, part)
                assert torch.equal(old[~own], new[~own])
                assert (old[own] != new[own]).any()


@pytest.mark.parametrize("options", [{"scope": "global"}, {"pruning": "soft"}])
def test_variants_give_every_layer_a_unit_while_there_are_free_ones(benchmark, options):
    strategy = structured_ensemble(digits_mlp(24, 16), mask_epochs=1, fit=FIT, **options)
    for task in range(3):
        strategy.train(benchmark.train_stream[task])
        for _, layer in strategy.network.layers():
            own = layer.masks.used(task) & layer.free_units(task)
            assert own.any() or not layer.free_units(task).any()


def test_a_task_without_free_units_still_learns(benchmark):
    strategy = structured_ensemble(digits_mlp(96, 64), quantile=0.0, mask_epochs=1, fit=Fit(epochs=8))
    reached = []
    for task in range(TASKS):
        strategy.train(benchmark.train_stream[task])
        reached.append(accuracy(strategy, [benchmark.test_stream[task]]))
    assert min(reached) > 0.65
    assert sum(reached) / TASKS > 0.8
    assert strategy.network.exhausted == {"features.1": 1, "features.3": 1}


def test_layers_without_free_units_are_named_once_and_known_from_the_state(benchmark, caplog):
    strategy = structured_ensemble(digits_mlp(40, 12), quantile=0.2, mask_epochs=0, fit=FIT)
    with caplog.at_level(logging.WARNING):
        for task in range(TASKS):
            strategy.train(benchmark.train_stream[task])
    exhausted = strategy.network.exhausted
    assert exhausted == {"features.1": 4, "features.3": 3}
    assert "features.3 had no free unit left for task 4" in strategy.network.notes()
    said = [record.getMessage() for record in caplog.records if "no free unit" in record.getMessage()]
    assert len(said) == 2
    assert said[0].startswith("task 4 finds no free unit in features.3:")
    other = StructuredNetwork(digits_mlp(40, 12)).regrow(strategy.network.classes_per_task)
    other.load_state_dict(strategy.network.state_dict())
    assert other.exhausted == exhausted


def test_masks_are_stored_as_bits(benchmark):
    strategy = structured_ensemble(digits_mlp(33, 16), mask_epochs=0, fit=FIT)
    for task in range(3):
        strategy.train(benchmark.train_stream[task])
    assert sizes(strategy.network)["mask"] == Size(0, 3 * (5 + 2))


class Recording(StructuredEnsemble):
    """Keeps what the phase of the scales left, and the importance worked out by hand."""

    def importance(self, scales):
        x, y, _ = next(iter(self.dataloader))
        linear, head = self.network.body.features[1].layer, self.network.heads[-1]
        with torch.no_grad():
            z = F.linear(x.flatten(1), linear.weight, linear.bias)
            scale = scales["features.1"][0]
            hidden = torch.relu(z * scale)
            error = torch.softmax(head(hidden), 1) - F.one_hot(y, head.out_features)
            by_row = (error @ head.weight) * (hidden > 0) * z
            self.expected = by_row.mean(dim=0).abs()
        self.scales = scale.detach().clone()
        self.found = super().importance(scales)
        self.state = copy.deepcopy(self.network.state_dict())
        return self.found


@pytest.mark.parametrize("mask_epochs", [0, 3])
def test_importance_is_the_gradient_of_the_scales_alone(benchmark, mask_epochs):
    strategy = Recording(
        network=StructuredNetwork(digits_mlp(12)),
        choice={"quantile": 0.5},
        mask_epochs=mask_epochs,
        mask_learning_rate=0.1,
        fit=Fit(epochs=1, batch_size=10_000, optimizer="adamw", weight_decay=0.5, clip_norm=0.01),
    )
    before = copy.deepcopy(strategy.network.body.state_dict())
    strategy.train(benchmark.train_stream[0])
    torch.testing.assert_close(strategy.found["features.1"][0], strategy.expected, rtol=1e-4, atol=1e-7)
    for name in ("weight", "bias"):
        name = f"features.1.layer.{name}"
        assert torch.equal(before[name], strategy.state[f"body.{name}"])
    own = strategy.network.body.features[1].masks.used(0)
    assert float(strategy.expected[own].min()) >= float(strategy.expected[~own].max())


def test_only_the_scales_learn_in_their_phase(benchmark):
    states = []

    class Watching(StructuredEnsemble):
        def importance(self, scales):
            states.append((self.network.heads[-1].weight.clone(), scales["features.1"].detach().clone()))
            return super().importance(scales)

    for epochs in (0, 4):
        options = {"quantile": 0.5}
        strategy = Watching(
            network=StructuredNetwork(digits_mlp(12)),
            choice=options,
            mask_epochs=epochs,
            mask_learning_rate=0.1,
            fit=FIT,
        )
        strategy.train(benchmark.train_stream[0])
    assert torch.equal(states[0][0], states[1][0])
    assert not torch.equal(states[0][1], states[1][1])
    assert strategy.network.body.features[1].scale is None


class KeepingScales(StructuredEnsemble):
    """Keeps the scales when their phase ends, and what is known of the importance."""

    def importance(self, scales):
        self.scales = {name: scale.detach().clone() for name, scale in scales.items()}
        self.found = super().importance(scales)
        return self.found


def keeping(body: nn.Module, fit: Fit = FIT, **options: Any) -> KeepingScales:
    members = {"members_per_task": options.pop("members_per_task", 3)}
    defaults = {"choice": {"quantile": 0.5}, "mask_epochs": 2, "mask_learning_rate": 0.01}
    return KeepingScales(network=StructuredNetwork(body, **members), fit=fit, **(defaults | options))


def test_diversity_keeps_the_members_scales_apart(benchmark):
    found = {}
    for weight in (0.0, 0.01):
        strategy = keeping(digits_mlp(24, 16), mask_epochs=5, diversity=weight)
        strategy.train(benchmark.train_stream[0])
        found[weight] = float(divergence(list(strategy.scales.values())))
    assert found[0.01] > 2 * abs(found[0.0])


def test_every_member_sees_every_image_in_the_pass_for_importance(benchmark):
    fit = Fit(epochs=1, batch_size=10_000)
    strategy = keeping(digits_mlp(12), fit, members_per_task=2)
    network, seen = strategy.network, {}

    def note(*_: Any) -> None:
        # before the task's rows are trained, and the head with them
        seen.update(copy.deepcopy(network.state_dict()))

    original = network.choose_units
    network.choose_units = lambda chosen: (note(), original(chosen))
    strategy.train(benchmark.train_stream[0])
    x, y, _ = benchmark.train_stream[0].dataset.batch(torch.arange(len(benchmark.train_stream[0].dataset)))
    z = F.linear(
        x.flatten(1), seen["body.features.1.layer.weight"], seen["body.features.1.layer.bias"]
    ).detach()
    scale = strategy.scales["features.1"].requires_grad_(True)
    logits = [F.linear(torch.relu(z * row), seen["heads.0.weight"], seen["heads.0.bias"]) for row in scale]
    (gradient,) = torch.autograd.grad(F.cross_entropy((logits[0] + logits[1]) / 2, y), scale)
    torch.testing.assert_close(strategy.found["features.1"], gradient.abs(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"members_per_task": 3}])
def test_plugins_that_look_at_iterations_change_nothing(benchmark, options):
    class Watching(SupervisedPlugin):
        def after_training_iteration(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            pass

    states = []
    for plugins in ((), (Watching(),)):
        strategy = structured_ensemble(digits_mlp(16), mask_epochs=2, fit=FIT, plugins=plugins, **options)
        strategy.train(benchmark.train_stream[0])
        states.append(strategy.network.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_the_phases_steps_are_counted(benchmark):
    strategy = structured_ensemble(digits_mlp(16), mask_epochs=3, fit=FIT)
    steps = []
    strategy.on_step = lambda: steps.append(1)
    strategy.train(benchmark.train_stream[0])
    images = len(benchmark.train_stream[0].dataset)
    assert len(steps) == strategy.steps_for(images) == math.ceil(images / 64) * (3 + 1 + 2)


def test_a_layer_that_grows_is_never_exhausted_and_the_record_says_so(benchmark):
    fit = Fit(epochs=8)
    strategy = structured_ensemble(digits_mlp(16, 8), quantile=0.0, mask_epochs=1, grow=0.5, fit=fit)
    reached = []
    for task in range(TASKS):
        strategy.train(benchmark.train_stream[task])
        reached.append(accuracy(strategy, [benchmark.test_stream[task]]))
    network = strategy.network
    assert network.units.widths == [[16 + 8 * task, 8 + 4 * task] for task in range(TASKS)]
    assert network.notes()[0] == "features.1 was widened from 16 to 48 units, first for task 2"
    assert min(reached) > 0.65
    # each layer of the last task: all rows, all columns; each head reads the units of its time
    weights = 48 * 65 + 24 * 49
    assert sizes(network)["shared"].parameters == weights
    assert sizes(network)["head"].parameters == sum((8 + 4 * task + 1) * 2 for task in range(TASKS))
    assert sizes(network)["mask"].bytes == TASKS * (6 + 3)


def test_what_has_no_units_is_an_error():
    body = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2))
    body.num_features = 2
    with pytest.raises(InputError, match="0 is a Embedding, which every task would change"):
        structured_ensemble(body)
    empty = nn.Sequential(nn.Flatten())
    empty.num_features = 4
    with pytest.raises(InputError, match="Sequential has no linear or convolution layer"):
        structured_ensemble(empty)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantile": 1.0}, r"quantile is in \[0, 1\), not 1.0"),
        ({"quantile": -0.1}, r"quantile is in \[0, 1\), not -0.1"),
        ({"mask_epochs": -1}, "mask_epochs is at least 0"),
        ({"mask_learning_rate": 0.0}, "mask_learning_rate above 0"),
        ({"members_per_task": 0}, "members_per_task is at least 1, not 0"),
        ({"diversity": -1.0}, "diversity is at least 0"),
        ({"grow": -0.5}, "grow is a share of a layer's units"),
    ],
)
def test_bad_options_are_said(options, message):
    with pytest.raises(InputError, match=message):
        structured_ensemble(digits_mlp(4), **options)
