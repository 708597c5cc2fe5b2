from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lifelong_ens.errors import InputError
from lifelong_ens.layers.bank import Selection
from lifelong_ens.layers.bits import unpack
from lifelong_ens.networks.plain import Body
from strategies.supermasks import SupermaskLayer, SupermaskNetwork


def conv_net() -> Body:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 7, 3)]
    return Body(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 7, None)


def layers(network: SupermaskNetwork) -> list[SupermaskLayer]:
    return [module for module in network.modules() if isinstance(module, SupermaskLayer)]


def take_steps(network: SupermaskNetwork, task: int) -> None:
    trained = [p for p in network.parameters() if p.requires_grad]
    stepper = torch.optim.SGD(trained, lr=0.5, momentum=0.9, weight_decay=0.1)
    for _ in range(4):
        stepper.zero_grad()
        network(torch.randn(8, 1, 8, 8), task).square().mean().backward()
        stepper.step()


def test_weights_are_a_signed_constant_that_nothing_trains():
    plain = conv_net()
    signs = [module.weight.sign() for module in plain.modules() if isinstance(module, nn.Conv2d)]
    network = SupermaskNetwork(plain, density=0.25)
    for sign, layer, fan_in in zip(signs, layers(network), (9, 45), strict=True):
        torch.testing.assert_close(layer.weight, sign * math.sqrt(2 / (fan_in * 0.25)))
        assert not layer.layer.bias.any()
    before = [layer.weight.clone() for layer in layers(network)]
    network.begin_task(2)
    take_steps(network.train(), 0)
    assert all(
        torch.equal(weight, layer.weight) for weight, layer in zip(before, layers(network), strict=True)
    )
    trained = {name.rpartition(".")[2] for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {"scores", "weight", "bias"}  # of the masks and of the head


def test_masks_hold_exactly_the_share_asked_for_in_packed_bits():
    network = SupermaskNetwork(conv_net(), density=0.3).regrow([2, 2, 2])
    for layer in layers(network):
        size = layer.weight.numel()
        assert layer.masks.packed.shape == (3, math.ceil(size / 8))
        assert layer.masks.packed.dtype == torch.uint8
        assert unpack(layer.masks.packed, size).sum(dim=1).tolist() == [round(0.3 * size)] * 3
        assert layer.masks.scores is None


def test_gradient_passes_straight_through_to_the_scores():
    selection = Selection()
    layer = SupermaskLayer(nn.Linear(3, 2), selection, 0.5, "shared")
    layer.weight.requires_grad_(False)
    layer.masks.start(layer.weight)
    x = torch.randn(5, 3)
    with selection.of(0):
        y = layer(x)
    y.sum().backward()
    # dL/ds = dL/dW * W, at masked weights too
    expected = x.sum(dim=0).expand(2, 3) * layer.weight
    torch.testing.assert_close(layer.masks.scores.grad, expected)
    mask = torch.zeros(6)
    mask[layer.masks.scores.detach().flatten().topk(3).indices] = 1
    assert torch.equal(layer.task_weight(0).detach(), layer.weight * mask.view(2, 3))
    with selection.of(0):
        layer.masks.commit()
        assert torch.equal(layer(x), y)


def test_past_masks_stay_and_differ():
    network = SupermaskNetwork(conv_net()).train()
    x, outputs = torch.randn(6, 1, 8, 8), []
    for task in range(3):
        network.begin_task(2)
        take_steps(network.train(), task)
        network.finish_task()
        outputs.append(network.eval()(x, task).detach())
        assert all(torch.equal(network(x, past), outputs[past]) for past in range(task + 1))
    packed = layers(network)[1].masks.packed
    assert not torch.equal(packed[0], packed[1])


def test_mixed_task_batch_equals_per_task_calls():
    network = SupermaskNetwork(conv_net(), norm="per_member", bias="per_member").regrow([2, 3]).eval()
    x, task = torch.randn(5, 1, 8, 8), torch.tensor([1, 0, 1, 1, 0])
    logits = network(x, task)
    for one, classes in enumerate((2, 3)):
        torch.testing.assert_close(logits[task == one][:, :classes], network(x[task == one], one))


def test_a_task_in_training_continues_from_its_state():
    network = SupermaskNetwork(conv_net()).regrow([2]).train()
    network.begin_task(2)
    take_steps(network, 1)
    other = SupermaskNetwork(conv_net()).regrow([2])
    other.begin_task(2)
    other.load_state_dict(network.state_dict())
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(network.eval()(x, 1), other.eval()(x, 1))


def test_a_task_without_mask_is_an_error():
    network = SupermaskNetwork(conv_net()).regrow([2])
    with pytest.raises(IndexError, match="task 1 has no mask"):
        layers(network)[0].task_weight(1)


@pytest.mark.parametrize("density", [0, 1.5, -1])
def test_density_out_of_range_is_refused(density):
    with pytest.raises(InputError, match="density is above 0"):
        SupermaskNetwork(conv_net(), density=density)
