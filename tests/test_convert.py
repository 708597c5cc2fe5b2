from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from lifelong_ens.convert import (
    MEMBER_LAYERS,
    MemberNetwork,
    batch_ensemble,
    convert,
    export,
    plan_conversion,
)
from lifelong_ens.errors import InputError
from lifelong_ens.layers.attention import Rank1MultiheadAttention
from lifelong_ens.layers.bank import Bank
from lifelong_ens.layers.norm import MemberBatchNorm
from lifelong_ens.layers.rank1 import Rank1Layer
from lifelong_ens.networks.plain import lenet5, resnet18, resnet20, resnet32

Randomise = Callable[..., nn.Module]
SIZES = {"resnet18": 64, "resnet50": 64, "vit_b_16": 32}
NUM_MEMBERS = 2


@cache
def torchvision_network(name: str) -> nn.Module:
    """A network of torchvision without numbers, built once; of the transformer's twelve blocks the first three."""
    options = {"image_size": SIZES[name]} if name.startswith("vit") else {}
    with torch.device("meta"):
        network = getattr(torchvision.models, name)(num_classes=10, **options)
    if name.startswith("vit"):
        network.encoder.layers = network.encoder.layers[:3]
    return network


def fill_members(network: nn.Module, seed: int = 1) -> None:
    """Numbers for the members' own rows only, far from signs and ones, which hide errors."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, bank in network.named_modules():
            if isinstance(bank, Bank) and bank.active is not None:
                if "running_var" in name:
                    bank.active.mul_(torch.rand_like(bank.active) + 0.5)
                elif bank.component == "fast_weights":
                    bank.active.normal_(1.0, 0.3)
                else:
                    bank.active.add_(torch.randn_like(bank.active) * 0.2)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())


@pytest.mark.parametrize("name", SIZES)
def test_torchvision_networks_with_members(name: str, randomise: Randomise) -> None:
    original = randomise(copy.deepcopy(torchvision_network(name)).to_empty(device="cpu")).eval()
    before = {key: tensor.clone() for key, tensor in original.state_dict().items()}
    types = [type(module) for module in original.modules()]
    ensemble = batch_ensemble(original, NUM_MEMBERS, init="gaussian")
    assert not any(module.training for module in ensemble.modules())

    kept = dict(ensemble.body.named_parameters())
    weights = [key for key in before if key in kept]
    assert len(weights) >= {"resnet18": 21, "resnet50": 54, "vit_b_16": 13}[name]
    assert all(torch.equal(kept[key], before[key]) for key in weights)

    fill_members(ensemble)
    x = torch.randn(2, 3, SIZES[name], SIZES[name])
    with torch.no_grad():
        out = ensemble(x)
        assert out.shape == (NUM_MEMBERS, 2, 10)
        assert relative(out[0], out[1]) > 0.05
        for member in range(NUM_MEMBERS):
            torch.testing.assert_close(ensemble(x, members=[member])[0], out[member], rtol=1e-4, atol=1e-4)
        assert relative(batch_ensemble(original, 2, init="ones")(x)[1], original(x)) < 1e-5
        exported = ensemble.export_member(1)
        assert [type(module) for module in exported.modules()] == types
        assert relative(exported(x), out[1]) < 1e-5
        by_row = ensemble(x, ids=torch.tensor([1, 0]))
        assert relative(by_row, torch.stack([out[1, 0], out[0, 1]])) < 1e-5
    # the original is as it was, to the bit
    assert [type(module) for module in original.modules()] == types
    assert before.keys() == original.state_dict().keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in original.state_dict().items())


@pytest.mark.parametrize("norm", ["per_member", "statistics_only", "shared"])
@pytest.mark.parametrize("bias", ["per_member", "shared"])
def test_every_policy_of_norm_and_bias_exports(norm: Any, bias: Any, randomise: Randomise) -> None:
    ensemble = batch_ensemble(randomise(lenet_with_norm()), 3, norm=norm, bias=bias).eval()
    fill_members(ensemble)
    x = torch.randn(4, 3, 20, 20)
    out = ensemble(x)
    for member in range(3):
        assert relative(ensemble.export_member(member)(x), out[member]) < 1e-5
    components = {module.component for module in ensemble.modules() if isinstance(module, Bank)}
    expected = {
        "per_member": {"norm_affine", "norm_statistics"},
        "statistics_only": {"norm_statistics"},
        "shared": set(),
    }
    assert components == {"fast_weights"} | expected[norm] | ({"bias"} if bias == "per_member" else set())


def lenet_with_norm() -> nn.Module:
    body = lenet5(5, input_shape=(3, 20, 20))
    return nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(body), nn.LayerNorm(5), nn.Linear(5, 4))


def small_resnet() -> nn.Module:
    """Two blocks, one of them with a convolution as its shortcut."""
    network = resnet20(4, width=4, input_shape=(3, 8, 8))
    layers: Any = network.features
    network.features = nn.Sequential(*layers[:4], layers[6], *layers[-2:])
    network.fc = nn.Linear(8, 4)
    return network


def test_training_a_batch_of_all_members_equals_training_each_alone(randomise: Randomise) -> None:
    ensemble = batch_ensemble(
        randomise(resnet20(4, width=4, input_shape=(3, 8, 8))), 2, init="gaussian"
    ).double()
    fill_members(ensemble)
    alone = [ensemble.export_member(member).double().train() for member in range(2)]
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    out = ensemble.train()(x)
    for member in range(2):
        assert relative(out[member], alone[member](x)) < 1e-9
    out.square().sum().backward()
    for plain in alone:
        plain.zero_grad()
        plain(x).square().sum().backward()
    head = ensemble.body.fc
    torch.testing.assert_close(head.private_bias.active.grad[1], alone[1].fc.bias.grad)
    per_member = [
        plain.fc.weight.grad * torch.outer(head.s.row(m), head.r.row(m)) for m, plain in enumerate(alone)
    ]
    torch.testing.assert_close(head.weight.grad, sum(per_member))


def test_members_in_another_order_and_one_a_row(randomise: Randomise) -> None:
    ensemble = batch_ensemble(randomise(lenet_with_norm()), 4, init="gaussian").eval()
    fill_members(ensemble)
    x = torch.randn(5, 3, 20, 20)
    out = ensemble(x)
    for members in ([3, 1], [1, 2, 3], [2], [0, 0]):
        assert relative(ensemble(x, members=members), out[members]) < 1e-5
    ids = torch.tensor([3, 0, 0, 2, 1])
    assert relative(ensemble(x, ids=ids), out[ids, torch.arange(5)]) < 1e-5


@pytest.mark.parametrize("members", [[4], [-1], [0, 9], []])
def test_members_that_are_not_there(members: list[int]) -> None:
    ensemble = batch_ensemble(nn.Linear(2, 2), 4)
    with pytest.raises(IndexError, match="0 to 3"):
        ensemble(torch.zeros(3, 2), members=members)


def test_ids_that_do_not_fit_the_batch() -> None:
    ensemble = batch_ensemble(nn.Linear(2, 2), 4)
    with pytest.raises(ValueError, match="expected 4 of them, not 2"):
        ensemble(torch.zeros(4, 2), ids=torch.tensor([0, 1]))
    with pytest.raises(IndexError, match="0 to 3"):
        ensemble(torch.zeros(2, 2), ids=torch.tensor([0, 4]))
    with pytest.raises(IndexError, match="0 to 3"):
        ensemble.export_member(4)


@pytest.mark.parametrize("num_members", [0, -2])
def test_an_ensemble_has_a_member(num_members: int) -> None:
    with pytest.raises(InputError, match="at least one member"):
        batch_ensemble(nn.Linear(2, 2), num_members)


@pytest.mark.parametrize("num_members", [1, 3])
def test_starting_at_ones_every_member_is_the_original(num_members: int, randomise: Randomise) -> None:
    original = randomise(resnet20(7, width=4)).eval()
    ensemble = batch_ensemble(original, num_members, init="ones")
    x = torch.randn(5, 3, 16, 16)
    out, expected = ensemble(x), original(x)
    if num_members == 1:
        assert torch.equal(out[0], expected)
    for member in range(num_members):
        assert torch.equal(ensemble(x, members=[member])[0], expected)
        assert relative(out[member], expected) < 1e-6


def test_double_precision_is_kept(randomise: Randomise) -> None:
    original = randomise(lenet_with_norm()).double().eval()
    ensemble = batch_ensemble(original, 2, init="gaussian")
    assert {tensor.dtype for tensor in ensemble.state_dict().values() if tensor.is_floating_point()} == {
        torch.float64
    }
    x = torch.randn(3, 3, 20, 20, dtype=torch.float64)
    assert relative(ensemble.export_member(1)(x), ensemble(x)[1]) < 1e-12


def test_an_exported_member_is_on_the_device_of_the_ensemble() -> None:
    network = nn.ModuleList([lenet_with_norm(), encoder()])
    exported = batch_ensemble(network, 2).to("meta").export_member(1)
    assert {tensor.device.type for tensor in exported.state_dict().values()} == {"meta"}


def test_the_dry_run_lists_every_module_with_tensors() -> None:
    network = torchvision_network("resnet18")
    plan = plan_conversion(network)
    with_tensors = [name for name, module in network.named_modules() if module._parameters or module._buffers]
    assert [entry.name for entry in plan] == with_tensors
    assert {entry.source: entry.target for entry in plan} == {
        "Conv2d": "Rank1Conv2d",
        "BatchNorm2d": "MemberBatchNorm",
        "Linear": "Rank1Linear",
    }


def test_the_dry_run_of_a_vision_transformer_says_what_stays() -> None:
    plan = {entry.name: entry for entry in plan_conversion(torchvision_network("vit_b_16"), norm="shared")}
    staying = {
        name: entry.reason
        for name, entry in plan.items()
        if entry.target is None and entry.reason != "as asked"
    }
    assert set(staying) == {"", "encoder"}  # the class token and the position embedding
    attention = plan["encoder.layers.encoder_layer_0.self_attention"]
    assert attention.target == "Rank1MultiheadAttention"
    assert "encoder.layers.encoder_layer_0.self_attention.out_proj" not in plan
    assert plan["encoder.ln"].target is None


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (["fc"], [], {"fc"}),
        (["features.0"], [], {"features.0"}),
        (["features"], ["*.3"], {"features.0", "features.7", "features.9"}),
        (["features.[79]"], [], {"features.7", "features.9"}),
        ([nn.Conv2d], [], {"features.0", "features.3"}),
        (None, [nn.Conv2d, "fc"], {"features.7", "features.9"}),
        ([lambda name, module: getattr(module, "out_features", 0) > 50], [], {"features.7", "features.9"}),
        ([nn.Linear], [lambda name, module: name == "fc"], {"features.7", "features.9"}),
    ],
)
def test_include_and_exclude(include: Any, exclude: Any, expected: set[str], caplog: Any) -> None:
    ensemble = batch_ensemble(lenet5(10), 2, include=include, exclude=exclude)
    converted = {name for name, module in ensemble.body.named_modules() if isinstance(module, MEMBER_LAYERS)}
    assert converted == expected
    assert not caplog.records  # what was asked for needs no warning


@pytest.mark.parametrize("include", [["nothing"], [nn.Conv3d], [lambda name, module: False], []])
def test_nothing_matched_is_an_error(include: Any) -> None:
    with pytest.raises(
        InputError, match=r"nothing in Body matched.*Conv2d, Linear.*check include and exclude"
    ):
        batch_ensemble(lenet5(10), 2, include=include)


def test_a_network_without_weights_is_an_error() -> None:
    with pytest.raises(InputError, match="its modules with weights are none"):
        batch_ensemble(nn.Sequential(nn.ReLU()), 2)


def test_the_network_can_be_a_single_layer(randomise: Randomise) -> None:
    ensemble = batch_ensemble(randomise(nn.Linear(3, 2)), 2, init="gaussian")
    x = torch.randn(4, 3)
    assert type(ensemble.export_member(0)) is nn.Linear
    torch.testing.assert_close(ensemble.export_member(0)(x), ensemble(x)[0])


class Own(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def test_what_cannot_have_members_is_named_in_a_warning(caplog: Any, randomise: Randomise) -> None:
    odd = nn.ModuleDict(
        {
            "own": Own(2, 2),
            "transposed": nn.ConvTranspose2d(2, 2, 2),
            "recurrent": nn.LSTM(2, 2),
            "embedding": nn.Embedding(3, 2),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
            "plain": nn.Linear(2, 2),
        }
    )
    with caplog.at_level(logging.WARNING):
        ensemble = batch_ensemble(odd, 2)
    messages = {record.args[0]: record.getMessage() for record in caplog.records}  # type: ignore[index]
    unconverted = {"own", "transposed", "recurrent", "embedding", "normed"}
    assert unconverted <= set(messages)
    assert "plain" not in messages
    assert "own (Own) stays shared by all members: a subclass of Linear" in messages["own"]
    assert "LSTM has no form with members" in messages["recurrent"]
    assert type(ensemble.body["own"]) is Own  # type: ignore[index]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_a_weight_that_a_hook_computes_stays_and_is_named(caplog: Any) -> None:
    with torch.no_grad():
        network = nn.Sequential(nn.utils.weight_norm(nn.Linear(2, 2)), nn.Linear(2, 2))
    with caplog.at_level(logging.WARNING):
        ensemble = batch_ensemble(network, 2)
    assert "0 (Linear) stays shared by all members: its weight is computed by a hook" in caplog.text
    assert type(ensemble.body[0]) is nn.Linear  # type: ignore[index]


def test_attention_with_rows_on_the_second_axis_is_an_error() -> None:
    with pytest.raises(
        InputError, match=r"0: nn.MultiheadAttention has its rows on axis 1; build it with batch_first"
    ):
        batch_ensemble(nn.Sequential(nn.MultiheadAttention(4, 2)), 2)


def test_a_batch_norm_with_a_cumulative_average_is_an_error() -> None:
    with pytest.raises(InputError, match=r"1: MemberBatchNorm.*momentum=None"):
        batch_ensemble(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, momentum=None)), 2)


class Shared(nn.Module):
    """One linear layer at two places, one of them deeper, and another tied to its weight."""

    def __init__(self) -> None:
        super().__init__()
        layer, self.tied = nn.Linear(4, 4), nn.Linear(4, 4)
        self.first, self.again, self.deep = layer, layer, nn.Sequential(nn.ReLU(), layer, layer)
        self.tied.weight = layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.deep(self.again(torch.relu(self.first(x)))))


def test_shared_modules_stay_shared_and_tied_weights_tied(randomise: Randomise) -> None:
    ensemble = batch_ensemble(randomise(Shared()), 3, init="gaussian")
    fill_members(ensemble)
    body: Any = ensemble.body
    assert isinstance(body.first, Rank1Layer)
    assert body.first is body.again is body.deep[1] is body.deep[2]
    assert body.tied.weight is body.first.weight
    assert body.tied.r is not body.first.r
    x = torch.randn(2, 4)
    out = ensemble(x)
    for member in range(3):
        plain: Any = ensemble.export_member(member)
        assert plain.first is plain.again is plain.deep[2]
        assert not any(isinstance(module, MEMBER_LAYERS) for module in plain.modules())
        assert relative(plain(x), out[member]) < 1e-5


def encoder(norm_first: bool = False) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)


def plain_copy(body: Any, member: int) -> Any:
    """The exported member in training mode, in which torch has no fused path to take."""
    return export(body, member).train()


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize(
    "include", [None, ["*.linear1"], ["layers.1.linear1"], ["*.norm1"], ["*.self_attn"]], ids=str
)
def test_torchs_fused_encoder_does_not_bypass_the_members(
    include: Any, norm_first: bool, padded: bool, randomise: Randomise
) -> None:
    original = randomise(encoder(norm_first))
    body, _ = convert(original, 3, include=include, init="gaussian")
    fill_members(body)
    body.eval()
    x = torch.randn(2, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    three = None if padding is None else padding.repeat(3, 1)
    with torch.no_grad():
        out = body(x.repeat(3, 1, 1), src_key_padding_mask=three).unflatten(0, (3, 2))
        for member in range(3):
            expected = plain_copy(body, member)(x, src_key_padding_mask=padding)
            seen = slice(None) if padding is None else ~padding
            torch.testing.assert_close(out[member][seen], expected[seen], rtol=1e-4, atol=1e-5)
    assert relative(out[0][:, 0], out[1][:, 0]) > 0.01


def test_an_exported_encoder_is_fused_again(randomise: Randomise) -> None:
    original: Any = randomise(encoder())
    body, _ = convert(original, 2, init="gaussian")
    plain: Any = export(body.eval(), 0)
    assert plain.use_nested_tensor == original.use_nested_tensor == 1
    for layer, before in zip(plain.layers, original.layers, strict=True):
        assert layer.activation_relu_or_gelu == before.activation_relu_or_gelu == 1
        assert layer.__dict__.keys() == before.__dict__.keys()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        fused = plain(x)
    torch.testing.assert_close(fused, plain.train()(x), rtol=1e-4, atol=1e-5)


def test_a_decoder_attends_across_with_members(randomise: Randomise) -> None:
    layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    body, _ = convert(randomise(layer), 2, init="gaussian")
    fill_members(body)
    assert sum(isinstance(module, Rank1MultiheadAttention) for module in body.modules()) == 2
    target, memory = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(3)
    out = body(target.repeat(2, 1, 1), memory.repeat(2, 1, 1), tgt_mask=mask, tgt_is_causal=True)
    for member in range(2):
        expected = export(body, member)(target, memory, tgt_mask=mask, tgt_is_causal=True)
        torch.testing.assert_close(out.unflatten(0, (2, 2))[member], expected, rtol=1e-4, atol=1e-5)


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("width", "plain", "shared", "per_member"),
    [(64, 7_427_914, 7_466_652, 7_496_220), (16, 466_906, 476_652, 484_044)],
)
def test_parameters_of_resnet32(width: int, plain: int, shared: int, per_member: int) -> None:
    network = resnet32(10, width=width)
    assert parameters(network) == plain
    assert parameters(batch_ensemble(network, 4, norm="shared")) == shared
    assert parameters(batch_ensemble(network, 4)) == per_member


def test_parameters_of_the_reduced_resnet18_and_lenet5() -> None:
    network = resnet18(width=20)
    assert sum(m.weight.numel() for m in network.modules() if isinstance(m, nn.Conv2d)) == 1_090_140
    assert parameters(network) == 1_093_140
    fast = parameters(batch_ensemble(network, 1, norm="shared")) - parameters(network)
    assert fast == 2_703
    assert parameters(lenet5()) == 61_156
    assert parameters(batch_ensemble(lenet5(), 1, bias="shared")) - 61_156 == 755


def test_parameters_of_torchvisions_resnet50() -> None:
    plan = plan_conversion(torchvision_network("resnet50"), exclude=["fc"], norm="shared")
    with torch.device("meta"):
        network = torchvision.models.resnet50()
    convs = [network.get_submodule(entry.name) for entry in plan if entry.target]
    assert sum(m.in_channels + m.out_channels for m in convs) == 49_091  # type: ignore[operator, misc]


def test_converted_networks_copy_and_reload(randomise: Randomise) -> None:
    ensemble = batch_ensemble(randomise(lenet_with_norm()), 3, init="gaussian").eval()
    fill_members(ensemble)
    x = torch.randn(2, 3, 20, 20)
    other = batch_ensemble(lenet_with_norm(), 1).eval()
    other.load_state_dict(ensemble.state_dict())
    for twin in (copy.deepcopy(ensemble), MemberNetwork(other.body, other.selection, 3)):
        assert torch.equal(twin(x), ensemble(x))
        assert torch.equal(twin(x, members=[2]), ensemble(x, members=[2]))


def test_a_failing_conversion_changes_nothing() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2))
    with pytest.raises(InputError):
        batch_ensemble(network, 2)
    assert [type(module) for module in network] == [nn.Linear, nn.MultiheadAttention]


@pytest.mark.parametrize("training", [True, False])
def test_one_compilation_serves_all_batch_sizes(training: bool) -> None:
    ensemble, counter = batch_ensemble(small_resnet(), 2).train(training), CompileCounter()
    assert any(isinstance(module, MemberBatchNorm) for module in ensemble.modules())
    torch._dynamo.reset()
    compiled = torch.compile(ensemble, backend=counter, fullgraph=True)
    for size in (20, 22, 34):
        x = torch.randn(size, 3, 8, 8)
        torch._dynamo.mark_dynamic(x, 0)
        compiled(x)
    torch._dynamo.reset()
    assert counter.frame_count == 1
