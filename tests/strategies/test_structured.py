from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifelong_ens.accounting.components import Size, sizes
from lifelong_ens.errors import InputError
from lifelong_ens.networks.plain import lenet5, mlp, resnet20, vgg11_half
from lifelong_ens.networks.structured import StructuredNetwork, choose
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


def grown(
    body: nn.Module, num_tasks: int = 2, shape: tuple[int, int, int] = (3, 32, 32)
) -> StructuredNetwork:
    """A network whose tasks own random units with random weights, its norms' statistics moved."""
    torch.manual_seed(1)
    network = StructuredNetwork(body)
    for _ in range(num_tasks):
        network.train().begin_task(3)
        network.start_scales()
        free = {name: layer.free_units(network.num_tasks - 1) for name, layer in network.layers()}
        network.choose_units(
            choose({name: torch.rand(len(units)) for name, units in free.items()}, free, 0.5)
        )
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter) / max(parameter[0].numel(), 10) ** 0.5)
        for _ in range(3):
            network(torch.randn(8, *shape) + 0.5, network.num_tasks - 1)
        network.finish_task()
    return network.eval()


@pytest.mark.parametrize("quantile", [0.25, 0.5, 0.9])
def test_each_task_takes_its_share_of_the_free_units(benchmark, quantile):
    widths = (64, 33)
    strategy = structured_ensemble(digits_mlp(*widths), quantile=quantile, mask_epochs=1, fit=FIT)
    free = list(widths)
    for task in range(TASKS):
        strategy.train(benchmark.train_stream[task])
        layers = [layer for _, layer in strategy.network.layers()]
        for index, layer in enumerate(layers):
            own = layer.masks.row(task) & ~layer.masks.row(task - 1)
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
            own = layer.masks.row(task) & ~layer.masks.row(task - 1)
            for part in ("weight", "bias"):
                old, new = getattr(before[name], part), getattr(layer.layer, part)
                assert torch.equal(old[~own], new[~own])
                assert (old[own] != new[own]).any()


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
    assert int(choose({"a": torch.zeros(10)}, free, 0.7)["a"].sum()) == taken(10, 0.7)
    assert not choose({"a": torch.rand(10)}, {"a": ~free["a"]}, 0.5)["a"].any()


@pytest.mark.parametrize("options", [{"scope": "global"}, {"pruning": "soft"}])
def test_variants_give_every_layer_a_unit_while_there_are_free_ones(benchmark, options):
    strategy = structured_ensemble(digits_mlp(24, 16), mask_epochs=1, fit=FIT, **options)
    for task in range(3):
        strategy.train(benchmark.train_stream[task])
        for _, layer in strategy.network.layers():
            own = layer.masks.row(task) & layer.free_units(task)
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
    assert sizes(grown(vgg11_half(), num_tasks=1))["mask"].bytes == 172


class Recording(StructuredEnsemble):
    """Keeps what the phase of the scales left, and the importance worked out by hand."""

    def importance(self, scales):
        x, y, _ = next(iter(self.dataloader))
        linear, head = self.network.body.features[1].layer, self.network.heads[-1]
        with torch.no_grad():
            z = F.linear(x.flatten(1), linear.weight, linear.bias)
            scale = scales["features.1"]
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
    torch.testing.assert_close(strategy.found["features.1"], strategy.expected, rtol=1e-4, atol=1e-7)
    for name in ("weight", "bias"):
        name = f"features.1.layer.{name}"
        assert torch.equal(before[name], strategy.state[f"body.{name}"])
    own = strategy.network.body.features[1].masks.row(0)
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


def weights(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    "build", [mlp, lenet5, vgg11_half, lambda **options: vgg11_half(batch_norm=True, **options)]
)
def test_a_task_is_exported_as_a_smaller_dense_network(build):
    network = grown(build(input_shape=(3, 32, 32)), num_tasks=3)
    x = torch.randn(5, 3, 32, 32)
    counts = []
    for task in range(3):
        exported = network.export_task(task)
        with torch.no_grad():
            torch.testing.assert_close(exported(x), network(x, task), rtol=1e-5, atol=1e-5)
        assert not any("structured" in type(module).__module__ for module in exported.modules())
        counts.append(weights(exported))
    assert counts == sorted(counts)
    whole = sum(layer.layer.weight.numel() for _, layer in network.layers())
    # a layer between two others shrinks on both sides
    assert counts[0] < 0.6 * whole


def test_flattened_features_and_nested_sequences_are_exported():
    body = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    )
    body.num_features = 24
    network, x = grown(body), torch.randn(4, 3, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(network.export_task(0)(x), network(x, 0), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_cut_is_said():
    with pytest.raises(InputError, match=r"features\.3 is a BasicBlock"):
        grown(resnet20(width=4)).export_task(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(3072, 4), nn.Sigmoid())
    body.num_features = 4
    with pytest.raises(InputError, match="2 is a Sigmoid"):
        grown(body).export_task(0)


def test_units_that_are_off_leave_the_norm_as_zeros():
    network = grown(vgg11_half(batch_norm=True))
    seen: list[Tensor] = []
    network.body.features[1].register_forward_hook(lambda *args: seen.append(args[-1]))
    network(torch.randn(4, 3, 32, 32), 0)
    on = network.body.features[0].masks.row(0)
    assert not seen[0][:, ~on].any()
    assert seen[0][:, on].any()


def test_rows_of_several_tasks_run_as_those_of_one():
    network, x = grown(resnet20(width=4)), torch.randn(6, 3, 32, 32)
    tasks = torch.tensor([1, 0, 0, 1, 1, 0])
    with torch.no_grad():
        mixed = network(x, tasks)
        for task in range(2):
            torch.testing.assert_close(mixed[tasks == task], network(x[tasks == task], task))


@pytest.mark.parametrize(
    "norm", [nn.GroupNorm(2, 4), nn.LayerNorm([4, 6, 6]), nn.BatchNorm2d(4, affine=False)]
)
def test_other_norms_forget_nothing_either(norm):
    body = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(144, 9))
    body.num_features = 9
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(grown(body, 1, (1, 8, 8))(x, 0), grown(body, 3, (1, 8, 8))(x, 0))


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
    ],
)
def test_bad_options_are_said(options, message):
    with pytest.raises(InputError, match=message):
        structured_ensemble(digits_mlp(4), **options)
