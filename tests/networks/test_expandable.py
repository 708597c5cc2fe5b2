from __future__ import annotations

import pytest
import torch
from torch import nn

from lifelong_ens.networks.expandable import DenNetwork
from lifelong_ens.networks.plain import _resnet, lenet5, mlp, resnet18, vgg11_half

BODIES = {
    "mlp": lambda: mlp(input_shape=(3, 32, 32), hidden=(12, 10)),
    "lenet5": lenet5,
    "resnet18": lambda: resnet18(width=4),
    "vgg11_half": lambda: vgg11_half(batch_norm=True),
}


@pytest.fixture(params=BODIES)
def body(request, randomise) -> nn.Module:
    return randomise(BODIES[request.param]()).eval()


@pytest.fixture
def x():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def two_tasks(body: nn.Module) -> DenNetwork:
    """One task learnt, a second begun, its head and norms with numbers of their own."""
    torch.manual_seed(0)
    network = DenNetwork(body)
    network.begin_task(3)
    network.train()
    network(torch.randn(4, 3, 32, 32), 0)
    network.finish_task()
    network.begin_task(2)
    nn.init.normal_(network.head.weight)
    network(torch.randn(4, 3, 32, 32), 1)
    return network.eval()


def zero(network: DenNetwork) -> None:
    with torch.no_grad():
        for layer in network.layers():
            layer.layer.weight.zero_()
        network.head.weight.zero_()


def units(*chosen: list[int]) -> list[torch.Tensor]:
    return [torch.tensor(one, dtype=torch.long) for one in chosen]


def indices(selected: list[torch.Tensor]) -> list[list[int]]:
    return [one.nonzero().squeeze(1).tolist() for one in selected]


def test_selection_goes_back_from_every_output_of_the_head():
    network = two_tasks(mlp(input_shape=(3, 32, 32), hidden=(4, 3)))
    zero(network)
    _, second = network.layers()
    with torch.no_grad():
        second.layer.weight[0, 1] = 0.1
        second.layer.weight[2, 3] = -0.1
        second.layer.weight[1, 0] = 0.1
        network.head.weight[1, 2] = 1e-8
    assert indices(network.select()) == [[3], [2]]
    with torch.no_grad():
        network.head.weight[0, 0] = -1.0
    selected = network.select()
    assert indices(selected) == [[1, 3], [0, 2]]
    assert network.history[1].tolist() == [[2, 0], [2, 0]]
    (weight, mask), (bias, rows) = network.sub_network(selected)[2:]
    assert weight is second.layer.weight
    assert bias is second.layer.bias
    assert mask.nonzero().tolist() == [[0, 1], [0, 3], [2, 1], [2, 3]]
    assert rows.tolist() == [True, False, True]
    assert network.head_columns(selected).tolist() == [[True, False, True]] * 2


def test_selection_reads_every_position_of_a_flattened_map():
    network = two_tasks(lenet5())
    zero(network)
    with torch.no_grad():
        _, second, third, fourth = (layer.layer.weight for layer in network.layers())
        network.head.weight[0, 5] = 1
        fourth[5, 7] = 1
        third[7, 25 * 4 + 24] = 1
        second[4, 3, 2, 2] = 1
    assert indices(network.select()) == [[3], [4], [7], [5]]


def test_selection_goes_around_residual_blocks_until_nothing_is_found():
    network = two_tasks(_resnet((3, 32, 32), [3], 2, None))
    stream, inside, later = range(3)
    zero(network)
    _, conv1, conv2, conv3, conv4 = (layer.layer.weight for layer in network.layers())
    with torch.no_grad():
        network.head.weight[0, 0] = 1
        conv2[0, 2, 0, 0] = 1
        conv1[2, 1, 1, 1] = 1
        # the second block writes channel 1, which only the first block is found to need
        conv4[1, 0, 2, 2] = 1
        conv3[0, 0, 1, 1] = 1
    selected = indices(network.select())
    assert selected[stream] == [0, 1]
    assert selected[inside] == [2]
    assert selected[later] == [0]


def test_drift_is_the_norm_over_all_that_a_unit_reads():
    network = two_tasks(_resnet((3, 32, 32), [3], 1, None))
    before = network.old_tensors()
    assert all(not drift.any() for drift in network.drift(before))
    stem, _, conv2 = network.layers()
    with torch.no_grad():
        stem.layer.weight[1, 0, 0, 0] += 3
        conv2.layer.weight[1, 2, 1, 1] -= 4
    stream, inside = network.drift(before)
    torch.testing.assert_close(stream, torch.tensor([0.0, 5.0, 0.0]))
    assert not inside.any()
    network = two_tasks(mlp(input_shape=(3, 32, 32), hidden=(2, 2)))
    before = network.old_tensors()
    with torch.no_grad():
        layer = next(iter(network.layers())).layer
        layer.weight[0, 7] += 3
        layer.bias[0] += 4
    torch.testing.assert_close(network.drift(before)[0], torch.tensor([5.0, 0.0]), rtol=1e-4, atol=0)


def test_split_in_numbers():
    network = two_tasks(mlp(input_shape=(3, 32, 32), hidden=(2, 3)))
    first, second = network.layers()
    before = network.old_tensors()
    network.grow([1, 0])
    with torch.no_grad():
        first.layer.weight += 1
        first.layer.bias += 2
        second.layer.weight += 5
    w1, b1 = (tensor.clone() for tensor in first.task_tensors(1))
    w2 = second.task_tensors(1)[0].clone()
    head = network.head.weight.detach().clone()
    # of the first layer unit 1, of the second unit 0
    network.split(before, units([1], [0]))
    assert network.stamps.table == [[2, 3], [4, 4]]
    (old1, old_b1), (old2, _) = before
    weight, bias = first.task_tensors(1)
    assert torch.equal(weight, torch.stack([w1[0], old1[1], w1[2], w1[1]]))
    assert torch.equal(bias, torch.stack([b1[0], old_b1[1], b1[2], b1[1]]))
    weight, _ = second.task_tensors(1)
    # split: what it was, and it reads nothing new
    assert torch.equal(weight[0], torch.tensor([*old2[0].tolist(), 0, 0]))
    # not split: reads the old unit as before, the copy with the difference
    for row in (1, 2):
        expected = torch.stack([w2[row, 0], old2[row, 1], w2[row, 2], w2[row, 1] - old2[row, 1]])
        assert torch.equal(weight[row], expected)
    # the copy: reads the copy alone
    assert torch.equal(weight[3], torch.stack([w2[0, 0], torch.tensor(0.0), w2[0, 2], w2[0, 1]]))
    zeros = torch.zeros(2)
    assert torch.equal(network.head.weight, torch.stack([zeros, head[:, 1], head[:, 2], head[:, 0]], dim=1))
    assert network.history[1].tolist() == [[0, 1], [0, 1]]
    assert network.added(1) == [2, 1]


def test_split_of_what_did_not_drift_changes_no_output(body, x):
    network = two_tasks(body)
    logits = [network(x, task) for task in range(2)]
    network.split(network.old_tensors(), units(*[[0, 2]] * len(network.groups)))
    network.eval()
    assert torch.equal(network(x, 0), logits[0])
    torch.testing.assert_close(network(x, 1), logits[1], rtol=1e-3, atol=1e-4)


def test_split_of_all_that_drifted_gives_the_past_back_to_the_bit(body, x):
    network = two_tasks(body)
    before, past = network.old_tensors(), network(x, 0)
    network.grow([2] * len(network.groups))
    network.eval()
    assert torch.equal(network(x, 0), past)
    with torch.no_grad():
        for layer in network.layers():
            layer.layer.weight[[1, 3]] += 0.1
    assert not torch.equal(network(x, 0), past)
    drifted = [drift.nonzero().squeeze(1) for drift in network.drift(before)]
    assert all(one.tolist() == [1, 3] for one in drifted)
    network.split(before, drifted)
    network.eval()
    assert torch.equal(network(x, 0), past)
    network.finish_task()
    assert torch.equal(network(x, 0), past)


def test_units_whose_channel_is_zero_are_dropped_without_a_change(body, x):
    network = two_tasks(body)
    network.grow([3] * len(network.groups))
    with torch.no_grad():
        for parts in network.new_units():
            for part in parts:
                part[1] = 0
            # a shift or a weight alone keeps a unit
            for part in parts[1:]:
                part[0] = 0
    # in evaluation, norms subtract the mean of a time when the channel was not zero yet
    network.train()
    before = network(x, 1).detach()
    network.drop_zero_units()
    assert network.added(1) == [2] * len(network.groups)
    torch.testing.assert_close(network(x, 1).detach(), before, rtol=1e-3, atol=1e-4)


def test_added_units_consist_of_rows_biases_and_shifts():
    network = two_tasks(_resnet((3, 32, 32), [3], 1, None))
    assert network.new_units() == [[], []]
    network.grow([2, 1])
    stream, inside = network.new_units()
    # stem, second convolution, and a norm behind each
    assert [tuple(part.shape) for part in stream] == [(2, 3, 3, 3), (2, 4, 3, 3), (2,), (2,)]
    assert [tuple(part.shape) for part in inside] == [(1, 5, 3, 3), (1,)]


def test_a_new_head_starts_at_zero_after_the_first_task():
    network = DenNetwork(mlp(hidden=(4, 3)))
    network.begin_task(2)
    assert network.head.weight.all()
    network.begin_task(2)
    assert not network.head.weight.any()
    assert not network.head.bias.any()


def test_what_tasks_did_is_part_of_the_state():
    network = two_tasks(mlp(input_shape=(3, 32, 32), hidden=(4, 3)))
    before = network.old_tensors()
    network.select()
    network.grow([3, 2])
    network.split(before, units([1], [0, 2]))
    network.finish_task()
    assert network.notes() == [
        "task 2: features.1 selected 4 of 4, added 3, split 1; features.3 selected 3 of 3, added 2, split 2"
    ]
    other = DenNetwork(mlp(input_shape=(3, 32, 32), hidden=(4, 3))).regrow(network.classes_per_task)
    other.load_state_dict(network.state_dict())
    assert other.notes() == network.notes()
