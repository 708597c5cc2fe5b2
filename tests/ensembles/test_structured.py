from __future__ import annotations

import copy
import functools
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifelong_ens.accounting.meter import TrainingMeter
from lifelong_ens.ensembles.ensemble import FILE, Ensemble
from lifelong_ens.ensembles.structured import (
    ScaledNetwork,
    channel_importance,
    choose_channels,
    cuttable_channels,
    fit_structured,
)
from lifelong_ens.ensembles.training import Training
from lifelong_ens.errors import DamagedFileError, InputError, UnfitNetworkError
from lifelong_ens.networks import mlp, resnet20, vgg11_half
from lifelong_ens.networks.channels import trace_channels
from lifelong_ens.networks.cutting import cut_out
from lifelong_ens.store import read_metadata, read_tensors, write_tensors
from lifelong_ens.training.data import ImageData
from lifelong_ens.training.fit import Fit

MLP = functools.partial(mlp, num_classes=10, input_shape=(1, 8, 8), hidden=(33, 16))
RESNET = functools.partial(resnet20, num_classes=10, input_shape=(1, 8, 8), width=4)
FIT = Fit(epochs=2, batch_size=64, learning_rate=0.05, weight_decay=1e-3)
# a step of this rate moves no weight by a bit
STILL = Fit(epochs=1, batch_size=64, learning_rate=1e-30, weight_decay=0.0)


def noise(count: int, shape: tuple[int, int, int], num_classes: int = 10) -> ImageData:
    """Images without any meaning."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, *shape), dtype=torch.uint8, generator=generator)
    labels = torch.arange(count) % num_classes
    center = torch.full((shape[0],), 127.0)
    return ImageData(images, torch.arange(count), labels, center, center / 2)


def chosen(network: nn.Module, data: ImageData, **options: Any) -> list[dict[str, Tensor]]:
    cut = options.pop("cut", "inner")
    defaults = {
        "num_members": 3,
        "prune": 0.5,
        "scope": "local",
        "epochs": 1,
        "divergence_weight": 0.01,
        "round_to": 1,
    }
    options = {"seed": 3, "meter": TrainingMeter(), **defaults, **options}
    groups = cuttable_channels(trace_channels(network), cut)
    return choose_channels(network, groups, data, FIT.for_scales(0.001), **options)


def left(count: int, prune: float) -> int:
    """Channels whose rank reaches the quantile."""
    return count - math.ceil(prune * (count - 1) - 1e-9)


def member_by_hand(network: nn.Module, scaled: ScaledNetwork, scales: list[Tensor], member: int) -> nn.Module:
    """The network with the scales of one member multiplied into its weights and biases."""
    network = copy.deepcopy(network)
    layers: dict[str, Any] = dict(network.named_modules())
    for group, scale in zip(scaled.groups, scales, strict=True):
        for layer in (layers[name] for name in group.writers):
            row = scale[member]
            layer.weight.data *= row.view(-1, *[1] * (layer.weight.dim() - 1))
            if layer.bias is not None:
                layer.bias.data *= row
    return network


@pytest.fixture(params=["mlp", "resnet", "resnet, residual stream too"])
def scaled_network(request):
    """An untrained network and its scaled copy, in double precision, for three members."""
    torch.manual_seed(0)
    network = (MLP if request.param == "mlp" else RESNET)().double()
    groups = cuttable_channels(trace_channels(network), "all" if "stream" in request.param else "inner")
    scaled = ScaledNetwork(network, groups, 3)
    scaled.scales.double()
    return network, scaled


def test_what_may_be_cut():
    torch.manual_seed(0)
    groups = trace_channels(RESNET())
    inner = [group.name for group in cuttable_channels(groups, "inner")]
    assert inner == [f"features.{block}.conv1" for block in range(3, 12)]
    assert len(cuttable_channels(groups, "all")) == 9 + 3
    assert [group.size for group in cuttable_channels(trace_channels(MLP()), "inner")] == [33, 16]


def test_scales_are_those_of_networks_with_scaled_weights(scaled_network):
    network, scaled = scaled_network
    scales = [scale.detach() for scale in scaled.scales]
    members = [member_by_hand(network, scaled, scales, member).eval() for member in range(3)]
    scaled.eval()
    x = torch.randn(8, 1, 8, 8, dtype=torch.double)
    with torch.no_grad():
        found = scaled(x)
        # blocks of two rows, and the two left over are the first member's
        for member, rows in ((0, [0, 1, 6, 7]), (1, [2, 3]), (2, [4, 5])):
            torch.testing.assert_close(found[rows], members[member](x[rows]))
        expected = torch.stack([member(x) for member in members]).mean(dim=0)
        torch.testing.assert_close(scaled.mean_logits(x), expected)


def test_the_loss_is_the_members_fit_and_one_over_their_divergence(scaled_network):
    network, scaled = scaled_network
    scales = [scale.detach() for scale in scaled.scales]
    scaled.eval()
    x, y = torch.randn(6, 1, 8, 8, dtype=torch.double), torch.arange(6)
    log_probs = []
    for member in range(3):
        rows = slice(2 * member, 2 * member + 2)
        log_probs.append(member_by_hand(network, scaled, scales, member).eval()(x[rows]).log_softmax(dim=1))
    fit = F.nll_loss(torch.cat(log_probs).detach().float(), y)

    def kernel(a: Tensor, b: Tensor) -> float:
        rows = [math.exp(-sum(float(i - j) ** 2 for j in b) / len(a) / len(a)) for i in a]
        return sum(rows) / len(a)

    total = 0.0
    for layer in scales:
        for a, b in ((layer[0], layer[1]), (layer[0], layer[2]), (layer[1], layer[2])):
            total += kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)
    for weight, expected in ((0.25, float(fit) + 0.25 / abs(total)), (0.0, float(fit))):
        assert scaled.loss(x, y, weight).item() == pytest.approx(expected, rel=1e-6)


def test_importance_is_the_slope_of_the_loss(scaled_network):
    network, scaled = scaled_network
    data = ImageData(**{**vars(noise(24, (1, 8, 8))), "transform": Tensor.double})
    fit = Fit(batch_size=16).for_scales(0.001)
    training = Training(scaled, data, fit, seed=0, meter=TrainingMeter(), epochs=1)
    with torch.no_grad():
        # statistics and a mode that must not matter
        scaled.train()(data.batch(torch.arange(24))[0])
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    found = channel_importance(scaled, training)
    start = [scale.detach().clone() for scale in scaled.scales]

    def losses(scales: list[Tensor]) -> list[Tensor]:
        members = [member_by_hand(network, scaled, scales, member).eval() for member in range(3)]
        result = []
        with torch.no_grad():
            for rows in order.split(16):
                x, y = data.batch(rows)
                mean = torch.stack([member(x) for member in members]).mean(dim=0)
                result.append(F.cross_entropy(mean, y))
        return result

    for index, member, channel in ((0, 0, 1), (1, 2, 3), (len(start) - 1, 1, 0), (len(start) - 1, 2, 2)):
        slopes = []
        for sign in (1, -1):
            moved = [scale.clone() for scale in start]
            moved[index][member, channel] += sign * 1e-5
            slopes.append(losses(moved))
        expected = sum(abs(float(up - down)) / 2e-5 for up, down in zip(*slopes, strict=True)) / 2
        name = scaled.groups[index].name
        # the loss is worked out in float32
        assert float(found[name][member, channel]) == pytest.approx(expected, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("prune", [0.3, 0.5, 0.8])
def test_a_local_cut_takes_the_same_share_of_every_layer(prune):
    torch.manual_seed(0)
    for build, cut in ((MLP, "inner"), (RESNET, "inner"), (RESNET, "all")):
        network = build()
        for channels in chosen(network, noise(40, (1, 8, 8)), prune=prune, cut=cut):
            assert channels
            for keep in channels.values():
                assert int(keep.sum()) == left(len(keep), prune)


def test_a_global_cut_takes_its_share_of_all_and_leaves_every_layer_one():
    torch.manual_seed(0)
    network = mlp(10, input_shape=(1, 8, 8), hidden=(60, 20, 20))
    with torch.no_grad():
        for tensor in network.features[3].parameters():
            tensor.zero_()
    for channels in chosen(network, noise(40, (1, 8, 8)), scope="global", prune=0.6):
        # only the last layer matters; of the others, which are equal, those that come last stay, and of each one
        assert [int(keep.sum()) for keep in channels.values()] == [1, 20, 20]
    network = mlp(10, input_shape=(1, 8, 8), hidden=(60, 20, 20))
    for channels in chosen(network, noise(40, (1, 8, 8)), scope="global", prune=0.6):
        assert sum(int(keep.sum()) for keep in channels.values()) == left(100, 0.6) == 40


def test_widths_are_filled_up_with_the_channels_that_matter_most():
    torch.manual_seed(0)
    network = MLP()
    options = {"scope": "global", "prune": 0.7}
    plain = chosen(network, noise(40, (1, 8, 8)), **options)
    rounded = chosen(network, noise(40, (1, 8, 8)), round_to=8, **options)
    fewer = chosen(network, noise(40, (1, 8, 8)), **{**options, "prune": 0.5})
    for member, channels in enumerate(rounded):
        for name, keep in channels.items():
            count = int(plain[member][name].sum())
            assert int(keep.sum()) == min(-(-count // 8) * 8, len(keep))
            assert not (plain[member][name] & ~keep).any()
            # what a milder cut keeps stands in the same order of importance
            milder = fewer[member][name]
            assert not (keep & ~milder).any() or not (milder & ~keep).any()
    (all_of_it,) = chosen(network, noise(40, (1, 8, 8)), round_to=100, num_members=1)
    assert all(keep.all() for keep in all_of_it.values())


def test_members_choose_differently_and_the_network_stays_as_it_is():
    torch.manual_seed(0)
    network = RESNET()
    before = copy.deepcopy(network.state_dict())
    kept = chosen(network, noise(40, (1, 8, 8)), epochs=2)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert any((kept[one][name] != kept[other][name]).any() for name in kept[one])
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    again = chosen(network, noise(40, (1, 8, 8)), epochs=2)
    assert all(torch.equal(rows[name], again[m][name]) for m, rows in enumerate(kept) for name in rows)


def weights(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def resnet20_numbers(kept: float, num_classes: int) -> int:
    """Weights of ours, by hand: stages of 16, 32 and 64 channels, inner widths a share of them."""
    total, before = 3 * 16 * 9 + 2 * 16, 16
    for width in (16, 32, 64):
        for block in range(3):
            inner = round(kept * width)
            total += 9 * before * inner + 2 * inner + 9 * inner * width + 2 * width
            # a 1x1 convolution and its norm, where the authors' shortcuts have no weights
            total += before * width + 2 * width if block == 0 and width != 16 else 0
            before = width
    return total + 64 * num_classes + num_classes


@pytest.mark.parametrize(
    ("prune", "num_classes", "theirs"), [(0.5, 10, 135_744), (0.5, 100, 141_504), (0.3, 10, 189_156)]
)
def test_size_of_a_resnet20_member(prune, num_classes, theirs):
    torch.manual_seed(0)
    network = resnet20(num_classes)
    data = noise(num_classes, (3, 32, 32), num_classes)
    (channels,) = chosen(network, data, prune=prune, num_members=1, epochs=0)
    member = cut_out(network, trace_channels(network), channels)
    assert weights(member) == resnet20_numbers(1 - prune, num_classes)
    # theirs has no bias in the classifier and no weights in its shortcuts
    shortcuts = 16 * 32 + 32 * 64 + 2 * 32 + 2 * 64
    rounding = 0 if prune == 0.5 else 3 * 2 * (9 * 64 + 1) * 2
    assert abs(weights(member) - num_classes - shortcuts - theirs) <= rounding


def test_size_of_a_vgg_member_falls_with_the_square():
    torch.manual_seed(0)
    network = vgg11_half(10)
    (channels,) = chosen(network, noise(10, (3, 32, 32)), num_members=1, epochs=0)
    member: Any = cut_out(network, trace_channels(network), channels)
    widths = (3, 16, 32, 64, 64, 128, 128, 128, 128)
    expected = sum(9 * a * b + b for a, b in pairwise(widths)) + 128 * 10 + 10
    assert weights(member) == expected
    assert 3.9 < weights(network) / weights(member) < 4
    assert member.num_features == member.fc.in_features == 128


def starts(digits: Any, **options: Any) -> tuple[nn.Module, Any]:
    """The untrained network and an ensemble whose members were not moved."""
    ensemble = fit_structured(
        MLP, digits[0], num_members=2, mask_epochs=1, scope="local", fit=STILL, seed=4, **options
    )
    torch.manual_seed(4)
    return MLP(), ensemble


def test_members_start_from_the_untrained_network_or_anew(digits):
    network, ensemble = starts(digits)
    rows: Any = network.features[1].weight
    kept = []
    for member in ensemble.networks:
        own = member.features[1].weight
        equal = (own[:, None] == rows[None]).all(dim=2)
        assert own.shape == (17, 64)
        assert equal.any(dim=1).all()
        kept.append(equal.any(dim=0))
    assert not torch.equal(*kept)
    _, anew = starts(digits, reinitialise=True)
    for member in anew.networks:
        own = member.features[1].weight
        assert own.shape == (17, 64)
        assert not (own[:, None] == rows[None]).all(dim=2).any()
    assert not torch.equal(*(member.features[1].weight for member in anew.networks))


def test_what_it_spent_has_the_scales_and_the_pass_for_importance_in_it(digits):
    options = {"num_members": 2, "scope": "local", "fit": FIT}
    flops = [fit_structured(MLP, digits[0], mask_epochs=n, **options).spent.flops for n in (0, 1, 2)]
    assert flops[1] - flops[0] == pytest.approx(flops[2] - flops[1])
    forward = 2 * (64 * 33 + 33 * 16 + 16 * 10)
    # no gradients of weights, and none of the images: what the first scales multiply is as far as they go
    epoch = len(digits[0]) * (forward + 2 * (33 * 16 + 16 * 10))
    assert flops[1] - flops[0] == pytest.approx(epoch)
    narrow = 2 * (64 * 17 + 17 * 8 + 8 * 10)
    member = len(digits[0]) * FIT.epochs * (3 * narrow - 2 * 64 * 17)
    assert flops[0] == pytest.approx(2 * epoch + 2 * member)
    spent = fit_structured(MLP, digits[0], mask_epochs=1, **options).spent
    assert spent.trainings == 2


def test_progress_hears_of_every_step(digits):
    heard: dict[str, list[int]] = {}

    def progress(label: str, steps: int) -> Any:
        heard[label] = [steps, 0]

        def step() -> None:
            heard[label][1] += 1

        return step

    fit_structured(MLP, digits[0], num_members=2, mask_epochs=2, fit=FIT, progress=progress)
    assert list(heard) == ["structured scales", "structured 1/2", "structured 2/2"]
    assert all(promised == made for promised, made in heard.values())
    assert heard["structured scales"][0] == 3 * math.ceil(len(digits[0]) / 64)


def test_the_file_says_how_wide_members_are(digits, tmp_path):
    ensemble: Any = fit_structured(RESNET, digits[0], num_members=2, mask_epochs=1, fit=FIT, prune=0.7)
    path = ensemble.save(tmp_path)
    about, tensors = read_metadata(path), read_tensors(path)
    for member, widths in zip(ensemble.networks, about["plan"]["widths"], strict=True):
        layers = dict(member.named_modules())
        assert {name: layers[name].out_channels for name in widths} == widths
        assert sum(widths.values()) < 0.4 * 3 * (4 + 8 + 16)
    first = next(iter(about["plan"]["widths"][0]))
    for value in (0, 1_000, "wide"):
        damaged = copy.deepcopy(about)
        damaged["plan"]["widths"][0][first] = value
        write_tensors(path, tensors, damaged)
        with pytest.raises(DamagedFileError, match=FILE):
            Ensemble.load(tmp_path)
    for plan in ({}, {"widths": about["plan"]["widths"][:1]}, {"widths": [{"other": 3}] * 2}):
        write_tensors(path, tensors, {**about, "plan": plan})
        with pytest.raises(DamagedFileError, match=FILE):
            Ensemble.load(tmp_path)
    write_tensors(path, tensors, about)
    with pytest.raises(DamagedFileError, match=FILE):
        Ensemble.load(tmp_path, functools.partial(RESNET, width=8))
    assert Ensemble.load(tmp_path, RESNET).num_members == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_members": 0}, "at least one member, not 0"),
        ({"prune": 0.0}, "between 0 and 1, not 0.0"),
        ({"prune": 1.0}, "between 0 and 1, not 1.0"),
        ({"prune": math.nan}, "between 0 and 1, not nan"),
        ({"mask_epochs": -1}, "mask_epochs is at least 0"),
        ({"mask_learning_rate": 0.0}, "mask_learning_rate above 0"),
        ({"divergence_weight": -1.0}, "divergence_weight is at least 0"),
        ({"scope": "everywhere"}, "scope is global or local, not everywhere"),
        ({"cut": "some"}, "cut is inner or all, not some"),
        ({"round_to": 0}, "round_to is a number of channels, at least 1, not 0"),
    ],
)
def test_bad_options_are_said_before_anything_is_trained(options, message, digits):
    with pytest.raises(InputError, match=message):
        fit_structured(MLP, digits[0], **options)


def tied() -> nn.Module:
    """Every hidden channel is on a residual stream."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat, self.one, self.two = nn.Flatten(), nn.Linear(64, 8), nn.Linear(64, 8)
            self.last = nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.flat(x)
            return self.last(self.one(x) + self.two(x))

    return Tied()


def test_a_network_without_channels_to_cut_is_said(digits):
    for build in (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
        functools.partial(MLP, hidden=(1,)),
    ):
        with pytest.raises(UnfitNetworkError, match="no channels that could be cut"):
            fit_structured(build, digits[0], fit=FIT)
    with pytest.raises(UnfitNetworkError, match="or cut=all where residual sums tie"):
        fit_structured(tied, digits[0], fit=FIT)
    assert fit_structured(tied, digits[0], num_members=2, cut="all", mask_epochs=0, fit=FIT).num_members == 2
    with pytest.raises(UnfitNetworkError, match="cannot be followed"):
        fit_structured(lambda: nn.Sequential(nn.Conv1d(1, 4, 1), nn.Softmax(dim=1)), digits[0])
