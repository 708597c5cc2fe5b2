"""Layers before the first member run once per input, and the answer is that of copies from the start."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from lifelong_ens import replication
from lifelong_ens.accounting.flops import FlopMeter
from lifelong_ens.convert import MEMBER_LAYERS, MemberNetwork, batch_ensemble
from lifelong_ens.layers.rank1 import Rank1Layer
from lifelong_ens.networks.plain import lenet5, resnet20
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
    assert network.replication.late is not None
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
    late = network.replication.late
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


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch):
    """Returns a function that says whether members take turns."""

    def force(answer: bool) -> None:
        monkeypatch.setattr(replication, "in_turn", lambda *_: answer)

    return force


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("build", [lambda: resnet20(5, width=4), lambda: lenet5(5)])
def test_members_in_turn_answer_and_learn_as_stacked(train, build, randomise, turns):
    network = randomise(batch_ensemble(build(), 3)).double().train(train)
    other = copy.deepcopy(network)
    x = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    for run in (lambda net: net(x), lambda net: net(x, members=[2, 0]), lambda net: net.split(x)):
        found = []
        for net, turn in ((network, True), (other, False)):
            turns(turn)
            net.zero_grad()
            out = run(net)
            out.square().mean().backward()
            found.append([out.detach(), *(p.grad for p in net.parameters() if p.grad is not None)])
            found[-1] += list(net.buffers())
        assert len(found[0]) == len(found[1])
        for one, two in zip(*found, strict=True):
            torch.testing.assert_close(one, two)


def test_a_norm_that_members_share_sees_all_their_rows_together_in_training(turns):
    turns(True)
    network = batch_ensemble(resnet20(5, width=4), 3, norm="shared")
    x = torch.randn(6, 3, 16, 16)
    assert not network.train().replication.in_turn(x, 3)
    assert network.eval().replication.in_turn(x, 3)


def test_sizes_are_found_without_anybody_noticing(randomise):
    network = randomise(batch_ensemble(resnet20(5, width=4), 3)).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    calls = []
    for module in network.body.modules():
        module.register_forward_hook(lambda *_: calls.append(1))
    x, state = torch.randn(1, 3, 16, 16), torch.get_rng_state()
    with FlopMeter(network) as meter:
        sizes = network.replication._calls(x)
    assert len(sizes) == sum(isinstance(one, Rank1Layer) for one in network.modules())
    assert (calls, meter.total) == ([], 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in network.modules())
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("ids", [None, torch.tensor([2, 0, 0, 1, 2, 1])])
def test_a_norm_that_scales_for_the_layer_before_it_gives_what_the_two_give(ids, randomise):
    network = randomise(batch_ensemble(resnet20(5, width=4), 3)).double().eval()
    other = copy.deepcopy(network)
    layers = [one for one in network.modules() if isinstance(one, Rank1Layer)]
    assert sum(bool(one.norm) for one in layers) == len(layers) - 1  # all but the classifier
    for one in other.modules():
        if isinstance(one, Rank1Layer):
            one.norm = ()
    x = torch.randn(6, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(network(x, ids=ids), other(x, ids=ids))
    assert any(one.deferred for one in layers)


def test_only_a_norm_that_alone_reads_a_layer_scales_for_it():
    class TwoReaders(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.other = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
            self.twice = nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            z = self.norm(y) + y
            return self.twice(self.twice(self.other(z)))

    network = batch_ensemble(TwoReaders(), 2)
    assert not any(one.norm for one in network.modules() if isinstance(one, Rank1Layer))
