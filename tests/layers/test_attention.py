from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lifelong_ens.layers.attention import Rank1MultiheadAttention

Randomise = Callable[..., nn.Module]
BATCH, HEADS, WIDTH, QUERIES, KEYS, NUM_MEMBERS = 2, 2, 6, 3, 4, 3
KINDS: dict[str, dict[str, Any]] = {
    "packed": {},
    "no bias": {"bias": False},
    "kdim and vdim": {"kdim": 5, "vdim": 7},
    "dropout": {"dropout": 0.5},
}


def masks() -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    per_head = torch.rand(BATCH * HEADS, QUERIES, KEYS, generator=generator) < 0.4
    per_head[..., 0] = False  # a row that may look nowhere is NaN
    padding = torch.tensor([[False, False, True, True], [False, False, False, True]])
    floats = torch.randn(QUERIES, KEYS, generator=generator)
    as_float = torch.zeros(padding.shape).masked_fill(padding, -torch.inf)
    return {
        "none": {},
        "bool": {"attn_mask": per_head[0]},
        "float": {"attn_mask": floats},
        "per head": {"attn_mask": per_head},
        "padding": {"key_padding_mask": padding},
        "bool and padding": {"attn_mask": per_head[0], "key_padding_mask": padding},
        "float and padding": {"attn_mask": floats, "key_padding_mask": as_float},
        "per head and padding": {"attn_mask": per_head, "key_padding_mask": padding},
    }


def build(kind: str, randomise: Randomise) -> tuple[Rank1MultiheadAttention, nn.MultiheadAttention]:
    plain = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **KINDS[kind])
    randomise(plain)
    attention = Rank1MultiheadAttention(plain, NUM_MEMBERS, init="gaussian")
    for layer in (attention.k_proj, attention.v_proj, attention.out_proj):
        layer.selection = attention.q_proj.selection
    for bank in (layer.private_bias for layer in projections(attention)):
        if bank is not None:
            nn.init.normal_(bank.active)
    return attention, plain


def projections(attention: Rank1MultiheadAttention) -> list[Any]:
    return [attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj]


def by_hand(
    attention: Rank1MultiheadAttention, plain: nn.MultiheadAttention, member: int
) -> nn.MultiheadAttention:
    """Torch's attention with one member's dense weights, from the numbers of the plain one and the banks."""
    same = plain.in_proj_weight is not None
    slow = (
        plain.in_proj_weight.chunk(3) if same else [getattr(plain, f"{name}_proj_weight") for name in "qkv"]
    )
    new = nn.MultiheadAttention(
        WIDTH,
        HEADS,
        plain.dropout,
        plain.out_proj.bias is not None,
        kdim=plain.kdim,
        vdim=plain.vdim,
        batch_first=True,
    )
    layers = projections(attention)
    factors = [torch.outer(layer.s.active[member], layer.r.active[member]) for layer in layers]
    dense = [weight * factor for weight, factor in zip([*slow, plain.out_proj.weight], factors, strict=True)]
    with torch.no_grad():
        if same:
            new.in_proj_weight.copy_(torch.cat(dense[:3]))
        else:
            for name, weight in zip("qkv", dense[:3], strict=True):
                getattr(new, f"{name}_proj_weight").copy_(weight)
        new.out_proj.weight.copy_(dense[3])
        if new.in_proj_bias is not None:
            biases = [layer.private_bias.active[member] for layer in layers]
            new.in_proj_bias.copy_(torch.cat(biases[:3]))
            new.out_proj.bias.copy_(biases[3])
    return new.train(attention.training)


def inputs(plain: nn.MultiheadAttention) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    sizes = [(QUERIES, WIDTH), (KEYS, plain.kdim), (KEYS, plain.vdim)]
    return [torch.randn(BATCH, length, width, generator=generator) for length, width in sizes]


def stacked(mask: dict[str, Tensor]) -> dict[str, Tensor]:
    """Masks for rows that are repeated once per member; a 2-D attention mask holds for all rows."""
    repeats = {"key_padding_mask": True, "attn_mask": mask.get("attn_mask", torch.empty(0)).dim() == 3}
    return {name: torch.cat([one] * NUM_MEMBERS) if repeats[name] else one for name, one in mask.items()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("need_weights", ["averaged", "per head", "no"])
@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("kind", ["packed", "no bias", "kdim and vdim"])
def test_every_member_equals_torchs_attention(
    kind: str, mask: str, need_weights: str, training: bool, randomise: Randomise
) -> None:
    attention, plain = build(kind, randomise)
    attention.train(training)
    options = {"need_weights": need_weights != "no", "average_attn_weights": need_weights == "averaged"}
    with torch.set_grad_enabled(training):
        out, weights = attention(
            *(torch.cat([one] * NUM_MEMBERS) for one in inputs(plain)), **options, **stacked(masks()[mask])
        )
        for member in range(NUM_MEMBERS):
            expected, expected_weights = by_hand(attention, plain, member)(
                *inputs(plain), **options, **masks()[mask]
            )
            rows = slice(member * BATCH, (member + 1) * BATCH)
            torch.testing.assert_close(out[rows], expected)
            if expected_weights is None:
                assert weights is None
            else:
                torch.testing.assert_close(weights[rows], expected_weights)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_in_training_is_torchs(need_weights: bool, randomise: Randomise) -> None:
    attention, plain = build("dropout", randomise)
    query = inputs(plain)
    reference = by_hand(attention, plain, 1)
    outs = []
    for module in (attention, reference):
        torch.manual_seed(3)
        with attention.q_proj.selection.of(1):
            outs.append(module(*query, need_weights=need_weights))
    torch.testing.assert_close(outs[0][0], outs[1][0])
    with attention.q_proj.selection.of(1):
        undropped = attention.eval()(*query)[0]
    assert (undropped - outs[0][0]).abs().max() > 0.01


def test_gradients_are_torchs(randomise: Randomise) -> None:
    attention, plain = build("packed", randomise)
    reference = by_hand(attention, plain, 2)
    ours, theirs = ([one.clone().requires_grad_() for one in inputs(plain)] for _ in range(2))
    with attention.q_proj.selection.of(2):
        out = attention(*ours)[0]
    direction = torch.randn_like(out)
    (out * direction).sum().backward()
    (reference(*theirs)[0] * direction).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    torch.testing.assert_close(
        attention.q_proj.private_bias.active.grad[2], reference.in_proj_bias.grad[:WIDTH]
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_export_is_torchs_attention(kind: str, dtype: torch.dtype, randomise: Randomise) -> None:
    attention, plain = build(kind, randomise)
    attention.to(dtype).eval()
    exported = attention.export(1)
    assert {tensor.dtype for tensor in exported.state_dict().values()} == {dtype}
    assert exported.state_dict().keys() == plain.state_dict().keys()
    expected = by_hand(attention, plain.to(dtype), 1).to(dtype).state_dict()
    for name, tensor in exported.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])


def test_frozen_weights_stay_frozen(randomise: Randomise) -> None:
    plain = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).requires_grad_(False)
    attention = Rank1MultiheadAttention(plain, 1)
    trained = {name for name, parameter in attention.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(name.endswith("active") for name in trained)


@pytest.mark.parametrize(
    "options", [{}, {"add_bias_kv": True, "batch_first": True}, {"add_zero_attn": True, "batch_first": True}]
)
def test_what_has_no_form_with_members_is_refused(options: dict[str, bool]) -> None:
    with pytest.raises(ValueError, match=r"batch_first=True|add_bias_kv"):
        Rank1MultiheadAttention(nn.MultiheadAttention(WIDTH, HEADS, **options), 2)


def test_rows_without_a_batch_axis_and_a_causal_hint_without_mask_are_refused(randomise: Randomise) -> None:
    attention, plain = build("packed", randomise)
    query = inputs(plain)[0]
    with pytest.raises(ValueError, match=r"expected \(batch, L, E\)"):
        attention(query[0], query[0], query[0])
    with pytest.raises(ValueError, match="pass the mask"):
        attention(*[torch.cat([query] * 3)] * 3, is_causal=True)
