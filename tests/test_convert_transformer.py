"""Members of torch's own Transformers, each against the plain network that it is exported as."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lifelong_ens import SELF_ATTENTION, batch_ensemble
from lifelong_ens.convert import MEMBER_LAYERS, MemberNetwork
from lifelong_ens.layers.attention import Rank1MultiheadAttention
from lifelong_ens.layers.bank import Bank
from lifelong_ens.layers.rank1 import Rank1Layer

Randomise = Callable[..., nn.Module]
WIDTH, HEADS, BATCH, SOURCE, TARGET, NUM_MEMBERS = 8, 2, 3, 5, 4, 3
INCLUDES: dict[str, Any] = {
    "all": None,
    "self-attention": SELF_ATTENTION,
    "linears": [nn.Linear, nn.MultiheadAttention],
    "feed-forward": ["*.linear1", "*.linear2"],
    "norms": [nn.LayerNorm],
}


def layer_options(norm_first: bool, dropout: float) -> dict[str, Any]:
    return {"dim_feedforward": 16, "dropout": dropout, "batch_first": True, "norm_first": norm_first}


def build(kind: str, norm_first: bool, dropout: float) -> nn.Module:
    options = layer_options(norm_first, dropout)
    if kind == "transformer":
        return nn.Transformer(WIDTH, HEADS, 2, 2, **options)
    if kind == "encoder":
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, **options)
        return nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=not norm_first)
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, HEADS, **options), 2, nn.LayerNorm(WIDTH))


def call(kind: str, padded: bool) -> tuple[list[Tensor], dict[str, Any], list[str]]:
    """Inputs, inputs by name, and which of these hold for all rows."""
    generator = torch.Generator().manual_seed(5)
    source, target = (torch.randn(BATCH, n, WIDTH, generator=generator) for n in (SOURCE, TARGET))
    # float masks, as torch wants both of one kind
    causal = nn.Transformer.generate_square_subsequent_mask(TARGET)
    lengths = torch.tensor([[SOURCE], [3], [4]])
    source_padding = torch.zeros(BATCH, SOURCE).masked_fill(torch.arange(SOURCE) >= lengths, -torch.inf)
    target_padding = torch.zeros(BATCH, TARGET)
    target_padding[1, 2:] = -torch.inf
    if kind == "encoder":
        named = {"src_key_padding_mask": source_padding} if padded else {}
        return [source], named, []
    named = {"tgt_mask": causal, "tgt_is_causal": True}
    if padded:
        named |= {"tgt_key_padding_mask": target_padding, "memory_key_padding_mask": source_padding}
    if kind == "decoder":
        return [target, source], named, ["tgt_mask"]
    if padded:
        named |= {"src_key_padding_mask": source_padding}
    return [source, target], named, ["tgt_mask"]


def filled(ensemble: MemberNetwork) -> MemberNetwork:
    torch.manual_seed(1)
    with torch.no_grad():
        for bank in (module for module in ensemble.modules() if isinstance(module, Bank)):
            noise = torch.randn_like(bank.active) * 0.3
            bank.active.copy_(1 + noise if bank.component == "fast_weights" else bank.active + noise)
    return ensemble


def unpadded(kind: str, padded: bool) -> Tensor:
    """Rows of the output that mean something: torch's fused encoder leaves zeros at padding."""
    if kind != "encoder" or not padded:
        return torch.ones(BATCH, SOURCE if kind == "encoder" else TARGET, dtype=torch.bool)
    return call(kind, padded)[1]["src_key_padding_mask"] == 0


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
@pytest.mark.parametrize("include", INCLUDES)
@pytest.mark.parametrize("kind", ["encoder", "decoder", "transformer"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_every_member_is_the_plain_network_it_is_exported_as(
    kind: str, include: str, norm_first: bool, training: bool, padded: bool, randomise: Randomise
) -> None:
    original = randomise(build(kind, norm_first, dropout=0.0)).train(training)
    ensemble = filled(batch_ensemble(original, NUM_MEMBERS, include=INCLUDES[include], init="gaussian"))
    inputs, named, unbatched = call(kind, padded)
    seen = unpadded(kind, padded)
    # no gradients, which is where torch would take its fused paths
    with torch.set_grad_enabled(training):
        out = ensemble(*inputs, **named, unbatched=unbatched)
        assert out.shape == (NUM_MEMBERS, *inputs[0 if kind != "transformer" else 1].shape)
        for member in range(NUM_MEMBERS):
            plain = ensemble.export_member(member)
            assert not any(isinstance(module, MEMBER_LAYERS) for module in plain.modules())
            torch.testing.assert_close(out[member][seen], plain(*inputs, **named)[seen], rtol=1e-5, atol=1e-5)
    assert (out[0][seen] - out[1][seen]).abs().max() > 0.01


def thinned(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """A dropout whose mask depends on the shape alone, not on how the numbers lie in memory."""
    if not training:
        return x
    kept = torch.rand(x.shape[1:], generator=torch.Generator().manual_seed(7)) >= p
    return x * kept / (1 - p)


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
@pytest.mark.parametrize("include", ["all", "self-attention"])
@pytest.mark.parametrize("kind", ["encoder", "decoder", "transformer"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_dropout_is_where_torch_has_it(
    kind: str, include: str, norm_first: bool, randomise: Randomise, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = randomise(build(kind, norm_first, dropout=0.4)).train()
    ensemble = filled(batch_ensemble(original, NUM_MEMBERS, include=INCLUDES[include], init="gaussian"))
    attentions = [module for module in ensemble.modules() if isinstance(module, Rank1MultiheadAttention)]
    assert {attention.dropout for attention in attentions} == {0.4}
    inputs, named, unbatched = call(kind, padded=True)
    same = ensemble(*inputs, **named, unbatched=unbatched, members=[1, 1])
    assert (same[0] - same[1]).abs().max() > 0.01  # every row drops other units
    # that of attention weights is compared with torch's where attention is tested
    for module in ensemble.modules():
        if isinstance(module, (Rank1MultiheadAttention, nn.MultiheadAttention)):
            module.dropout = 0.0
    monkeypatch.setattr(torch.nn.functional, "dropout", thinned)
    out = ensemble(*inputs, **named, unbatched=unbatched)
    for member in range(NUM_MEMBERS):
        expected = ensemble.export_member(member)(*inputs, **named)
        torch.testing.assert_close(out[member], expected, rtol=1e-5, atol=1e-5)
    undropped = ensemble.eval()(*inputs, **named, unbatched=unbatched)
    assert (undropped - out).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["encoder", "decoder", "transformer"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_gradients_reach_the_fast_weights_of_every_projection(kind: str, randomise: Randomise) -> None:
    ensemble = filled(batch_ensemble(randomise(build(kind, True, 0.0)).train(), 2, init="gaussian"))
    inputs, named, unbatched = call(kind, padded=True)
    out = ensemble(*inputs, **named, unbatched=unbatched)
    (out * torch.randn_like(out)).sum().backward()
    layers = {name: module for name, module in ensemble.named_modules() if isinstance(module, Rank1Layer)}
    assert (
        sum(name.endswith("q_proj") for name in layers)
        == {"encoder": 2, "decoder": 4, "transformer": 6}[kind]
    )
    for name, layer in layers.items():
        for side, bank in {"r": layer.r, "s": layer.s}.items():
            smallest = bank.active.grad.abs().amax(dim=1).min()
            # the softmax does not see what is added to all keys, but what scales them
            assert smallest > 1e-6, (name, side)


def test_self_attention_alone_leaves_everything_else_shared(randomise: Randomise) -> None:
    ensemble = batch_ensemble(randomise(build("transformer", True, 0.0)), 4, include=SELF_ATTENTION)
    converted = {name for name, module in ensemble.body.named_modules() if isinstance(module, MEMBER_LAYERS)}
    attentions = {
        name for name, module in ensemble.body.named_modules() if isinstance(module, Rank1MultiheadAttention)
    }
    assert attentions == {f"{part}.layers.{i}.self_attn" for part in ("encoder", "decoder") for i in (0, 1)}
    assert {name.rpartition(".")[0] for name in converted} <= attentions | {
        name.rpartition(".")[0] for name in attentions
    }
    # of each of four attentions: four projections with r, s and the three additional biases
    more = sum(p.numel() for p in ensemble.parameters()) - sum(
        p.numel() for p in build("transformer", True, 0.0).parameters()
    )
    assert more == 4 * 4 * (4 * 2 * WIDTH + 3 * WIDTH)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("members", [None, [2]])
def test_attention_alone(need_weights: bool, members: list[int] | None, randomise: Randomise) -> None:
    ensemble = filled(
        batch_ensemble(randomise(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)), 3, init="gaussian")
    )
    query, key = torch.randn(BATCH, TARGET, WIDTH), torch.randn(BATCH, SOURCE, WIDTH)
    out, weights = ensemble(query, key, key, need_weights=need_weights, members=members)
    expected, expected_weights = ensemble.export_member(2)(query, key, key, need_weights=need_weights)
    torch.testing.assert_close(out[-1], expected)
    if need_weights:
        torch.testing.assert_close(weights[-1], expected_weights)
    else:
        assert weights is None


def test_a_per_head_mask_is_repeated_whole(randomise: Randomise) -> None:
    ensemble = filled(batch_ensemble(randomise(build("encoder", True, 0.0)), 2, init="gaussian"))
    x = torch.randn(BATCH, SOURCE, WIDTH)
    per_head = torch.rand(BATCH * HEADS, SOURCE, SOURCE) < 0.3
    per_head[..., 0] = False
    out = ensemble(x, mask=per_head)
    torch.testing.assert_close(out[1], ensemble.export_member(1)(x, mask=per_head), rtol=1e-5, atol=1e-5)


def test_ids_with_several_inputs(randomise: Randomise) -> None:
    ensemble = filled(batch_ensemble(randomise(build("decoder", True, 0.0)), 3, init="gaussian"))
    inputs, named, unbatched = call("decoder", padded=True)
    all_members = ensemble(*inputs, **named, unbatched=unbatched)
    ids = torch.tensor([2, 0, 1])
    torch.testing.assert_close(ensemble(*inputs, **named, ids=ids), all_members[ids, torch.arange(BATCH)])


def test_an_input_that_holds_for_all_rows_has_to_be_named(randomise: Randomise) -> None:
    ensemble = batch_ensemble(build("decoder", True, 0.0), 2)
    inputs, named, _ = call("decoder", padded=False)
    with pytest.raises(ValueError, match=r"shape \(4, 4\) does not have the batch of 3.*unbatched"):
        ensemble(*inputs, **named)
