from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifelong_ens.accounting.meter import TrainingMeter, saved_bytes
from lifelong_ens.networks.batch_ensemble import BatchEnsembleNetwork
from lifelong_ens.networks.plain import mlp

ROWS, WIDTHS, CLASSES = 6, [12, 7, 5], 4
FORWARD = 2 * (12 * 7 + 7 * 5 + 5 * 4)
TRAINING = 3 * FORWARD - 2 * 12 * 7


def network() -> nn.Module:
    return mlp(CLASSES, input_shape=(3, 2, 2), hidden=WIDTHS[1:])


def batch(rows: int = ROWS) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 3, 2, 2), torch.zeros(rows, dtype=torch.int64)


def step(net: nn.Module, rows: int = ROWS) -> None:
    x, y = batch(rows)
    F.cross_entropy(net(x), y).backward()


def test_one_measured_step_and_the_rows_give_the_whole() -> None:
    meter, net = TrainingMeter(), network()
    assert not meter.measured
    with meter.measure(net, ROWS):
        step(net)
    assert meter.measured
    assert meter.flops == 0
    meter.count(ROWS)
    assert meter.flops == ROWS * TRAINING
    meter.count(100)
    assert meter.flops == (ROWS + 100) * TRAINING
    assert meter.flops_rank1 == 0


def test_a_new_phase_is_measured_again() -> None:
    meter, net = TrainingMeter(), network()
    with meter.measure(net, ROWS):
        step(net)
    meter.count(10)
    meter.new_phase()
    with pytest.raises(RuntimeError, match="measure a step"):
        meter.count(1)
    net.features.requires_grad_(False)
    with meter.measure(net, ROWS):
        step(net)
    meter.count(10)
    assert meter.flops == 10 * TRAINING + 10 * (FORWARD + 2 * 5 * CLASSES)


def test_rank1_products_are_listed_apart_and_part_of_the_whole(forced: Callable[[str], None]) -> None:
    forced("scale")
    net = BatchEnsembleNetwork(mlp(input_shape=(3, 2, 2), hidden=WIDTHS[1:])).regrow([CLASSES])
    net.begin_task(CLASSES)
    meter = TrainingMeter()
    x, y = batch()
    with meter.measure(net, ROWS):
        F.cross_entropy(net(x, 1), y).backward()
    meter.count(50)
    rank1 = 4 * (12 + 7 + 7 + 5) - 12
    dense = 2 * 2 * (12 * 7 + 7 * 5) + 3 * 2 * 5 * CLASSES
    assert meter.flops_rank1 == pytest.approx(50 * rank1)
    assert meter.flops == pytest.approx(50 * (dense + rank1))


def test_saved_bytes_of_an_mlp() -> None:
    net, (x, y) = network(), batch()
    with saved_bytes(net) as saved:
        loss = F.cross_entropy(net(x), y)
    activations = sum(WIDTHS) + CLASSES  # each layer's input; a rectified one also serves its own gradient
    labels, weight_of_the_mean = 8 * ROWS, 4
    assert sum(saved.values()) == 4 * ROWS * activations + labels + weight_of_the_mean
    loss.backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_frozen_layers_save_nothing() -> None:
    net, (x, y) = network(), batch()
    net.features.requires_grad_(False)
    with saved_bytes(net) as saved:
        F.cross_entropy(net(x), y)
    assert sum(saved.values()) == 4 * ROWS * (WIDTHS[-1] + CLASSES) + 8 * ROWS + 4


def test_nothing_is_saved_without_gradients() -> None:
    net = network()
    with torch.no_grad(), saved_bytes(net) as saved:
        net(batch()[0])
    assert not saved


def test_storages_that_die_meanwhile_do_not_hide_others() -> None:
    net = nn.Sequential(*[nn.Linear(256, 256) for _ in range(4)])
    with saved_bytes(net) as saved:
        for _ in range(3):
            net(torch.randn(64, 256))  # freed at once
    assert sum(saved.values()) == 3 * 4 * (4 * 64 * 256)


def test_the_meter_keeps_the_largest_step() -> None:
    meter, net = TrainingMeter(), network()
    for rows in (2, 8, 4):
        with meter.measure(net, rows):
            step(net, rows)
    assert meter.saved_bytes == 8 * (4 * (sum(WIDTHS) + CLASSES) + 8) + 4


def test_measuring_changes_no_number() -> None:
    torch.manual_seed(0)
    net, twin = network(), network()
    twin.load_state_dict(net.state_dict())
    x, y = batch()
    with TrainingMeter().measure(net, ROWS):
        F.cross_entropy(net(x), y).backward()
    F.cross_entropy(twin(x), y).backward()
    for one, other in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_seconds_add_up_and_an_error_does_not_lose_them() -> None:
    meter = TrainingMeter()
    with meter.timing():
        time.sleep(0.02)
    first = meter.seconds
    assert first >= 0.02
    failing: dict[str, object] = {}
    with pytest.raises(KeyError), meter.timing():
        failing[time.sleep(0.01) or "missing"]
    assert meter.seconds >= first + 0.01
