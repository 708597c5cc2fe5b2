from __future__ import annotations

import copy
import functools

import pytest
import torch
import torchvision
from torch import nn

from lifelong_ens import batch_ensemble, networks
from lifelong_ens.errors import InputError
from lifelong_ens.networks.plain import (
    lenet5,
    mlp,
    reinitialise,
    resnet18,
    resnet20,
    resnet32,
    vgg11_half,
    without_classifier,
    wrn28_10,
)


@pytest.mark.parametrize("name", networks.BUILDERS)
@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 47, 33)])
def test_every_builder_gives_features_or_logits(name: str, shape: tuple[int, int, int]) -> None:
    builder = getattr(networks, name)
    if name == "wrn28_10":
        builder = functools.partial(builder, width=1)
    x = torch.randn(2, *shape)
    body = builder(input_shape=shape).eval()
    assert body(x).shape == (2, body.num_features)
    assert builder(7, input_shape=shape).eval()(x).shape == (2, 7)


def test_an_unknown_network_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="resnet19"):
        _ = networks.resnet19


def test_mlp_is_linear_layers_with_relu_between() -> None:
    network = mlp(3, input_shape=(1, 2, 2), hidden=(5, 4))
    x = torch.randn(6, 1, 2, 2)
    first, second = (layer for layer in network.features if isinstance(layer, nn.Linear))
    assert (first.in_features, second.out_features) == (4, 4)
    hidden = torch.relu(second(torch.relu(first(x.flatten(1)))))
    torch.testing.assert_close(network(x), network.fc(hidden))


@pytest.mark.parametrize("shape", [(1, 15, 16), (1, 16, 15), (3, 8, 8)])
def test_lenet5_says_what_does_not_fit(shape: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match=f"at least 16x16, these are {shape[1]}x{shape[2]}.*--image_size 32"):
        lenet5(input_shape=shape)


def test_lenet5_of_a_width_has_so_many_channels_and_units() -> None:
    layers = [layer for layer in lenet5(10, width=0.5).modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert [tuple(layer.weight.shape[:2]) for layer in layers] == [
        (3, 3),
        (8, 3),
        (60, 200),
        (42, 60),
        (10, 42),
    ]
    narrowest = lenet5(width=0.01)
    assert narrowest.num_features == 1
    assert narrowest(torch.randn(2, 3, 32, 32)).shape == (2, 1)
    with pytest.raises(InputError, match="above 0"):
        lenet5(width=0.0)


@pytest.mark.parametrize("shape", [(1, 31, 32), (3, 32, 16)])
def test_vgg11_half_says_what_does_not_fit(shape: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match=f"at least 32x32, these are {shape[1]}x{shape[2]}.*--image_size 32"):
        vgg11_half(input_shape=shape)


def test_vgg11_half_has_the_published_number_of_weights() -> None:
    for batch_norm, norms in ((False, 0), (True, 8)):
        body = vgg11_half(batch_norm=batch_norm)
        convolutions = [module for module in body.modules() if isinstance(module, nn.Conv2d)]
        assert sum(layer.weight.numel() for layer in convolutions) == 2_304_864
        assert sum(len(layer.weight) for layer in convolutions) == 1_376
        assert body.num_features == 256
        assert sum(isinstance(module, nn.BatchNorm2d) for module in body.modules()) == norms


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("build", "single", "four_members"),
    [
        (functools.partial(wrn28_10, 10), 36_479_194, 36_557_548),
        (functools.partial(wrn28_10, 100), 36_536_884, 36_615_868),
        (functools.partial(resnet32, 10, width=64), 7_427_914, 7_466_652),
    ],
)
def test_wide_networks_have_the_counted_parameters(build, single: int, four_members: int) -> None:
    # BatchEnsemble's networks, in uncertainty-baselines: 36.5 M and 36.6 M, 7.43 M and 7.47 M
    with torch.device("meta"):
        network = build()
        assert count(network) == single
        assert count(batch_ensemble(network, 4, norm="shared")) == four_members


def test_wide_network_normalises_before_it_convolves() -> None:
    block = wrn28_10(width=1, dropout=0.5).features[5].eval()
    x = torch.randn(2, 16, 8, 8)
    active = torch.relu(block.bn1(x))
    first = torch.relu(block.bn2(block.conv1(active)))
    torch.testing.assert_close(block(x), block.conv2(first) + block.shortcut(active))
    torch.manual_seed(0)
    assert not torch.equal(block.train()(x), block(x))
    unchanged = wrn28_10(width=1).features[1]
    assert unchanged.shortcut is None
    nn.init.zeros_(unchanged.conv2.weight)
    torch.testing.assert_close(unchanged(x), x)


def test_wide_network_starts_with_the_variance_of_its_outputs() -> None:
    weight = wrn28_10(width=4).features[9].conv2.weight.detach()
    assert float(weight.std()) == pytest.approx((2 / (9 * weight.shape[0])) ** 0.5, rel=0.02)


@pytest.mark.parametrize(("builder", "strides"), [(resnet18, 8), (resnet20, 4)])
def test_residual_networks_halve_between_stages(builder, strides: int) -> None:
    network = builder(width=4).eval()
    before_pooling = network.features[:-2](torch.randn(1, 3, 32, 32))
    assert before_pooling.shape[2:] == (32 // strides, 32 // strides)
    assert network.features[-2:](before_pooling).shape == (1, network.num_features)


def test_a_block_adds_its_shortcut() -> None:
    block = resnet20(width=4).features[6].eval()
    assert isinstance(block.shortcut, nn.Sequential)
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(block(x), torch.relu(block.shortcut(x)))


def test_the_classifier_makes_way_for_features() -> None:
    with torch.device("meta"):
        network = torchvision.models.resnet18(num_classes=9)
        transformer = torchvision.models.vit_b_16()
    body = without_classifier(network)
    assert (body.num_features, type(body.fc)) == (512, nn.Identity)
    assert body(torch.zeros(2, 3, 64, 64, device="meta")).shape == (2, 512)
    assert without_classifier(body) is body
    assert isinstance(without_classifier(transformer).heads.head, nn.Identity)
    assert transformer.num_features == 768


def test_a_network_without_linear_layer_is_an_error() -> None:
    with pytest.raises(InputError, match="Sequential has no linear layer to take off"):
        without_classifier(nn.Sequential(nn.Conv2d(1, 1, 1)))


def test_all_weights_are_drawn_anew() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    network = nn.Sequential(resnet20(3, width=4), layer)
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.fill_(5)
    before = copy.deepcopy(network.state_dict())
    assert reinitialise(network) is network
    for name, tensor in network.state_dict().items():
        assert (tensor != before[name]).all(), name
    assert float(network[0].features[1].running_var[0]) == 1
