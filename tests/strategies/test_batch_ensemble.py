"""What the builder of BatchEnsemble adds to its network: files of weights, the fittest start, a longer first task."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lifelong_ens.errors import InputError
from lifelong_ens.layers.bank import banks
from lifelong_ens.layers.linear import Rank1Linear
from lifelong_ens.networks.plain import mlp
from lifelong_ens.training.fit import Fit
from strategies import batch_ensemble_lifelong
from streams import split_digits

FIT = Fit(epochs=2, batch_size=32)


def body(num_classes: int | None = None):
    torch.manual_seed(0)
    return mlp(num_classes, input_shape=(1, 8, 8), hidden=(16,))


def test_weights_from_a_file_stay_as_they_are_and_the_record_says_whose_they_are(tmp_path: Path) -> None:
    trained, path = body(10), tmp_path / "trained.safetensors"
    sha256 = save_and_hash(trained.state_dict(), path)
    mine = mlp(input_shape=(1, 8, 8), hidden=(16,))
    before = mine.features[1].weight.clone()
    strategy = batch_ensemble_lifelong(mine, train_on="pretrained", weights=str(path), fit=FIT)
    assert strategy.network.notes() == [f"shared weights from trained.safetensors, sha256 {sha256}"]
    for experience in split_digits(num_tasks=2).train_stream:
        strategy.train(experience)
    found: Any = strategy.network.body
    assert torch.equal(found.features[1].weight, trained.features[1].weight)
    assert not torch.equal(found.features[1].r.row(0), torch.ones(64))
    assert torch.equal(mine.features[1].weight, before)


def save_and_hash(state: dict[str, torch.Tensor], path: Path) -> str:
    save_file(state, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_trained_classifier_in_memory_needs_no_file() -> None:
    trained = body(10)
    strategy = batch_ensemble_lifelong(trained, train_on="pretrained", fit=FIT)
    strategy.train(split_digits(num_tasks=2).train_stream[0])
    weight: Any = strategy.network.body.features[1].weight  # pyright: ignore
    assert torch.equal(weight, body().features[1].weight)
    assert not weight.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "w.pth"}, "weights are for train_on=pretrained"),
        ({"weights": "nowhere.pth", "train_on": "pretrained"}, "no file nowhere.pth"),
        ({"first_task": "shared", "train_on": "pretrained"}, "leave first_task at member"),
        ({"rank": 0}, "rank is at least 1, not 0"),
        ({"additive": -1}, "additive is at least 0, not -1"),
        ({"first_epochs": 0}, "first_epochs is above 0, not 0"),
        ({"fast_learning_rate": -0.1}, "fast_learning_rate is above 0"),
    ],
)
def test_options_that_do_not_go(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        batch_ensemble_lifelong(body(), **options)


@pytest.mark.parametrize("validation", [0.0, 0.2])
@pytest.mark.parametrize(("members", "fittest"), [(1, 0), (1, 1), (2, 0)])
def test_the_fittest_start_is_the_task_whose_features_say_something(
    validation: float, members: int, fittest: int, forced: Callable[[str], None]
) -> None:
    forced("scale")
    stream = split_digits(num_tasks=3, validation=validation)
    strategy = batch_ensemble_lifelong(body(), init="fittest", members_per_task=members, fit=FIT)
    network, held_out = strategy.network, stream.streams.get("valid")
    for task in (0, 1):
        strategy.train(stream.train_stream[task], eval_streams=held_out and [held_out[task]])
    other, expected = 1 - fittest, list(range(fittest * members, (fittest + 1) * members))
    for bank in banks(network.body):
        bank.committed[other * members : (other + 1) * members] = 0
    before, counted = strategy.meter.flops, []
    strategy.run_epochs = lambda *_: counted.append(strategy.meter.flops - before)
    strategy.train(stream.train_stream[2], eval_streams=held_out and [held_out[2]])
    assert network.notes() == ["task 2 started from task 1", f"task 3 started from task {fittest + 1}"]
    for bank in banks(network.body):
        assert torch.equal(bank.committed[2 * members :], bank.committed[expected])
    images = len(stream.train_stream[2].dataset) + (len(held_out[2].dataset) if held_out else 0)
    # every image through both earlier tasks: dense products, and the products with r and s
    assert counted == [pytest.approx(images * 2 * members * (2 * 64 * 16 + 64 + 16))]


def test_a_longer_first_task_is_the_only_one_that_is_longer() -> None:
    stream = split_digits(num_tasks=3)
    strategy = batch_ensemble_lifelong(body(), first_epochs=5, fit=FIT)
    epochs = []
    for experience in stream.train_stream:
        strategy.train(experience)
        epochs.append(strategy.clock.train_exp_epochs)
        last = strategy.optimizer.param_groups[0]["lr"]
        assert last == pytest.approx(0, abs=1e-9)  # the schedule ends with the last epoch
    assert epochs == [5, 2, 2]


def test_options_win_over_the_preset() -> None:
    strategy = batch_ensemble_lifelong(mlp(), preset="accurate", init="gaussian")
    assert strategy.network.init == "gaussian"
    assert strategy.overrides["fast_weights"]["lr"] == 0.05
    assert (
        next(layer for layer in strategy.network.modules() if isinstance(layer, Rank1Linear)).more is not None
    )
    paper = batch_ensemble_lifelong(mlp())
    assert paper.network.init == "random_sign"
    assert "lr" not in paper.overrides["fast_weights"]
    with pytest.raises(InputError, match="preset is paper or accurate"):
        batch_ensemble_lifelong(mlp(), preset="best")  # pyright: ignore
