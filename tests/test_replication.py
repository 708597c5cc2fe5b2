"""Layers before the first member run once per input, and the answer is that of copies from the start."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from lifelong_ens.accounting.flops import FlopMeter
from lifelong_ens.convert import MEMBER_LAYERS, MemberNetwork, batch_ensemble
from lifelong_ens.replication import replicate_late


def tiled(network: MemberNetwork, x: torch.Tensor) -> torch.Tensor:
    with network.selection.of(None):
        out = network.body(x.repeat(network.num_members, *[1] * (x.dim() - 1)))
    return out.unflatten(0, (network.num_members, len(x)))


@pytest.mark.parametrize(
    "exclude", [["conv1"], ["conv1", "bn1", "layer1"], ["conv1", "bn1", "layer1.0.conv1"]]
)
def test_equals_copies_from_the_start_with_residual_paths_across_the_border(exclude, randomise):
    network = randomise(batch_ensemble(resnet18(num_classes=5), 3, exclude=exclude)).eval()
    assert network._late[0] is not None
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(network(x), tiled(network, x))
        torch.testing.assert_close(network(x, members=[2, 0]), tiled(network, x)[[2, 0]])
        with FlopMeter(network) as late:
            network(x)
        with FlopMeter(network) as early:
            tiled(network, x)
    assert late.total < early.total


def test_gradients_are_those_of_copies_from_the_start(randomise):
    network = randomise(batch_ensemble(resnet18(num_classes=5), 3, exclude=["conv1"]))
    network.eval()
    other = copy.deepcopy(network)
    x = torch.randn(2, 3, 32, 32)
    network(x).square().mean().backward()
    tiled(other, x).square().mean().backward()
    for (name, one), two in zip(network.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_a_copy_and_a_loaded_network_use_their_own_layers():
    network = batch_ensemble(resnet18(num_classes=5), 2, exclude=["conv1"]).eval()
    other = copy.deepcopy(network)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        other.body.conv1.weight.zero_()
        assert not torch.equal(network(x), other(x))
        network.load_state_dict(other.state_dict())
        assert torch.equal(network(x), other(x))
        assert torch.equal(network.double()(x.double()), tiled(network, x.double()))


class Sized(nn.Module):
    """Reads the size of what comes before the border after it: copying that size would be wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        y = self.first(x)
        return self.second(y).view(y.size(0), -1)


class Branching(nn.Module):
    """Its path depends on its input, so it has no graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.second(self.first(x) if x.sum() > 0 else x)


@pytest.mark.parametrize("model", [Branching(), nn.Sequential(nn.Flatten(), nn.Linear(4, 4)), Sized()])
def test_copies_from_the_start_where_late_ones_are_not_safe_or_save_nothing(model):
    exclude = ["first"] if not isinstance(model, nn.Sequential) else []
    network = batch_ensemble(model, 3, exclude=exclude)
    assert replicate_late(network.body, lambda module: isinstance(module, MEMBER_LAYERS)) is None
    if not isinstance(model, Sized):
        assert network(torch.randn(2, 4)).shape == (3, 2, 4)


def test_dropout_before_the_border_has_a_mask_for_every_copy():
    body = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 64, bias=False))
    network = batch_ensemble(body, 2, exclude=["0"], init="ones").train()
    late = network._late[0]
    assert late is not None
    out = network(torch.randn(3, 4))
    assert not torch.equal(out[0], out[1])


def test_rows_split_over_members_are_each_seen_by_one(randomise):
    network = randomise(batch_ensemble(resnet18(num_classes=5), 3)).eval()
    for rows in (6, 7):
        x = torch.randn(rows, 3, 32, 32)
        with torch.no_grad():
            whole, out = network(x), network.split(x)
        owners = torch.arange(rows) * 3 // rows
        torch.testing.assert_close(out, whole[owners, torch.arange(rows)], rtol=1e-4, atol=1e-5)
