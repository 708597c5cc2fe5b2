from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from avalanche.benchmarks import nc_benchmark
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import strategies.reinforced
from lifelong_ens.accounting.components import sizes
from lifelong_ens.errors import InputError
from lifelong_ens.networks.plain import lenet5, mlp, resnet18, vgg11_half
from lifelong_ens.training.fit import Fit
from strategies import rcl
from strategies.evaluation import accuracy
from strategies.loader import hold_out
from strategies.reinforced import Rcl, ReinforcedNetwork
from streams import from_arrays, split_digits

FIT = Fit(epochs=2, batch_size=32, learning_rate=0.05, momentum=0.9, weight_decay=5e-3)


@pytest.fixture(scope="module")
def benchmark():
    return split_digits(num_tasks=3, seed=0)


def digits_mlp(*hidden: int) -> nn.Module:
    torch.manual_seed(0)
    return mlp(input_shape=(1, 8, 8), hidden=hidden)


def norm_net() -> nn.Module:
    """A conv net with BatchNorm."""
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Linear(72, 9),
    )
    body.num_features = 9
    return body


def train(strategy, benchmark, tasks: int = 2):
    for experience in list(benchmark.train_stream)[:tasks]:
        strategy.train(experience)
    return strategy


def watch(strategy: Rcl, seen: list[dict], rewards: Sequence[float] = ()) -> Rcl:
    """Keep each trial's units, reward and the network it ended with; the rewards may be given instead."""
    run_trial = strategy.run_trial

    def watched(units, validation):
        reward = run_trial(units, validation)
        reward = rewards[len(seen)] if rewards else reward
        seen.append({"units": units, "reward": reward, "end": copy.deepcopy(strategy.network.state_dict())})
        return reward

    strategy.run_trial = watched
    return strategy


@pytest.mark.parametrize("make", [lambda: digits_mlp(24, 16), norm_net])
def test_the_best_trial_is_kept_to_the_bit(benchmark, make):
    trials: list[dict] = []
    strategy = rcl(make(), trials=4, max_units=5, fit=FIT)
    # none above zero, and of two equal ones the first
    train(watch(strategy, trials, rewards=[-3.0, -1.0, -2.0, -1.0]), benchmark, 1)
    found: dict[str, Tensor] = {}
    finish = strategy.network.finish_task

    def finish_task():
        found.update(copy.deepcopy(strategy.network.state_dict()))
        finish()

    strategy.network.finish_task = finish_task
    strategy.train(benchmark.train_stream[1])
    best = trials[1]
    assert found.pop("searches").tolist() == [[0, 0], [4, -1]]
    del best["end"]["searches"]
    assert found.keys() == best["end"].keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in best["end"].items())
    assert strategy.network.added(1) == best["units"]


def test_reward_is_validation_accuracy_less_the_cost_of_units(benchmark, monkeypatch):
    monkeypatch.setattr(strategies.reinforced, "accuracy", lambda *_: 0.75)
    trials: list[dict] = []
    train(watch(rcl(digits_mlp(24, 16), trials=4, alpha=0.01, fit=FIT), trials), benchmark)
    assert len({sum(trial["units"]) for trial in trials}) > 1
    for trial in trials:
        assert trial["reward"] == pytest.approx(0.75 - 0.01 * sum(trial["units"]))


def test_every_trial_starts_from_what_earlier_tasks_left(benchmark):
    trials: list[dict] = []
    strategy = train(watch(rcl(norm_net(), trials=4, max_units=4, fit=FIT), trials), benchmark, 1)
    first = copy.deepcopy(strategy.network.state_dict())
    strategy.train(benchmark.train_stream[1])
    for name in first.keys() - {"sizes", "searches"}:
        assert all(torch.equal(trial["end"][name], first[name]) for trial in trials)
    rows = [trial["end"]["body.5.new_columns"] for trial in trials if trial["units"][0]]
    heads = [trial["end"]["heads.1.bias"] for trial in trials]
    for tensors in (rows, heads):
        assert len(tensors) > 1
        assert all(
            one.shape != other.shape or not torch.equal(one, other) for one, other in pairwise(tensors)
        )


def test_first_task_is_trained_plainly_on_all_its_images(benchmark):
    steps: list[int] = []
    strategy = rcl(digits_mlp(8), fit=FIT)
    strategy.on_step = lambda: steps.append(1)
    train(strategy, benchmark, 1)
    images = len(benchmark.train_stream[0].dataset)
    assert len(steps) == strategy.steps_for(images) == -(-images // 32) * 2
    assert strategy.network.notes() == []


def test_weights_equal_the_closed_form(benchmark):
    strategy = train(rcl(digits_mlp(24, 16), trials=3, fit=FIT), benchmark, 3)
    network = strategy.network
    n1, n2 = (
        width + sum(network.added(task)[group] for task in range(3)) for group, width in enumerate((24, 16))
    )
    assert n1 + n2 > 40
    after = [16 + sum(network.added(task)[1] for task in range(last + 1)) for last in range(3)]
    heads = sum((n + 1) * c for n, c in zip(after, network.classes_per_task, strict=True))
    total = sum(size.parameters for size in sizes(network).values())
    assert total == 65 * n1 + (n1 + 1) * n2 + heads


def draw(monkeypatch, units: list[list[int]]) -> None:
    """Let controllers draw these numbers, one trial after the other."""
    drawn = iter(units)
    monkeypatch.setattr("strategies.controller.Controller.sample", lambda self: next(drawn))


def flops_of_second_task(benchmark, trials: int) -> float:
    strategy = train(rcl(digits_mlp(24, 16), trials=trials, max_units=8, fit=FIT), benchmark, 1)
    before = strategy.meter.flops
    strategy.train(benchmark.train_stream[1])
    return strategy.meter.flops - before


def test_flops_of_all_trials_count(benchmark, monkeypatch):
    """Nothing added: a pass through the frozen body, and one product more for the head's gradient."""
    draw(monkeypatch, [[0, 0]] * 5)
    dataset = benchmark.train_stream[1].dataset
    kept, _ = hold_out(dataset, 0.1, 0)
    head = 16 * len(set(dataset.targets))
    one = 2 * len(kept) * FIT.epochs * (64 * 24 + 24 * 16 + 2 * head)
    assert flops_of_second_task(benchmark, trials=1) == pytest.approx(one)
    assert flops_of_second_task(benchmark, trials=4) == pytest.approx(4 * one)


def test_trials_of_different_widths_are_each_measured(benchmark, monkeypatch):
    draw(monkeypatch, [[0, 0], [8, 8], [0, 0], [8, 8]])
    narrow, wide = (flops_of_second_task(benchmark, trials=1) for _ in range(2))
    assert narrow < wide
    assert flops_of_second_task(benchmark, trials=2) == pytest.approx(narrow + wide)


def test_progress_knows_all_steps_and_says_which_trial_runs(benchmark):
    steps: list[int] = []
    phases: list[str] = []
    strategy = rcl(digits_mlp(8), trials=3, fit=FIT)
    strategy.on_step, strategy.on_phase = lambda: steps.append(1), phases.append
    train(strategy, benchmark, 3)
    expected = [strategy.steps_for(len(one.dataset), task) for task, one in enumerate(benchmark.train_stream)]
    assert len(steps) == sum(expected)
    assert phases[:3] == ["trial 1/3", "trial 2/3", "trial 3/3"]
    assert len(phases) == 6


def judged(strategy: Rcl, monkeypatch) -> list:
    """The datasets that rewards are worked out on."""
    seen = []

    def recording(one, experiences):
        seen.extend(experience.dataset for experience in experiences)
        return accuracy(one, experiences)

    monkeypatch.setattr(strategies.reinforced, "accuracy", recording)
    return seen


def rows(dataset) -> set[int]:
    return set(dataset.image_data.rows.tolist())


def test_trials_are_judged_on_images_that_are_neither_trained_on_nor_tested(benchmark, monkeypatch):
    strategy = rcl(digits_mlp(8), trials=2, fit=FIT)
    seen = judged(strategy, monkeypatch)
    trained = []
    make = strategy.make_train_dataloader

    def recording(**kwargs):
        make(**kwargs)
        trained.append(strategy.dataloader.dataset)

    strategy.make_train_dataloader = recording
    train(strategy, benchmark, 2)
    every = rows(benchmark.train_stream[1].dataset)
    held, kept = rows(seen[0]), rows(trained[-1])
    assert len(seen) == 2
    assert held | kept == every
    assert not held & kept
    assert not held & rows(benchmark.test_stream[1].dataset)
    assert len(held) == pytest.approx(0.1 * len(every), abs=4)


def test_the_stream_s_validation_images_are_used_where_there_are_any(monkeypatch):
    benchmark = split_digits(num_tasks=3, seed=0, validation=0.2)
    strategy = rcl(digits_mlp(8), trials=2, holdout=0, fit=FIT)
    seen = judged(strategy, monkeypatch)
    for task in range(2):
        strategy.train(benchmark.train_stream[task], eval_streams=[benchmark.valid_stream[task]])
    assert all(rows(dataset) == rows(benchmark.valid_stream[1].dataset) for dataset in seen)
    assert len(seen) == 2


def test_without_any_validation_images_it_says_what_to_do(benchmark):
    with pytest.raises(InputError, match=r"--validation 0\.1, or leave --holdout out"):
        train(rcl(digits_mlp(8), trials=2, holdout=0, fit=FIT), benchmark, 1)
    images, labels = np.zeros((8, 4, 4, 1), np.uint8), np.array([0, 0, 0, 0, 1, 1, 2, 3])
    small = from_arrays(images, labels, images, labels, num_tasks=2, class_order=[0, 1, 2, 3])
    with pytest.raises(InputError, match=r"--validation 0\.1; task 2 has too few images"):
        train(rcl(mlp(input_shape=(1, 4, 4), hidden=(4,)), trials=2, fit=FIT), small)


def test_a_stock_avalanche_benchmark_is_held_out_from_too():
    torch.manual_seed(0)
    labels = torch.arange(4).repeat(40)
    data = TensorDataset(torch.randn(160, 1, 8, 8) * 0.1 + labels.view(-1, 1, 1, 1), labels)
    data.targets = labels.tolist()
    stock = nc_benchmark(data, data, 2, task_labels=True, seed=0, class_ids_from_zero_in_each_exp=True)
    fit = Fit(epochs=10, batch_size=16)
    strategy = train(rcl(digits_mlp(16, 16), trials=2, fit=fit), stock)
    assert all(accuracy(strategy, [test]) > 0.9 for test in stock.test_stream)


def test_images_are_held_out_class_by_class_and_by_seed(benchmark):
    dataset = benchmark.train_stream[0].dataset
    kept, held = hold_out(dataset, 0.25, 3)
    labels, total = torch.tensor(held.targets), torch.tensor(list(dataset.targets))
    for label in total.unique():
        assert int((labels == label).sum()) == -(-int((total == label).sum()) // 4)
    assert rows(held) == rows(hold_out(dataset, 0.25, 3)[1]) != rows(hold_out(dataset, 0.25, 4)[1])
    assert len(kept) + len(held) == len(dataset)


def test_early_stopping_goes_by_what_is_held_out():
    benchmark = split_digits(num_tasks=3, seed=0, validation=0.2)
    steps: list[int] = []
    fit = Fit(epochs=30, batch_size=32, learning_rate=1e-9, patience=1)
    strategy = rcl(digits_mlp(8), trials=2, fit=fit)
    strategy.train(benchmark.train_stream[0], eval_streams=[benchmark.valid_stream[0]])
    strategy.on_step = lambda: steps.append(1)
    strategy.train(benchmark.train_stream[1])
    kept, _ = hold_out(benchmark.train_stream[1].dataset, 0.1, 0)
    # the second epoch of each trial is no better than the first
    assert len(steps) == 2 * 2 * -(-len(kept) // 32)


def test_records_follow_from_the_state(benchmark):
    strategy = train(rcl(digits_mlp(24, 16), trials=2, max_units=3, fit=FIT), benchmark, 3)
    notes = strategy.network.notes()
    assert notes[0] == "units are those of features.1, features.3"
    first, second = strategy.network.added(1)
    assert notes[1].startswith(f"task 2 added {first}, {second} units; best of 2 trials, reward 0.")
    assert len(notes) == 3
    other = ReinforcedNetwork(digits_mlp(24, 16)).regrow(strategy.network.classes_per_task)
    other.load_state_dict(strategy.network.state_dict())
    assert other.notes() == notes


def easy(seed: int):
    """Two tasks of two classes each that any network tells apart at once: dark and light images."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(4), 40)
    images = (200 * (labels % 2)[:, None, None, None] + random.integers(0, 40, (160, 6, 6, 1))).astype(
        np.uint8
    )
    return from_arrays(images, labels, images, labels, num_tasks=2, class_order=[0, 1, 2, 3])


def test_fewer_units_are_added_over_trials_on_a_task_that_needs_none():
    fit = Fit(epochs=2, batch_size=36, learning_rate=0.1)
    added: list[Tensor] = []
    for seed in range(3):
        trials: list[dict] = []
        body = mlp(input_shape=(1, 6, 6), hidden=(120, 120))
        train(watch(rcl(body, trials=50, fit=fit, seed=seed), trials), easy(seed))
        added.append(torch.tensor([float(sum(trial["units"])) for trial in trials]))
    units = torch.stack(added).mean(dim=0)
    assert float(units[:10].mean()) > 20
    assert float(units[-10:].mean()) < 10


@pytest.mark.parametrize(("make", "groups"), [(lenet5, 4), (lambda: resnet18(width=4), 12), (vgg11_half, 8)])
def test_limits_are_a_quarter_of_the_width_and_filters_are_added_too(make, groups):
    images = np.random.default_rng(0).integers(0, 255, (32, 32, 32, 3)).astype(np.uint8)
    labels = np.arange(32) % 4
    stream = from_arrays(images, labels, images, labels, num_tasks=2)
    strategy = train(rcl(make(), trials=2, fit=Fit(epochs=1, batch_size=16)), stream)
    widths = [group.size for group in strategy.network.groups]
    assert len(widths) == groups
    limits = [min(max(width // 4, 1), 29) for width in widths]
    added = strategy.network.added(1)
    assert all(units <= limit for units, limit in zip(added, limits, strict=True))
    assert sum(added) > 0


def test_released_code_s_numbers():
    search = rcl(digits_mlp(8, 200), preset="released_code").search
    assert (search.trials, search.max_units, search.controller_learning_rate) == (50, 29, 0.001)
    assert (search.alpha, search.released) == (1e-4, True)
    assert rcl(digits_mlp(8), preset="released_code", trials=3).search.trials == 3


def test_compile_is_left_out_with_a_word(caplog):
    with caplog.at_level(logging.WARNING):
        strategy = rcl(digits_mlp(8), fit=Fit(compile=True))
    assert not strategy.fit.compile
    assert "without torch.compile" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trials": 0}, "trials and max_units are at least 1, not 0"),
        ({"max_units": 0}, "trials and max_units are at least 1, not 20 and 0"),
        ({"alpha": -1.0}, "alpha is at least 0"),
        ({"controller_learning_rate": 0.0}, "controller_learning_rate above 0"),
        ({"holdout": 1.0}, "holdout is at least 0 and below 1, not 1.0"),
    ],
)
def test_bad_options_are_said(options, message):
    with pytest.raises(InputError, match=message):
        rcl(digits_mlp(4), **options)
