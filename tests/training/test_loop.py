from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lifelong_ens.errors import InputError, NonFiniteLossError
from lifelong_ens.networks.batch_ensemble import BatchEnsembleNetwork
from lifelong_ens.networks.plain import mlp
from lifelong_ens.training.fit import Fit
from lifelong_ens.training.loop import EarlyStopping, Optimisation, mean_loss, run_epoch


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.ones(3))


def rates(fit: Fit, steps_per_epoch: int, **options: Any) -> list[float]:
    """The learning rate that each step of the whole training uses."""
    weight = parameter()
    optimisation = Optimisation([{"params": [weight]}], fit, steps_per_epoch, **options)
    used = []
    for _ in range(steps_per_epoch * (options.get("epochs") or fit.epochs)):
        used.append(optimisation.optimizer.param_groups[0]["lr"])
        optimisation.step(weight.sum())
    return used


def test_cosine_from_the_learning_rate_to_zero() -> None:
    used = rates(Fit(epochs=2, learning_rate=0.4), steps_per_epoch=4)
    assert used == pytest.approx([0.2 * (1 + math.cos(math.pi * step / 8)) for step in range(8)])
    assert used[0] == 0.4
    assert used[4] == pytest.approx(0.2)


def test_warm_up_rises_linearly_and_then_the_cosine_starts() -> None:
    used = rates(Fit(epochs=3, learning_rate=1.0, warmup_epochs=0.75), steps_per_epoch=4)
    assert used[:3] == pytest.approx([0.25, 0.5, 0.75])
    assert used[3:] == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 9)) for step in range(9)])


def test_warm_up_without_a_schedule_stays_at_the_top() -> None:
    fit = Fit(epochs=2, learning_rate=1.0, warmup_epochs=1, schedule="constant")
    assert rates(fit, steps_per_epoch=3) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_a_constant_rate() -> None:
    assert rates(Fit(epochs=1, learning_rate=0.3, schedule="constant"), 4) == [0.3] * 4


def test_the_schedule_spans_the_epochs_of_this_training() -> None:
    used = rates(Fit(epochs=50, learning_rate=1.0), 2, epochs=2)
    assert used == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)])


def test_groups_keep_their_own_rate_and_decay_through_the_schedule() -> None:
    fast, slow = parameter(), parameter()
    fit = Fit(epochs=1, learning_rate=1.0, weight_decay=0.5, momentum=0.0)
    groups = [{"params": [fast], "lr": 0.1, "weight_decay": 0.0}, {"params": [slow]}]
    optimisation = Optimisation(groups, fit, steps_per_epoch=2)
    optimisation.step((fast + slow).sum())
    assert fast.tolist() == pytest.approx([1 - 0.1] * 3)
    assert slow.tolist() == pytest.approx([1 - 1.0 * (1 + 0.5)] * 3)
    assert [group["lr"] for group in optimisation.optimizer.param_groups] == pytest.approx([0.05, 0.5])
    assert groups[1] == {"params": [slow]}  # what was given is not changed


@pytest.mark.parametrize(
    ("name", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)]
)
def test_each_optimizer_is_torchs(name: Any, kind: Any) -> None:
    fit = Fit(
        epochs=1, optimizer=name, learning_rate=0.1, weight_decay=0.2, momentum=0.8, schedule="constant"
    )
    ours, theirs = parameter(), parameter()
    optimisation = Optimisation([{"params": [ours]}], fit, 3)
    options = {"lr": 0.1, "weight_decay": 0.2} | ({"momentum": 0.8} if name == "sgd" else {})
    optimizer = kind([theirs], **options)
    for _ in range(3):
        optimisation.step((ours**3).sum())
        optimizer.zero_grad()
        (theirs**3).sum().backward()
        optimizer.step()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("clip", "moved"), [(1.0, 1.0), (100.0, 12.0), (None, 12.0)])
def test_the_whole_gradient_is_clipped(clip: float | None, moved: float) -> None:
    one, other = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(5))
    fit = Fit(epochs=1, learning_rate=1.0, momentum=0.0, weight_decay=0.0, clip_norm=clip)
    optimisation = Optimisation([{"params": [one]}, {"params": [other]}], fit, 1)
    optimisation.step(4 * (one.sum() + other.sum()))  # a gradient of norm 12
    moves = torch.cat([one.flatten(), other]).detach()
    assert float(moves.norm()) == pytest.approx(moved, rel=1e-4)
    assert moves.unique().numel() == 1


def test_autocast_only_where_asked() -> None:
    device = torch.device("cpu")
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    for amp, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        with Optimisation([{"params": [parameter()]}], Fit(amp=amp), 1).precision(device):
            assert layer(x).dtype == dtype


def test_an_epoch_takes_a_step_for_each_batch_and_returns_the_mean_loss() -> None:
    weight = nn.Parameter(torch.zeros(()))
    fit = Fit(epochs=1, learning_rate=0.5, momentum=0.0, weight_decay=0.0, schedule="constant")
    optimisation = Optimisation([{"params": [weight]}], fit, 2)
    # losses (w - 1)^2 from w = 0: 1, then w = 1: (1 - 3)^2 = 4, then w = 3
    assert run_epoch([1.0, 3.0], lambda target: (weight - target) ** 2, optimisation) == pytest.approx(2.5)
    assert weight.item() == pytest.approx(3.0)
    assert math.isnan(run_epoch([], lambda batch: weight, optimisation))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_names_its_step(bad: float) -> None:
    weight = parameter()
    optimisation = Optimisation([{"params": [weight]}], Fit(epochs=1), 4)
    with pytest.raises(NonFiniteLossError, match=f"the loss is {bad} at step 3 of 4"):
        run_epoch([1.0, 2.0, bad, math.nan], lambda factor: factor * weight.sum(), optimisation)


def test_the_mean_of_finite_losses() -> None:
    assert mean_loss([torch.tensor(1.0), torch.tensor(4.0)]) == 2.5


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


def test_early_stopping_waits_and_puts_the_best_epoch_back() -> None:
    net = network()
    stopping = EarlyStopping(net, patience=2)
    states, answers = [], []
    for score in (0.5, 0.8, 0.7, 0.8):
        net.train()(torch.randn(8, 2))
        with torch.no_grad():
            net[0].weight.add_(1)
        states.append(copy.deepcopy(net.state_dict()))
        answers.append(stopping.should_stop(score))
    assert answers == [False, False, False, True]  # as good as the best is not better
    tensors = [id(tensor) for tensor in net.parameters()]
    stopping.restore()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in net.state_dict().items())
    assert [id(tensor) for tensor in net.parameters()] == tensors


def test_a_better_epoch_resets_the_patience() -> None:
    stopping = EarlyStopping(network(), patience=2)
    assert [stopping.should_stop(s) for s in (0.1, 0.0, 0.2, 0.1, 0.1)] == [False, False, False, False, True]


def test_early_stopping_reaches_the_members_in_training() -> None:
    net = BatchEnsembleNetwork(mlp(input_shape=(1, 2, 2), hidden=(3,))).regrow([2])
    net.begin_task(2)
    x = torch.randn(4, 1, 2, 2)
    stopping, answer = EarlyStopping(net, 1), net(x, 1)
    stopping.should_stop(1.0)
    active = net.body.features[1].r.active
    with torch.no_grad():
        active.add_(1)
    assert not torch.equal(net(x, 1), answer)
    assert stopping.should_stop(0.5)
    stopping.restore()
    assert torch.equal(net(x, 1), answer)
    assert net.body.features[1].r.active is active


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs is at least 1, not 0"),
        ({"batch_size": 0}, "batch_size is at least 1"),
        ({"warmup_epochs": -1}, "warmup_epochs is at least 0"),
        ({"weight_decay": -1e-4}, "weight_decay is at least 0"),
        ({"learning_rate": 0.0}, "learning_rate is above 0"),
        ({"learning_rate": math.nan}, "learning_rate is above 0, not nan"),
        ({"clip_norm": 0.0}, "clip_norm is above 0"),
        ({"patience": 0}, "patience is at least 1 epoch"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Fit(**options)


def test_a_network_learns_in_a_loop() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    y = (x[:, 0] > x[:, 1]).long()
    net = nn.Linear(4, 2)
    fit = Fit(epochs=5, learning_rate=0.5, amp=True, clip_norm=1.0, warmup_epochs=1)
    optimisation = Optimisation([{"params": list(net.parameters())}], fit, steps_per_epoch=4)

    def loss(index: Tensor) -> Tensor:
        with optimisation.precision(x.device):
            return nn.functional.cross_entropy(net(x[index]).float(), y[index])

    losses = [run_epoch(torch.arange(64).split(16), loss, optimisation) for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    assert float((net(x).argmax(1) == y).float().mean()) > 0.9
