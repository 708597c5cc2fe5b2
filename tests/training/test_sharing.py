"""Steps in parts: the step of the whole mini-batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lifelong_ens.errors import InputError, UnfitNetworkError
from lifelong_ens.networks import mlp, resnet20
from lifelong_ens.training.devices import ALONE, Devices
from lifelong_ens.training.fit import Fit
from lifelong_ens.training.loop import Optimisation, run_epoch
from lifelong_ens.training.sharing import Sharing
from strategies import agem, ewc, finetune, lwf, pnn, replay, structured_ensemble
from streams import split_digits

FIT = Fit(epochs=2, batch_size=37, clip_norm=1.0, augment="crop_flip")


def learnt(builder, accumulate: int, **options) -> tuple[dict[str, torch.Tensor], object]:
    torch.manual_seed(0)
    body = mlp(input_shape=(1, 8, 8), hidden=[32])
    fit = Fit(**{**vars(FIT), "accumulate": accumulate})
    strategy = builder(body, fit=fit, seed=1, **options)
    steps = []
    strategy.on_step = lambda: steps.append(1)
    stream = split_digits(num_tasks=2, limit=25)
    for experience in stream.train_stream:
        strategy.train(experience)
    assert len(steps) >= 2 * 2 * 4
    return strategy.network.state_dict(), strategy.meter


@pytest.mark.parametrize("builder", [finetune, pnn, ewc, lwf, replay, agem, structured_ensemble])
def test_a_step_in_parts_is_the_step(builder):
    options = {"mask_epochs": 1} if builder is structured_ensemble else {}
    whole, cost = learnt(builder, 1, **options)
    parts, cost_in_parts = learnt(builder, 3, **options)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-5, atol=1e-5, msg=name)
    assert cost_in_parts.flops == pytest.approx(cost.flops, rel=0.02)
    if builder is finetune:
        assert cost_in_parts.saved_bytes < 0.4 * cost.saved_bytes


def test_the_mean_loss_of_an_epoch_is_that_of_its_steps():
    x, y = torch.randn(10, 3), torch.randint(2, (10,))

    def run(parts: int) -> float:
        torch.manual_seed(0)
        net = nn.Linear(3, 2)
        sharing = Sharing(ALONE, parts)
        fit = Fit(accumulate=parts)
        optimisation = Optimisation([{"params": list(net.parameters())}], fit, 3, sharing=sharing)
        batches = sharing.portions([x[:4], y[:4]] for _ in range(2))
        return run_epoch(batches, lambda b: nn.functional.cross_entropy(net(b[0]), b[1]), optimisation)

    assert run(1) == pytest.approx(run(3), abs=1e-6)


def test_rows_are_dealt_so_that_all_are_computed_once_or_by_all():
    for count in (2, 3, 4):
        for rows in range(1, 9):
            every = [Devices(rank, count, torch.device("cpu")) for rank in range(count)]
            computed = [list(range(rows))[one.own(rows)] for one in every]
            expected = list(range(rows)) if rows >= count else list(range(rows)) * count
            assert sorted(row for one in computed for row in one) == sorted(expected)
            weights = []
            for one in every:
                sharing = Sharing(one)
                sharing.take(rows)
                weights.append(sharing.weight)
            assert sum(weights) == pytest.approx(1)


def test_accumulate_has_no_place_where_nothing_shares_and_where_plugins_see_steps():
    with pytest.raises(InputError, match="accumulate is for strategies"):
        Optimisation([{"params": [nn.Parameter(torch.zeros(1))]}], Fit(accumulate=2), 1)
    from avalanche.core import SupervisedPlugin

    class Looks(SupervisedPlugin):
        def after_backward(self, strategy, *args, **kwargs):
            """Looks."""

    strategy = finetune(resnet20(input_shape=(1, 8, 8)), fit=Fit(accumulate=2), plugins=[Looks()])
    with pytest.raises(UnfitNetworkError, match="plugins that act on training steps"):
        strategy.train(split_digits(limit=2).train_stream[0])


def test_records_of_earlier_runs_are_the_same_runs():
    assert "accumulate" not in Fit().as_dict()
    assert Fit(accumulate=2).as_dict()["accumulate"] == 2
