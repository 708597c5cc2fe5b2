"""Hyper-deep ensembles: what is trained, what is chosen, what is charged."""

from __future__ import annotations

import functools
import logging
from dataclasses import replace

import pytest
import torch
from torch import nn

from lifelong_ens.ensembles import fit_deep, fit_hyper_deep, fit_single
from lifelong_ens.ensembles.greedy import greedy_selection
from lifelong_ens.ensembles.hyper_deep import HyperGrid
from lifelong_ens.ensembles.training import silent
from lifelong_ens.errors import InputError
from lifelong_ens.metrics.uncertainty import nll
from lifelong_ens.networks import mlp
from lifelong_ens.training.data import ImageData
from lifelong_ens.training.fit import Fit

SHAPE = (1, 8, 8)
MLP = functools.partial(mlp, num_classes=10, input_shape=SHAPE, hidden=(32, 32))
FIT = Fit(epochs=4, batch_size=32, learning_rate=0.1, weight_decay=1e-3)
RANGES = {"l2": (1e-2, 1e1), "label_smoothing": (1e-5, 0.2), "dropout": (1e-3, 0.9), "learning_rate": None}


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 10))


@pytest.fixture(scope="module")
def grid(digits):
    train, validation, _ = digits
    return new_grid(train, validation)


def new_grid(train: ImageData, validation: ImageData | None, build=MLP, **more) -> HyperGrid:
    options = {
        "num_members": 3,
        "fit": FIT,
        "seed": 3,
        "device": "cpu",
        "progress": silent,
        "num_candidates": 5,
        **RANGES,
        **more,
    }
    return HyperGrid(build, train, validation, **options)


def outputs(network: nn.Module, data: ImageData) -> torch.Tensor:
    x, _ = data.batch(torch.arange(len(data)))
    with torch.no_grad():
        return network.eval()(x)


def test_the_first_candidate_is_the_given_configuration_and_its_seeds_a_deep_ensemble(grid, digits):
    train, validation, test = digits
    single = fit_single(MLP, train, validation, fit=FIT, seed=3)
    assert torch.equal(outputs(grid.searched[0].network, test), outputs(single, test)[0])
    alone = new_grid(train, validation, num_candidates=1)
    deep = fit_deep(MLP, train, validation, num_members=3, fit=FIT, seed=3)
    assert torch.equal(outputs(alone.deep_of_best(), test), outputs(deep, test))
    assert alone.deep_of_best().spent.flops == deep.spent.flops
    assert alone.fixed_init_hyper().num_members == 1


def test_all_candidates_of_the_search_start_and_run_alike_but_for_their_hyper_parameters(grid, digits):
    train, _, test = digits
    assert [candidate.number for candidate in grid.searched] == [0] * 5
    assert [bool(candidate.values) for candidate in grid.searched] == [False, True, True, True, True]
    assert len({tuple(candidate.values.values()) for candidate in grid.searched}) == 5
    one = grid.searched[2]
    # trained here by hand: the same seed, weight decay by layer, label smoothing
    torch.manual_seed(3)
    network = MLP()
    kernels = ("l2_input", "l2_1", "l2_output")
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    groups = []
    for layer, name in zip(layers, kernels, strict=True):
        bias = "l2_output_bias" if name == "l2_output" else name
        groups.append({"params": [layer.weight], "weight_decay": 2 * one.values[name] / 400})
        groups.append({"params": [layer.bias], "weight_decay": 2 * one.values[bias] / 400})
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4 * 13)
    order = torch.Generator().manual_seed(3)
    for _ in range(4):
        for rows in torch.randperm(400, generator=order).split(32):
            x, labels = train.batch(rows)
            loss = nn.functional.cross_entropy(
                network(x), labels, label_smoothing=one.values["label_smoothing"]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    torch.testing.assert_close(outputs(one.network, test), outputs(network, test), rtol=1e-3, atol=1e-3)


def test_both_greedy_selections(grid, digits):
    validation, test = digits[1], digits[2]
    searched = torch.stack([candidate.log_probs for candidate in grid.searched])
    first = greedy_selection(searched, validation.labels, 3)
    assert grid.picks == {row: count for row, count in enumerate(first.tolist()) if count}
    ensemble = grid.hyper_deep()
    rows = [row for row in range(5) if first[row]]
    stratified = grid.candidates([(row, number) for row in rows for number in range(3)], "again")
    counts = greedy_selection(torch.stack([one.log_probs for one in stratified]), validation.labels, 3)
    assert ensemble.num_members == int((counts > 0).sum()) <= 3
    torch.testing.assert_close(ensemble.weights, counts[counts > 0] / counts.sum(), check_dtype=False)
    expected = [outputs(one.network, test) for one, count in zip(stratified, counts, strict=True) if count]
    assert torch.equal(outputs(ensemble, test), torch.stack(expected))
    # every seed is a network of its own: no two candidates are the same
    everything = torch.stack([one.log_probs for one in stratified])
    for i in range(len(everything)):
        for j in range(i):
            assert not torch.equal(everything[i], everything[j])


def test_no_ensemble_of_the_grid_is_worse_than_the_best_network_on_validation_images(grid, digits):
    def loss(ensemble):
        x, labels = digits[1].batch(torch.arange(len(digits[1])))
        with torch.no_grad():
            return float(nll(ensemble.log_probs(x)[None], labels))

    best = loss(grid.best_of_search())
    fixed, deep = loss(grid.fixed_init_hyper()), loss(grid.hyper_deep())
    assert fixed <= best + 1e-6
    assert deep <= best + 1e-6


def test_everything_that_was_trained_for_it_is_charged(grid, digits):
    train, validation, _ = digits
    per_training = fit_single(MLP, train, validation, fit=FIT, seed=3).spent.flops
    deep, fixed = grid.hyper_deep(), grid.fixed_init_hyper()
    configurations = len(grid.picks)
    assert grid.best_of_search().spent.trainings == fixed.spent.trainings == 5
    assert deep.spent.trainings == 5 + configurations * 2
    assert grid.deep_of_best().spent.trainings == 5 + 2
    for ensemble in (deep, fixed):
        assert ensemble.spent.flops == pytest.approx(per_training * ensemble.spent.trainings, rel=1e-6)
        assert ensemble.spent.seconds > 0
    # asking again trains nothing
    assert grid.hyper_deep().spent == deep.spent


def test_the_function_is_the_grid_s(grid, digits):
    train, validation, test = digits
    ensemble = fit_hyper_deep(
        MLP, train, validation, num_members=3, fit=FIT, seed=3, num_candidates=5, l2=RANGES["l2"]
    )
    assert torch.equal(outputs(ensemble, test), outputs(grid.hyper_deep(), test))


def test_dropout_is_tuned_where_there_is_some(digits):
    train, validation, _ = digits
    grid = new_grid(train, validation, with_dropout, num_candidates=3)
    rates = [one.network[3].p for one in grid.searched]
    assert rates[0] == 0.3
    assert rates[1:] == [one.values["dropout_3"] for one in grid.searched[1:]]
    kept = new_grid(train, validation, with_dropout, num_candidates=2, dropout=None)
    assert [one.network[3].p for one in kept.searched] == [0.3, 0.3]


def test_a_candidate_that_diverges_is_left_out_and_charged(digits, caplog):
    train, validation, _ = digits
    wild = {"learning_rate": (1e8, 1e9), "fit": replace(FIT, epochs=2), "num_candidates": 3}
    with caplog.at_level(logging.WARNING):
        grid = new_grid(train, validation, **wild)
    lost = [one for one in grid.searched if one.network is None]
    assert lost
    assert "left out" in caplog.text
    ensemble = grid.fixed_init_hyper()
    assert ensemble.spent.trainings == 3
    assert outputs(ensemble, validation).isfinite().all()
    with pytest.raises(InputError, match="finite loss"):
        new_grid(train, validation, fit=replace(FIT, learning_rate=1e9), num_candidates=1)


def test_bad_input_is_refused(digits):
    train, validation, _ = digits
    with pytest.raises(InputError, match="needs validation images"):
        fit_hyper_deep(MLP, train)
    with pytest.raises(InputError, match="3 for 10 classes"):
        fit_hyper_deep(MLP, train, validation.subset(torch.arange(3)))
    with pytest.raises(InputError, match="at least one member"):
        fit_hyper_deep(MLP, train, validation, num_members=0)
    with pytest.raises(InputError, match="num_candidates"):
        fit_hyper_deep(MLP, train, validation, num_candidates=0)
