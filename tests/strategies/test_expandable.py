from __future__ import annotations

import inspect
import math
import re

import pytest
import torch
from avalanche.core import SupervisedPlugin
from torch import Tensor, nn

from lifelong_ens.accounting.components import sizes
from lifelong_ens.errors import InputError
from lifelong_ens.networks.plain import Body, mlp
from lifelong_ens.training.fit import Fit
from strategies import den
from strategies.expandable import PRESETS, Den, _pull, most_drifted, number
from streams import split_digits

FIT = Fit(epochs=2, batch_size=64, learning_rate=0.02, momentum=0.9, weight_decay=0.1)
NEVER = 1e9


@pytest.fixture(scope="module")
def benchmark():
    return split_digits(num_tasks=3, seed=0)


def small_mlp() -> Body:
    torch.manual_seed(0)
    return mlp(input_shape=(1, 8, 8), hidden=(24, 16))


class Block(nn.Module):
    """Two convolutions with norms around an identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


def conv_net() -> Body:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), Block(6), nn.Conv2d(6, 5, 3), nn.ReLU()]
    return Body(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten()), 20, None)


BODIES = {"mlp": small_mlp, "conv": conv_net}


@pytest.fixture(params=BODIES)
def body(request) -> Body:
    return BODIES[request.param]()


def trained(benchmark, body: Body, tasks: int, **options) -> Den:
    strategy = den(body, **{"fit": FIT, **options})
    for task in range(tasks):
        strategy.train(benchmark.train_stream[task])
    return strategy


def logits(strategy: Den, benchmark, task: int) -> Tensor:
    x, _, _ = benchmark.test_stream[task].dataset.batch(torch.arange(50))
    with torch.no_grad():
        return strategy.network.eval()(x, task)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_weights_that_are_not_selected_do_not_move_to_the_bit(benchmark, body, optimizer, monkeypatch):
    fit = Fit(epochs=2, optimizer=optimizer, learning_rate=0.01, momentum=0.9, weight_decay=0.1)
    strategy = trained(benchmark, body, 1, loss_threshold=NEVER, sigma=NEVER, sigma_conv=NEVER, fit=fit)
    network = strategy.network
    selected = [torch.arange(group.size) % 2 == 0 for group in network.groups]
    before = {id(layer): [p.clone() for p in layer.layer.parameters()] for layer in network.layers()}
    heads = []

    def select() -> list[Tensor]:
        heads.append(network.head.weight.detach().clone())
        return selected

    monkeypatch.setattr(network, "select", select)
    strategy.train(benchmark.train_stream[1])
    masks = {id(parameter): mask for parameter, mask in network.sub_network(selected)}
    for layer in network.layers():
        for parameter, old in zip(layer.layer.parameters(), before[id(layer)], strict=True):
            mask = masks[id(parameter)]
            assert torch.equal(parameter[~mask], old[~mask])
            assert (parameter[mask] != old[mask]).any()
    columns = network.head_columns(selected)[0]
    assert torch.equal(network.head.weight[:, ~columns], heads[0][:, ~columns])
    assert not torch.equal(network.head.weight, heads[0])


def test_nothing_selected_nothing_moved_nothing_split(benchmark, body):
    """Zero drift: no split, though every drift above zero would be one."""
    strategy = trained(benchmark, body, 1)
    past = logits(strategy, benchmark, 0)
    strategy.method = den(body, l1=NEVER, loss_threshold=NEVER, sigma=0.0, sigma_conv=0.0).method
    strategy.train(benchmark.train_stream[1])
    network = strategy.network
    assert not network.history.any()
    assert network.added(1) == [0] * len(network.groups)
    assert torch.equal(logits(strategy, benchmark, 0), past)


def test_when_all_that_drifts_is_split_the_past_does_not_move_to_the_bit(benchmark, body):
    options = {"sigma": 0.0, "sigma_conv": 0.0, "max_split": 10**6, "loss_threshold": 0.0, "units": 2}
    strategy = trained(benchmark, body, 1, **options)
    past = [logits(strategy, benchmark, 0)]
    for task in (1, 2):
        strategy.train(benchmark.train_stream[task])
        assert strategy.network.history[task, :, 1].min() > 0
        for earlier, expected in enumerate(past):
            assert torch.equal(logits(strategy, benchmark, earlier), expected)
        past.append(logits(strategy, benchmark, task))


def test_without_splits_the_past_moves(benchmark, body):
    strategy = trained(benchmark, body, 1, sigma=NEVER, sigma_conv=NEVER, loss_threshold=NEVER)
    past = logits(strategy, benchmark, 0)
    strategy.train(benchmark.train_stream[1])
    assert not torch.equal(logits(strategy, benchmark, 0), past)
    assert strategy.network.added(1) == [0] * len(strategy.network.groups)


def test_expansion_alone_keeps_the_past_to_the_bit(benchmark, body, monkeypatch):
    options = {"sigma": NEVER, "sigma_conv": NEVER, "loss_threshold": 0.0, "group_lasso": 0.0, "units": 3}
    strategy = trained(benchmark, body, 1, **options)
    past = logits(strategy, benchmark, 0)
    nothing = [torch.zeros(group.size, dtype=torch.bool) for group in strategy.network.groups]
    monkeypatch.setattr(strategy.network, "select", lambda: nothing)
    strategy.train(benchmark.train_stream[1])
    assert strategy.network.added(1) == [3] * len(strategy.network.groups)
    assert torch.equal(logits(strategy, benchmark, 0), past)


def test_k_is_a_number_or_a_share_of_the_first_width(benchmark):
    assert [number(units, 12) for units in (0, 0.1, 0.5, 1, 10.0)] == [0, 2, 6, 1, 10]
    options = {"sigma": NEVER, "loss_threshold": 0.0, "group_lasso": 0.0, "units": 0.3}
    assert trained(benchmark, small_mlp(), 3, **options).network.stamps.table == [
        [24, 16],
        [32, 21],
        [40, 26],
    ]


def test_units_that_group_lasso_makes_zero_are_dropped(benchmark, body):
    options = {"sigma": NEVER, "sigma_conv": NEVER, "loss_threshold": 0.0}
    strategy = trained(benchmark, body, 2, group_lasso=NEVER, **options)
    assert strategy.network.added(1) == [0] * len(strategy.network.groups)


def test_capacity_equals_its_closed_form(benchmark):
    """Weights follow from the stamps; the units that were added beyond the split ones are at most k."""
    strategy = trained(benchmark, small_mlp(), 3, loss_threshold=0.0, units=4, max_split=3)
    network = strategy.network
    for task in (1, 2):
        for added, (selected, split), size in zip(
            network.added(task), network.history[task].tolist(), network.stamps.table[task - 1], strict=True
        ):
            assert 0 <= selected <= size
            assert 0 <= split <= 3
            assert split <= added <= split + 4
    n1, n2 = network.stamps.table[-1]
    classes = network.classes_per_task
    heads = sum((n + 1) * k for (_, n), k in zip(network.stamps.table, classes, strict=True))
    assert sum(size.parameters for size in sizes(network).values()) == 65 * n1 + (n1 + 1) * n2 + heads
    assert len(network.notes()) == 2


def test_first_task_is_sparse_and_filters_are_groups(benchmark):
    """Eq. 2: l1 leaves single weights zero; of a filter all or none."""
    strategy = trained(benchmark, small_mlp(), 1, l1=0.01)
    weights = [layer.layer.weight for layer in strategy.network.layers()]
    assert all(0.1 < (weight == 0).double().mean() < 1 for weight in weights)
    strategy = trained(benchmark, conv_net(), 1, l1=0.3)
    zero = [(layer.layer.weight == 0).flatten(1) for layer in strategy.network.layers()]
    assert all(torch.equal(filters.any(dim=1), filters.all(dim=1)) for filters in zero)
    assert any(filters.any() for filters in zero)
    strategy = trained(benchmark, small_mlp(), 1, l1=0.0)
    assert all(layer.layer.weight.all() for layer in strategy.network.layers())


@pytest.mark.parametrize("per_step", [False, True])
def test_thresholds_of_a_step(per_step):
    strategy = den(small_mlp(), preset="released_code" if per_step else "paper", l1=0.5)
    strategy.network.begin_task(2)
    head = strategy.network.head.weight
    before = head.detach().clone()
    strategy._sparsify_head(0.1)
    threshold = 0.5 if per_step else 0.05
    assert torch.equal(head.detach(), torch.nn.functional.softshrink(before, threshold))


def test_the_units_that_drifted_most_are_split():
    drift = torch.tensor([0.3, 0.0, 0.9, 0.5, 0.1])
    assert most_drifted(drift, 0.2, 10).tolist() == [0, 2, 3]
    assert most_drifted(drift, 0.2, 2).tolist() == [2, 3]
    assert most_drifted(drift, 0.9, 2).tolist() == []
    assert most_drifted(torch.zeros(3), 0.0, 3).tolist() == []


def test_a_stronger_drift_penalty_moves_less(benchmark):
    moved = []
    for strength in (0.0, 2.0, 50.0):
        options = {"sigma": NEVER, "loss_threshold": NEVER, "drift_penalty": strength}
        strategy = trained(benchmark, small_mlp(), 1, **options)
        network = strategy.network
        before = [layer.layer.weight.clone() for layer in network.layers()]
        strategy.train(benchmark.train_stream[1])
        pairs = zip(network.layers(), before, strict=True)
        moved.append(sum(float((layer.layer.weight - old).norm()) for layer, old in pairs))
    assert moved[0] > 1.5 * moved[1] > 3 * moved[2] > 0


def test_drift_penalty_enters_by_its_gradient():
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    weight.grad = torch.tensor([0.5, 0.5])
    _pull([(weight, torch.tensor([0.0, 1.0]))], 0.25)
    assert weight.grad.tolist() == [0.5 + 0.5 * 1.0, 0.5 - 0.5 * 3.0]


def test_released_code_splits_after_expansions_alone(benchmark):
    options = {"preset": "released_code", "sigma": 0.0}
    network = trained(benchmark, small_mlp(), 2, loss_threshold=NEVER, **options).network
    assert network.history[1, :, 1].tolist() == [0, 0]
    network = trained(benchmark, small_mlp(), 2, loss_threshold=0.0, **options).network
    assert network.history[1, :, 1].tolist() == [10, 10]


def test_an_epoch_with_callbacks_corrects_its_steps_too(benchmark):
    class Counting(SupervisedPlugin):
        calls = 0

        def after_training_iteration(self, strategy, *args, **kwargs) -> None:
            self.calls += 1

    plugin = Counting()
    states = [
        trained(benchmark, small_mlp(), 2, loss_threshold=0.0, plugins=plugins).network.state_dict()
        for plugins in ([], [plugin])
    ]
    assert plugin.calls
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_steps_are_at_most_as_many_as_foretold(benchmark):
    steps = []
    strategy = den(small_mlp(), fit=FIT, loss_threshold=0.0, sigma=0.0)
    strategy.on_step = lambda: steps.append(1)
    for task in range(2):
        steps.clear()
        strategy.train(benchmark.train_stream[task])
        images = len(benchmark.train_stream[task].dataset)
        # epochs: those of the first task; of selection, retraining, expansion and after the split
        epochs = 1 + 2 + 1 + 1 if task else 2
        assert len(steps) == epochs * math.ceil(images / 64) <= strategy.steps_for(images)
    assert len(steps) == strategy.steps_for(images)


def test_the_help_gives_the_numbers_of_both_presets():
    for name in vars(PRESETS["paper"]).keys() & inspect.signature(den).parameters.keys():
        pattern = rf"^ +{name}: .*?\(paper ([\d.e-]+), code ([\d.e-]+)\)"
        paper, code = re.search(pattern, den.__doc__, re.MULTILINE | re.DOTALL).groups()
        assert float(paper) == getattr(PRESETS["paper"], name)
        assert float(code) == getattr(PRESETS["released_code"], name)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"units": -1}, "units is at least 0"),
        ({"l1": -0.1}, "l1 is at least 0"),
        ({"growth_share": 0.0}, "growth_share is above 0"),
        ({"preset": "mine"}, "preset is paper or released_code"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        den(small_mlp(), **options)


def test_a_task_is_learnt_once(benchmark):
    strategy = trained(benchmark, small_mlp(), 1)
    with pytest.raises(InputError, match="every task once"):
        strategy.train(benchmark.train_stream[0])
