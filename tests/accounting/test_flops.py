from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lifelong_ens.accounting.flops import FlopMeter, forward_flops
from lifelong_ens.convert import batch_ensemble, convert
from lifelong_ens.layers.convolution import Rank1Conv2d
from lifelong_ens.layers.rank1 import Rank1Layer
from lifelong_ens.networks.batch_ensemble import BatchEnsembleNetwork
from lifelong_ens.networks.plain import lenet5, mlp, resnet20
from lifelong_ens.networks.task import Independent, MultiHead

ROWS = 3
WIDTHS = [12, 7, 5]  # of the mlp: image, hidden, hidden
CLASSES = 4
BODY = 2 * (12 * 7 + 7 * 5)
HEAD = 2 * 5 * CLASSES
# lenet5 on 3x32x32: output positions x weights of each layer
LENET = 2 * (28 * 28 * 6 * 75 + 10 * 10 * 16 * 150 + 400 * 120 + 120 * 84)
LENET_FIRST = 2 * 28 * 28 * 6 * 75


def body() -> Any:
    return mlp(input_shape=(3, 2, 2), hidden=WIDTHS[1:])


def images(rows: int = ROWS) -> Tensor:
    return torch.randn(rows, 3, 2, 2)


def training(network: nn.Module, run: Any) -> FlopMeter:
    with FlopMeter(network) as meter:
        run().square().sum().backward()
    return meter


def test_an_mlp_forward() -> None:
    network = MultiHead(body()).regrow([CLASSES])
    meter = forward_flops(network, lambda: network(images(), 0))
    assert meter.by_component == {"shared": ROWS * BODY, "head": ROWS * HEAD}
    assert (meter.backward, meter.rank1) == (0, 0)
    assert meter.total == ROWS * (BODY + HEAD)


def test_an_mlp_in_training_is_three_times_less_the_images_gradient() -> None:
    network = MultiHead(body()).regrow([CLASSES])
    meter = training(network, lambda: network(images(), 0))
    first_layers_input_gradient = 2 * 12 * 7
    assert meter.total == ROWS * (3 * (BODY + HEAD) - first_layers_input_gradient)
    assert meter.backward == ROWS * (2 * (BODY + HEAD) - first_layers_input_gradient)


def test_a_convolutional_network() -> None:
    network = lenet5(10)
    head = 2 * 84 * 10
    x = torch.randn(2, 3, 32, 32)
    assert forward_flops(network, lambda: network(x)).total == 2 * (LENET + head)
    meter = training(network, lambda: network(x))
    assert meter.total == 2 * (3 * (LENET + head) - LENET_FIRST)


def test_an_inner_gradient_that_nobody_needs_costs_nothing() -> None:
    network = lenet5(10)
    network.features.requires_grad_(False)
    meter = training(network, lambda: network(torch.randn(2, 3, 32, 32)))
    assert meter.backward == 2 * 2 * 84 * 10  # the weight of the last layer alone


def test_frozen_weights_cost_no_weight_gradient() -> None:
    network = lenet5(10)
    network.features[3].requires_grad_(False)
    second = 2 * 10 * 10 * 16 * 150
    meter = training(network, lambda: network(torch.randn(2, 3, 32, 32)))
    assert meter.total == 2 * (3 * (LENET + 2 * 84 * 10) - LENET_FIRST - second)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("input_gradient", [True, False])
def test_grouped_convolutions(groups: int, input_gradient: bool) -> None:
    layer = nn.Conv2d(6, 12, 3, groups=groups, bias=False)
    x = torch.randn(2, 6, 8, 7, requires_grad=input_gradient)
    forward = 2 * 2 * (6 * 5) * 12 * (6 // groups) * 9
    meter = training(layer, lambda: layer(x))
    assert meter.by_component == {"shared": forward}
    assert meter.backward == (1 + input_gradient) * forward


def test_a_transposed_convolution() -> None:
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2)
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    forward = 2 * 2 * 25 * 4 * 6 * 9
    assert training(layer, lambda: layer(x)).total == 3 * forward


@pytest.mark.parametrize("kind", [1, 3])
def test_convolutions_of_other_dimensions(kind: int) -> None:
    layer = [nn.Conv1d, nn.Conv2d, nn.Conv3d][kind - 1](2, 3, 2, stride=2)
    x = torch.randn(2, 2, *[6] * kind)
    forward = 2 * 2 * 3**kind * 3 * 2 * 2**kind
    assert training(layer, lambda: layer(x)).total == 2 * forward


def rank1_sizes() -> tuple[int, int, int]:
    """Entries of a row that go into rank-1 layers, that come out, and those that come in at the first."""
    return 12 + 7, 7 + 5, 12


def test_the_first_task_of_batch_ensemble(forced: Callable[[str], None]) -> None:
    forced("scale")
    network = BatchEnsembleNetwork(body())
    network.begin_task(CLASSES)
    meter = training(network, lambda: network(images(), 0))
    ins, outs, first = rank1_sizes()
    assert meter.by_component == {
        "shared": ROWS * BODY,
        "head": ROWS * HEAD,
        "fast_weights": ROWS * (ins + outs),
    }
    # r of the first layer needs the gradient of its product with the image: nothing is saved there
    assert meter.backward == ROWS * 2 * (BODY + HEAD)
    # two for the vector, one towards the input unless that is the image
    # and the scaled input once more, which is not kept for the gradient of the weight
    assert meter.rank1_backward == ROWS * (4 * ins + 3 * outs - first)
    assert meter.rank1 == ROWS * (5 * ins + 4 * outs - first)
    assert meter.total == sum(meter.by_component.values()) + meter.backward + meter.rank1_backward


@pytest.mark.parametrize("members", [1, 3])
def test_a_later_task_costs_twice_the_forward_pass_of_what_is_shared(
    members: int, forced: Callable[[str], None]
) -> None:
    forced("scale")
    network = BatchEnsembleNetwork(body(), members_per_task=members).regrow([CLASSES] * 2)
    network.begin_task(CLASSES)
    meter = training(network, lambda: network.member_logits(images(), 2))
    ins, outs, first = rank1_sizes()
    # the shared weights have no gradient, the activations do; the new head has both
    rows = ROWS * members
    assert meter.total - meter.rank1 == rows * (2 * BODY + 3 * HEAD)
    assert meter.rank1 == rows * (4 * (ins + outs) - first)


def test_merging_costs_a_later_task_products_of_its_weights_size_and_sums_over_activations(
    forced: Callable[[str], None],
) -> None:
    forced("merge")
    network = BatchEnsembleNetwork(body()).regrow([CLASSES] * 2)
    network.begin_task(CLASSES)
    meter = training(network, lambda: network(images(), 2))
    first, second = 12 * 7, 7 * 5
    assert meter.total - meter.rank1 == ROWS * (2 * BODY + 3 * HEAD)
    assert meter.rank1_forward == 2 * (first + second)
    # the first layer, whose input needs no gradient, by that of its dense weight; the second by sums
    assert meter.rank1_backward == (6 + 1) * first + 2 * ROWS * (7 + 5)


def test_a_committed_task_costs_only_its_forward_pass(forced: Callable[[str], None]) -> None:
    forced("scale")
    network = BatchEnsembleNetwork(body()).regrow([CLASSES] * 2)
    meter = forward_flops(network, lambda: network(images(), 1))
    ins, outs, _ = rank1_sizes()
    assert meter.total == ROWS * (BODY + HEAD + ins + outs)
    assert meter.by_component["fast_weights"] == ROWS * (ins + outs) == meter.rank1


def test_rank1_products_of_convolutions(forced: Callable[[str], None]) -> None:
    forced("scale")
    ensemble = batch_ensemble(nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.ReLU(), nn.Conv2d(3, 4, 3)), 2)
    meter = forward_flops(ensemble, lambda: ensemble(torch.randn(5, 2, 8, 8)))
    products = 2 * 36 + 3 * 36 + 3 * 36 + 4 * 16 + (2 * 64 - 2 * 36)
    dense = 2 * (36 * 3 * 2 * 9 + 16 * 4 * 3 * 9)
    assert meter.rank1 == 2 * 5 * products
    assert meter.total == 2 * 5 * (dense + products)


def test_one_column_of_many_costs_one_network() -> None:
    network = Independent(body()).regrow([CLASSES] * 3)
    meter = forward_flops(network, lambda: network(images(), 1))
    assert meter.by_component == {"column": ROWS * BODY, "head": ROWS * HEAD}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("members", [False, True])
def test_attention(need_weights: bool, members: bool) -> None:
    plain = nn.MultiheadAttention(8, 2, batch_first=True)
    network = convert(plain, 1)[0] if members else plain.train()
    x = torch.randn(2, 5, 8)
    with torch.enable_grad(), FlopMeter(network) as meter:
        network(x, x, x, need_weights=need_weights)
    projections, products = 4 * 2 * 2 * 5 * 8 * 8, 2 * 2 * 2 * 5 * 5 * 8
    assert meter.by_component["shared"] == projections + products
    assert meter.backward == 0


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("autocast", [True, False])
def test_every_mode_counts_the_same(context: Any, autocast: bool) -> None:
    network = lenet5(10)
    with context(), torch.autocast("cpu", torch.bfloat16, enabled=autocast), FlopMeter(network) as meter:
        network(torch.randn(2, 3, 32, 32))
    assert meter.total == 2 * (LENET + 2 * 84 * 10)


def test_counting_changes_nothing() -> None:
    network = BatchEnsembleNetwork(resnet20(width=2)).regrow([3, 3])
    network.begin_task(3)
    network.train()
    network.body.features[4].eval()
    modes = [module.training for module in network.modules()]
    before = copy.deepcopy(network.state_dict())
    x = torch.randn(2, 3, 8, 8)
    forward_flops(network, lambda: network(x, 1))
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules()]
    assert sum(hooks) == 0


def test_an_error_inside_leaves_the_network_as_it_was() -> None:
    network = mlp(3, input_shape=(3, 2, 2)).train()
    with pytest.raises(RuntimeError):
        forward_flops(network, lambda: network(torch.zeros(1, 5)))
    assert network.training
    assert not any(module._forward_hooks for module in network.modules())


def test_a_members_forward_pass_in_training_leaves_rank1_gradients_of_committed_vectors_out(
    forced: Callable[[str], None],
) -> None:
    forced("scale")
    body_, selection = convert(body(), 1)
    for module in body_.modules():
        if isinstance(module, Rank1Layer):
            module.r.commit()
            module.s.commit()
    with selection.of(0):
        meter = training(body_, lambda: body_(images()))
    ins, outs, first = rank1_sizes()
    # towards the activations only, and the scaled inputs once more
    assert meter.rank1_backward == ROWS * (2 * ins - first + outs)


def test_folding_rank1_into_a_convolution_costs_products_of_its_weights_size() -> None:
    conv = Rank1Conv2d(3, 4, kernel_size=3, num_members=2)
    conv.weight.requires_grad_(False)
    x = torch.randn(8, 3, 10, 10)
    with conv.selection.of(1):
        meter = training(conv, lambda: conv(x))
    weight, outer = 4 * 3 * 9, 4 * 3
    assert meter.rank1_forward == outer + weight
    # and the outer product once more
    assert meter.rank1_backward == 2 * weight + 5 * outer
    # the folded weight's gradient, and none towards the images
    assert meter.backward == 2 * weight * 8 * 8 * 8


@pytest.mark.parametrize(("rank", "additive"), [(3, 0), (1, 2), (2, 1)])
@pytest.mark.parametrize("groups", [1, 2])
def test_products_of_further_pairs_are_rank1_work(rank: int, additive: int, groups: int) -> None:
    conv = Rank1Conv2d(
        2 * groups, 4, kernel_size=3, groups=groups, num_members=2, rank=rank, additive=additive
    )
    conv.weight.requires_grad_(False)
    x = torch.randn(8, 2 * groups, 10, 10)
    with conv.selection.of(1):
        meter = training(conv, lambda: conv(x))
    weight, outer = 4 * 2 * 9, 4 * 2
    products = 2 * ((rank - 1) * outer + additive * weight)
    sums = outer * (rank > 1) + weight * (additive > 0)
    assert meter.rank1_forward == meter.by_component["fast_weights"] == outer + weight + products + sums
    assert meter.rank1_backward == 2 * weight + 4 * outer + 2 * products
    convolution = 2 * weight * 8 * 8 * 8
    assert meter.by_component["shared"] == meter.backward == convolution
    assert meter.total == 2 * convolution + meter.rank1
    evaluated = forward_flops(conv, lambda: conv(x))
    assert evaluated.rank1 == 2 * meter.rank1_forward  # both members, four rows each
    assert evaluated.by_component["shared"] == convolution
