from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from lifelong_ens.networks.channels import Channels, trace_channels
from lifelong_ens.networks.cutting import cut_out, keep_channels, positions
from lifelong_ens.networks.plain import lenet5, resnet20, vgg11_half


def test_a_chain_without_channels_that_are_zero_is_smaller_and_the_same():
    torch.manual_seed(0)
    body, x = lenet5(5), torch.randn(3, 3, 32, 32)
    modules = dict(body.named_modules())
    groups = trace_channels(body)
    kept = [torch.arange(group.size) % 3 != 1 for group in groups]
    # the classifier keeps its rows
    kept[-1][:] = True
    with torch.no_grad():
        for group, keep in zip(groups, kept, strict=True):
            for name in group.writers:
                modules[name].weight[~keep] = 0
                modules[name].bias[~keep] = 0
        expected = body(x)
        keep_channels(body, groups, kept)
        torch.testing.assert_close(body(x), expected, rtol=1e-5, atol=1e-6)
    shapes = [tuple(modules[group.name].weight.shape) for group in groups]
    assert shapes == [(4, 3, 5, 5), (11, 4, 5, 5), (80, 275), (56, 80), (5, 56)]
    assert (modules["features.7"].in_features, modules["features.7"].out_features) == (275, 80)


def test_a_flattened_channel_has_all_its_positions():
    assert positions(torch.tensor([0, 2]), 3).tolist() == [0, 1, 2, 6, 7, 8]


def flattening_vgg() -> nn.Module:
    """Convolutions with norms, whose last map of 2x2 is flattened for hidden linear layers."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(2)),
        nn.Flatten(),
        nn.Sequential(
            nn.Linear(48, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 9), nn.ReLU(), nn.Linear(9, 5)
        ),
    )


NETWORKS = {
    "resnet20": partial(resnet20, 5, width=4),
    "vgg11_half": partial(vgg11_half, 5, batch_norm=True),
    "flattening_vgg": flattening_vgg,
    "torchvision resnet18": partial(torchvision.models.resnet18, weights=None, num_classes=5),
}


def silenced(network: nn.Module, groups: list[Channels], kept: Mapping[str, Tensor]) -> nn.Module:
    """The whole network, where nothing of the channels that are not kept reaches any layer that reads them."""
    network = copy.deepcopy(network)
    layers = dict(network.named_modules())

    def silence(keep: Tensor, layer: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        x = inputs[0]
        if isinstance(layer, nn.Linear):
            # the numbers of a channel stand side by side
            return (x.unflatten(1, (len(keep), -1)) * keep[:, None]).flatten(1)
        return x * keep.view(1, -1, 1, 1)

    for group in groups:
        for reader in group.readers:
            layers[reader].register_forward_pre_hook(partial(silence, kept[group.name]))
    return network


@pytest.fixture(params=NETWORKS)
def cut_network(request, randomise):
    """A network, its channels, and some of them: a different number of every group, all of the classifier's."""
    network = randomise(NETWORKS[request.param]()).eval()
    groups = trace_channels(network)
    generator = torch.Generator().manual_seed(1)
    kept = {}
    for index, group in enumerate(groups):
        keep = torch.rand(group.size, generator=generator) < (0.3, 0.5, 0.8)[index % 3]
        keep[0] = True
        kept[group.name] = keep | group.features
    return network, groups, kept


def test_a_smaller_copy_is_the_network_with_what_was_cut_silenced(cut_network):
    network, groups, kept = cut_network
    before = copy.deepcopy(network.state_dict())
    small = cut_out(network, groups, kept).eval()
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = silenced(network, groups, kept)(x)
        torch.testing.assert_close(small(x), expected, rtol=1e-5, atol=1e-5)
        assert float((network(x) - expected).abs().max()) > 1e-3
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    layers: dict[str, Any] = dict(small.named_modules())
    for group in groups:
        width = int(kept[group.name].sum())
        assert all(len(layers[name].weight) == width for name in group.writers)
        assert all(layers[name].num_features == width for name in group.norms)


def test_groups_that_are_not_named_stay_whole(cut_network):
    network, groups, kept = cut_network
    name = groups[1].name
    small: Any = cut_out(network, groups, {name: kept[name]})
    found = [len(dict(small.named_modules())[group.name].weight) for group in groups]
    assert found == [
        int(kept[name].sum()) if index == 1 else group.size for index, group in enumerate(groups)
    ]


def test_torch_pruning_cuts_the_same(cut_network):
    tp = pytest.importorskip("torch_pruning")
    network, groups, kept = cut_network
    x = torch.randn(4, 3, 32, 32)
    other = copy.deepcopy(network)
    graph = tp.DependencyGraph().build_dependency(other, example_inputs=x)
    for group in groups:
        cut = (~kept[group.name]).nonzero().squeeze(1).tolist()
        if cut:
            layer = dict(other.named_modules())[group.name]
            prune = (
                tp.prune_linear_out_channels if isinstance(layer, nn.Linear) else tp.prune_conv_out_channels
            )
            graph.get_pruning_group(layer, prune, idxs=cut).prune()
    small = cut_out(network, groups, kept)
    expected = other.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in small.state_dict().items())
    with torch.no_grad():
        assert torch.equal(small(x), other(x))
