"""What is tuned on a network, and with which weight decay."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from lifelong_ens.convert import batch_ensemble
from lifelong_ens.ensembles.space import decay_groups, hyper_space, layer_groups, needed_validation
from lifelong_ens.errors import InputError
from lifelong_ens.networks import mlp, resnet20

L2 = (1e-2, 1e2)


def test_groups_are_the_ends_and_thirds_of_what_is_between():
    groups = layer_groups(mlp(10, hidden=(5, 5, 5, 5)))
    assert [*groups.values()] == [
        ("l2_input", "l2_input"),
        ("l2_1", "l2_1"),
        ("l2_2", "l2_2"),
        ("l2_3", "l2_3"),
        ("l2_output", "l2_output_bias"),
    ]
    kernels = [kernel for kernel, _ in layer_groups(resnet20(10)).values()]
    assert len(kernels) == 22
    assert [kernels.count(name) for name in dict.fromkeys(kernels)] == [1, 7, 7, 6, 1]
    resnet = layer_groups(torchvision.models.resnet18(num_classes=3))
    assert resnet["conv1"] == ("l2_input",) * 2
    assert resnet["fc"] == ("l2_output", "l2_output_bias")
    assert resnet["layer2.0.conv1"] == ("l2_1", "l2_1")


def test_small_networks():
    assert [*layer_groups(nn.Linear(3, 2)).values()] == [("l2_output", "l2_output_bias")]
    assert [*layer_groups(nn.Linear(3, 2, bias=False)).values()] == [("l2_output", "l2_output")]
    assert len(layer_groups(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)))) == 2
    with pytest.raises(InputError, match="no linear layer"):
        hyper_space(nn.ReLU(), 100, l2=L2)


def test_ranges_and_draws():
    network = nn.Sequential(
        nn.Linear(3, 4), nn.Dropout(0.3), nn.Linear(4, 4), nn.Dropout2d(), nn.Linear(4, 2)
    )
    space = hyper_space(
        network, 100, l2=L2, label_smoothing=(1e-5, 0.2), dropout=(1e-3, 0.9), learning_rate=(1e-3, 1)
    )
    assert [*space.ranges] == [
        "l2_input",
        "l2_1",
        "l2_output",
        "l2_output_bias",
        "dropout_1",
        "dropout_3",
        "label_smoothing",
        "learning_rate",
    ]
    generator = torch.Generator().manual_seed(0)
    draws = [space.draw(generator) for _ in range(2000)]
    logs = torch.tensor([[*draw.values()] for draw in draws]).log()
    low, high = space.low.log(), space.high.log()
    assert ((logs >= low) & (logs <= high)).all()
    torch.testing.assert_close(logs.mean(0), (low + high) / 2, rtol=0, atol=0.3)
    torch.testing.assert_close(logs.std(0), (high - low) / 12**0.5, rtol=0.1, atol=0)
    without = hyper_space(network, 100, l2=L2)
    assert [*without.ranges] == ["l2_input", "l2_1", "l2_output", "l2_output_bias"]
    assert without.dropouts == {}


@pytest.mark.parametrize(
    ("option", "value"),
    [("l2", (0.0, 1.0)), ("l2", (1.0, 1.0)), ("label_smoothing", (0.1, 1.0)), ("dropout", (0.1, 2.0))],
)
def test_impossible_ranges_are_refused(option, value):
    network = nn.Sequential(nn.Linear(3, 4), nn.Dropout())
    with pytest.raises(InputError, match="0 < lowest < highest"):
        hyper_space(network, 100, **{"l2": L2, option: value})


def test_one_step_of_decay_is_the_gradient_of_the_l2_term():
    """Weight decay is twice the coefficient over N; norms keep that of the fit, fast weights have none."""
    torch.manual_seed(0)
    network = batch_ensemble(resnet20(5, width=4), 2).body
    plain = resnet20(5, width=4)
    for net in (network, plain):
        space = hyper_space(plain, 40, l2=L2)
        values = {name: 0.5 + index for index, name in enumerate(space.ranges)}
        layers = {}
        for name, groups in layer_groups(plain).items():
            layer = net.get_submodule(name)
            for parameter, group in zip((layer.weight, layer.bias), groups, strict=True):
                if parameter is not None:
                    layers[id(parameter)] = values[group]
        groups = decay_groups(net, space, values)
        assert len(groups) < 10
        seen = [id(parameter) for group in groups for parameter in group["params"]]
        assert sorted(seen) == sorted(id(parameter) for parameter in net.parameters())
        before = {id(parameter): parameter.detach().clone() for parameter in net.parameters()}
        optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=0.3)
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        fast = {id(p) for name, p in net.named_parameters() if name.endswith((".r.active", ".s.active"))}
        for parameter in net.parameters():
            old = before[id(parameter)].requires_grad_()
            if id(parameter) in layers:
                loss = layers[id(parameter)] / 40 * old.square().sum()
            else:
                loss = (0.0 if id(parameter) in fast else 0.15) * old.square().sum()
            (gradient,) = torch.autograd.grad(loss, old)
            torch.testing.assert_close(parameter, old - 0.1 * gradient)


def test_validation_images_are_needed(digits):
    train, validation, _ = digits
    assert needed_validation("x", train, validation, 1) is validation
    with pytest.raises(InputError, match="x needs validation images"):
        needed_validation("x", train, None, 1)
    with pytest.raises(InputError, match="7 for 10 classes"):
        needed_validation("x", train, validation.subset(torch.arange(7)), 1)
    with pytest.raises(InputError, match="at least one member"):
        needed_validation("x", train, validation, 0)
