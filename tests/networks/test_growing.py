from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from lifelong_ens.errors import UnfitNetworkError
from lifelong_ens.networks.growing import GrowingNetwork
from lifelong_ens.networks.plain import lenet5, mlp, resnet18, vgg11_half, without_classifier

BODIES = {
    "mlp": lambda: mlp(input_shape=(3, 32, 32), hidden=(12, 10)),
    "lenet5": lenet5,
    "resnet18": lambda: resnet18(width=4),
    "vgg11_half": lambda: vgg11_half(batch_norm=True),
    "torchvision": lambda: without_classifier(torchvision.models.resnet18(weights=None)),
}


@pytest.fixture(params=BODIES)
def body(request, randomise) -> nn.Module:
    return randomise(BODIES[request.param]()).eval()


@pytest.fixture
def x():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def learn(network: GrowingNetwork) -> None:
    """Move everything that may move, norms' statistics too, as hard as an optimizer never would."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    network.train()
    network(torch.randn(4, 3, 32, 32), network.num_tasks - 1)
    network.finish_task()
    network.eval()


def test_first_task_is_the_body_itself(body, x):
    network = GrowingNetwork(body).eval()
    network.begin_task(3)
    network.eval()
    assert torch.equal(network(x, 0), network.heads[0](body(x)))


def test_past_tasks_stay_to_the_bit_and_can_be_exported_while_the_network_grows(body, x):
    network = GrowingNetwork(body)
    logits = []
    for task in range(3):
        network.begin_task(2 + task)
        if task:
            network.grow([1 + index % 3 for index in range(len(network.groups))])
            network.grow([1] * len(network.groups))
        learn(network)
        logits.append(network(x, task))
    for task in range(3):
        assert torch.equal(network(x, task), logits[task])
        assert torch.equal(network.export_task(task)(x), logits[task])
    mixed = network(x, torch.tensor([2, 0, 1]))
    torch.testing.assert_close(mixed[1, :2], logits[0][1], rtol=1e-4, atol=1e-5)
    assert mixed[1, 2:].isneginf().all()


def test_state_restores_the_widths(body, x):
    network = GrowingNetwork(body)
    for task in range(3):
        network.begin_task(2)
        network.grow([task] * len(network.groups))
        learn(network)
    other = GrowingNetwork(body).regrow([2, 2, 2])
    other.load_state_dict(network.state_dict())
    other.eval()
    assert other.stamps.table == network.stamps.table
    for task in range(3):
        assert torch.equal(other(x, task), network(x, task))
    other.begin_task(2)
    other.grow([1] * len(other.groups))
    other.eval()
    assert torch.equal(other(x, 1), network(x, 1))


def test_what_is_discarded_was_never_there(body, x):
    network = GrowingNetwork(body)
    network.begin_task(2)
    learn(network)
    first = network(x, 0)
    network.begin_task(3)
    start = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.grow([2] * len(network.groups))
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    network.train()(torch.randn(4, 3, 32, 32), 1)
    head = network.heads[1].weight
    network.discard()
    found = network.state_dict()
    assert found.keys() == start.keys()
    for name, tensor in start.items():
        if not name.startswith("heads.1"):
            assert torch.equal(found[name], tensor), name
    assert network.heads[1].weight.shape == start["heads.1.weight"].shape
    assert not torch.equal(network.heads[1].weight, head[:, : network.heads[1].in_features])
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trained == {"heads.1.weight", "heads.1.bias"} | {name for name in start if is_new_affine(name)}
    assert network.added(1) == [0] * len(network.groups)
    network.eval()
    assert torch.equal(network(x, 0), first)


def is_new_affine(name: str) -> bool:
    """Whether it is a number that the second task's norm learns."""
    return name.startswith("body.") and name.endswith((".1.weight", ".1.bias")) and ".layer." not in name


def test_state_of_another_body_is_refused():
    network, other = GrowingNetwork(mlp(hidden=(8, 8))), GrowingNetwork(mlp(hidden=(8, 9)))
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.regrow([2]).load_state_dict(network.regrow([2]).state_dict())


def test_units_that_are_not_kept_were_never_there(body, x):
    """Units whose outgoing weights are zero can be dropped without a change of any output."""
    network = GrowingNetwork(body)
    network.begin_task(2)
    learn(network)
    network.begin_task(2)
    network.grow([3] * len(network.groups))
    kept = [torch.arange(size) != size - 2 for size in network.stamps.table[-1]]
    with torch.no_grad():
        for layer in network.layers():
            for new in (layer.new_rows, layer.new_columns):
                width = layer.layer.weight.shape[1]
                if layer.reads is None or new is None:
                    continue
                columns = ~kept[layer.reads].repeat_interleave(layer.positions)
                new[:, columns if new is layer.new_rows else columns[width:]] = 0
        features = next(i for i, group in enumerate(network.groups) if group.features)
        positions = network.heads[1].in_features // len(kept[features])
        network.heads[1].weight[:, ~kept[features].repeat_interleave(positions)] = 0
    network.eval()
    before = network(x, 1)
    network.keep(kept)
    network.eval()
    assert network.added(1) == [2] * len(network.groups)
    torch.testing.assert_close(network(x, 1), before, rtol=1e-4, atol=1e-5)


def test_only_what_the_newest_task_added_is_trained():
    network = GrowingNetwork(resnet18(width=4))
    network.begin_task(2)
    assert all(parameter.requires_grad for parameter in network.parameters())
    network.begin_task(2)
    network.grow([1] * len(network.groups))
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert all(("new_" in name) or (".1.weight" in name) or ("1.bias" in name) for name in trained)
    assert any("features.0.new_rows" in name for name in trained)


def test_weights_equal_the_closed_form():
    network = GrowingNetwork(mlp(input_shape=(1, 4, 4), hidden=(5, 4)))
    for task in range(3):
        network.begin_task(3)
        network.grow([2 * task, task])
        network.finish_task()
    n1, n2 = 5 + 6, 4 + 3
    body = 17 * n1 + (n1 + 1) * n2
    heads = 3 * ((4 + 1) + (5 + 1) + (7 + 1))
    assert sum(parameter.numel() for parameter in network.parameters()) == body + heads
    assert network.added(2) == [4, 2]


class OnItsInput(nn.Module):
    num_features = 4

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        return x + self.second(torch.relu(self.first(x)))


def test_a_layer_that_is_added_to_the_input_is_named():
    with pytest.raises(UnfitNetworkError, match="second is added to the network's own input"):
        GrowingNetwork(OnItsInput())
