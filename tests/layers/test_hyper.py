"""Hyper layers against their dense form, and their L2 norm against the sum over examples."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lifelong_ens.accounting.components import sizes
from lifelong_ens.layers.convolution import Rank1Conv1d, Rank1Conv2d, Rank1Conv3d
from lifelong_ens.layers.hyper import HyperDropout, HyperLayer, HyperSelection
from lifelong_ens.layers.linear import Rank1Linear

MEMBERS, HYPER = 3, 4
LAYERS = {
    "linear": (lambda: nn.Linear(5, 7), Rank1Linear, (5,)),
    "linear, tokens": (lambda: nn.Linear(5, 7), Rank1Linear, (2, 5)),
    "linear without bias": (lambda: nn.Linear(5, 7, bias=False), Rank1Linear, (5,)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), Rank1Conv1d, (4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), Rank1Conv2d, (4, 8, 8)),
    "conv2d with bias": (
        lambda: nn.Conv2d(4, 6, 3, padding_mode="reflect", padding=1),
        Rank1Conv2d,
        (4, 8, 8),
    ),
    "grouped conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), Rank1Conv2d, (4, 8, 8)),
    "depthwise conv2d": (lambda: nn.Conv2d(4, 8, 3, groups=4), Rank1Conv2d, (4, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), Rank1Conv3d, (2, 4, 4, 4)),
}
layers = pytest.mark.parametrize("name", LAYERS)
tied_or_free = pytest.mark.parametrize("tied", [True, False], ids=["tied", "free"])


def make(
    name: str, tied: bool = True, members: int = MEMBERS
) -> tuple[nn.Module, HyperLayer, HyperSelection]:
    """A plain layer and its hyper layer with numbers that hide nothing, in float64."""
    torch.manual_seed(1)
    build, rank1, _ = LAYERS[name]
    plain, selection = build().double(), HyperSelection()
    base = rank1.of(plain, members, init="gaussian", selection=selection)
    layer = HyperLayer(base, selection, HYPER, init="gaussian", tied=tied)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.7)
    return plain, layer, selection


def inputs(name: str, rows: int) -> torch.Tensor:
    return torch.randn(rows, *LAYERS[name][2], dtype=torch.double)


def explicit(plain: nn.Module, layer: HyperLayer, member: int, scaled: torch.Tensor, x: torch.Tensor):
    """One row through torch's own layer with the weight of equation 7, written out here."""
    base, response = layer.base, layer.response
    weight = plain.weight
    embedded = layer.embedding.weight @ scaled
    out, groups = len(weight), getattr(plain, "groups", 1)
    e = embedded[:out]

    def outer(side):
        r, s = side.r.row(member), side.s.row(member)
        # output o reads the input channels of its group
        per_output = torch.stack([r.view(groups, -1)[o * groups // out] for o in range(out)])
        return (s[:, None] * per_output).view(out, -1, *[1] * (weight.dim() - 2))

    along = [-1] + [1] * (weight.dim() - 1)
    dense = base.weight * outer(base) + response.weight * outer(response) * e.view(along)
    dense_layer = copy.deepcopy(plain)
    dense_layer.weight = nn.Parameter(dense.detach())
    if plain.bias is not None:
        own = base.private_bias.row(member) + layer.response_bias.row(member) * embedded[out:]
        dense_layer.bias = nn.Parameter(own.detach())
    return dense_layer(x.unsqueeze(0))[0], dense_layer


@layers
@tied_or_free
def test_every_row_is_computed_with_its_member_s_dense_weight_at_its_hyper_parameters(name, tied):
    plain, layer, selection = make(name, tied)
    x, scaled = inputs(name, 2 * MEMBERS), torch.rand(2 * MEMBERS, HYPER, dtype=torch.double)
    with selection.at(scaled, scaled):
        y = layer(x)
    for row in range(len(x)):
        expected, _ = explicit(plain, layer, row // 2, scaled[row], x[row])
        torch.testing.assert_close(y[row], expected, rtol=1e-10, atol=1e-10)
    # blocks of hyper-parameters; ids; one member alone; training, where a dense weight may be made
    per_member = scaled[::2]
    with selection.at(per_member, per_member):
        by_block = layer(x)
    with selection.at(per_member.repeat_interleave(2, 0), per_member.repeat_interleave(2, 0)):
        torch.testing.assert_close(by_block, layer(x))
    ids = torch.tensor([2, 0, 1, 1, 2])
    with selection.of(ids), selection.at(scaled[:5], scaled[:5]):
        mixed = layer(x[:5])
    for row, member in enumerate(ids.tolist()):
        expected, _ = explicit(plain, layer, member, scaled[row], x[row])
        torch.testing.assert_close(mixed[row], expected, rtol=1e-10, atol=1e-10)
    for mode in (True, False):
        layer.train(mode)
        with selection.of(1), selection.at(scaled[:1], scaled[:1]):
            one = layer(x)
        for row in range(len(x)):
            expected, _ = explicit(plain, layer, 1, scaled[0], x[row])
            torch.testing.assert_close(one[row], expected, rtol=1e-10, atol=1e-10)


@layers
@tied_or_free
def test_without_response_it_is_batch_ensemble(name, tied):
    _, layer, selection = make(name, tied)
    base = copy.deepcopy(layer.base)
    with torch.no_grad():
        layer.embedding.weight.zero_()
    x, scaled = inputs(name, 2 * MEMBERS), torch.rand(2 * MEMBERS, HYPER, dtype=torch.double)
    with selection.at(scaled, scaled):
        assert torch.equal(layer(x), base(x))


@layers
@tied_or_free
def test_export_is_the_dense_layer(name, tied):
    plain, layer, selection = make(name, tied)
    scaled, x = torch.rand(MEMBERS, HYPER, dtype=torch.double), inputs(name, 2)
    for member in range(MEMBERS):
        expected, dense = explicit(plain, layer, member, scaled[member], x[0])
        with selection.at(scaled, scaled):
            exported = layer.export(member)
        assert type(exported) is type(plain)
        assert exported.state_dict().keys() == plain.state_dict().keys()
        torch.testing.assert_close(exported.state_dict(), dense.state_dict(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(exported(x)[0], expected)


@layers
@tied_or_free
@pytest.mark.parametrize("fast_weights", [True, False], ids=["members'", "shared"])
@pytest.mark.parametrize("members", [1, MEMBERS])
def test_l2_is_the_mean_over_examples_of_squared_norms(name, tied, fast_weights, members):
    plain, layer, _ = make(name, tied, members)
    examples = 5
    scaled = torch.rand(members, examples, HYPER, dtype=torch.double)
    kernel, bias = torch.rand(2, members, examples, dtype=torch.double)
    if not fast_weights:
        fixed = copy.deepcopy(layer)
        with torch.no_grad():
            for side in (fixed.base, fixed.response):
                side.r.active.fill_(1)
                side.s.active.fill_(1)
    else:
        fixed = layer
    total = torch.zeros((), dtype=torch.double)
    for k in range(members):
        for i in range(examples):
            _, dense = explicit(plain, fixed, k, scaled[k, i], inputs(name, 1)[0])
            total += kernel[k, i] * dense.weight.square().sum()
            if dense.bias is not None:
                total += bias[k, i] * dense.bias.square().sum()
    expected = total / (members * examples)
    got = layer.l2(scaled, kernel, bias, fast_weights=fast_weights)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_gradients_of_the_l2_norm_are_those_of_the_sum():
    _, layer, _ = make("conv2d with bias", tied=False)
    scaled = torch.rand(MEMBERS, 4, HYPER, dtype=torch.double)
    kernel, bias = torch.rand(2, MEMBERS, 4, dtype=torch.double)
    names = [name for name, _ in layer.named_parameters()]

    def run(*values):
        return torch.func.functional_call(
            L2(layer), {f"layer.{n}": v for n, v in zip(names, values, strict=True)}, (scaled, kernel, bias)
        )

    assert torch.autograd.gradcheck(run, tuple(p.detach().requires_grad_() for p in layer.parameters()))


class L2(nn.Module):
    def __init__(self, layer: HyperLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
        return self.layer.l2(*arguments, fast_weights=True)


@tied_or_free
def test_what_it_stores(tied):
    _, layer, _ = make("linear", tied)
    slow, fast = 5 * 7, MEMBERS * (5 + 7)
    stored = {name: size.parameters for name, size in sizes(layer).items()}
    assert stored == {
        "shared": slow,
        "response": slow,
        "fast_weights": fast if tied else 2 * fast,
        "bias": 2 * MEMBERS * 7,
        "embedding": HYPER * 2 * 7,
    }
    assert sum(stored.values()) == sum(tensor.numel() for tensor in layer.state_dict().values())


def test_starts_as_the_plain_layer_where_fast_weights_are_one():
    torch.manual_seed(0)
    plain, selection = nn.Linear(200, 300), HyperSelection()
    layer = HyperLayer(Rank1Linear.of(plain, 2, init="ones", selection=selection), selection, 2)
    x, scaled = torch.randn(4, 200), torch.rand(2, 2)
    with selection.at(scaled, scaled):
        torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=5e-3)
    # He et al.: a unit's output keeps its size through the ReLU that follows
    assert layer.response.weight.std().item() == pytest.approx((2 / 200) ** 0.5, rel=0.02)
    assert layer.embedding.weight.std().item() == pytest.approx(1e-4, rel=0.1)


def test_tied_copies_stay_tied_and_state_dicts_restore():
    _, layer, selection = make("conv2d", tied=True)
    _, other, other_selection = make("conv2d", tied=True)
    twin = copy.deepcopy(layer)
    assert twin.tied
    assert twin.response.r is not layer.base.r
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(layer.state_dict())
    x, scaled = inputs("conv2d", MEMBERS), torch.rand(MEMBERS, HYPER, dtype=torch.double)
    with selection.at(scaled, scaled), other_selection.at(scaled, scaled):
        assert torch.equal(layer(x), other(x))
    assert not make("conv2d", tied=False)[1].tied


@layers
def test_odd_batches_are_refused(name):
    _, layer, selection = make(name)
    scaled = torch.rand(MEMBERS, HYPER, dtype=torch.double)
    with selection.at(scaled, scaled), pytest.raises(ValueError, match="do not split"):
        layer(inputs(name, 4))
    four = torch.rand(4, HYPER, dtype=torch.double)
    with selection.at(four, four), pytest.raises(ValueError, match="do not split"):
        layer(inputs(name, 6))
    with pytest.raises(RuntimeError, match="without any"):
        layer(inputs(name, MEMBERS))


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_bfloat16_stays_bfloat16(name):
    _, layer, selection = make(name)
    layer.float()
    scaled, x = torch.rand(MEMBERS, HYPER), inputs(name, MEMBERS).float()
    with selection.at(scaled, scaled):
        exact = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            half = layer(x)
    assert half.dtype is torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=0.05, atol=0.3)


def test_dropout_at_a_rate_of_each_row_s_own():
    selection = HyperSelection()
    rates = torch.tensor([[0.0, 0.1], [0.0, 0.5], [0.0, 0.9]])
    dropout = HyperDropout(nn.Dropout(), selection, 1)
    x = torch.ones(6, 40_000)
    torch.manual_seed(0)
    with selection.at(rates, rates):
        y = dropout(x)
        assert torch.equal(dropout.eval()(x), x)
    zeros = (y == 0).float().mean(dim=1)
    torch.testing.assert_close(zeros, rates[:, 1].repeat_interleave(2), rtol=0, atol=0.02)
    torch.testing.assert_close(y.mean(dim=1), torch.ones(6), rtol=0, atol=0.05)
    # a constant rate is torch's dropout in distribution: kept numbers are divided by what is kept
    assert y[2:4].unique().tolist() == [0.0, 2.0]


def test_dropout_of_channels():
    selection = HyperSelection()
    rates = torch.full((1, 1), 0.5)
    dropout = HyperDropout(nn.Dropout2d(), selection, 0)
    torch.manual_seed(0)
    with selection.at(rates, rates):
        y = dropout(torch.ones(8, 100, 3, 3))
    assert set(F.avg_pool2d(y, 3).flatten().tolist()) == {0.0, 2.0}
