from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from lifelong_ens.accounting.components import sizes
from lifelong_ens.errors import InputError
from lifelong_ens.networks.channels import trace_channels
from lifelong_ens.networks.choosing import choose
from lifelong_ens.networks.plain import lenet5, mlp, resnet18, resnet20, vgg11_half
from lifelong_ens.networks.structured import StructuredNetwork


def grown(
    body: nn.Module, num_tasks: int = 2, shape: tuple[int, int, int] = (3, 32, 32), **options: float
) -> StructuredNetwork:
    """A network whose tasks own random units with random weights, its norms' statistics moved."""
    torch.manual_seed(1)
    network = StructuredNetwork(body, **options)
    for _ in range(num_tasks):
        network.train().begin_task(3)
        network.start_scales()
        free = {name: layer.free_units(network.num_tasks - 1) for name, layer in network.layers()}
        members = [
            choose({name: torch.rand(len(units)) for name, units in free.items()}, free, 0.5)
            for _ in range(network.members_per_task)
        ]
        network.choose_units({name: torch.stack([units[name] for units in members]) for name in free})
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter) / max(parameter[0].numel(), 10) ** 0.5)
        for _ in range(3):
            network(torch.randn(8, *shape) + 0.5, network.num_tasks - 1)
        network.finish_task()
    return network.eval()


def test_masks_are_a_bit_for_every_unit_and_member():
    assert sizes(grown(vgg11_half(), num_tasks=1))["mask"].bytes == 172
    assert sizes(grown(vgg11_half(), num_tasks=2, members_per_task=3))["mask"].bytes == 172 * 2 * 3


def small_body(num_features: int = 9) -> nn.Sequential:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, num_features), nn.ReLU())
    body.num_features = num_features
    return body


def test_members_have_units_of_their_own_and_all_of_earlier_tasks():
    network = grown(small_body(), 3, (1, 3, 4), members_per_task=2)
    for _, layer in network.layers():
        masks = layer.masks
        for task in range(3):
            rows, before = masks.rows(2 * task, 2), masks.used(task - 1)
            own = rows & ~before
            assert (rows & before == before).all()
            assert own.any(dim=1).all() or not layer.free_units(task).any()
        assert not torch.equal(*masks.rows(0, 2))


def test_members_answer_as_networks_of_their_own_and_their_probabilities_are_averaged():
    network, x = grown(resnet20(width=4), members_per_task=3), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        logits = network.member_logits(x, 1)
        for member in range(3):
            with network.units.of(3 + member):
                alone = network.heads(network.body(x), 1)
            torch.testing.assert_close(logits[member], alone, rtol=1e-4, atol=1e-5)
        mean = torch.softmax(logits, dim=-1).mean(dim=0)
        torch.testing.assert_close(network(x, 1).exp(), mean)
        tasks = torch.tensor([1, 0, 1, 0])
        mixed = network.member_logits(x, tasks)
        torch.testing.assert_close(mixed[:, 0], logits[:, 0], rtol=1e-4, atol=1e-5)


def scaled(network: StructuredNetwork, x: Tensor, member: int) -> Tensor:
    """Logits of a ``small_body`` with one member's scales, written out."""
    x = x.flatten(1)
    for _, layer in network.layers():
        x = torch.relu(F.linear(x, layer.layer.weight, layer.layer.bias) * layer.scale[member])
    return network.heads[-1](x)


@pytest.mark.parametrize("rows", [7, 2])
def test_a_batch_is_split_over_the_scales_and_what_is_left_over_goes_to_the_first(rows):
    network = StructuredNetwork(small_body(), members_per_task=3)
    network.begin_task(4)
    network.start_scales()
    x = torch.randn(rows, 1, 3, 4)
    owners = {7: [0, 0, 1, 1, 2, 2, 0], 2: [0, 0]}[rows]
    expected = torch.stack([scaled(network, x, member)[row] for row, member in enumerate(owners)])
    torch.testing.assert_close(network.split_logits(x, 0), expected)
    every = torch.stack([scaled(network, x, member) for member in range(3)])
    torch.testing.assert_close(network.member_logits(x, 0), every)


def test_while_units_are_chosen_all_rows_share_the_statistics_of_their_batch():
    body = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.BatchNorm1d(6))
    body.num_features = 6
    network = StructuredNetwork(body, members_per_task=2)
    network.begin_task(3)
    network.start_scales()
    layer, x = network.body[1], torch.randn(8, 1, 3, 4)
    z = F.linear(x.flatten(1), layer.layer.weight, layer.layer.bias)
    z = z * layer.scale.repeat_interleave(4, dim=0)
    expected = F.batch_norm(z, None, None, training=True)
    torch.testing.assert_close(network.split_logits(x, 0), network.heads[0](expected))


def test_a_network_that_grows_offers_every_task_its_share():
    network = grown(small_body(), 5, (1, 3, 4), grow=0.4)
    widths = {"1": [10], "3": [9]}
    for name, layer in network.layers():
        share, free = math.ceil(0.4 * widths[name][0]), widths[name][0]
        for task in range(5):
            more = max(share - free, 0)
            widths[name] += [widths[name][-1] + more] if task else []
            assert int(layer.free_units(task).sum()) == free + more >= share
            # the task leaves the lower half
            free = math.ceil(0.5 * (free + more - 1))
    assert network.units.widths == [list(row) for row in zip(*widths.values(), strict=True)]
    assert network.units.widths[-1] > network.units.widths[0]
    first, second = network.layers()
    assert first[1].layer.weight.shape == (widths["1"][-1], 12)
    assert second[1].layer.weight.shape == (widths["3"][-1], widths["1"][-1])
    assert [head.in_features for head in network.heads] == widths["3"]
    assert not network.exhausted
    assert network.notes()[0] == f"1 was widened from 10 to {widths['1'][-1]} units, first for task 3"


BODIES: dict[str, Callable[[], nn.Module]] = {
    "lenet5": lenet5,
    "vgg11_half": lambda: vgg11_half(batch_norm=True),
    "resnet20": lambda: resnet20(width=4),
}


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("members", [1, 2])
def test_growth_moves_no_earlier_task_by_a_bit(body, members):
    x = torch.randn(4, 3, 32, 32)
    torch.manual_seed(0)
    plain = BODIES[body]()
    short = grown(plain, 2, grow=0.5, members_per_task=members)
    long = grown(plain, 4, grow=0.5, members_per_task=members)
    assert long.units.widths[-1] > short.units.widths[-1]
    with torch.no_grad():
        for task in range(2):
            assert torch.equal(short.member_logits(x, task), long.member_logits(x, task))


def test_new_units_on_a_residual_stream_are_written_and_read_by_all_its_layers():
    network = grown(resnet20(width=4), 4, grow=0.5)
    groups, layers = trace_channels(resnet20(width=4)), dict(network.layers())
    for group, width in zip(groups, network.units.widths[-1], strict=True):
        assert width > group.size
        assert {len(layers[name].layer.weight) for name in group.writers} == {width}
        assert all(layers[name].layer.weight.shape[1] == width for name in group.readers)


def test_a_grown_network_is_restored_with_its_widths():
    network, x = grown(resnet20(width=4), 4, grow=0.5), torch.randn(3, 3, 32, 32)
    other = StructuredNetwork(resnet20(width=4), grow=0.5).regrow(network.classes_per_task)
    other.load_state_dict(network.state_dict())
    assert other.notes() == network.notes()
    with torch.no_grad():
        for task in range(4):
            assert torch.equal(network(x, task), other.eval()(x, task))
    fixed = StructuredNetwork(resnet20(width=4)).regrow(network.classes_per_task)
    with pytest.raises(RuntimeError, match="sizes"):
        fixed.load_state_dict(network.state_dict())


def test_what_cannot_be_followed_cannot_grow():
    body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Flatten())
    body.num_features = 144
    with pytest.raises(InputError, match="GroupNorm"):
        StructuredNetwork(body, grow=0.5)


def weights(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    "build", [mlp, lenet5, vgg11_half, lambda **options: vgg11_half(batch_norm=True, **options)]
)
def test_a_task_is_exported_as_a_smaller_dense_network(build):
    network = grown(build(input_shape=(3, 32, 32)), num_tasks=3)
    x = torch.randn(5, 3, 32, 32)
    counts = []
    for task in range(3):
        exported = network.export_task(task)
        with torch.no_grad():
            torch.testing.assert_close(exported(x), network(x, task), rtol=1e-5, atol=1e-5)
        assert not any("structured" in type(module).__module__ for module in exported.modules())
        counts.append(weights(exported))
    assert counts == sorted(counts)
    whole = sum(layer.layer.weight.numel() for _, layer in network.layers())
    # a layer between two others shrinks on both sides
    assert counts[0] < 0.6 * whole


def test_flattened_features_and_nested_sequences_are_exported():
    body = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    )
    body.num_features = 24
    network, x = grown(body), torch.randn(4, 3, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(network.export_task(0)(x), network(x, 0), rtol=1e-5, atol=1e-5)


def test_residual_networks_are_cut_too():
    network, x = grown(resnet18(width=8), 2), torch.randn(3, 3, 32, 32)
    for task in range(2):
        exported = network.export_task(task)
        with torch.no_grad():
            torch.testing.assert_close(exported(x), network(x, task), rtol=1e-5, atol=1e-5)
        assert weights(exported) == resnet18_weights(network, task)
    assert resnet18_weights(network, 0) < 0.75 * weights(resnet18(3, width=8))


def resnet18_weights(network: StructuredNetwork, task: int) -> int:
    """Numbers left of a ResNet-18 for RGB images and three classes: rows times columns of what is on."""
    on = {name: layer.masks.used(task) for name, layer in network.layers()}

    def kept(*names: str) -> int:
        return int(torch.stack([on[f"features.{name}"] for name in names]).any(dim=0).sum())

    stream = kept("0", "3.conv2", "4.conv2")
    total = stream * 27 + 2 * stream
    for stage in range(4):
        first, second = 3 + 2 * stage, 4 + 2 * stage
        before, shortcut = stream, [f"{first}.shortcut.0"] if stage else []
        if stage:
            stream = kept(f"{first}.conv2", f"{second}.conv2", *shortcut)
            total += before * stream + 2 * stream
        for block, width_in in ((first, before), (second, stream)):
            hidden = kept(f"{block}.conv1")
            total += 9 * hidden * (width_in + stream) + 2 * (hidden + stream)
    return total + 3 * stream + 3


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (lambda: torchvision.models.resnet18(num_classes=3), {}),
        (lambda: resnet20(width=4), {"members_per_task": 2}),
        (lambda: resnet20(width=4), {"members_per_task": 2, "grow": 0.75}),
        (lenet5, {"members_per_task": 3}),
        (lenet5, {"grow": 0.75}),
    ],
)
def test_every_member_of_every_task_is_exported(build, options):
    network, x = grown(build(), 2, **options), torch.randn(3, 3, 32, 32)
    whole = sum(layer.layer.weight.numel() for _, layer in network.layers())
    for task in range(2):
        logits = network.member_logits(x, task)
        for member in range(network.members_per_task):
            exported = network.export_task(task, member)
            with torch.no_grad():
                torch.testing.assert_close(exported(x), logits[member].detach(), rtol=1e-5, atol=1e-5)
            assert weights(exported) < whole
    with pytest.raises(IndexError, match="member 3 does not exist"):
        network.export_task(0, 3)


class PreActivation(nn.Module):
    """A norm on a residual sum, whose shift keeps channels alive that no layer writes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_features = 6
        self.stem, self.branch = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.branch(torch.relu(x))
        return torch.relu(self.last(torch.relu(self.norm(x)))).mean((2, 3))


def test_channels_behind_a_norm_of_a_sum_stay():
    network, x = grown(PreActivation(), grow=0.75), torch.randn(3, 3, 9, 9)
    exported = network.export_task(0)
    with torch.no_grad():
        torch.testing.assert_close(exported(x), network(x, 0), rtol=1e-5, atol=1e-5)
    assert len(exported[0].stem.weight) == 6
    assert len(exported[0].last.weight) == 3


def test_export_leaves_the_network_as_it_is():
    network, x = grown(resnet20(width=4)), torch.randn(3, 3, 32, 32)
    before, state = network(x, 1), copy.deepcopy(network.state_dict())
    network.export_task(1)
    assert torch.equal(network(x, 1), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


def test_what_cannot_be_cut_is_said():
    body = nn.Sequential(nn.Flatten(), nn.Linear(3072, 4), nn.Sigmoid())
    body.num_features = 4
    with pytest.raises(InputError, match=r"through 2 \(Sigmoid\)"):
        grown(body).export_task(0)
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten())
    body.num_features = 3600
    with pytest.raises(InputError, match=r"through 1 \(GroupNorm\)"):
        grown(body).export_task(0)


def test_units_that_are_off_leave_the_norm_as_zeros():
    network = grown(vgg11_half(batch_norm=True))
    seen: list[Tensor] = []
    network.body.features[1].register_forward_hook(lambda *args: seen.append(args[-1]))
    network(torch.randn(4, 3, 32, 32), 0)
    on = network.body.features[0].masks.used(0)
    assert not seen[0][:, ~on].any()
    assert seen[0][:, on].any()


def test_rows_of_several_tasks_run_as_those_of_one():
    network, x = grown(resnet20(width=4)), torch.randn(6, 3, 32, 32)
    tasks = torch.tensor([1, 0, 0, 1, 1, 0])
    with torch.no_grad():
        mixed = network(x, tasks)
        for task in range(2):
            torch.testing.assert_close(mixed[tasks == task], network(x[tasks == task], task))


@pytest.mark.parametrize(
    "norm", [nn.GroupNorm(2, 4), nn.LayerNorm([4, 6, 6]), nn.BatchNorm2d(4, affine=False)]
)
def test_other_norms_forget_nothing_either(norm):
    body = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(144, 9))
    body.num_features = 9
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(grown(body, 1, (1, 8, 8))(x, 0), grown(body, 3, (1, 8, 8))(x, 0))
